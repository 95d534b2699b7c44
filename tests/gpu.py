"""What only a GPU can show: builds there, checks every kernel and measures, into a folder that results are added to as they appear.

    python tests/gpu.py FOLDER [--part PART ...] [--minutes N]        (`make gpu`)

Four parts, each of at most 8 minutes on 16 cores, for a machine with a GPU and no network:
  build        compiles the extension in place, runs the emulator's conformance file and every CUDA instance once
  correctness  the Triton and the CUDA kernels, every feature, against float64 and against each other
  sanitizer    compute-sanitizer's memcheck and racecheck on small calls
  benchmark    the grid of fused_attention.benchmarks.gpu_attention, the most important cells first, and the host's share
A part that was stopped goes on where it was: what FOLDER says was done is not done again. The last output is a table of all parts, in
FOLDER/summary.md too; what was not run is in it as not run.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests/emulator"
WORKERS = min(16, os.cpu_count() or 1)
sys.path.append(str(ROOT))

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


class Outcome(NamedTuple):
    state: str  # passed, failed or not run
    detail: str


class Run:
    """One call of this program: where results go, and until when."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder = folder
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def command(self, log: str, *words: str | Path, **environment: str) -> int | None:
        """Runs a program, its output at the end of a log; the exit status, None where time ran out."""
        with (self.folder / log).open("a") as file:
            print(f"$ {' '.join(map(str, words))}", file=file, flush=True)
            try:
                return subprocess.run(
                    list(map(str, words)), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, timeout=max(1.0, self.left()),
                    env=os.environ | environment,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                return None

    def tests(self, name: str, *words: str | Path, workers: int = WORKERS, **environment: str) -> Outcome:
        """Runs tests that no earlier run saw pass; `name`.jsonl remembers them (tests/on_gpu/recording.py)."""
        record = self.folder / f"{name}.jsonl"
        parallel = ("-n", workers) if workers > 1 else ()
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "on_gpu.recording", "--record", record, *parallel, *words]
        status = self.command("tests.log", *map(str, pytest), **environment)
        states = [json.loads(line)["state"] for line in record.read_text().splitlines()] if record.exists() else []
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "no test ran"
        if status is None:
            return Outcome(NOT_RUN, f"out of time after {counts}")
        return Outcome(PASSED if status in (0, 5) and states else FAILED, f"{counts}; tests.log")  # 5: none was left to run


def why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


def on_gpu(step: Callable[[Run], Outcome]) -> Callable[[Run], Outcome]:
    def run_step(run: Run) -> Outcome:
        reason = why_no_gpu()
        return step(run) if reason is None else Outcome(NOT_RUN, reason)

    return run_step


def build(run: Run) -> Outcome:
    import torch

    environment = {"FUSED_ATTENTION_CUDA": "1"}
    if torch.cuda.is_available() and "FUSED_ATTENTION_CUDA_ARCHS" not in os.environ:  # or the driver compiles every kernel at its first use
        environment["FUSED_ATTENTION_CUDA_ARCHS"] = "{}{}".format(*torch.cuda.get_device_capability())
    status = run.command("build.log", sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", **environment)
    if status is None:
        return Outcome(NOT_RUN, "out of time")
    lines = [line for line in (run.folder / "build.log").read_text().splitlines() if line.startswith("fused_attention: CUDA kernels")]
    return Outcome(PASSED if status == 0 else FAILED, lines[-1] if status == 0 and lines else "build.log")


@on_gpu
def conformance(run: Run) -> Outcome:
    """The wrappers of every PTX instruction on this GPU, byte for byte what they give in the emulator."""
    import torch

    if torch.cuda.get_device_capability() != (9, 0):
        return Outcome(NOT_RUN, f"the file is for compute capability 9.0, this is {torch.cuda.get_device_capability()}")
    from csrc.cuda.toolkit import find_nvcc

    nvcc = find_nvcc()
    if nvcc is None:
        return Outcome(NOT_RUN, "there is no nvcc")
    program, output = run.folder / "conformance", run.folder / "conformance_sm90.bin"
    architecture = "-gencode=arch=compute_90a,code=sm_90a"
    status = run.command("build.log", nvcc, "-std=c++17", architecture, EMULATOR / "conformance.cu", "-I", EMULATOR, "-o", program)
    if status == 0:
        status = run.command("build.log", program, output)
    program.unlink(missing_ok=True)
    if status != 0:
        return Outcome(NOT_RUN if status is None else FAILED, "build.log")
    found = output.read_bytes()
    (run.folder / "conformance_sm90.bin.xz").write_bytes(lzma.compress(found))  # to be committed beside the emulated one
    output.unlink()
    expected = lzma.decompress((EMULATOR / "conformance_emulated.bin.xz").read_bytes())
    different = sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))
    return Outcome(PASSED if different == 0 else FAILED, f"{different} of {len(expected)} bytes differ from the emulator's")


