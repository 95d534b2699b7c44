"""The codegen gate: compiles every tile of kernels/triton/tile_table.json for every architecture, without a GPU, and inspects the code.

    python tests/triton_codegen_gate.py                 check; one line for each kernel; exit status 1 if one may not be shipped
    python tests/triton_codegen_gate.py --sample 1      the same, and compile also what did not change since the record was written
    python tests/triton_codegen_gate.py --write-record  check what changed, and keep what was found (triton_codegen_record.py)
    ... --minutes 10                                    in an order at random, and compile nothing more after so long: the rest is counted
    python tests/triton_codegen_gate.py --choose        take the first candidate of each row that passes, and write the table
    python tests/triton_codegen_gate.py --choose --keep the same, from the table's tiles on: they stay unless they fail
    ... --choose --also PYTHON                          candidates must also pass with that interpreter's Triton

The real host code runs on CPU tensors (triton_offline.py), one representative problem for each row of the table, with everything that
its feature class may hold (benchmarks/tune.py); for a few rows also one with a PreparedMask or with packed sequences. What fails: spills,
local memory in a hot loop, more shared memory than there is, and on sm_90 16-bit products that are not warpgroup products or that wait
for one another. float16 compiles like bfloat16 and is not repeated; nor is a row with the tile of one that differs by more features
(stands_for).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import pickle
import random
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # compiles faster, to the same instructions

import triton
import triton_codegen_record
from triton_offline import Binary, Launch, offline
from triton_resources import OPCODES, Resources, failures, resources

from fused_attention.benchmarks import tune
from fused_attention.benchmarks.tune import Row, Size
from fused_attention.kernels.triton import backend as triton_backend
from fused_attention.kernels.triton.launch import Tile, tile_table

ARCHITECTURES = {"sm80": 80, "sm86": 120, "sm90": 90, "sm100": 100}  # sm_86, sm_89 and sm_120 share tiles

# {(dtype, head_dim, feature class): the form in which problems come beside separate tensors}
FORMS = {
    ("16-bit", 64, "plain"): "varlen",
    ("16-bit", 64, "masked"): "prepared",
    ("fp32", 64, "dropout"): "prepared",
}
PASSES_OF_FORM = {"varlen": ("forward", "backward"), "prepared": ("forward", "backward", "dbias", "weights")}


class Task(NamedTuple):
    """The kernels of one problem, in every form that is checked, for one family of architectures."""

    measured_pass: str  # in tune.PASSES
    family: str
    dtype: str
    head_dim: int
    feature_class: str

    def rows(self) -> dict[str, Row]:
        names = [name for name in tune.PASSES[self.measured_pass] if tune.has_class(name, self.feature_class)]
        return {name: Row(name, *self[1:]) for name in names}

    def forms(self) -> list[str]:
        other = FORMS.get(self[2:])
        return ["separate", other] if other and self.measured_pass in PASSES_OF_FORM[other] else ["separate"]


class Line(NamedTuple):
    """One kernel in the report."""

    task: Task
    kernel_name: str  # in the tile table, or of a kernel function that is not
    tile: Tile | None
    found: Resources
    failures: list[str]
    form: str = "separate"
    key: str = ""  # in the record


def tasks(pattern: str) -> Iterator[Task]:
    for measured_pass in tune.PASSES:
        for family in ARCHITECTURES:
            for dtype in tune.DTYPES:
                for head_dim in sorted(tune.HEAD_DIMS):
                    for feature_class in tune.FEATURE_CLASSES:
                        task = Task(measured_pass, family, dtype, head_dim, feature_class)
                        if task.rows() and re.search(pattern, " ".join(map(str, task))):
                            yield task


def stands_for(row: Row) -> Row:
    """The row whose kernel is checked in a row's place: that of the class with the most features among those with the same tile.

    The kernel does all that the row's does and more, so it needs at least its registers and shared memory. Not so for plain: tile lists
    take the place of loop bounds.
    """
    richer = () if row.feature_class == "plain" else tune.FEATURE_CLASSES[tune.FEATURE_CLASSES.index(row.feature_class) + 1 :]
    for feature_class in reversed(richer):
        other = row._replace(feature_class=feature_class)
        if tune.has_class(row.kernel_name, feature_class) and tile_table()[other] == tile_table()[row]:
            return other
    return row


def checked_names(task: Task, form: str) -> set[str]:
    """Kernels of a task that are checked in a form: those that nothing stands for, and in other forms than the usual all of them."""
    return {name for name, row in task.rows().items() if form != "separate" or stands_for(row) == row}


def kernel_of(function_name: str) -> str:
    """The table's name of a kernel function."""
    return next((name for name in ("decode", "dkdv", "dq", "dbias", "weights", "forward") if name in function_name), function_name)


