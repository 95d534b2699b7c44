"""What bounds the CUDA backward: the work of one step of each of its kernels, by the tables and the rules of cuda_model.py.

    python tests/cuda_backward_model.py                    the time of every way through the backward, and what limits its kernels
    python tests/cuda_backward_model.py --deviations       counts against those of the machine code that was built
    python tests/cuda_backward_model.py --write            both, into docs/cuda-kernels.md

A step is one tile of scores: what a block of keys does for a tile of rows, or the other way round. Plain instances with 16 bits an element;
kernels run one after the other, so that their times add up. Without launches, which cost a few microseconds each.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

import cuda_model as model
from cuda_model import FAMILIES, GPUS, HMMA_MULTIPLY_ADDS, INSTANCES, WARP, WIDE_ACCESS, Deviation, Gpu, Instance
from cuda_resources import expected, num_hot_loops

LDS_BYTES = 8 * WARP  # lse or delta of two rows for each lane
OPCODES = {"HMMA.16816.F32": "HMMA", "LDSM.16.M88.4": "LDSM", "LDSM.16.MT88.4": "LDSM", "MUFU.EX2": "EX2", "RED.E.ADD.F32": "RED"}
# Beside cuda_model.py's: loads of row statistics from shared memory, of operands that warps exchange; additions to global memory.
BACKWARD_FAMILIES = {"LDS": (r"LDS(\.|$)", "shared"), "STS": (r"STS", "shared"), "RED": (r"RED\.", None)} | FAMILIES
WAYS = {
    "one pass": ("backward",),
    "two passes": ("backward_query", "backward_key"),
    "single tile": ("single_tile_backward",),
}


def groups_of_warps(row: Instance) -> int:
    """How many pieces of 16 rows, or of 16 keys, a block has: each a warp's, or a pair's."""
    return (row.block_m if row.pass_name == "backward_query" else row.block_n) // 16


def work(row: Instance) -> Counter[str]:
    """Instructions of a step for 16 of the block's rows or keys, by family, without masks."""
    counts: Counter[str] = Counter()
    for opcode, (least, _) in expected(row).items():
        counts[OPCODES.get(opcode, "LDGSTS")] += least
    pair, transposed = row.kernel.endswith("_pairs"), row.pass_name != "backward_query"
    scores = (row.block_m if transposed else row.block_n) * 16 // WARP  # of a lane
    counts["EX2"] = scores
    dkey, dvalue = row.pass_name != "backward_dvalue", transposed and row.pass_name != "backward_dkey"
    counts["FFMA"] = scores  # score * scale - lse
    counts["FADD"] = scores * dkey  # dweight - delta
    counts["FMUL"] = scores * dkey  # by the weight
    counts["F2FP"] = scores // 2 * (dkey + dvalue)  # gradients of scores, weights
    if transposed:
        counts["LDS"] = 2 * scores // 4  # lse and delta of two rows serve four scores
    if pair:  # weights go from one warp to the other in float32; of the query pass gradients come back as an operand
        counts["STS"] += scores // 4 + (0 if transposed else scores // 8)
        counts["LDS"] += scores // 4 + (0 if transposed else scores // 8)
    if row.pass_name in ("backward", "single_tile_backward"):  # gradients of scores, for the product that sums over keys
        counts["STS"] += scores // 2
    if row.dropout:
        counts += model.dropout(scores)
    return counts


def cycles(row: Instance, gpu: Gpu) -> dict[str, float]:
    """{unit: cycles of an SM for one step of one block}"""
    counts = work(row)
    amounts: Counter[str] = Counter()
    for family, count in counts.items():
        unit = BACKWARD_FAMILIES[family][1]
        if unit:
            size = {"HMMA": HMMA_MULTIPLY_ADDS, "LDSM": WIDE_ACCESS, "LDGSTS": WIDE_ACCESS, "LDS": LDS_BYTES, "STS": LDS_BYTES}.get(
                family, WARP
            )
            amounts[unit] += count * size
    amounts["issue"] = counts.total()
    return {unit: groups_of_warps(row) * amount / getattr(gpu, unit) for unit, amount in amounts.items()}


class Time(NamedTuple):
    kernel: str
    microseconds: float
    limit: str


