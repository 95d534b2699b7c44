"""What only a GPU can show: builds there, checks every kernel and measures.

    python tests/gpu.py FOLDER [--part PART ...] [--minutes N]        (`make gpu`)

For a machine with a GPU, no network and perhaps no git. In the order of a first run:
  build        compiles the extension in place, runs the emulator's conformance file and 20 calls of every kind
  benchmark    the grid of fused_attention.benchmarks.gpu_attention, the most important cells first; the host's share; ways of the CUDA
               backward; then tiles of the Triton kernels while time is left
  correctness  every CUDA instance once; the CUDA and the Triton kernels, every feature, against float64 and against each other
  sanitizer    compute-sanitizer's memcheck and racecheck on small calls
Each part takes at most 9 minutes, what it needs built included. --minutes limits the whole call.

FOLDER gets two files, summary.md and results.tar.gz, both rewritten while the run goes on: what is killed loses seconds. A run goes on from
them where the one before was, on another machine too, unless kernels/ or csrc/ or the GPU are others. What was not run is in the table as
not run.
"""

from __future__ import annotations

import argparse
import lzma
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "src")]

from cuda_tools import find_cuda_tool  # noqa: E402
from on_gpu.machine import machine, sources  # noqa: E402
from on_gpu.results import FAILED, NOT_RUN, PARTLY, PASSED, Outcome, Results  # noqa: E402
from on_gpu.run import Run  # noqa: E402

from fused_attention.benchmarks.cell import commit  # noqa: E402
from fused_attention.benchmarks.journal import Journal  # noqa: E402

EMULATOR = ROOT / "tests/emulator"
PART_SECONDS = 9 * 60.0  # machines that are lent by the command allow ten minutes
OURS_FAILED = 4  # exit status of gpu_attention.py that is final
LEAST_SECONDS = 60.0  # that are worth another process


class Step(NamedTuple):
    run: Callable[[Run], Outcome]
    share: float = 1.0  # of the time that its part has left


def build(run: Run) -> Outcome:
    environment = {}
    if not machine().why_not:
        environment["FUSED_ATTENTION_CUDA"] = os.environ.get("FUSED_ATTENTION_CUDA", "1")
        environment["FUSED_ATTENTION_CUDA_ARCHS"] = os.environ.get("FUSED_ATTENTION_CUDA_ARCHS") or "{}{}".format(*machine().capability)
    status = run.command("build.log", sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", **environment)
    if status is None:
        return Outcome(NOT_RUN, "out of time; build.log")
    said = [line for line in (run.files / "build.log").read_text().splitlines() if line.startswith("fused_attention: ")]
    return Outcome(PASSED if status == 0 else FAILED, f"{said[-1].removeprefix('fused_attention: ')}; build.log" if said else "build.log")


def conformance(run: Run) -> Outcome:
    """The wrappers of every PTX instruction on this GPU, byte for byte what they give in the emulator."""
    if machine().capability != (9, 0):
        return Outcome(NOT_RUN, f"the file is for compute capability 9.0, this is {'.'.join(map(str, machine().capability))}")
    nvcc = find_cuda_tool("nvcc")
    if nvcc is None:
        return Outcome(NOT_RUN, "there is no nvcc")
    program, output = run.files / "conformance", run.files / "conformance_sm90.bin"
    architecture = "-gencode=arch=compute_90a,code=sm_90a"
    status = run.command("build.log", nvcc, "-std=c++17", architecture, EMULATOR / "conformance.cu", "-I", EMULATOR, "-o", program)
    if status == 0:
        status = run.command("build.log", program, output)
    program.unlink(missing_ok=True)
    if status != 0:
        return Outcome(NOT_RUN if status is None else FAILED, "build.log")
    found = output.read_bytes()
    (run.files / "conformance_sm90.bin.xz").write_bytes(lzma.compress(found))  # to be committed beside the emulated one
    output.unlink()
    expected = lzma.decompress((EMULATOR / "conformance_emulated.bin.xz").read_bytes())
    different = sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))
    return Outcome(PASSED if different == 0 else FAILED, f"{different} of {len(expected)} bytes differ from the emulator's")


def smoke(run: Run) -> Outcome:
    return run.tests("smoke", "tests/on_gpu/test_smoke.py")


def grid(run: Run) -> Outcome:
    file = run.files / "benchmark.jsonl"
    status = until_it_ends(run, "benchmark.md", "fused_attention.benchmarks.gpu_attention", file, again=("--compiled",))
    table = (run.files / "benchmark.md").read_text().rpartition("\n$ ")[2]
    measured = sum(isinstance(result, dict) and "forward" in result for result in Journal(file).results.values())
    detail = f"{measured} calls measured, {table.count('not run') if status is not None else 'others'} not run; benchmark.md"
    if status is None:
        return Outcome(PARTLY if measured else NOT_RUN, f"out of time; {detail}")
    return Outcome(FAILED if status != 0 else PARTLY if "not run" in table else PASSED, detail)


def tiles(run: Run) -> Outcome:
    status = until_it_ends(run, "tiles.txt", "fused_attention.benchmarks.tune", run.files / "tiles.jsonl")
    left = (run.files / "tiles.txt").read_text().rpartition("\n$ ")[2].count("not measured")
    if status != 0:
        return Outcome(NOT_RUN if status is None else FAILED, "tiles.txt")
    return Outcome(PARTLY if left else PASSED, f"{left} rows not measured; tiles.txt")