@on_gpu
def smoke(run: Run) -> Outcome:
    return run.tests("smoke", "tests/on_gpu/test_cuda_instances.py")


@on_gpu
def triton_kernels(run: Run) -> Outcome:
    return run.tests("triton", "tests/on_triton")


@on_gpu
def cuda_kernels(run: Run) -> Outcome:
    return run.tests("cuda", "tests/on_gpu", "--ignore=tests/on_gpu/test_cuda_instances.py")


def sanitizer(tool: str) -> Callable[[Run], Outcome]:
    @on_gpu
    def step(run: Run) -> Outcome:
        program = shutil.which("compute-sanitizer")
        if program is None:
            return Outcome(NOT_RUN, "there is no compute-sanitizer")
        words = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", sys.executable, "tests/on_gpu/small_calls.py"]
        status = run.command("sanitizer.log", *words, str(run.folder / f"{tool}.txt"), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        done = (run.folder / f"{tool}.txt").read_text().split("\n") if (run.folder / f"{tool}.txt").exists() else []
        detail = f"{len(done) - 1} small calls; sanitizer.log"
        return Outcome(NOT_RUN if status is None else PASSED if status == 0 else FAILED, detail)

    return step


@on_gpu
def grid(run: Run) -> Outcome:
    words = [sys.executable, "-m", "fused_attention.benchmarks.gpu_attention", run.folder / "benchmark.jsonl"]
    status = run.command("benchmark.md", *map(str, words), "--minutes", f"{max(0.0, run.left() / 60 - 1):.1f}")
    return Outcome(
        NOT_RUN if status is None else PASSED if status == 0 else FAILED, "benchmark.md, whose table says which cells were not run"
    )


@on_gpu
def host_cost(run: Run) -> Outcome:
    status = run.command("host-cost.txt", sys.executable, "benchmarks/host_cost.py", "gpu")
    return Outcome(NOT_RUN if status is None else PASSED if status == 0 else FAILED, "host-cost.txt")


@on_gpu
def ways_of_the_backward(run: Run) -> Outcome:
    status = run.command("cuda-backward.txt", sys.executable, "-m", "fused_attention.benchmarks.cuda_backward")
    return Outcome(NOT_RUN if status is None else PASSED if status == 0 else FAILED, "cuda-backward.txt")


PARTS: dict[str, dict[str, Callable[[Run], Outcome]]] = {
    "build": {"build in place": build, "conformance file": conformance, "every CUDA instance": smoke},
    "correctness": {"CUDA kernels": cuda_kernels, "Triton kernels": triton_kernels},
    "sanitizer": {"memcheck": sanitizer("memcheck"), "racecheck": sanitizer("racecheck")},
    "benchmark": {"host's share": host_cost, "ways of the CUDA backward": ways_of_the_backward, "grid": grid},
}


def machine() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return f"{gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}, commit {commit or 'unknown'}"


def summary(outcomes: dict[str, dict[str, Outcome]]) -> str:
    lines = [machine(), "", "| part | step | | |", "| --- | --- | --- | --- |"]
    for part, steps in PARTS.items():
        for step in steps:
            state, detail = outcomes.get(part, {}).get(step, (NOT_RUN, ""))
            lines.append(f"| {part} | {step} | {state} | {detail} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results; what it says was done is not done again")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    parser.add_argument("--minutes", type=float, default=8.0, help="of each part")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "outcomes.json"
    outcomes = {
        part: {step: Outcome(*outcome) for step, outcome in steps.items()}
        for part, steps in (json.loads(state.read_text()) if state.exists() else {}).items()
    }
    for part in options.part or PARTS:
        run = Run(folder, options.minutes)
        for step, function in PARTS[part].items():
            before = outcomes.setdefault(part, {}).get(step)
            if before is not None and before.state == PASSED and step != "build in place":  # ninja knows what is left to build
                continue
            outcomes[part][step] = function(run) if run.left() > 0 else Outcome(NOT_RUN, "out of time")
            state.write_text(json.dumps(outcomes, indent=1))
            print(f"{part}: {step}: {': '.join(outcomes[part][step])}", flush=True)
    table = summary(outcomes)
    (folder / "summary.md").write_text(table + "\n")
    print(table)
    asked = [outcome for part in options.part or PARTS for outcome in outcomes[part].values()]
    return int(any(outcome.state == FAILED for outcome in asked))


if __name__ == "__main__":
    sys.exit(main())