def steps(row: Instance, seqlen: int, causal: bool) -> tuple[int, int]:
    """Blocks of a head, and how many steps they make in all."""
    of_query = row.pass_name == "backward_query"
    side, step = (row.block_m, row.block_n) if of_query else (row.block_n, row.block_m)
    starts = range(0, seqlen, side)
    visible = (
        [min(start + side, seqlen) if of_query else seqlen - start // step * step for start in starts] if causal else [seqlen] * len(starts)
    )
    return len(starts), sum(ceil(length / step) for length in visible)


def kernel_time(row: Instance, gpu: Gpu, heads: int, seqlen: int, causal: bool) -> Time:
    blocks, visits = steps(row, seqlen, causal)
    # The longest list of blocks that an SM gets; blocks of a causal call are dealt so that lists are alike.
    busiest = heads * visits / gpu.sms if causal else ceil(heads * blocks / gpu.sms) * visits / blocks
    hertz = gpu.megahertz * 1e6
    seconds = {unit: busiest * number / hertz for unit, number in cycles(row, gpu).items()}
    tensors = {"backward": 6, "backward_query": 5, "single_tile_backward": 8}.get(
        row.pass_name, 6
    )  # of 16 bits: q, k, v, dout, their gradients
    elements = heads * seqlen * row.head_dim_qk
    sums = 4 * heads * visits * row.block_m * row.head_dim_qk if row.pass_name == "backward" else 0
    seconds["memory"] = 2 * tensors * elements / (gpu.memory * 1e9)
    if gpu.l2:
        step = row.block_n if row.pass_name == "backward_query" else row.block_m
        seconds["L2"] = (heads * visits * 2 * step * (row.head_dim_qk + row.head_dim_v) + sums) / (gpu.l2 * hertz)
    limit = max(seconds, key=seconds.__getitem__)
    return Time(row.pass_name, seconds[limit] * 1e6, limit)


def way(name: str, head_dim: int, gpu: Gpu, heads: int, seqlen: int, causal: bool) -> list[Time]:
    """The kernels of one way, in order; empty where it has none for this size."""
    elements, float_sums = heads * seqlen * head_dim, 4 * heads * seqlen * head_dim
    times = []
    for pass_name in WAYS[name]:
        fitting = [row for row in plain_rows(pass_name) if row.head_dim_qk == row.head_dim_v == head_dim]
        if not fitting or (name == "single tile" and seqlen > fitting[0].block_n):
            return []
        times.append(kernel_time(fitting[0], gpu, heads, seqlen, causal))
    if name != "single tile":
        cleared = float_sums if name == "one pass" else 0
        times.insert(0, Time("backward_delta", (4 * elements + cleared) / (gpu.memory * 1e3), "memory"))
    if name == "one pass":
        times.append(Time("backward_dquery", (float_sums + 2 * elements) / (gpu.memory * 1e3), "memory"))
    return times


def plain_rows(pass_name: str) -> list[Instance]:  # bfloat16 only: float16 has the same tiles
    of_class = "masked" if pass_name.startswith("single_tile") else "plain"  # which have no class of their own for it
    return [row for row in INSTANCES if (row.pass_name, row.dtype, row.feature_class, row.dropout) == (pass_name, "bf16", of_class, False)]


def way_lines(shapes: list[tuple[int, int, int, bool]]) -> Iterator[str]:
    yield f"| head_dim | batch, heads, seqlen | way | {' | '.join(GPUS)} |"
    yield f"|---:|---|---|{'---|' * len(GPUS)}"
    for head_dim in (64, 128, 256):
        for batch, num_heads, seqlen, causal in shapes:
            for name in WAYS:
                cells = [way(name, head_dim, gpu, batch * num_heads, seqlen, causal) for gpu in GPUS.values()]
                if not cells[0]:
                    continue
                flops = 10 * batch * num_heads * seqlen * seqlen * head_dim * (0.5 if causal else 1)  # five products
                texts = [_cell(times, flops) for times in cells]
                yield f"| {head_dim} | {batch}, {num_heads}, {seqlen}{' causal' if causal else ''} | {name} | {' | '.join(texts)} |"


def _cell(times: list[Time], flops: float) -> str:
    total = sum(time.microseconds for time in times)
    longest = max(times, key=lambda time: time.microseconds)
    return f"{total:.0f} us, {flops / total / 1e6:.0f} TFLOP/s; {longest.kernel}: {longest.limit}"


def deviations(row: Instance, loop: Counter[str], tolerance: float = 0.15) -> list[Deviation]:
    """Families of which the loop without masks has more or fewer than the model, which leaves integer instructions out."""
    modelled = work(row)
    found = []
    for family in modelled:
        pattern = BACKWARD_FAMILIES[family][0]
        opcodes = Counter({opcode: count for opcode, count in loop.items() if re.match(pattern, opcode)})
        found.append(Deviation(family, opcodes.total(), modelled[family], opcodes))
    return [one for one in found if abs(one.counted - one.modelled) > tolerance * one.modelled]


def deviation_lines(pattern: str) -> Iterator[str]:
    from cuda_codegen_gate import check, why_not

    if reason := why_not():
        sys.exit(reason)
    yield "| instance | instructions of the loop | of the model, integer ones left out | more or fewer: in the loop, in the model |"
    yield "|---|---:|---:|---|"
    for pass_name in ("backward", "backward_query", "backward_key"):
        for row in plain_rows(pass_name):
            if re.search(pattern, row.name):
                (line,) = check(row.image, ())
                loop = line.code.loops[0]
                found = "<br>".join(map(str, deviations(row, loop)))
                note = " (masks are a branch of it)" if num_hot_loops(row) == 1 else ""
                yield f"| {row.name.removeprefix('sm80_').replace('_bf16', '')}{note} | {loop.total()} | {work(row).total()} | {found} |"


def page_tables() -> dict[str, Iterator[str]]:
    shapes = [(128, 8, 128, False), (4, 16, 1024, True), (4, 16, 4096, False)]
    return {"ways": way_lines(shapes), "backward deviations": deviation_lines("(64x64|128x128|256x256)_bf16_plain$")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="instances, with --deviations")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--deviations", action="store_true", help="compare with the machine code that was built")
    action.add_argument("--write", action="store_true", help="update the tables of docs/cuda-kernels.md")
    options = parser.parse_args()
    if options.write:
        return model.update_page(page_tables())
    shapes = [(batch, 16, seqlen, causal) for batch, seqlen in ((16, 512), (8, 1024), (4, 2048), (2, 4096)) for causal in (False, True)]
    for line in deviation_lines(options.only) if options.deviations else way_lines([(64, 16, 128, False), *shapes]):
        print(line)


if __name__ == "__main__":
    main()