_keys: dict[Binary, str] = {}  # of all that was compiled: Triton keeps it as long


class Compiler:
    """Finds what kernels take: of those on record without compiling them."""

    def __init__(self, known: dict[str, Resources] | None = None, *, count: bool = True, until: float = math.inf) -> None:
        self.known = known or {}
        self.count = count
        self.until = until  # on time.time(): nothing is compiled after it
        self.too_late: set[str] = set()  # keys of what was not

    def of_task(self, task: Task, form: str, names: set[str]) -> dict[str, tuple[str, Resources]]:
        """{key: (kernel, what it takes)} of the kernels that a task's problem launches, with the table's tiles; of those that have a
        tile, the named ones."""
        arch = ARCHITECTURES[task.family]
        row = next(iter(task.rows().values()))
        run = tune.runner(row, tune.representative(row, Size(), "cpu", form))
        left_out = {*tune.KERNELS} - names
        found: dict[str, tuple[str, Resources]] = {}
        compiled_now = []

        def is_known(*, fn: Any, compile: dict[str, Any], **others: Any) -> bool:
            key = triton_codegen_record.key(fn.jit_function, compile["specialization_data"], arch)
            if key in self.known:
                found[key] = kernel_of(fn.name), self.known[key]
            elif time.time() > self.until:
                self.too_late.add(key)
            else:
                compiled_now.append(key)
                return False
            return True

        def add(launched: Launch) -> None:
            binary = launched.binary
            if binary not in _keys:
                _keys[binary] = compiled_now.pop()
            found[_keys[binary]] = kernel_of(binary.name), resources(binary, arch, count=self.count)

        with offline(arch, inspect=True, execute=add, wanted=lambda name: kernel_of(name) not in left_out):
            triton.knobs.runtime.jit_cache_hook = is_known
            run()
            if form == "prepared":  # by the kernels, as on a GPU
                triton_backend.prepared_tiles(tune.representative(row, Size(), "cpu"), gradients=True)
        return found


def check(task: Task, compiler: Compiler | None = None, *, every: bool = True) -> list[Line]:
    """Every kernel of the task, or those that nothing stands for; those first that have a row of their own in the table."""
    compiler = compiler or Compiler()
    arch = ARCHITECTURES[task.family]
    task_rows = task.rows()
    lines = []
    for form in task.forms():
        names = set(task_rows) if every else checked_names(task, form)
        if not names:
            continue
        for key, (name, found) in compiler.of_task(task, form, names).items():
            warpgroups = name in task_rows and task.dtype == "16-bit" and not is_narrow(task_rows[name])
            tile = tile_table()[task_rows[name]] if name in task_rows else None
            lines.append(Line(task, name, tile, found, failures(found, arch, warpgroups=warpgroups), form, key))
        missing = names - {line.kernel_name for line in lines if line.form == form}
        if missing and not compiler.too_late:
            raise RuntimeError(f"{task}: no kernel ran for {missing}, {form}")
    return sorted(lines, key=lambda line: line.tile is None)


class Failed(NamedTuple):
    """A candidate that did not pass for a kernel, and so will hardly pass for larger head dims and harder classes."""

    kernel_name: str
    head_dim: int
    hardness: int
    tile: Tile

    def rules_out(self, row: Row, tile: Tile) -> bool:
        easier = self.head_dim <= row.head_dim and self.hardness <= tune.FEATURE_CLASSES.index(row.feature_class)
        return easier and (self.kernel_name, self.tile) == (row.kernel_name, tile)


def is_narrow(row: Row) -> bool:
    """Whether a kernel may use warp matrix products on sm_90: warpgroup products have 64 rows, and registers for 64 rows.

    Decoding has 16 rows. Sums of 64 rows by 256, of which dkdv has two, leave it and dq too few registers for the rest; so does dropout
    together with everything else in dkdv from 64 rows by 128 on (triton 3.6 spills 44 bytes with its smallest tile).
    """
    if row.kernel_name == "dkdv":
        return row.head_dim == 256 or (row.head_dim == 128 and row.feature_class == "dropout")
    return row.kernel_name == "decode" or (row.kernel_name == "dq" and row.head_dim == 256)


