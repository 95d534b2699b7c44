"""What a run of the benchmarks keeps and prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")
from fused_attention.benchmarks import PYTEST_ARGUMENTS, budget, front_page, report
from fused_attention.benchmarks.benchmark_attention import DTYPES, FEATURES, UNFUSED, Case
from fused_attention.benchmarks.report import Comparison, append, begin, means, read, table

CASE = {"shape": "4", "dtype": "fp32", "feature": "none", "threads": "1"}
CELL = Comparison("a group", CASE, "forward", 1.0, 2.0, "torch", 9, None, "", geomean_bar=1.5)


def test_a_file_gives_back_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert read(file) == {}
    begin(file)
    append(file, "one", CELL)
    begin(file)  # a run that goes on
    append(file, "two", replace(CELL, ours_ms=8.0))
    assert read(file) == {"one": CELL, "two": replace(CELL, ours_ms=8.0)}


def test_means() -> None:
    slower = replace(CELL, ours_ms=4.0, case=CELL.case | {"threads": "2", "feature": "causal"})
    text = means([CELL, slower, replace(CELL, geomean_bar=None)])
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["a", "group"]
    assert ["forward", "fp32", "1", "1", "2.00", "0", "2.00:", "4;", "none"] in lines
    assert ["forward", "fp32", "2", "1", "0.50", "1", "0.50:", "4;", "causal"] in lines
    assert ["forward", "fp32", "all", "2", "1.00", "(below", "1.5)", "1", "0.50:", "4;", "causal"] in lines
    assert means([replace(CELL, geomean_bar=None)]) == ""


def test_the_front_page_reads_what_a_report_writes() -> None:
    backward = replace(CELL, measure="backward", ours_ms=3.0, peer_ms=9.0, bar=2.0, note="a note")
    alone = replace(CELL, case=CELL.case | {"dtype": "bf16"}, bar=3.0)
    text = f"machine\n\n{report.report([CELL, backward, alone, replace(CELL, group='another')])}\n"
    both, forward = front_page.rows(text, CELL.group)
    assert both.case == CELL.case
    assert both.ratio() == pytest.approx((CELL.peer_ms + 9.0) / (CELL.ours_ms + 3.0))
    assert forward == (alone.case, {"forward": alone.ours_ms}, {"forward": alone.peer_ms})
    assert len(front_page.rows(text, "another")) == 1


def test_several_runs_give_the_median(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """And what is far from its bar is not run again."""
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl", "three.jsonl")]
    near, far = replace(CELL, case=CELL.case | {"feature": "causal"}), replace(CELL, peer_ms=100.0)
    begin(files[0])
    append(files[0], "near", near)
    append(files[0], "far", far)
    for file, ours_ms in zip(files[1:], (8.0, 4.0), strict=True):
        monkeypatch.setattr(sys, "argv", ["report", str(files[0]), "--leave", "3", str(file)])
        report.main()
        assert read(file) == {"far": far}
        append(file, "near", replace(near, ours_ms=ours_ms))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["report", *map(str, files)])
    report.main()
    assert table([replace(near, ours_ms=4.0), far]) in capsys.readouterr().out


@pytest.mark.parametrize("feature", [*FEATURES, *UNFUSED])
@pytest.mark.parametrize("shape", [(2, 2, 9, 12, 64), (2, 2, 1, 12, 64)], ids=str)
def test_both_sides_of_a_benchmark_compute_the_same(feature: str, shape: tuple[int, ...]) -> None:
    case = Case(shape, DTYPES["fp32"], feature)
    case.check()
    if feature == "dropout":
        return
    assert torch.allclose(case.run_ours(), case.run_torch(), atol=1e-5)
    ours = case.call("backward", case.run_ours, case.ours)()
    theirs = case.call("backward", case.run_torch, case.torchs)()
    assert len(ours) == len(theirs) == (4 if feature == "bias gradient" else 3)
    for gradient, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(gradient, expected, atol=1e-5)


# Cells for a run of their own: each call advances a clock that stands in for the time, so that no machine is too slow.
CELLS = """
import os, signal, time as real_time, types
import pytest
from fused_attention.benchmarks import budget, conftest

now = 0.0
clock = types.SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now, strftime=real_time.strftime)
budget.time = conftest.time = clock

def taking(seconds):
    def call():
        global now
        now += seconds
    return call

@pytest.mark.parametrize("seconds", [0.1, 30.0, 3.0])
def test_cell(compare, request, seconds):
    if request.config.stash[conftest.BUDGET].started:
        request.config.stash[conftest.BUDGET].started = 0.0
    compare(taking(seconds), taking(2 * seconds), check=lambda: None, group="g", case={"s": str(seconds)}, measure="forward")

