"""What a run of the benchmarks keeps and prints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
from fused_attention.benchmarks import (
    attention_case,
    benchmark_attention,
    benchmark_cross,
    benchmark_decode,
    benchmark_module,
    benchmark_overhead,
    benchmark_short,
    benchmark_weights,
    budget,
    conftest,
    isa,
    peers,
    report,
    surroundings,
    yardsticks,
)
from fused_attention.benchmarks import benchmark_masks as masks
from fused_attention.benchmarks.attention_case import BOTH, FORWARD, LAYOUTS, Case, Shape
from fused_attention.benchmarks.cell import OURS, Cell, Time, UnusableFile, append, begin, read, summary
from fused_attention.benchmarks.command import PYTEST_ARGUMENTS, main

CASE = {"tokens": "4", "dtype": "fp32", "threads": "1"}


def time_of(ms: float) -> Time:
    return Time(ms, 0.9 * ms, 1.1 * ms, 9, 12.0)


CELL = Cell("a suite", CASE, FORWARD, {OURS: time_of(1.0), "torch": time_of(2.0)}, {"other": "not installed"}, 50.0, "GFLOP/s", 80e3)


def timed(ours_ms: float, **case: str) -> Cell:
    return replace(CELL, times=CELL.times | {OURS: time_of(ours_ms)}, case=CASE | case)


def test_a_file_gives_back_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    begin(file, "avx2")
    append(file, "one", CELL)
    begin(file)  # a run that goes on
    append(file, "two", timed(8.0))
    assert read(file).cells == {"one": CELL, "two": timed(8.0)}
    assert read(file).facts["isa"] == "avx2"
    assert read(file).facts["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", '{"machine": 1}\n{"name": 1}\n', "\x00"], ids=repr)
def test_a_file_of_something_else_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(text)
    with pytest.raises(UnusableFile, match="results.jsonl is not a file of benchmark results"):
        read(file)


def test_rates_ratios_and_noise() -> None:
    assert summary([3e-3, 1e-3, 2e-3]) == Time(2.0, 1.5, 2.5, 3)
    assert summary([3e-3]) == Time(3.0, 3.0, 3.0, 1)
    assert CELL.ratios() == {"torch": 2.0}
    assert CELL.noise("torch") == pytest.approx(0.2)
    assert (CELL.rate(), CELL.rate("torch")) == (50e3, 25e3)  # 50 GFLOP in a millisecond
    assert CELL.share() == pytest.approx(50 / 80)


def test_the_table_has_what_was_measured_and_says_what_was_not() -> None:
    best = replace(CELL, times=CELL.times | {"OpenVINO": time_of(0.5)}, busy="3.0 other tasks ran", bars={"torch": 2.5, "OpenVINO": 0.4})
    lines = report.report([CELL, best, replace(CELL, suite="another")]).splitlines()
    titles = "tokens dtype threads measure ours ms +-% rate of roof x torch x OpenVINO x best peak MB"
    assert lines[0] == "a suite"
    assert lines[1].split() == titles.split()
    assert lines[2].split() == ["4", "fp32", "1", "forward", "1.000", "10", "50000", "GFLOP/s", "62%", "2.00", "-", "12"]
    assert lines[3].split() == [
        "4",
        "fp32",
        "1",
        "forward",
        "1.000",
        "10",
        "50000",
        "GFLOP/s",
        "62%",
        "2.00",
        "(below",
        "2.5)",
        "0.50",
        "(>=",
        "0.4)",
        "0.50",
        "12",
        "busy",
    ]
    assert "another" in lines
    assert "no time: other, in 3 cells: not installed" in lines
    assert "busy machine in 1 of 3 cells, such as: 3.0 other tasks ran" in lines


def test_means() -> None:
    best = {"OpenVINO": time_of(0.4)}
    lines = report.means([CELL, replace(timed(4.0, tokens="8"), times={OURS: time_of(4.0), "torch": time_of(2.0)} | best)]).splitlines()
    found = [" ".join(line.split()) for line in lines]
    assert "a suite forward fp32 torch 2 1.00 1 0.50 8; 1" in found
    assert "a suite forward fp32 OpenVINO 1 0.10 1 0.10 8; 1" in found
    assert "a suite forward fp32 best 2 0.45 1 0.10 8; 1" in found
    assert report.means([replace(CELL, times={OURS: time_of(1.0)})]) == ""


def test_several_runs_give_the_median(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """And what is far from its bar is not run again."""
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl", "three.jsonl")]
    far = timed(0.01, tokens="8")
    begin(files[0])
    append(files[0], "near", CELL)
    append(files[0], "far", far)
    for file, ours_ms in zip(files[1:], (8.0, 4.0), strict=True):
        monkeypatch.setattr(sys, "argv", ["report", str(files[0]), "--leave", "3", str(file)])
        report.main()
        assert read(file).cells == {"far": far}
        append(file, "near", timed(ours_ms))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["report", *map(str, files)])
    report.main()
    assert report.tables([timed(4.0), far]) in capsys.readouterr().out


def test_a_saved_run_becomes_a_page_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench plot`, from the file alone: every kind of plot, both themes, and what a reader must not have to guess."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "run.jsonl"
    begin(file)
    for length in (64, 512):
        append(
            file,
            f"attention {length}",
            replace(CELL, suite="attention", case=CASE | {"tokens": str(length), "layout": "BLHD"}, work=0.05, traffic=0.01, roof=80.0),
        )
    for batch in (1, 8):
        case = {"batch": str(batch), "dtype": "fp32", "threads": "1"}
        append(
            file,
            f"decode {batch}",
            replace(CELL, suite="decode <&>", case=case, unit="GB/s", gflop=0.01, traffic=0.02, busy="2.0 other tasks ran"),
        )
        append(file, f"tokens {batch}", replace(CELL, suite="model", case=case, unit="tokens/s", work=64.0, roof=None))
    assert main(["plot", str(file)]) == 0
    page = file.with_suffix(".html").read_text()
    assert page.count("<svg") == 4
    titles = ("Speed by length", "Roofline", "Memory", "Decoding", "Ratios", "Means")
    assert [title for title in titles if f"<h2>{title}</h2>" not in page] == []
    for text in (
        "prefers-color-scheme: dark",
        "width=device-width",
        "GFLOP/s",
        "operations a byte",
        "tokens/s",
        "decode &lt;&amp;&gt;",
        "2.0 other tasks",
    ):
        assert text in page
    for reference in ("http:", "https:", "src=", "<script"):
        assert reference not in page.replace('xmlns="http:', "").replace('xmlns:xlink="http:', "")
    lines = file.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * len(read(file).cells)  # ours, torch, and what is missing
    assert "attention,tokens 64; dtype fp32; threads 1; layout BLHD,forward,torch,2.0,1.8,2.2" in lines[2]
    assert len(json.loads(file.with_suffix(".json").read_text())["cells"]) == len(read(file).cells)


@pytest.mark.parametrize(("ours_ms", "status"), [(1.0, 0), (1.3, 0), (1.9, 1)])
def test_a_ratio_that_fell_by_more_than_its_noise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ours_ms: float, status: int
) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    for file, cell in ((old, CELL), (new, timed(ours_ms))):
        begin(file)
        append(file, "one", cell)
    monkeypatch.setattr(pytest, "main", lambda arguments: 0)
    monkeypatch.setattr("fused_attention.benchmarks.command.write_all", lambda path: [])
    assert main(["--against", str(old), "--results", str(new)]) == status
    assert ("a suite; 4; fp32; 1; forward: 1.05x torch, was 2.00x (noise 40%)" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize("content", [None, "", "another"], ids=["absent", "empty", "of other cells"])
def test_a_file_that_nothing_can_be_compared_with_is_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    begin(new)
    append(new, "one", CELL)
    if content is not None:
        old.write_text(new.read_text().replace('"one"', '"another"') if content else "")
    monkeypatch.setattr(pytest, "main", lambda arguments: 0)
    monkeypatch.setattr("fused_attention.benchmarks.command.write_all", lambda path: [])
    assert main(["--against", str(old), "--results", str(new)]) == 2
    assert "fused-attention bench: " in capsys.readouterr().err


SIDES = [name for name in peers.MAKERS if name != peers.FLEX]  # which compiles for seconds
SHAPE = Shape(2, 2, 9, 12, 64)


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("mask", ["none", "causal", *masks.MASKS])
def test_every_side_is_right_or_says_why_it_does_not_run(name: str, mask: str) -> None:
    shape = Shape(2, 2, 9, 9, 64) if mask == "causal" else SHAPE
    options = {"none": {}, "causal": {"is_causal": True}}.get(mask) or (masks.options_of(mask, shape) if mask != "none" else {})
    for layout in LAYOUTS:
        for measure in (FORWARD, BOTH):
            case = Case(shape, torch.float32, layout, measure, 1, **options)
            found = case.sides(flex=False)[name]
            if isinstance(found, str):
                assert name not in peers.DIFFERENTIABLE
                assert any(
                    word in found for word in ("not installed", "has no backward", "takes (B, L, H, D) memory only", "has no dropout")
                )
                continue
            results = found()
            case.check(name, results)
            assert len(results) == (1 if measure == FORWARD else 5 if "gradient" in mask else 4)
            if mask != "dropout":
                wrong = [result.detach().clone() for result in results]
                wrong[-1][-1, -1, -1, -1] += wrong[-1].abs().max()
                with pytest.raises(AssertionError, match="differs from float64"):
                    case.check(name, tuple(wrong))


# The smallest cell of every suite that is not tested otherwise.
SMALL_CELLS = {
    "attention": lambda cell: benchmark_attention.test_attention(cell, "causal", 64, 128, "BLHD", 1, "fp32", "both"),
    "cross": lambda cell: benchmark_cross.test_cross(cell, (512, 64), "BLHD", 1, "bf16", "forward"),
    "decode": lambda cell: benchmark_decode.test_decode(cell, 1, 512, "BHLD", 1, "fp32"),
    "module": lambda cell: benchmark_module.test_training(cell, 2, 16, "fp32", "self, key padding"),
    "overhead": lambda cell: benchmark_overhead.test_overhead(cell, "gradient"),
    "short": lambda cell: benchmark_short.test_short(cell, "texts of 4", 32, "BLHD", 1, "fp32", "forward"),
    "weights": lambda cell: benchmark_weights.test_weights(cell, 64, 1, "fp32"),
}


@pytest.mark.parametrize("suite", SMALL_CELLS)
def test_every_suite_checks_what_it_times(suite: str) -> None:
    """Each side of a cell returns what its check wants, twice; the check sees a wrong result, and the parameters place the cell."""
    cells = []

    def measure_cell(sides: dict[str, Any], *, check: Any, suite: str, case: dict[str, str], kind: str, **options: Any) -> None:
        for side, function in sides.items():
            if isinstance(function, str):
                continue
            result = function()
            check(side, result)
            wrong = [1.5 * tensor for tensor in result] if isinstance(result, list | tuple) else 1.5 * result
            with pytest.raises(AssertionError):
                check(side, type(result)(wrong) if isinstance(result, tuple) else wrong)
            function()
        cells.append((suite, {OURS, "torch"} <= sides.keys(), options.get("work", 0.0) >= 0))

    SMALL_CELLS[suite](measure_cell)
    ((name, both, works),) = cells
    assert (name.startswith(suite), both, works) == (True, True, True)


def test_what_cannot_be_kept_to_an_instruction_set_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.OUR_VARIABLE, raising=False)
    available = ["avx512", "avx2", "base"]
    assert isa.reason_against("onnxruntime", available) is None
    monkeypatch.setenv(isa.OUR_VARIABLE, "avx2")
    assert "cannot be kept to avx2" in str(isa.reason_against("onnxruntime", available))
    assert isa.reason_against("torch", available) is isa.reason_against("onnxruntime", ["avx2", "base"]) is None
    monkeypatch.setattr(peers.cpu, "instruction_sets", lambda: ("avx2", available))
    case = Case(SHAPE, torch.float32, "BLHD", FORWARD, 1)
    assert "cannot be kept to avx2" in str(case.sides(flex=False)["onnxruntime MHA"])


@pytest.mark.parametrize("name", isa.INSTRUCTION_SETS)
def test_a_restricted_run_has_every_library_restricted(name: str) -> None:
    """Asked of a process with these variables: torch's capability and ours are the wanted ones, or what the machine has below them."""
    _, available = peers.cpu.instruction_sets()
    if name not in available:
        pytest.skip(f"no {name} here")
    program = (
        "import torch; from fused_attention.kernels.native import cpu; "
        "print(torch.backends.cpu.get_cpu_capability(), cpu.instruction_sets()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | isa.environment(name), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["AVX2" if name == "avx2" else "AVX512", name]


def test_peak_memory_is_that_of_the_call() -> None:
    if not surroundings.RESET.exists():
        pytest.skip("no /proc/self/clear_refs")

    def call() -> int:
        return len(b"1" * 50_000_000)  # freed as it ends

    result, peak = surroundings.peak_mb(call)
    assert result == 50_000_000
    if peak is None:
        pytest.skip("the system does not let a process reset its peak")
    assert 45 < peak < 80


def test_a_busy_machine_is_recognized() -> None:
    steady, drifting = Time(1.0, 0.99, 1.01, 9), Time(1.0, 0.8, 1.2, 9)
    assert surroundings.busy([0, 0, 1], steady) == ""
    assert surroundings.busy([2, 3, 1], steady) == "2.0 other tasks ran"
    assert surroundings.busy([0], drifting) == "the same product or copy varied by 20%"
    assert surroundings.busy([], None) == ""


def test_yardsticks_do_the_work_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardsticks, "SIDE", 64)
    yardsticks._product.cache_clear()
    run, work = yardsticks.product(torch.float32)
    assert run().shape == (64, 64)
    assert work == 2e-9 * 64**3
    yardsticks._product.cache_clear()


