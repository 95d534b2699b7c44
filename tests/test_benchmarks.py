"""What a run of the benchmarks keeps and prints."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
from fused_attention.benchmarks import report
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


def test_the_readme_gets_the_means_and_what_has_a_bar_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file, readme = tmp_path / "results.jsonl", tmp_path / "README.md"
    readme.write_text("before\n```results\nold\n```\nafter\n```sh\nkept\n```\n")
    begin(file)
    append(file, "one", CELL)
    append(file, "two", replace(CELL, group="another", geomean_bar=None, bar=3.0))
    monkeypatch.setattr(sys, "argv", ["report", str(file), "--readme", str(readme)])
    report.main()
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("before\n```results\n")
    assert text.endswith("```\nafter\n```sh\nkept\n```\n")
    assert "2.00 (>= 1.5)" in text
    assert "2.00 (below 3)" in text
    assert table([CELL]) in capsys.readouterr().out


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
