"""`make gpu` on a machine without a GPU: what it cannot do it says, what was done is not done again, nothing is lost or left running."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import attention_calls
import cuda_emulation
import cuda_tools
import gpu
import pytest
import torch
from attention_calls import FEATURES
from gpu import FAILED, NOT_RUN, PARTLY, PASSED, Outcome, Run, Step
from on_gpu.machine import MEASURED, Machine, machine, sources
from on_gpu.processes import family, run_until
from on_gpu.results import Results

from fused_attention.benchmarks import cell
from fused_attention.kernels.native import cuda as cuda_backend

TESTS = Path(__file__).resolve().parent
A_GPU = Machine("a GPU", (9, 0), "torch 2.11", "")
NO_GPU = Machine("", (0, 0), "torch 2.11", "torch sees no GPU")


def new_results(folder: Path, about: str = "a GPU", steps: dict[str, list[str]] | None = None) -> Results:
    files = folder / f"files {time.monotonic_ns()}"
    files.mkdir(parents=True)
    return Results(folder / "out", files, about, "1234567", steps or {"part": ["step"]})


def read_summary(folder: Path) -> str:
    return (folder / "summary.md").read_text()


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as gpu.py asks; nothing is built."""
    monkeypatch.setattr(gpu, "machine", lambda: A_GPU)
    monkeypatch.setattr(gpu, "BUILD", ("part", "build"))


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, steps: dict, *options: str) -> int:
    monkeypatch.setattr(gpu, "PARTS", {"part": {"build": Step(lambda run: Outcome(PASSED, "")), **steps}})
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(folder), *options])
    return gpu.main()


# What is run, and what is said of it


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu, "machine", lambda: NO_GPU)
    steps = gpu.PARTS["build"] | {"build in place": Step(lambda run: Outcome(PASSED, "the CUDA kernels are not built"))}
    monkeypatch.setitem(gpu.PARTS, "build", steps)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path)])
    assert gpu.main() == 0
    table = read_summary(tmp_path)
    assert table.count("| not run | torch sees no GPU |") == sum(map(len, gpu.PARTS.values())) - 1
    assert "| build | build in place | passed | the CUDA kernels are not built |" in table
    assert table.strip() in capsys.readouterr().out


def test_a_first_run_goes_by_importance() -> None:
    order = [step for steps in gpu.PARTS.values() for step in steps]
    assert order[:4] == ["build in place", "conformance file", "20 smoke cells", "grid"]
    assert order[7:10] == ["every CUDA instance", "CUDA kernels", "Triton kernels"]
    assert order[10:] == ["memcheck", "racecheck"]
    assert len(importlib.import_module("on_gpu.test_smoke").CELLS) == 20


