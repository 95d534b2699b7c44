"""The codegen gate of the CUDA kernels: inspects what the build compiled, without a GPU.

    python tests/cuda_codegen_gate.py            check every instance; exit status 1 if one may not be shipped or is worse than the table
    python tests/cuda_codegen_gate.py --write    the same, and write docs/cuda-codegen.md, the table that later builds are compared with

Three sources: the machine code that the build made, ptxas's account of it, and the same account for other GPUs, whose machine code a
driver makes of the PTX. What an image took to compile and what it adds to the extension has limits too (csrc/cuda/build_images.py).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import sass
from cuda_resources import Code, Usage, code, failures, matching, usages
from cuda_tools import find_cuda_tool
from occupancy import KB, room

from csrc.cuda.build_images import costs, over_limits
from csrc.cuda.instances.manifest import INSTANCES, SMALL_SHARED_BYTES, Instance
from csrc.cuda.toolkit import find_toolkit

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / str(sysconfig.get_config_var("SOABI")) / "cuda"
TABLE = ROOT / "docs/cuda-codegen.md"
WRITE = "make codegen-cuda-table"
BUILT_FOR = "sm_80"
OTHERS = {"sm_89": SMALL_SHARED_BYTES, "sm_90": 227 * KB, "sm_120": SMALL_SHARED_BYTES}  # and what a block may have of shared memory
# Nothing may spill in the machine code that ships. What a driver makes of the PTX is up to its own assembler, of whatever version: there up
# to ten words a thread that wait in local memory, as the widest tile with a float mask has on sm_90, are no reason to give up a tile that
# fits everywhere else.
TOLERATED_ELSEWHERE = 40  # bytes
SLACK = 0.02  # by how much a hot loop may grow before the table must be written anew


class Line(NamedTuple):
    """One instance in the report."""

    row: Instance
    usage: Usage
    code: Code
    others: dict[str, Usage]  # by architecture, those that were assembled
    failures: list[str]


def why_not() -> str | None:
    """Why nothing can be inspected."""
    if not any(FOLDER.glob(f"*.{BUILT_FOR}.cubin")):
        return f"the CUDA kernels are not built, or not for {BUILT_FOR}"
    return None if find_cuda_tool("nvdisasm") else "there is no nvdisasm: it comes with triton and with the CUDA toolkit"


def built_usages() -> dict[str, Usage]:
    """{instance: what it takes}, of every instance."""
    logs = {row.image: (FOLDER / f"{row.image}.log").read_text() for row in INSTANCES}
    return {kernel: usage for log in logs.values() for (kernel, arch), usage in usages(log).items() if arch == BUILT_FOR}


def assemble(image: str, arch: str) -> dict[str, Usage]:
    """Of another GPU's machine code; what ptxas said is kept beside the PTX until that is newer."""
    ptx, log = FOLDER / f"{image}.ptx", FOLDER / f"{image}.{arch}.log"
    if not log.exists() or log.stat().st_mtime < ptx.stat().st_mtime:
        command = [find_toolkit().ptxas, "-v", f"-arch={arch}", ptx, "-o", "/dev/null"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{image} does not assemble for {arch}: {done.stdout}")
        log.write_text(done.stdout)
    return {kernel: usage for (kernel, _), usage in usages(log.read_text()).items()}


def check(image: str, others: Iterable[str] = OTHERS) -> list[Line]:
    """Every instance of an image."""
    listings = sass.functions(sass.disassemble((FOLDER / f"{image}.{BUILT_FOR}.cubin").read_bytes()))
    built = usages((FOLDER / f"{image}.log").read_text())
    rows = [row for row in INSTANCES if row.image == image]
    elsewhere = {arch: assemble(image, arch) for arch in others}
    lines = []
    for row in rows:
        usage, found = built[row.name, BUILT_FOR], code(listings[row.name], row.pass_name)
        its_others = {arch: kernels[row.name] for arch, kernels in elsewhere.items()}
        reasons = failures(row, usage, found)
        for arch, other in its_others.items():
            if row.shared_bytes <= OTHERS[arch] and max(other.spills, other.stack) > TOLERATED_ELSEWHERE:
                reasons.append(f"{other.spills} bytes spilled, a stack frame of {other.stack} bytes on {arch}")
        lines.append(Line(row, usage, found, its_others, reasons))
    return lines


# The table

COLUMNS = (
    "instance", "registers", "spills", "stack", "shared", "blocks on sm_80", "on sm_89", "HMMA", "LDSM", "LDGSTS", "MUFU", "loop",
    "masked loop", "code KB", "spills on sm_89, 90, 120",
)  # fmt: skip
HEADING = f"""# What the compiler makes of the CUDA kernels

Written by `{WRITE}`, checked by `make codegen-cuda`. A change that makes an instance worse than its line
fails; one that is meant to, or that makes it better, writes the table anew.

- registers, spills and stack: per thread, by ptxas's account of the sm_80 code, which ships; spills and stack in bytes, and 0 is the only
  number allowed
- shared: bytes of a block; blocks: how many of them an SM holds at once, by registers, shared memory and threads
- HMMA, LDSM, LDGSTS, MUFU: matrix products, their loads from shared memory, copies to it and exp2 in one pass of a warp through the loop
  over blocks of keys without masks, or in the whole single-tile kernel. The gate knows these numbers from the tile
- loop, masked loop: all instructions of the two hot loops, rarely executed ones included; {SLACK:.0%} more are tolerated
- spills on other GPUs: of the machine code that a driver makes of the PTX. {TOLERATED_ELSEWHERE} bytes are tolerated:
  they are up to the assembler of whatever driver there is, and ten words that wait in local memory cost less than a smaller tile would

"""


def cells(line: Line) -> list[str]:
    row, usage, loops = line.row, line.usage, line.code.loops
    lean = loops[0] if loops else None
    blocks = [min(room(arch, usage.registers, row.num_threads, row.shared_bytes).values()) for arch in (80, 89)]
    counts = [str(matching(lean, opcode)) if lean else "" for opcode in ("HMMA", "LDSM", "LDGSTS", r"MUFU\.EX2")]
    sizes = [str(loops[number].total()) if number < len(loops) else "" for number in (0, 1)]
    return [
        row.name, *map(str, usage), str(row.shared_bytes), *map(str, blocks), *counts, *sizes, f"{line.code.kilobytes:.1f}",
        ", ".join(str(other.spills) for other in line.others.values()),
    ]  # fmt: skip


def table(lines: Iterable[Line], compiler: str) -> str:
    rows = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *map(cells, lines)]
    return f"{HEADING}Compiler: {compiler}.\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def read_table(text: str) -> dict[str, dict[str, str]]:
    """{instance: {column: cell}}"""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows[2:]}