def until_it_ends(run: Run, log: str, module: str, file: Path, again: tuple[str, ...] = ()) -> int | None:
    """Runs a program that keeps what it measures in a journal once more, with `again`, after each kernel that took its process along."""
    options: tuple[str, ...] = ()
    while True:
        kept = file.stat().st_size if file.exists() else 0
        minutes = f"{max(0.0, run.left() / 60 - 0.5):.2f}"
        status = run.command(log, sys.executable, "-m", module, file, "--minutes", minutes, *options)
        came_further = file.exists() and file.stat().st_size > kept
        if status in (None, 0, OURS_FAILED) or run.left() < LEAST_SECONDS or not came_further:
            return status
        options = again


def sanitizer(tool: str) -> Callable[[Run], Outcome]:
    def step(run: Run) -> Outcome:
        program = find_cuda_tool("compute-sanitizer")
        if program is None:
            return Outcome(NOT_RUN, "there is no compute-sanitizer")
        done = run.files / f"{tool}.txt"
        words = [
            program,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--print-limit",
            "20",
            sys.executable,
            "tests/on_gpu/small_calls.py",
            done,
        ]
        status = run.command("sanitizer.log", *words, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if status and "Device not supported" in (run.files / "sanitizer.log").read_text().rpartition("\n$ ")[2]:
            return Outcome(NOT_RUN, "compute-sanitizer says: Device not supported")
        calls = len(done.read_text().splitlines()) if done.exists() else 0
        state = PASSED if status == 0 else FAILED if status is not None else PARTLY if calls else NOT_RUN
        return Outcome(state, f"{calls} small calls{', out of time' if status is None else ''}; sanitizer.log")

    return step


PARTS: dict[str, dict[str, Step]] = {
    "build": {"build in place": Step(build), "conformance file": Step(conformance), "20 smoke cells": Step(smoke)},
    "benchmark": {
        "grid": Step(grid, 0.8),
        "host's share": Step(lambda run: run.program("host-cost.txt", sys.executable, "benchmarks/host_cost.py", "gpu"), 0.5),
        "ways of the CUDA backward": Step(
            lambda run: run.program("cuda-backward.txt", sys.executable, "-m", "fused_attention.benchmarks.cuda_backward"), 0.5
        ),
        "tiles of the Triton kernels": Step(tiles),
    },
    "correctness": {
        "every CUDA instance": Step(lambda run: run.tests("instances", "tests/on_gpu/test_cuda_instances.py")),
        "CUDA kernels": Step(lambda run: run.tests("cuda", "tests/on_gpu/test_cuda.py", "tests/on_gpu/test_cuda_streams.py")),
        "Triton kernels": Step(lambda run: run.tests("triton", "tests/on_triton")),
    },
    "sanitizer": {"memcheck": Step(sanitizer("memcheck"), 0.5), "racecheck": Step(sanitizer("racecheck"))},
}
BUILD = ("build", "build in place")  # done without a GPU too, and first in every call: the machine may be another one


def run_part(part: str, run: Run) -> None:
    """Its steps that have not passed before."""
    run.limit(PART_SECONDS)
    part_end = run.end
    for name, step in PARTS[part].items():
        run.end = part_end
        before = run.results.outcomes[part].get(name)
        if (part, name) != BUILD and (before is None or before.state != PASSED):
            run_step(part, name, step, run)


def run_step(part: str, name: str, step: Step, run: Run) -> None:
    before = run.results.outcomes[part].get(name)
    run.results.outcomes[part][name] = Outcome(NOT_RUN, "it was under way when the run ended")
    if machine().why_not and (part, name) != BUILD:
        outcome = Outcome(NOT_RUN, machine().why_not)
    elif run.left() <= 0:
        outcome = before or Outcome(NOT_RUN, "out of time")
    else:
        run.limit(step.share * run.left())
        try:
            outcome = step.run(run)
        except Exception as error:  # a program that cannot be started, say: the other steps run
            outcome = Outcome(FAILED, f"{type(error).__name__}: {error}")
    run.results.outcomes[part][name] = outcome
    run.results.save()
    print(f"{part}: {name}: {': '.join(outcome)}", flush=True)


def about() -> str:
    return f"{machine().gpu or 'no GPU'}; {machine().versions}; sources {sources()}"


def stop(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would cut off what the first one leads to
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results; what they say was done is not done again")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    parser.add_argument("--minutes", type=float, help="of the whole call; 9 for each part without it")
    options = parser.parse_args()
    parts = list(dict.fromkeys(options.part or PARTS))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="gpu-results-") as files:
        steps = {part: list(steps) for part, steps in PARTS.items()}
        results = Results(options.folder.resolve(), Path(files), about(), commit(), steps)
        run = Run(results, 60 * options.minutes if options.minutes is not None else PART_SECONDS * len(parts))
        try:
            run.limit(PART_SECONDS)
            run_step(*BUILD, PARTS[BUILD[0]][BUILD[1]], run)
            for part in parts:
                run_part(part, run)
        finally:
            results.save()
    print(results.text())
    return int(any(outcome.state == FAILED for part in (BUILD[0], *parts) for outcome in results.outcomes[part].values()))


if __name__ == "__main__":
    sys.exit(main())
