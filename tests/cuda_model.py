"""What bounds the CUDA forward kernels: the work of one tile of keys, counted from the tile, against published throughputs.

    python tests/cuda_model.py                    the time of every cell, and what limits it
    python tests/cuda_model.py --batch 4 --num-heads 16 --seqlen 4096 --causal --only 64x64
    python tests/cuda_model.py --tile             cycles of every unit for one tile
    python tests/cuda_model.py --deviations       counts against those of the machine code that was built
    python tests/cuda_model.py --write            all three, into docs/cuda-kernels.md

The inputs are csrc/cuda/instances/manifest.py and GPUS below; nothing is fitted. Units work side by side, so that the busiest one alone
decides: a bound on speed that a kernel with perfect overlap would reach, not a forecast. Without prologue, epilogue and launch.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/cuda-kernels.md"
sys.path.append(str(ROOT))
from csrc.cuda.instances.manifest import INSTANCES, Instance  # noqa: E402


class Gpu(NamedTuple):
    """Published numbers. Rates are per clock and SM; of arithmetic, results: a warp's instruction takes 32 of them."""

    sms: int
    megahertz: int  # boost clock, at which the peak rates of the sources hold
    memory: int  # GB/s
    l2: int | None  # bytes per clock to all SMs; None: not published
    tensor: float  # multiply-adds of mma.sync, 16-bit with float32 sums
    fma: int  # float32 add, multiply, multiply-add
    alu: int  # 32-bit integer add, logic, shift, multiply; compare, minimum, maximum, select
    mufu: int  # exp2
    convert: int  # float32 to 16 bits
    shuffle: int = 32
    shared: int = 128  # bytes
    issue: int = 4  # instructions: one of each of the four schedulers


# [1] CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions": fma, alu, mufu, convert, shuffle; compute capability 8.0,
#     8.9, 9.0. The guide's table of shared memory: 32 banks of 4 bytes.
# [2] NVIDIA A100 Tensor Core GPU Architecture (whitepaper): SMs, clock, 312 TFLOP/s = 108 SMs x 1410 MHz x 1024 multiply-adds; L2 reads of
#     5120 bytes per clock. Data sheet of the A100 80 GB SXM: 2039 GB/s.
# [3] NVIDIA Ada GPU Architecture (whitepaper): 165.2 TFLOP/s with float32 sums = 128 SMs x 2520 MHz x 256 multiply-adds; 1008 GB/s.
# [4] NVIDIA H100 Tensor Core GPU Architecture (whitepaper), which the H200 shares: 989.4 TFLOP/s = 132 SMs x 1830 MHz x 2048 multiply-adds,
#     by wgmma. Data sheet of the H200: 4.8 TB/s.
# [5] Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture (arXiv 2402.13499): mma.sync reaches 62.9 % of that.
GPUS = {
    "A100": Gpu(108, 1410, 2039, 5120, tensor=1024, fma=64, alu=64, mufu=16, convert=16),
    "RTX 4090": Gpu(128, 2520, 1008, None, tensor=256, fma=128, alu=64, mufu=16, convert=16),
    "H200": Gpu(132, 1830, 4800, None, tensor=2048 * 0.629, fma=128, alu=64, mufu=16, convert=64),
}

WARP = 32
HMMA_MULTIPLY_ADDS = 16 * 8 * 16
WIDE_ACCESS = 16 * WARP  # bytes: of ldmatrix x4, and of a copy by cp.async, for a warp

# What opcodes do the same work, and the unit that does it. Compilers choose freely among the integer ones.
FAMILIES = {
    "HMMA": (r"HMMA", "tensor"),
    "LDSM": (r"LDSM", "shared"),
    "LDGSTS": (r"LDGSTS", "shared"),
    "LDG": (r"LDG\.", None),
    "EX2": (r"MUFU\.EX2", "mufu"),
    "FFMA": (r"FFMA", "fma"),
    "FADD": (r"FADD", "fma"),
    "FMUL": (r"FMUL", "fma"),
    "FMNMX": (r"FMNMX", "alu"),
    "FSEL, FSETP": (r"FSEL|FSETP", "alu"),
    "F2FP": (r"F2FP", "convert"),
    "SHFL": (r"SHFL", "shuffle"),
    "integer": (r"I|U|LOP3|LEA|SHF|SEL|MOV|PRMT|R2P|P2R|PLOP3|S2R|R2UR|CS2R", "alu"),
    "waits, branches, votes": (r"BAR|DEPBAR|LDGDEPBAR|BRA|CALL|BSSY|BSYNC|VOTE|LDS(\.|$)|NOP", None),
}


