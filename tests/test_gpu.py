"""`make gpu` on a machine without a GPU: what it cannot do it says; what was done is not done again."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import attention_calls
import cuda_emulation
import gpu
import pytest
import torch
from attention_calls import FEATURES
from gpu import FAILED, NOT_RUN, PASSED, Outcome, Run

from fused_attention.kernels import cuda_backend

TESTS = Path(__file__).resolve().parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--part", "correctness", "--part", "sanitizer", "--part", "benchmark"])
    assert gpu.main() == 0
    table = (tmp_path / "summary.md").read_text()
    assert table.count("| not run | torch sees no GPU |") == 7
    assert table.count("| not run |") == 10
    assert table.strip() in capsys.readouterr().out


def test_what_passed_is_not_done_again_and_what_failed_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def step(name: str, *states: str):
        left = list(states)
        return lambda run: done.append(name) or Outcome(left.pop(0), "")

    steps = {"good": step("good", PASSED), "bad": step("bad", FAILED, PASSED), "late": step("late", NOT_RUN, PASSED)}
    monkeypatch.setattr(gpu, "PARTS", {"part": steps})
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path)])
    assert [gpu.main() for _ in range(3)] == [1, 0, 0]
    assert done == ["good", "bad", "late", "bad", "late"]
    monkeypatch.setattr(gpu, "PARTS", {"part": steps | {"new": step("new", PASSED)}})
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--minutes", "0"])
    assert gpu.main() == 0
    assert "| part | new | not run | out of time |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_tests_that_passed_are_left_out_of_the_next_run(workers: int, tmp_path: Path) -> None:
    test_file = tmp_path / "test_it.py"
    test_file.write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_skipped(): pytest.skip('never')\n"
        "def test_bad(): assert os.environ['BETTER'] == '1'\n"
    )
    outcomes = []
    for better in "01":
        run = Run(tmp_path, 5.0)
        environment = {"BETTER": better, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        outcomes.append(run.tests("tests", "--rootdir", tmp_path, "-c", os.devnull, test_file, workers=workers, **environment))
    assert [outcome.state for outcome in outcomes] == [FAILED, PASSED]
    records = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    assert sorted(record["state"] for record in records[:3]) == ["failed", "passed", "skipped"]
    assert [(record["test"].split("::")[-1], record["state"]) for record in records[3:]] == [("test_bad", "passed")]


def test_a_program_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    run = Run(tmp_path, 0.0)
    assert run.command("log", sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)") is None
    assert run.command("log", sys.executable, "-c", "print('ended')") == 0


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_tests_on_a_gpu_say_that_they_need_one() -> None:
    run = subprocess.run([sys.executable, "-m", "pytest", TESTS / "on_gpu"], capture_output=True, text=True, cwd=TESTS.parent)
    assert run.returncode != 0
    assert "these tests need a GPU" in run.stdout + run.stderr