def worse(line: Line, committed: dict[str, dict[str, str]]) -> list[str]:
    """In what an instance is worse than its line in the table; failures() judges all that has a fixed limit."""
    if line.row.name not in committed:
        return [f"it is not in {TABLE.name}"]
    then, now = committed[line.row.name], dict(zip(COLUMNS, cells(line), strict=True))
    reasons = []
    for column in ("loop", "masked loop"):
        old, new = int(then[column] or 0), int(now[column] or 0)
        if new > old * (1 + SLACK):
            reasons.append(f"{new} instructions in the {column}, {old} in {TABLE.name}")
    for column in ("blocks on sm_80", "on sm_89"):
        if int(now[column]) < int(then[column]):
            reasons.append(f"{now[column]} blocks {column.removeprefix('blocks ')}, {then[column]} in {TABLE.name}")
    return reasons


def comparable(text: str) -> bool:
    """Another compiler makes other code: its instructions are not counted against the table."""
    return f"Compiler: {find_toolkit()}.\n" in text


def compared(lines: Iterable[Line], text: str) -> list[Line]:
    committed = read_table(text)
    return [line._replace(failures=line.failures + worse(line, committed)) if comparable(text) else line for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="images, such as 'forward_64x64_bf16'")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(f"codegen gate: {reason}")
    start = time.monotonic()
    images = [image for image in dict.fromkeys(row.image for row in INSTANCES) if re.search(options.only, image)]
    with ProcessPoolExecutor(options.jobs) as pool:
        lines = [line for its_lines in pool.map(partial(check, others=tuple(OTHERS)), images) for line in its_lines]
    if options.write and not options.only:
        TABLE.write_text(table(lines, str(find_toolkit())))
    elif options.write:
        sys.exit("--write writes the whole table: it goes without --only")
    lines = compared(lines, TABLE.read_text() if TABLE.exists() else "")
    for line in lines:
        print(f"{line.row.name:44s} {' '.join(f'{cell:>6s}' for cell in cells(line)[1:])}")
    failed = [line for line in lines if line.failures]
    print(f"{len(lines)} instances, {len(failed)} fail; {time.monotonic() - start:.0f} s")
    expensive = over_limits(costs(FOLDER, images))
    for sentence in expensive:
        print(f"FAILS {sentence}")
    for line in failed:
        print(f"FAILS {line.row.name}: {'; '.join(line.failures)}")
    if expensive:
        sys.exit("images cost too much to compile or to ship")
    if failed:
        sys.exit(f"If a change is meant to do this and nothing spills: {WRITE}")


if __name__ == "__main__":
    main()