class Work(NamedTuple):
    """Instructions of a warp for one tile of keys, by family."""

    every: Counter[str]  # of every tile
    seldom: Counter[str]  # of the first one (Q's loads), or when a row's maximum rises (rescaling out)


def work(row: Instance) -> Work:
    """In the loop without masks. In its other loop a tile adds a select to each score, and a few words of bits."""
    matrices, keys, dqk, dv = row.block_m // row.num_warps // 16, row.block_n, row.head_dim_qk, row.head_dim_v
    scores, rows, outputs = matrices * keys // 2, 2 * matrices, matrices * dv // 2  # of a lane
    single_tile = row.pass_name == "single_tile_forward"  # all keys are one tile: nothing is rescaled
    rescaled = 0 if single_tile else rows
    every: Counter[str] = Counter({
        "HMMA": matrices * (keys // 8 * (dqk // 16) + dv // 8 * (keys // 16)),
        "LDSM": keys // 16 * (dqk // 16) + keys // 16 * (dv // 16),
        "LDGSTS": keys * (dqk + dv) // 8 // row.num_threads,
        "EX2": scores + rescaled,  # weights; what the sums so far are multiplied by
        "FFMA": scores + rescaled,  # score * scale - row_max; row_sum * rescale + sum
        "FADD": scores + rescaled,  # row_sum; old row_max - new
        "FMUL": rows,  # row_max * scale
        "FMNMX": scores + 2 * rows,  # and across the four lanes of a row, and with the old one
        "FSEL, FSETP": rows,  # has a maximum risen?
        "F2FP": scores // 2,
        "SHFL": 2 * rows,
        "integer": addressing(row),
        "waits, branches, votes": 2 * 3 + 1 + 2,  # wait, barrier and commit for K and for V; vote; two branches
    })  # fmt: skip
    seldom = Counter({"FMUL": 0 if single_tile else outputs})
    q_loads = Counter({"LDSM": matrices * (dqk // 16)})
    if matrices * dqk <= 128 and not single_tile:  # Q stays in registers
        seldom += q_loads
    else:
        every += q_loads
    if row.dropout:
        every += dropout(scores)
    if row.feature_class == "bias":  # of 16 bits, two by a load: unpacked, masked where tiny, times log2(e), added
        every += Counter({"LDG": scores // 2, "integer": scores // 2 + 2 * rows, "FSEL, FSETP": 2 * scores, "FMUL": scores, "FFMA": scores})
    return Work(every, seldom)


def addressing(row: Instance) -> int:
    """Integer instructions: what must change from one tile to the next, everything else being a constant or an offset in the access."""
    total = 2  # count, compare
    for head_dim in (row.head_dim_qk, row.head_dim_v):  # of K, of V
        permuted = 8 if head_dim % 64 == 0 else 4  # chunks of 16 bytes that change places; as many lanes copy a row together
        passes = row.block_n * permuted // row.num_threads
        copies = row.block_n * head_dim // 8 // row.num_threads
        total += 4 + 3 * passes + copies  # row * stride; a 64-bit address and whether the row exists; whether the column does
        total += 1 + 2 * min(head_dim // 16, permuted // 2)  # the stage; swizzled addresses of ldmatrix: exclusive or, add
    return total


def dropout(scores: int) -> Counter[str]:
    """A draw of Philox, seven rounds of two wide multiplications and two exclusive ors of three words, covers 8 scores of a lane."""
    draws = scores // 8
    return Counter({"integer": draws * (7 * 4 + 8 // 2 * 2 + 8), "FSEL, FSETP": scores})  # halves of words cut out; compared; selected


def cycles(row: Instance, gpu: Gpu) -> dict[str, float]:
    """{unit: cycles of an SM for one tile of keys of one block}"""
    counts = work(row).every
    amounts: Counter[str] = Counter()
    for family, count in counts.items():
        if unit := FAMILIES[family][1]:
            size = {"tensor": HMMA_MULTIPLY_ADDS, "shared": WIDE_ACCESS}.get(unit, WARP)
            amounts[unit] += count * size
    amounts["issue"] = counts.total()
    return {unit: row.num_warps * amount / getattr(gpu, unit) for unit, amount in amounts.items()}


class Prediction(NamedTuple):
    microseconds: float
    limit: str
    tflops: float


def predict(row: Instance, gpu: Gpu, batch: int, num_heads: int, seqlen: int, causal: bool) -> Prediction:
    """Self-attention, as many key heads as query heads, a float mask of 16 bits for each head where the class has one."""
    heads = batch * num_heads
    seen = [min(start_m + row.block_m, seqlen) if causal else seqlen for start_m in range(0, seqlen, row.block_m)]
    visits = sorted(ceil(keys / row.block_n) for keys in seen)
    # Some SM gets ceil(blocks / SMs) blocks, which are no shorter than the shortest so many.
    turns = ceil(len(visits) * heads / gpu.sms)
    shortest = sum(visits[number // heads] for number in range(turns))
    busiest = max(heads * sum(visits) / gpu.sms, shortest)
    hertz = gpu.megahertz * 1e6
    seconds = {unit: busiest * number / hertz for unit, number in cycles(row, gpu).items()}
    elements = heads * seqlen * (2 * row.head_dim_qk + 2 * row.head_dim_v)
    mask = heads * seqlen * seqlen * (0.5 if causal else 1) if row.feature_class == "bias" else 0
    seconds["memory"] = (2 * elements + 2 * mask + 4 * heads * seqlen) / (gpu.memory * 1e9)
    if gpu.l2:
        tile_bytes = 2 * row.block_n * (row.head_dim_qk + row.head_dim_v)
        seconds["L2"] = heads * sum(visits) * tile_bytes / (gpu.l2 * hertz)
    limit = max(seconds, key=lambda unit: seconds[unit])
    # Two products, a multiply-add being two operations; half of the scores where causal.
    flops = 2 * heads * seqlen * seqlen * (row.head_dim_qk + row.head_dim_v) * (0.5 if causal else 1)
    return Prediction(seconds[limit] * 1e6, limit, flops / seconds[limit] / 1e12)


# Against the machine code


class Deviation(NamedTuple):
    family: str
    counted: int  # in the machine code
    modelled: int
    opcodes: Counter[str]  # that were counted

    def __str__(self) -> str:
        opcodes = ", ".join(f"{opcode} {count}" for opcode, count in self.opcodes.most_common(8))
        percent = f" ({self.counted / self.modelled - 1:+.0%})" if self.modelled else ""
        return f"{self.family}: {self.counted}, model {self.modelled}{percent}: {opcodes}"


def deviations(row: Instance, loop: Counter[str], tolerance: float = 0.15) -> list[Deviation]:
    """Families of which the loop without masks has more or fewer than the model, seldom executed ones included in both."""
    expected = work(row).every + work(row).seldom
    opcodes: dict[str, Counter[str]] = {family: Counter() for family in [*FAMILIES, "other"]}
    for opcode, count in loop.items():
        family = next((name for name, (pattern, _) in FAMILIES.items() if re.match(pattern, opcode)), "other")
        opcodes[family][opcode] += count
    found = [Deviation(family, counts.total(), expected[family], counts) for family, counts in opcodes.items()]
    return [one for one in found if abs(one.counted - one.modelled) > tolerance * one.modelled]


def forward_rows(pattern: str) -> Iterator[Instance]:  # bfloat16 only: float16 has the same tiles
    return (row for row in INSTANCES if row.pass_name.endswith("forward") and row.dtype == "bf16" and re.search(pattern, row.name))


def deviation_lines(pattern: str) -> Iterator[str]:
    """Of plain instances: masked and bias loops hold code for every feature, of which a call runs a part."""
    from cuda_codegen_gate import check, why_not

    if reason := why_not():
        sys.exit(reason)
    yield "| instance | instructions | model: always, seldom | more or fewer: in the loop, in the model |"
    yield "|---|---:|---:|---|"
    for row in forward_rows(pattern):
        if row.feature_class == "plain" and row.pass_name == "forward":
            (line,) = check(row.image, ())
            loop, counts = line.code.loops[0], work(row)
            found = "<br>".join(map(str, deviations(row, loop)))
            yield f"| {short(row)} | {loop.total()} | {counts.every.total()}, {counts.seldom.total()} | {found} |"


def tile_lines(pattern: str) -> Iterator[str]:
    units = ("tensor", "mufu", "fma", "alu", "convert", "shared", "issue")
    yield f"| instance | KFLOP | KB | GPU | {' | '.join(units)} |"
    yield f"|---|---:|---:|---|{'---:|' * len(units)}"
    for row in forward_rows(pattern):
        columns = row.block_n * (row.head_dim_qk + row.head_dim_v)
        sizes = f"{2 * row.block_m * columns // 1000} | {2 * columns // 1024}"  # K and V are two bytes an element
        for name, gpu in GPUS.items():
            needed = cycles(row, gpu)
            most = max(needed.values())
            cells = [f"**{needed[unit]:.0f}**" if needed[unit] == most else f"{needed[unit]:.0f}" for unit in units]
            yield f"| {short(row)} | {sizes} | {name} | {' | '.join(cells)} |"


def cell_lines(pattern: str, shapes: list[tuple[int, int, int, bool]]) -> Iterator[str]:
    yield f"| instance | batch, heads, seqlen | {' | '.join(GPUS)} |"
    yield f"|---|---|{'---|' * len(GPUS)}"
    for row in forward_rows(pattern):
        for batch, num_heads, seqlen, causal in shapes:
            if row.pass_name == "single_tile_forward" and seqlen > row.block_n:
                continue
            cells = [predict(row, gpu, batch, num_heads, seqlen, causal) for gpu in GPUS.values()]
            texts = [f"{cell.microseconds:.0f} us, {cell.tflops:.0f} TFLOP/s, {cell.limit}" for cell in cells]
            yield f"| {short(row)} | {batch}, {num_heads}, {seqlen}{' causal' if causal else ''} | {' | '.join(texts)} |"


def short(row: Instance) -> str:
    return row.name.removeprefix("sm80_").removeprefix("forward_").replace("_bf16", "")


def page_tables() -> dict[str, Iterator[str]]:
    shown = r"_bf16_plain$|(64x64|128x128)_bf16_(plain_dropout|bias)"
    return {
        "tile": tile_lines("_bf16_plain$"),
        "cells": cell_lines(shown, [(4, 16, 1024, True), (4, 16, 4096, False)]),
        "single-tile cells": cell_lines("forward_(64x64|128x128)_bf16_(plain|masked)$", [(128, 8, 128, False), (128, 8, 64, False)]),
        "deviations": deviation_lines("(64x64|128x128)_bf16_plain"),
    }


def update_page(tables: dict[str, Iterator[str]]) -> None:
    """Each table of docs/cuda-kernels.md stands between two comments that name it."""
    text = PAGE.read_text()
    for name, lines in tables.items():
        begin, end = (f"<!-- {word}: {name} -->\n" for word in ("begin", "end"))
        text = text[: text.index(begin) + len(begin)] + "".join(f"{line}\n" for line in lines) + text[text.index(end) :]
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="instances, such as '64x64_bf16_plain$'")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--seqlen", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--causal", action="store_true", help="only causal; without this both")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--tile", action="store_true", help="cycles of every unit for one tile of keys of one block")
    action.add_argument("--deviations", action="store_true", help="compare with the machine code that was built")
    action.add_argument("--write", action="store_true", help="update the tables of docs/cuda-kernels.md")
    options = parser.parse_args()
    if options.write:
        return update_page(page_tables())
    causal = (True,) if options.causal else (False, True)
    shapes = [(options.batch, options.num_heads, seqlen, one) for seqlen in options.seqlen for one in causal]
    if options.deviations:
        lines = deviation_lines(options.only)
    else:
        lines = tile_lines(options.only) if options.tile else cell_lines(options.only, shapes)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