def test_every_part_builds_first(a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def step(name: str) -> Step:
        return Step(lambda run: done.append(name) or Outcome(PASSED, ""))

    parts = {"part": {"build": step("build"), "smoke": step("smoke")}, "one": {"a": step("a")}, "two": {"b": step("b")}}
    monkeypatch.setattr(gpu, "PARTS", parts)
    for chosen in ("two", "one"):
        monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--part", chosen])
        assert gpu.main() == 0
    assert done == ["build", "b", "build", "a"]


def test_what_passed_is_not_done_again_and_what_failed_is(a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def step(name: str, *states: str) -> Step:
        left = list(states)
        return Step(lambda run: done.append(name) or Outcome(left.pop(0), ""))

    steps = {"good": step("good", PASSED), "bad": step("bad", FAILED, PASSED), "late": step("late", PARTLY, PASSED)}
    assert [call(monkeypatch, tmp_path, steps) for _ in range(3)] == [1, 0, 0]
    assert done == ["good", "bad", "late", "bad", "late"]
    assert call(monkeypatch, tmp_path, steps | {"new": step("new", PASSED)}, "--minutes", "0") == 0
    assert "| part | new | not run | out of time |" in read_summary(tmp_path)


def test_a_step_that_raises_fails_alone(a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Run) -> Outcome:
        raise FileNotFoundError("no such program")

    assert call(monkeypatch, tmp_path, {"broken": Step(broken), "good": Step(lambda run: Outcome(PASSED, ""))}) == 1
    assert "| part | broken | failed | FileNotFoundError: no such program |" in read_summary(tmp_path)
    assert "| part | good | passed |  |" in read_summary(tmp_path)


def test_a_step_leaves_time_to_those_after_it(a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    step = Step(lambda run: given.append(run.left()) or Outcome(PASSED, ""), 0.5)
    call(monkeypatch, tmp_path, {"first": step, "second": step._replace(share=1.0)}, "--minutes", "4")
    assert given == pytest.approx([120, 240], abs=20)
    assert gpu.PART_SECONDS < 600


def test_the_grid_goes_on_after_a_kernel_that_took_its_process_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, commands = Run(new_results(tmp_path), 600), []
    lines = ['{"begun": [["full", 64, 64, "triton"]]}', '{"key": ["full", 64, 64, "cuda"], "result": {"error": 0, "forward": [1, 1, ""]}}']

    def command(log: str, *words: object, **environment: str) -> int:
        commands.append(words)
        with (run.files / log).open("a") as file:
            print("$ command\n| full | 64 | 64 | not run |" if len(commands) < 3 else "$ command\n| full | 64 | 64 | 0.1 |", file=file)
        with (run.files / "benchmark.jsonl").open("a") as file:
            print("\n".join(lines), file=file)
        return [3, -11, 0][len(commands) - 1]

    monkeypatch.setattr(run, "command", command)
    assert gpu.grid(run) == Outcome(PASSED, "1 calls measured, 0 not run; benchmark.md")
    assert ["--compiled" in words for words in commands] == [False, True, True]


def test_a_benchmark_that_does_not_even_start_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, logs = Run(new_results(tmp_path), 600), []
    monkeypatch.setattr(run, "command", lambda log, *words: logs.append(log) or int((run.files / log).write_text("ImportError") > 0))
    assert gpu.grid(run) == Outcome(FAILED, "0 calls measured, 0 not run; benchmark.md")
    assert gpu.tiles(run) == Outcome(FAILED, "tiles.txt")
    assert logs == ["benchmark.md", "tiles.txt"]


@pytest.mark.parametrize(
    ("status", "said", "outcome"),
    [
        (0, "no errors", Outcome(PASSED, "2 small calls; sanitizer.log")),
        (9, "Invalid __global__ write", Outcome(FAILED, "2 small calls; sanitizer.log")),
        (None, "", Outcome(PARTLY, "2 small calls, out of time; sanitizer.log")),
        (1, "Error: Device not supported", Outcome(NOT_RUN, "compute-sanitizer says: Device not supported")),
    ],
    ids=["right", "wrong", "late", "not here"],
)
def test_what_the_sanitizer_says(status: int | None, said: str, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(new_results(tmp_path), 600)
    (run.files / "memcheck.txt").write_text("a call\nanother\n")
    (run.files / "sanitizer.log").write_text("$ an earlier one\nError: Device not supported\n")

    def command(log: str, *words: object, **environment: str) -> int | None:
        with (run.files / log).open("a") as file:
            print(f"$ {words[0]}\n{said}", file=file)
        return status

    monkeypatch.setattr(gpu, "find_cuda_tool", lambda name: Path("/usr/local/cuda/bin") / name)
    monkeypatch.setattr(run, "command", command)
    assert gpu.sanitizer("memcheck")(run) == outcome


# Results


def test_results_are_two_files_from_which_another_machine_goes_on(tmp_path: Path) -> None:
    first = new_results(tmp_path)
    (first.files / "tests.log").write_text("a log")
    first.outcomes["part"]["step"] = Outcome(PARTLY, "3 passed")
    first.save()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.tar.gz", "summary.md"]
    second = new_results(tmp_path)
    assert (second.files / "tests.log").read_text() == "a log"
    assert second.outcomes == {"part": {"step": Outcome(PARTLY, "3 passed")}}
    assert "a GPU; commit 1234567" in second.text()


def test_of_a_log_without_end_the_end_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("on_gpu.results.MOST_BYTES", 7)
    first = new_results(tmp_path)
    (first.files / "tests.log").write_text("an endless log")
    first.save()
    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        assert archive.extractfile("tests.log").read() == b"ess log"


def test_results_of_other_sources_are_put_aside(tmp_path: Path) -> None:
    for number in range(3):
        results = new_results(tmp_path, about=f"sources {number}")
        assert results.outcomes == {"part": {}}
        results.outcomes["part"]["step"] = Outcome(PASSED, "")
        results.save()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["earlier-1.tar.gz", "earlier-2.tar.gz", "results.tar.gz", "summary.md"]


def test_the_sources_have_a_name_without_git() -> None:
    before = sources()
    assert before == sources()
    new = TESTS.parent / MEASURED[0] / f"new_{os.getpid()}.json"
    try:
        new.write_text("{}")
        assert sources() != before
    finally:
        new.unlink()


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cell.commit() == "unknown (no git)"


def test_a_killed_run_leaves_its_results_and_no_process(tmp_path: Path) -> None:
    """SIGTERM while a step's program runs, which has started another one in a process group of its own."""
    (tmp_path / "step.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "print('begun', child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "main.py").write_text(
        "import sys, gpu\n"
        "from on_gpu.machine import Machine\n"
        "gpu.machine = lambda: Machine('a GPU', (9, 0), '', '')\n"
        "gpu.BUILD = ('part', 'build')\n"
        f"step = lambda run: run.program('step.log', sys.executable, {str(tmp_path / 'step.py')!r})\n"
        "gpu.PARTS = {'part': {'build': gpu.Step(lambda run: gpu.Outcome('passed', '')), 'long': gpu.Step(step)}}\n"
        "sys.exit(gpu.main())\n"
    )
    folder = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "TMPDIR": str(tmp_path)}
    program = subprocess.Popen([sys.executable, tmp_path / "main.py", folder], env=environment, stdout=subprocess.DEVNULL)
    logs: list[Path] = []
    while not (logs and "begun" in logs[0].read_text()):
        time.sleep(0.1)
        logs = list(tmp_path.glob("gpu-results-*/step.log"))
        assert program.poll() is None
    child = int(logs[0].read_text().split("begun")[1])
    assert child in family(program.pid)
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 128 + signal.SIGTERM
    assert family(child) == []
    assert "| part | long | not run | it was under way when the run ended |" in read_summary(folder)
    with tarfile.open(folder / "results.tar.gz") as archive:
        assert "begun" in archive.extractfile("step.log").read().decode()


def test_results_are_saved_while_a_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("on_gpu.processes.TICK_SECONDS", 0.05)
    saved: list[str] = []
    with (tmp_path / "log").open("w") as log:
        words = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(1)"]
        assert run_until(words, 60.0, log, tmp_path, dict(os.environ), lambda: saved.append((tmp_path / "log").read_text())) == 0
    assert len(saved) > 2
    assert saved[-1] == "begun\n"


def test_a_program_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    run = Run(new_results(tmp_path), 0.0)
    sleeping = "import subprocess, time; print(subprocess.Popen(['sleep', '600'], process_group=0).pid, flush=True); time.sleep(600)"
    if sys.version_info < (3, 11):
        sleeping = sleeping.replace("process_group=0", "start_new_session=True")
    run.limit(600)
    run.call_end = run.end = time.monotonic() + 3.0
    assert run.command("log", sys.executable, "-c", sleeping) is None
    child = int((run.files / "log").read_text().splitlines()[-1])
    assert family(child) == []
    run.call_end = run.end = time.monotonic() + 60.0
    assert run.command("log", sys.executable, "-c", "print('ended')") == 0


# Tests


def run_tests(folder: Path, text: str, workers: int, *words: str, **environment: str) -> Outcome:
    folder.mkdir(exist_ok=True)
    test_file = folder / "test_it.py"
    test_file.write_text(text)
    environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = Run(new_results(folder), 300.0)
    words = ("--rootdir", str(folder), "-c", os.devnull, *(("-p", "xdist.plugin") if workers > 1 else ()), *words)
    outcome = run.tests("tests", *words, test_file, workers=workers, **environment)
    run.results.save()
    return outcome


def records(folder: Path) -> list[dict]:
    with tarfile.open(folder / "out/results.tar.gz") as archive:
        return [json.loads(line) for line in archive.extractfile("tests.jsonl").read().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_tests_that_passed_are_left_out_of_the_next_run(workers: int, tmp_path: Path) -> None:
    text = "import os, pytest\ndef test_good(): pass\ndef test_bad(): assert os.environ['BETTER'] == '1'\n"
    outcomes = [run_tests(tmp_path, text, workers, BETTER=better) for better in "01"]
    assert outcomes == [
        Outcome(FAILED, "1 passed, 1 failed, 0 not run; tests.log"),
        Outcome(PASSED, "2 passed, 0 failed, 0 not run; tests.log"),
    ]
    ended = [(record["test"].split("::")[-1], record["state"]) for record in records(tmp_path) if "test" in record]
    assert sorted(ended[:2]) == [("test_bad", "failed"), ("test_good", "passed")]
    assert ended[2:] == [("test_bad", "passed")]


def test_what_was_skipped_was_not_run(tmp_path: Path) -> None:
    text = "import pytest\ndef test_good(): pass\ndef test_skipped(): pytest.skip('never')\n"
    for _ in range(2):
        assert run_tests(tmp_path, text, 1) == Outcome(PARTLY, "1 passed, 0 failed, 1 not run; tests.log")
    text = text.replace("def test_good(): pass\n", "").replace("test_skipped", "test_other")
    assert run_tests(tmp_path / "other", text, 1) == Outcome(NOT_RUN, "0 passed, 0 failed, 1 not run; tests.log")


def test_a_test_that_hangs_or_loses_the_gpu_ends_its_worker_and_no_other_test(tmp_path: Path) -> None:
    text = (
        "import sys, time, types\n"
        "cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: None)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
        "def broken(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_hangs(): time.sleep(600)\n"
        "def test_loses_the_gpu(): cuda.synchronize = broken; broken()\n"
        + "".join(f"def test_good_{number}(): cuda.synchronize()\n" for number in range(4))
    )
    outcome = run_tests(tmp_path, text, 2, "--limit-seconds", "3")
    assert outcome == Outcome(FAILED, "4 passed, 2 failed, 0 not run; tests.log")


def test_an_instance_that_no_profiler_saw_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    instances = importlib.import_module("on_gpu.test_cuda_instances")
    row, *others = instances.TILED
    for names in (set(), {"ampere_bf16_gemm", f"{row.name}_of_something_else"}):
        monkeypatch.setattr(instances, "launched", lambda row, names=names: names)
        with pytest.raises(AssertionError, match="the profiler saw none of our kernels"):
            instances.test_instance(row)
    monkeypatch.setattr(instances, "launched", lambda row: {others[0].name})
    with pytest.raises(pytest.skip.Exception, match="this GPU's plan takes other kernels"):
        instances.test_instance(row)
    monkeypatch.setattr(instances, "launched", lambda row: {row.name, "ampere_bf16_gemm"})
    instances.test_instance(row)


# The machine


def test_the_machine_is_asked_without_holding_it() -> None:
    machine.cache_clear()
    found = machine()
    assert f"torch {torch.__version__}" in found.versions
    assert bool(found.gpu) == torch.cuda.is_available()
    assert (found.why_not == "") == bool(found.gpu)


def test_a_torch_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("on_gpu.machine.QUESTION", "raise SystemExit('libcudart.so.13: cannot open')")
    machine.cache_clear()
    assert machine().why_not == "torch does not say whether it sees a GPU: libcudart.so.13: cannot open"
    machine.cache_clear()


def test_programs_of_the_toolkit_are_found_where_they_usually_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tools, "USUAL_FOLDER", tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert cuda_tools.find_cuda_tool("compute-sanitizer-of-a-test") is None
    for folder in ("compute-sanitizer", "bin"):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "compute-sanitizer-of-a-test"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert cuda_tools.find_cuda_tool("compute-sanitizer-of-a-test") == program
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    (home / "bin/compute-sanitizer-of-a-test").symlink_to(program)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert cuda_tools.find_cuda_tool("compute-sanitizer-of-a-test") == home / "bin/compute-sanitizer-of-a-test"


def test_the_smoke_cells_are_what_their_backends_cover() -> None:
    smoke = importlib.import_module("on_gpu.test_smoke")
    for backend, kind in smoke.CELLS:
        problem, _, _ = attention_calls.build(smoke.call_of(kind), "cpu")
        assert smoke.BACKENDS[backend].uncovered(problem) == [], (backend, kind)


# What needs the compiled kernels, in the emulator


@pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))
def test_the_calls_for_the_sanitizer_run_in_the_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_calls = importlib.import_module("on_gpu.small_calls")
    monkeypatch.setattr(small_calls, "BACKENDS", {"cuda": small_calls.cuda_backend})
    monkeypatch.setattr(small_calls, "HEAD_DIMS", {"cuda": (64,)})
    monkeypatch.setattr(small_calls, "FEATURES", {name: FEATURES[name] for name in ("window", "dropout")})
    monkeypatch.setattr(small_calls, "build", lambda call, device: attention_calls.build(call, "cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(sys, "argv", ["small_calls.py", str(tmp_path / "done")])
    for _ in range(2):
        with cuda_emulation.EmulatedGpu():
            small_calls.main()
    assert (tmp_path / "done").read_text().splitlines() == ["cuda, head_dim 64: window", "cuda, head_dim 64: dropout"]


@pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))
def test_the_smoke_run_reaches_every_instance() -> None:
    instances = importlib.import_module("on_gpu.test_cuda_instances")
    h100 = cuda_emulation.Gpu(90, 132, 227 * 1024)
    missed = []
    for row in instances.TILED:
        problem, dout, dlse = attention_calls.build(instances.call_of(row), "cpu")
        with cuda_emulation.EmulatedGpu(0, h100, kernels="none of them", backward=instances.backward_of(row)) as emulated:
            attention_calls.run(cuda_backend, problem, dout, dlse)
        if row.name not in [name for name, _ in emulated.planned]:
            missed.append(row.name)
    assert missed == []


@pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))
def test_the_smoke_cells_of_the_cuda_kernels_run_on_them() -> None:
    smoke = importlib.import_module("on_gpu.test_smoke")
    launched: set[str] = set()
    for kind in smoke.KINDS:
        problem, dout, dlse = attention_calls.build(smoke.call_of(kind), "cpu")
        with cuda_emulation.EmulatedGpu(0, cuda_emulation.Gpu(90, 132, 227 * 1024), kernels="none of them") as emulated:
            attention_calls.run(cuda_backend, problem, dout, dlse)
        launched |= {name for name, _ in emulated.planned}
    for kernel in ("single_tile_forward", "single_tile_backward"):
        assert any(name.startswith(f"sm80_{kernel}_") for name in launched), kernel


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_tests_on_a_gpu_say_that_they_need_one() -> None:
    run = subprocess.run([sys.executable, "-m", "pytest", TESTS / "on_gpu"], capture_output=True, text=True, cwd=TESTS.parent)
    assert run.returncode != 0
    assert "these tests need a GPU" in run.stdout + run.stderr