class OtherTriton:
    """A process of an interpreter that has another Triton, which checks tasks with it."""

    def __init__(self, python: str | Path) -> None:
        self.process = subprocess.Popen([python, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, task: Task) -> None:
        """With the tiles of this process's table."""
        assert self.process.stdin is not None
        pickle.dump((tuple(task), {tuple(row): tuple(tile_table()[row]) for row in task.rows().values()}), self.process.stdin)
        self.process.stdin.flush()

    def answer(self, task: Task) -> list[Line]:
        assert self.process.stdout is not None
        tiles = {name: tile_table()[row] for name, row in task.rows().items()}
        return [Line(task, name, tiles.get(name), *found) for name, *found in pickle.load(self.process.stdout)]

    def end(self) -> None:
        self.process.communicate()  # closes its stdin


def serve() -> None:
    """The other side of OtherTriton, until stdin ends."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing else may be written between the answers
    while True:
        try:
            task, tiles = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        tile_table().update({row: Tile._make(tile) for row, tile in tiles.items()})
        found = []
        for line in check(Task._make(task)):
            reasons = [f"{reason} with triton {triton.__version__}" for reason in line.failures]
            found.append((line.kernel_name, line.found, reasons, line.form))
        pickle.dump(found, answers)
        answers.flush()


class Choice(NamedTuple):
    """A candidate for one kernel of a task, and what was found."""

    badness: tuple[int, int]  # failures, bytes spilled
    tile: Tile
    lines: list[Line]


def choose(task: Task, keep: bool, failed: set[Failed], others: list[OtherTriton]) -> list[Line]:
    """Puts the first candidates that pass into the table; where none does, that with the least spills. Adds to `failed`."""
    rows = task.rows()
    remaining = {}
    for name, row in rows.items():
        tiles = sorted(tune.candidates(row), key=lambda tile, row=row: any(f.rules_out(row, tile) for f in failed))  # those last
        if keep:
            current = tile_table()[row]
            first = tiles.index(current) if current in tiles else 0
            tiles = list(dict.fromkeys([current, *tiles[first:], *tiles[:first]]))
        remaining[name] = tiles
        tile_table()[row] = tiles[0]
    best: dict[str, Choice] = {}
    while True:
        for other in others:
            other.ask(task)
        lines = check(task)
        for other in others:
            lines += other.answer(task)
        for name, row in rows.items():
            found = [line for line in lines if line.kernel_name == name]
            badness = (sum(len(line.failures) for line in found), sum(line.found.spills for line in found))
            if name not in best or badness < best[name].badness:
                best[name] = Choice(badness, tile_table()[row], found)
        failing = [name for name in rows if best[name].badness[0] and len(remaining[name]) > 1]
        for name in failing:
            failed.add(Failed(name, task.head_dim, tune.FEATURE_CLASSES.index(task.feature_class), remaining[name].pop(0)))
            tile_table()[rows[name]] = remaining[name][0]
        if not failing:
            for name, row in rows.items():
                tile_table()[row] = best[name].tile
            return [*(line for choice in best.values() for line in choice.lines), *(line for line in lines if line.kernel_name not in rows)]


def write_tiles(lines: list[Line]) -> None:
    """Writes the chosen tiles, and what follows from them for devices of no known family."""
    tile_table.cache_clear()  # another process may have written rows
    for line in lines:
        if line.tile:
            row = Row(line.kernel_name, *line.task[1:])
            tile_table()[row] = line.tile
            if row.family == "sm86":  # it fits 99 KB, and without pipelining takes less
                tile_table()[row._replace(family="other")] = line.tile._replace(num_stages=1)
    tune.write_table(tile_table())


def attempt(
    tasks: list[Task], options: argparse.Namespace, known: dict[str, Resources], until: float
) -> tuple[list[Line], list[str], set[str]]:
    """In a worker process: the lines of tasks, easy ones first, the texts of errors, and the keys of what there was no time for."""
    lines: list[Line] = []
    errors = []
    failed: set[Failed] = set()
    others = [OtherTriton(options.also)] if options.also else []
    compiler = Compiler(known, count=options.count, until=until)
    for task in tasks:
        start = time.monotonic()
        try:
            added = choose(task, options.keep, failed, others) if options.choose else check(task, compiler, every=False)
        except Exception:
            added = []
            errors.append(f"{' '.join(map(str, task))}: {traceback.format_exc()}")
        for line in added:
            if line.tile or line.failures:
                print(f"{text(line)}  {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        lines += added
    for other in others:
        other.end()
    return lines, errors, compiler.too_late


HEADING = (
    "kernel     arch    dtype   D  class   BLOCK_M x BLOCK_N, warps, stages   regs spillB  shared  blocks/SM          "
    "wgmma    HGMMA     HMMA      TC5     FFMA   LDGSTS      EX2   local  instructions"
)


def text(line: Line) -> str:
    task, found, tile = line.task, line.found, line.tile
    counts = {name: "/".join(map(str, found.counts.get(name, ()))) for name in OPCODES}
    local = "/".join(str(a + b) for a, b in zip(found.counts.get("LDL", ()), found.counts.get("STL", ()), strict=True))
    size = f"{tile.BLOCK_M:3d} x {tile.BLOCK_N:3d}, {tile.num_warps}, {tile.num_stages}" if tile else ""
    columns = "".join(f"{counts[name]:>9s}" for name in ("HGMMA", "HMMA", "TC5", "FFMA", "LDGSTS", "EX2"))
    return (
        f"{line.kernel_name:10s} sm_{ARCHITECTURES[task.family]:<4d} {task.dtype:6s} {task.head_dim:3d} {task.feature_class:8s} {size:34s} "
        f"{found.registers:4d} {found.spills:6d} {found.shared_memory:7d}  {found.blocks_per_sm:2d} {found.limited_by:14s} "
        f"{found.warpgroup_products:5d}{columns} {local:>7s}  {'/'.join(map(str, found.instructions)) if found.counts else ''}"
        + (f"  {line.form}" if line.form != "separate" else "")
        + ("  FAILS: " + ", ".join(line.failures) if line.failures else "")
    )


def distinct(lines: list[Line]) -> list[Line]:
    """Kernels without a row in the table are the same for many problems: each shows once for an architecture."""
    seen = set()
    kept = []
    for line in lines:
        key = line if line.tile else (line.kernel_name, line.task.family, repr(line.found))
        if repr(key) not in seen:
            seen.add(repr(key))
            kept.append(line)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="tasks such as 'forward sm90 16-bit 64 plain'")
    parser.add_argument("--choose", action="store_true", help="write the table")
    parser.add_argument("--keep", action="store_true", help="with --choose: start at the table's tiles")
    parser.add_argument("--also", type=Path, metavar="PYTHON", help="with --choose: interpreter whose Triton must pass a tile too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--sample", type=float, default=0.1, metavar="SHARE", help="of the kernels on record, to compile all the same")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the sample, to repeat it")
    parser.add_argument("--write-record", action="store_true", help="keep what was found, without a sample")
    parser.add_argument("--minutes", type=float, default=math.inf, help="compile nothing more after so long")
    parser.add_argument("--count", action="store_true", help="compile everything and count its instructions")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the lines there too")
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.write_record and (options.count or options.choose):
        parser.error("--write-record: the record holds no numbers of instructions, which --count and --choose find")
    if options.choose and options.minutes < math.inf:
        parser.error("--choose: a tile is chosen once all candidates before it were compiled, however long that takes")
    until = time.time() + 60 * options.minutes
    start = time.monotonic()
    groups: dict[tuple, list[Task]] = {}
    for task in tasks(options.only):
        if options.choose:
            groups.setdefault(task[:3], []).append(task)
        elif any(checked_names(task, form) for form in task.forms()):
            groups[task] = [task]
    record = triton_codegen_record.read()
    counting = options.count or options.choose  # what is found then holds numbers of instructions, which the record does not
    share = 1 if counting else 0 if options.write_record else options.sample
    repeated = triton_codegen_record.sample(list(record), share, options.seed)
    known = {key: found for key, found in record.items() if key not in repeated}
    results: dict[tuple, list[Line]] = {}
    errors = []
    too_late: set[str] = set()
    order = list(groups)
    if options.minutes < math.inf:  # every kernel has its turn in one run or another
        random.Random(options.seed).shuffle(order)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(attempt, groups[key], options, known, until): key for key in order}
        for future in as_completed(pending):
            results[pending[future]], its_errors, its_too_late = future.result()
            errors += its_errors
            too_late |= its_too_late
            if options.choose:
                write_tiles(results[pending[future]])
    all_lines = [line for key in groups for line in results[key]]
    found = {line.key: line.found for line in all_lines}
    if not counting:
        errors += [f"{line}: on record is {record[line.key]}" for line in all_lines if record.get(line.key, line.found) != line.found]
    if options.write_record and not errors:
        triton_codegen_record.write({**record, **found} if options.only else found)
    lines = distinct(all_lines)
    failed = sum(bool(line.failures) for line in lines) + len(errors)
    on_record = len(found.keys() & known.keys())
    heading = [
        f"triton {triton.__version__}: {len(lines)} kernels, {failed} fail; {time.monotonic() - start:.0f} s",
        f"{on_record} did not change and are on record, {len(found) - on_record} were compiled (--seed {options.seed}).",
        *([f"{len(too_late - found.keys())} were NOT compiled: out of time (--minutes {options.minutes:g})."] if too_late else []),
        "A line without a tile is a kernel that needs none of the table. wgmma: in the PTX. Numbers a/b: instructions in the whole kernel",
        "/ in its hot loops, with --count and where there is a stack frame; a kernel without one has no local memory.",
        "",
        HEADING,
    ]
    report = "\n".join([*heading, *map(text, lines), *errors])
    print(report)
    if options.report:
        options.report.write_text("\n".join(line.rstrip() for line in report.splitlines()) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
