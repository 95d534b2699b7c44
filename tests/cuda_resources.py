"""What a compiled CUDA kernel takes of a GPU, what its hot loops are made of, and what of that is not allowed.

Expected instruction counts follow from the manifest's row and from the method that the kernels' headers state, never from a listing.
All counts are of one warp, or of a pair that shares its rows, and one pass through a hot loop: every tile of keys. A loop's code holds what
rarely runs, too: Q's loads on the first pass, the rescaling of out when a maximum rises.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import sass
from occupancy import most_registers, room

from csrc.cuda.instances.manifest import Instance

KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
WARP = 32
# A kernel has no business with these: local memory, and addresses of which the compiler does not know that they are global. (RED has no
# form of its own for those.)
LOCAL = re.compile(r"(LDL|STL)(\.|$)")
EXP2 = re.compile(r"MUFU\.EX2")
GENERIC = re.compile(r"(LD|ST|ATOM)(\.|$)")
COPY = re.compile(r"LDGSTS(\.|$)")
WIDE_COPY = "LDGSTS.E.BYPASS.128"
GLOBAL_LOAD, GLOBAL_STORE = re.compile(r"LDG(\.|$)"), re.compile(r"STG(\.|$)")
WIDE_STORE = re.compile(r"STG\..*128")


class Usage(NamedTuple):
    """By ptxas's account; bytes are per thread."""

    registers: int
    spills: int  # bytes stored to local memory for want of registers
    stack: int


class Code(NamedTuple):
    loops: list[Counter[str]]  # {opcode: how often} of each hot loop, the leanest first
    kernel: Counter[str]

    @property
    def kilobytes(self) -> float:
        return self.kernel.total() * 16 / 1024  # an instruction is 128 bits


def usages(log: str) -> dict[tuple[str, str], Usage]:
    """{(kernel, architecture such as sm_80): what it takes} from what ptxas -v wrote."""
    _, *pieces = KERNEL.split(log)
    result = {}
    for kernel, architecture, text in zip(pieces[0::3], pieces[1::3], pieces[2::3], strict=True):
        numbers = [
            re.search(pattern, text) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack frame")
        ]
        if None in numbers:
            raise ValueError(f"ptxas says nothing about the registers of {kernel}: {text!r}")
        result[kernel, architecture] = Usage(*(int(number[1]) for number in numbers if number))
    return result


def code(listing: str, pass_name: str = "") -> Code:
    """Of one kernel's listing (sass.functions)."""
    instructions, labels = sass.parse(listing)
    kernel = Counter(instruction.opcode for instruction in instructions)
    if pass_name.startswith("single_tile"):
        return Code([kernel], kernel)
    loops = [Counter(instruction.opcode for instruction in loop) for loop in sass.hot_loops(instructions, labels)]
    loops.sort(key=lambda loop: loop.total())
    # Where a pair of warps shares the work (warp_pairs.cuh), each has its own loops, and exp2 is in those of one: a step is what both do.
    of_weights = [loop for loop in loops if matching(loop, EXP2)]
    of_gradients = [loop for loop in loops if not matching(loop, EXP2)]
    if of_weights and len(of_weights) == len(of_gradients):
        loops = [weights + gradients for weights, gradients in zip(of_weights, of_gradients, strict=True)]
    return Code(loops, kernel)


def matching(counts: Counter[str], pattern: str | re.Pattern[str]) -> int:
    """How many instructions have an opcode that starts so."""
    return sum(number for opcode, number in counts.items() if re.match(pattern, opcode))


def num_hot_loops(row: Instance) -> int:
    """Forward and backward: one over blocks that need no mask, one over those that do; masks are a branch of it in one pass. The whole of a
    single-tile kernel is one.
    """
    return {"helper": 0, "decode": 1, "backward": 1, "single_tile_forward": 1, "single_tile_backward": 1}.get(row.pass_name, 2)


