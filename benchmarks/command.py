"""`fused-attention bench`: runs the suites in pytest, then writes what they measured; `bench plot FILE` only writes it.

Exit status: pytest's; with --against 1 where a ratio fell, 2 where the file is unusable.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .cell import UnusableFile, read
from .isa import INSTRUCTION_SETS, OUR_VARIABLE, environment
from .saved import slower_than, write_all

FOLDER = Path(__file__).parent
PREFIX = "benchmark_"


def suites() -> list[str]:
    return sorted(path.stem.removeprefix(PREFIX) for path in FOLDER.glob(f"{PREFIX}*.py"))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fused-attention bench",
        description="Compare with every engine that is installed, on this machine. Every cell is saved as it ends, and a run that was "
        "stopped goes on with the same --results. Further arguments go to pytest, such as -k EXPRESSION.",
    )
    parser.add_argument("--suite", nargs="+", choices=suites(), default=[], metavar="SUITE", help=f"only these: {', '.join(suites())}")
    parser.add_argument("--isa", choices=INSTRUCTION_SETS, help="keep every engine to this instruction set")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), help="only benchmarks of these")
    parser.add_argument("--threads", nargs="+", type=int, help="only benchmarks on so many threads: 1, or as many as there are cores")
    parser.add_argument("--results", type=Path, help="the .jsonl file of the run, begun or new (default: a new one in .benchmarks)")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="an earlier run: exit status 1 where a ratio fell by more than its noise"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    if list(arguments[:1]) == ["plot"]:
        return plot(list(arguments[1:]))
    options, more = build_parser().parse_known_args(arguments)
    if options.isa is not None and os.environ.get(OUR_VARIABLE) != options.isa:  # the libraries read it when they load
        words = [sys.executable, "-m", "fused_attention", "bench", *arguments]
        return subprocess.run(words, env=os.environ | environment(options.isa)).returncode
    import pytest

    earlier = None
    if options.against is not None:
        try:
            earlier = read(options.against)
        except (OSError, UnusableFile) as error:
            return fail(error)
    results = options.results or Path(".benchmarks", time.strftime("%Y-%m-%d-%H%M%S.jsonl"))
    more += ["--results", str(results)]
    files = [str(FOLDER / f"{PREFIX}{suite}.py") for suite in options.suite] or [str(FOLDER)]
    for name in ("dtype", "threads"):
        if values := getattr(options, name):
            more += ["--only", f"{name}={','.join(map(str, values))}"]
    status = int(pytest.main([*files, *PYTEST_ARGUMENTS, *more]))
    if results.exists():
        print("written:", *map(str, [results, *write_all(results)]))
    if status == pytest.ExitCode.INTERRUPTED:
        return 130
    if earlier is None or status:
        return status
    try:
        fallen = slower_than(read(results), earlier)
    except (OSError, UnusableFile) as error:
        return fail(error)
    print(f"slower than in {options.against}: {len(fallen) or 'none'}", *fallen, sep="\n  ")
    return 1 if fallen else 0


def plot(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("fused-attention bench plot", description="Write the page and the tables of a saved run beside it.")
    parser.add_argument("results", type=Path, help="a .jsonl file that `fused-attention bench` wrote")
    try:
        print("written:", *map(str, write_all(parser.parse_args(arguments).results)))
    except (OSError, UnusableFile) as error:
        return fail(error)
    return 0


def fail(error: Exception) -> int:
    print(f"fused-attention bench: {error}", file=sys.stderr)
    return 2


# conftest.py prints every cell as it ends, then the tables.
PYTEST_ARGUMENTS = (
    "-q",
    "--override-ini=python_files=benchmark_*.py",
    "-p",
    "no:warnings",
    "--benchmark-only",
    "--benchmark-quiet",
    "-rfE",
    "--benchmark-max-time=1",  # seconds for the rounds of a cell
)