def test_work_is_that_of_the_products() -> None:
    assert attention_case.gflop(Shape(2, 3, 5, 7, 11), FORWARD) == pytest.approx(1e-9 * 4 * 2 * 3 * 5 * 7 * 11)
    assert attention_case.gflop(Shape(1, 1, 8, 8, 64), BOTH, 0.5) == pytest.approx(1e-9 * 14 * 64 * 64 / 2)


# Cells for a run of their own: each call advances a clock that stands in for the time, so that no machine is too slow.
CELLS = """
import os, signal, time as real_time, types
import pytest
from fused_attention.benchmarks import budget, conftest

now = 0.0
clock = types.SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now, strftime=real_time.strftime)
budget.time = conftest.time = clock
conftest.surroundings.peak_mb = lambda function: (function(), None)

def taking(seconds):
    def call():
        global now
        now += seconds
    return call

@pytest.mark.parametrize("seconds", [0.1, 30.0, 3.0])
def test_cell(measure_cell, request, seconds):
    if request.config.stash[conftest.BUDGET].started:
        request.config.stash[conftest.BUDGET].started = 0.0

    def check(side, result):
        assert side != "wrong", "off by one"

    def breaks():
        raise RuntimeError("no such thing")

    sides = {"ours": taking(seconds), "torch": taking(2 * seconds), "wrong": taking(1), "broken": breaks, "absent": "not installed"}
    measure_cell(sides, check=check, suite="g", case={"s": str(seconds)}, kind="forward")

def test_later(measure_cell):
    if "INTERRUPT" in os.environ:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore the signal
        os.kill(os.getpid(), signal.SIGINT)
    sides = {"ours": taking(0.1), "torch": taking(0.3)}
    measure_cell(sides, check=lambda side, result: None, suite="h", case={"s": "0.1"}, kind="forward")
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
    assert f"4 cells, 4 minutes at most; each is saved in .benchmarks/{file.name} as it ends" in finished.stdout
    # Of 240 seconds no cell may take a quarter: 3 rounds of 30 + 60 seconds are more; of 3 + 6 seconds there are fewer rounds than 7.
    cells = read(file).cells
    named = "benchmark_cells.py::test_"
    assert set(cells) == {f"{named}cell[0.1]", f"{named}cell[3.0]", f"{named}later"}
    assert cells[f"{named}cell[0.1]"].times["torch"].rounds == 7
    assert 3 <= cells[f"{named}cell[3.0]"].times["torch"].rounds < 7
    assert cells[f"{named}cell[0.1]"].missing == {
        "wrong": "wrong: off by one", "broken": "RuntimeError: no such thing", "absent": "not installed",
    }  # fmt: skip
    assert re.search(r"^\[[#.]{10}\] \d/4  \d+:\d\d left  g: 0.1; forward: .* ms  .*x torch$", finished.stdout, re.MULTILINE)
    assert "left out: 1 of 4 cells" in finished.stdout
    assert "too slow for 4 minutes: 1\n  cell: 30.0\n" in finished.stdout
    assert f"these too: fused-attention bench --results .benchmarks/{file.name} --minutes MINUTES" in finished.stdout

    rest = run_cells(tmp_path, "--minutes", "60", "--results", str(file))
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert len(read(file).cells) == 4
    assert "left out" not in rest.stdout
    assert "\n3.0 " in rest.stdout  # the tables hold the first run's too


def test_parameters_are_chosen() -> None:
    def item(**parameters: object) -> Any:
        return SimpleNamespace(callspec=SimpleNamespace(params=parameters), nodeid=str(parameters), get_closest_marker=lambda name: None)

    found: dict[str, Any] = {"only": ["dtype=fp32", "length=64,512"], "grid": "full"}
    stash = {conftest.CELLS: {}, conftest.BUDGET: budget.Budget(None)}
    config: Any = SimpleNamespace(
        getoption=lambda name: found[name.strip("-")], stash=stash, hook=SimpleNamespace(pytest_deselected=lambda items: None)
    )
    items = [item(dtype=dtype, length=length) for dtype in ("fp32", "bf16") for length in (64, 128, 512)] + [item(dtype="fp32")]
    wanted = [items[0], items[2]]
    conftest.pytest_collection_modifyitems(config, items)
    assert items == wanted
    found["only"] = ["dtype"]
    with pytest.raises(pytest.UsageError, match="--only dtype"):
        conftest.pytest_collection_modifyitems(config, items)


def test_an_interrupted_run_says_what_it_has(tmp_path: Path) -> None:
    finished = run_cells(tmp_path, "--results", "r.jsonl", "--minutes", "60", "-k", "later or 0.1", "--peers", "absent", INTERRUPT="1")
    assert finished.returncode == pytest.ExitCode.INTERRUPTED, finished.stdout + finished.stderr
    for name, cell in read(tmp_path / "r.jsonl").cells.items() if (tmp_path / "r.jsonl").exists() else []:
        assert name == "benchmark_cells.py::test_cell[0.1]"
        assert (list(cell.times), cell.missing) == ([OURS], {"absent": "not installed"})  # the peers that were asked for
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
    assert read(file).cells == {"one": CELL}


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