def expected(row: Instance) -> dict[str, tuple[int, int]]:
    """Of each hot loop: {what an opcode starts with: (at least, at most)}."""
    if row.kernel.endswith("_pairs"):
        return expected_pair(row)
    if row.pass_name.startswith("single_tile"):
        return expected_single_tile(row)
    if row.pass_name == "backward":
        return expected_one_pass(row)
    if row.pass_name.startswith("backward"):
        return expected_backward(row)
    if row.pass_name == "mask_gradient":  # a chunk of 64 columns, which is loaded from query and key or from dout and value
        chunk = 64 * (row.block_m + row.block_n) // 8 // row.num_threads
        return {
            "HMMA.16816.F32": (row.block_n // 8 * 4, row.block_n // 8 * 4),
            "LDSM.16.M88.4": ((row.block_n // 16 + 1) * 4, (row.block_n // 16 + 1) * 4),
            "LDSM.16.MT88.4": (0, 0),
            WIDE_COPY: (chunk, 2 * chunk),
            "MUFU.EX2": (0, 0),
        }
    decode = row.pass_name == "decode"
    rows, keys = (16, 16) if decode else (row.block_m // row.num_warps, row.block_n)  # of one warp's product
    lanes = WARP if decode else row.num_threads  # that copy a tile of keys together
    matrices, steps_qk, steps_pv = rows // 16, row.head_dim_qk // 16, keys // 16
    scores = rows * keys // WARP  # of a lane
    # In registers Q is loaded once, in the forward's loop on its first pass; else on every pass.
    q_outside = decode and row.head_dim_qk <= 128
    copies = keys * (row.head_dim_qk + row.head_dim_v) // 8 // lanes  # 16 bytes each
    # Where keys may be masked, a tile is copied by one of two pieces of code: with or without a key_mask.
    ways = 2 if row.pass_name == "forward" and row.feature_class != "plain" else 1
    softcap = 0 if row.feature_class == "plain" else scores  # tanh takes an exp2
    products = matrices * (keys // 8 * steps_qk + row.head_dim_v // 8 * steps_pv)
    loads = keys // 16 * steps_qk + (0 if q_outside else matrices * steps_qk)
    exponentials = scores + 2 * matrices + softcap  # a weight each, and a factor for what was summed so far in each of a lane's rows
    return {
        "HMMA.16816.F32": (products, products),
        "LDSM.16.M88.4": (loads, loads),
        "LDSM.16.MT88.4": (steps_pv * row.head_dim_v // 16, steps_pv * row.head_dim_v // 16),
        "LDGSTS": (copies, ways * copies),
        "MUFU.EX2": (exponentials, exponentials),
    }


def expected_backward(row: Instance) -> dict[str, tuple[int, int]]:
    """A warp has 16 rows, or 16 keys, and takes steps of so many keys, or rows; see backward_query.cuh and backward_key.cuh."""
    of_query = row.pass_name == "backward_query"
    steps = row.block_n if of_query else row.block_m
    dkey, dvalue = row.pass_name != "backward_dvalue", row.pass_name in ("backward_key", "backward_dvalue")  # dkey: or dquery
    dims_of_products = [row.head_dim_qk] + dkey * [row.head_dim_v]  # of scores, of the gradients of weights
    dims_of_sums = dkey * [row.head_dim_qk] + (dvalue and not of_query) * [row.head_dim_v]
    products = sum(steps // 8 * dim // 16 for dim in dims_of_products) + sum(steps // 16 * dim // 8 for dim in dims_of_sums)
    loads = sum((steps // 16 + 1) * dim // 16 for dim in dims_of_products)
    transposed = sum(steps // 16 * dim // 16 for dim in dims_of_sums)
    copies = steps * (row.head_dim_qk + row.head_dim_v) // 8 // row.num_threads
    scores = steps * 16 // WARP
    exponentials = scores * (1 if row.feature_class == "plain" else 2)  # a weight each; tanh takes one, too
    return {
        "HMMA.16816.F32": (products, products),
        "LDSM.16.M88.4": (loads, loads),
        "LDSM.16.MT88.4": (transposed, transposed),
        WIDE_COPY: (copies, 2 * copies),
        "MUFU.EX2": (exponentials, exponentials),
    }


def expected_pair(row: Instance) -> dict[str, tuple[int, int]]:
    """Of two warps that share 16 rows, or 16 keys; see backward_query_pairs.cuh and backward_key_pairs.cuh."""
    of_query = row.pass_name == "backward_query"
    steps = row.block_n if of_query else row.block_m
    dims = (row.head_dim_qk, row.head_dim_v)
    held = dims if of_query else (row.held_qk, row.held_v)  # of the left operand: not read in the loop
    sums = dims[:1] if of_query else dims
    products = sum(steps // 8 * dim // 16 for dim in dims) + sum(steps // 16 * dim // 8 for dim in sums)
    loads = sum(steps // 16 * dim // 16 for dim in dims) + (sum(dims) - sum(held)) // 16
    transposed = sum(steps // 16 * dim // 16 for dim in sums)
    copies = steps * sum(dims) // 8 // (row.num_threads // 2)
    exponentials = steps * 16 // WARP * (1 if row.feature_class == "plain" else 2)
    return {
        "HMMA.16816.F32": (products, products),
        "LDSM.16.M88.4": (loads, loads),
        "LDSM.16.MT88.4": (transposed, transposed),
        WIDE_COPY: (copies, 2 * copies),
        "MUFU.EX2": (exponentials, exponentials),
    }


def expected_one_pass(row: Instance) -> dict[str, tuple[int, int]]:
    """A warp has 16 keys and takes steps of block_m rows, of which it sums 16 or 32 of dquery; see backward.cuh and query_sums.cuh."""
    steps, dims = row.block_m, (row.head_dim_qk, row.head_dim_v)
    row_groups = steps // 32
    tall = row.num_warps % row_groups == 0 and row.head_dim_qk % (16 * row.num_warps // row_groups) == 0
    rows = 32 if tall else 16
    columns = row.head_dim_qk * steps // (rows * row.num_warps)
    of_query = rows // 16 * columns // 8 * row.block_n // 16
    products = 2 * sum(steps // 8 * dim // 16 for dim in dims) + of_query
    loads = sum((steps // 16 + 1) * dim // 16 for dim in dims)
    transposed = sum(steps // 16 * dim // 16 for dim in dims) + row.block_n // 16 * (rows // 16 + columns // 16)
    copies = steps * sum(dims) // 8 // row.num_threads
    # The weights, twice: where masks count and where they do not; tanh takes an exponential, too.
    exponentials = 2 * steps * 16 // WARP * (1 if row.feature_class == "plain" else 2)
    additions = rows * columns // WARP
    return {
        "HMMA.16816.F32": (products, products),
        "LDSM.16.M88.4": (loads, loads),
        "LDSM.16.MT88.4": (transposed, transposed),
        WIDE_COPY: (copies, 2 * copies),
        "MUFU.EX2": (exponentials, exponentials),
        "RED.E.ADD.F32": (additions, additions),
    }


def expected_single_tile(row: Instance) -> dict[str, tuple[int, int]]:
    """Of the whole kernel, which is unrolled over all that a warp has: 16 rows and all keys, 32 at a time, in single_tile_forward.cuh;
    16 keys and a step of rows in single_tile_backward.cuh, whose loop over the warps' shares of dquery stands there one to three times."""
    steps = row.head_dim_qk // 16
    if row.pass_name == "single_tile_forward":
        words, scores = row.block_n // 32, row.block_n * 16 // WARP
        copies = (16 * row.head_dim_qk + row.block_n * (row.head_dim_qk + row.head_dim_v)) // 8 // WARP
        return {
            "HMMA.16816.F32": 2 * (words * (4 * steps + 2 * row.head_dim_v // 8),),
            "LDSM.16.M88.4": 2 * (steps + 2 * words * steps,),
            "LDSM.16.MT88.4": 2 * (2 * words * row.head_dim_v // 16,),
            "LDGSTS": (copies, copies),
            "MUFU.EX2": (2 * scores + 2, 2 * scores + 4),  # tanh takes one, too; sinks
        }
    scores, of_keys, of_rows = row.block_m * 16 // WARP, 2 * 16 * row.head_dim_qk // 8 // WARP, 8 * row.head_dim_qk // 8 // WARP
    products, transposed = 2 * row.block_m // 8 * steps + 2 * row.block_m // 16 * row.head_dim_qk // 8, 2 * row.block_m // 16 * steps
    return {
        "HMMA.16816.F32": (products + 4, products + 3 * 4),
        "LDSM.16.M88.4": 2 * (2 * (1 + row.block_m // 16) * steps,),
        "LDSM.16.MT88.4": (transposed + 3, transposed + 3 * 3),
        "LDGSTS": (of_keys + of_rows, of_keys + 2 * of_rows),  # before the loop and in it
        "MUFU.EX2": (2 * scores, 2 * scores),
    }


def out_stores(row: Instance) -> tuple[int, int]:
    """Least number of 16-byte stores of out in the kernel, and most of narrower ones: of lse, by one lane of four."""
    if row.pass_name == "mask_gradient":  # of elements of the mask, in three dtypes
        return 0, 1000
    if row.kernel.endswith("_pairs"):
        return 16 * row.head_dim_qk // 8 // WARP, 16 if row.feature_class == "plain" else 1000
    if "backward" in row.pass_name:  # narrow: gradients of masks, sums of rows, columns and slopes
        return 16 * min(row.head_dim_qk, row.head_dim_v) // 8 // WARP, 16 if row.feature_class == "plain" else 1000
    if row.pass_name in ("forward", "single_tile_forward"):
        rows = row.block_m // row.num_warps
        return rows * row.head_dim_v // 8 // WARP, rows // 8
    return 3, 1  # decode: eight elements of out, or the two halves of as many float32 ones of a partial out


def failures(row: Instance, usage: Usage, found: Code | None) -> list[str]:
    """Why an instance may not be shipped; empty when it may. Without `found` only what ptxas says is judged."""
    reasons = []
    if usage.spills:
        reasons.append(f"{usage.spills} bytes spilled")
    if usage.stack:
        reasons.append(f"a stack frame of {usage.stack} bytes")
    blocks = room(80, usage.registers, row.num_threads, row.shared_bytes)
    if blocks["registers"] < row.blocks_per_sm:
        most = most_registers(row.num_threads, row.blocks_per_sm)
        reasons.append(f"{usage.registers} registers, {most} at most for {row.blocks_per_sm} blocks on an SM")
    if blocks["shared memory"] < row.blocks_per_sm:
        reasons.append(f"{row.shared_bytes} bytes of shared memory, too much for {row.blocks_per_sm} blocks on an SM")
    return reasons if found is None else reasons + code_failures(row, found)


def code_failures(row: Instance, found: Code) -> list[str]:
    if row.pass_name == "helper":  # has no hot loop, and runs for a moment
        return []
    reasons = []
    if len(found.loops) != num_hot_loops(row):
        reasons.append(f"{len(found.loops)} hot loops, not {num_hot_loops(row)}")
    for number, loop in enumerate(found.loops):
        where = "the hot loop" if len(found.loops) == 1 else f"the {'masked' if number else 'lean'} loop"
        for pattern, (least, most) in expected(row).items():
            if not least <= (count := matching(loop, pattern)) <= most:
                reasons.append(f"{count} {pattern} in {where}, not {least if least == most else f'{least} to {most}'}")
        if local := matching(loop, LOCAL):
            reasons.append(f"{local} local memory accesses in {where}")
        # Dropout reads its seed and its offset.
        if (
            row.feature_class == "plain"
            and row.pass_name in ("forward", "decode", "backward_query")
            and (loads := matching(loop, GLOBAL_LOAD)) > (2 if row.dropout else 0)
        ):
            reasons.append(f"{loads} loads from global memory in {where}")
    statistics = row.pass_name in ("backward", "backward_key", "backward_dkey", "backward_dvalue")  # lse and delta, a number to a row
    if (narrow := matching(found.kernel, COPY) - found.kernel[WIDE_COPY]) and not statistics:
        reasons.append(f"{narrow} asynchronous copies that are not {WIDE_COPY}")
    if generic := matching(found.kernel, GENERIC):
        reasons.append(f"{generic} accesses to what the compiler does not know to be global memory")
    wide = matching(found.kernel, WIDE_STORE)
    narrow = matching(found.kernel, GLOBAL_STORE) - wide
    least, most = out_stores(row)
    if wide < least:
        reasons.append(f"{wide} stores of 16 bytes, {least} at least for out")
    if narrow > most:
        reasons.append(f"{narrow} stores of less than 16 bytes, {most} at most for lse")
    return reasons