def test_later(compare):
    if "INTERRUPT" in os.environ:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore the signal
        os.kill(os.getpid(), signal.SIGINT)
    compare(taking(0.1), taking(0.3), check=lambda: None, group="h", case={"s": "0.1"}, measure="forward")
"""


def run_cells(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest with the benchmarks' conftest on CELLS."""
    (folder / "benchmark_cells.py").write_text(CELLS)
    command = [sys.executable, "-m", "pytest", "-p", "fused_attention.benchmarks.conftest", *PYTEST_ARGUMENTS, "-p", "no:cacheprovider"]
    surroundings = {name: value for name, value in os.environ.items() if name not in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS")}
    return subprocess.run(
        [*command, *arguments, "benchmark_cells.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env=surroundings | environment,
    )


def test_cells_are_printed_and_saved_as_they_end_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    finished = run_cells(tmp_path, "--minutes", "4")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (file,) = (tmp_path / ".benchmarks").iterdir()
    assert f"4 comparisons, 4 minutes at most; each is saved in .benchmarks/{file.name} as it ends" in finished.stdout
    # Of 240 seconds no cell may take a quarter: 7 rounds of 3 + 6 seconds are 63.
    assert set(read(file)) == {"benchmark_cells.py::test_cell[0.1]", "benchmark_cells.py::test_later"}
    assert re.search(r"^ +\d +\d+:\d\d  ratio .* ms, torch 200.000 ms +cell: 0.1; forward$", finished.stdout, re.MULTILINE)
    assert "left out: 2 of 4 comparisons" in finished.stdout
    assert "too slow for 4 minutes: 2\n  cell: 30.0; 3.0\n" in finished.stdout
    assert f"these too: fused-attention bench --results .benchmarks/{file.name} --minutes MINUTES" in finished.stdout

    rest = run_cells(tmp_path, "--minutes", "60", "--results", str(file))
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert len(read(file)) == 4
    assert "left out" not in rest.stdout
    assert rest.stdout.count(" 200.000 ") == 1  # the tables hold the first run's too


def test_an_interrupted_run_says_what_it_has(tmp_path: Path) -> None:
    finished = run_cells(tmp_path, "--results", "r.jsonl", "--minutes", "60", "-k", "later or 0.1", INTERRUPT="1")
    assert finished.returncode == pytest.ExitCode.INTERRUPTED, finished.stdout + finished.stderr
    assert set(read(tmp_path / "r.jsonl")) <= {"benchmark_cells.py::test_cell[0.1]"}
    assert "not reached" in finished.stdout
    assert "these too: fused-attention bench --results r.jsonl" in finished.stdout


def test_a_kill_in_the_middle_of_a_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.jsonl"
    begin(file)
    append(file, "one", CELL)

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fused_attention.transformer.translation.output_files.os.fsync", no_space)
    with pytest.raises(OSError, match="No space left") as error_info:
        append(file, "two", CELL)
    assert error_info.value.filename == str(file)
    assert read(file) == {"one": CELL}


def test_what_pays_on_this_machine_comes_first_and_functions_take_turns() -> None:
    def cells(pays: bool) -> list[tuple[str, str]]:
        items = [
            SimpleNamespace(originalname=name, nodeid=f"{name}[{dtype}-{i}]", callspec=SimpleNamespace(params={"dtype": dtype}))
            for name, count in (("many", 6), ("few", 1))
            for dtype in ("fp32", "bf16")
            for i in range(count)
        ]
        ordered = budget.by_importance(items, reduced_precision_pays=pays)
        assert sorted(item.nodeid for item in ordered) == sorted(item.nodeid for item in items)
        return [(item.originalname, item.callspec.params["dtype"]) for item in ordered]

    without = cells(False)
    assert [dtype for _, dtype in without] == ["fp32"] * 7 + ["bf16"] * 7
    assert {name for name, _ in without[:2]} == {name for name, _ in without[7:9]} == {"many", "few"}
    assert {name for name, _ in cells(True)[:2]} == {"many", "few"}
    assert {dtype for _, dtype in cells(True)[:7]} == {"fp32", "bf16"}


def test_a_cell_that_does_not_end_is_stopped() -> None:
    run = budget.Budget(minutes=0.001)

    def endless() -> None:
        with run.enforced("cell"):
            while True:
                pass

    with pytest.raises(pytest.skip.Exception):
        endless()
    assert run.left_out.keys() == {"cell"}
    with budget.Budget(minutes=None).enforced("cell"):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
