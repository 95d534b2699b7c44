"""The GPU benchmark's grid, its resumable record and its table; its calls on the CPU, where torch has one fused attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fused_attention.benchmarks import gpu_attention
from fused_attention.benchmarks.gpu_attention import Cell, cells, measure, table

TINY = 128  # tokens


def test_the_grid_holds_every_length_head_dim_and_mask() -> None:
    grid = cells()
    assert len(set(grid)) == len(grid)
    for feature in ("full", "causal"):
        wanted = {Cell(feature, length, head_dim) for length in gpu_attention.LENGTHS for head_dim in gpu_attention.HEAD_DIMS}
        assert wanted <= set(grid)
    assert {cell.feature for cell in grid} == set(gpu_attention.FEATURES)
    assert grid[0] == Cell("full", 2048, 64)


def test_flops() -> None:
    """4 B H L^2 D in the forward."""
    cell = Cell("full", 4096, 128)
    assert cell.heads == 16
    assert cell.flops("forward") == 4 * 4 * 16 * 4096**2 * 128
    assert cell._replace(feature="causal").flops("backward") == 2.5 / 2 * cell.flops("forward")


@pytest.mark.parametrize("feature", gpu_attention.FEATURES)
def test_calls_of_every_feature_agree_with_the_formula(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula stands in for our kernels; torch's flash attention is the only peer that a CPU has."""
    attention = gpu_attention.attention
    monkeypatch.setattr(gpu_attention, "attention", lambda *inputs, **options: attention(*inputs, **options | {"backend": "reference"}))
    results = measure(Cell(feature, 64, 64), ("cuda", "triton", "flash", "efficient"), "cpu", 0.0, tokens=TINY)
    assert set(results) == {"cuda", "triton", "flash", "efficient"}
    for ours in ("cuda", "triton"):
        assert results[ours]["forward"] > 0
        assert results[ours]["backward"] > 0
    assert isinstance(results["efficient"], str)
    if feature in ("full", "causal", "bool mask", "key padding", "short, padded"):
        assert results["flash"]["backward"] > 0, results["flash"]


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "attention", lambda query, key, value, **options: value + 0.0 * (query + key))
    results = measure(Cell("full", 64, 64), ("cuda", "flash"), "cpu", 0.0, tokens=TINY)
    assert results["cuda"] != results["flash"]
    assert "differs from cuda" in results["flash"]


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    measured = []

    def fake_measure(cell: Cell, providers: tuple[str, ...], device: str, seconds: float) -> dict:
        measured.append(cell)
        return {name: {"forward": 1.0, "backward": 2.0} for name in providers if name != "flex"} | {"flex": "no compiler"}

    monkeypatch.setattr(gpu_attention, "measure", fake_measure)
    monkeypatch.setattr(gpu_attention, "cells", lambda: [Cell("full", 128, 64), Cell("bias", 512, 64)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    file = tmp_path / "results.jsonl"
    assert gpu_attention.main([str(file), "--minutes", "0"]) == 0
    assert measured == []
    assert "not run" in capsys.readouterr().out
    assert gpu_attention.main([str(file)]) == 0
    assert measured == [Cell("full", 128, 64), Cell("bias", 512, 64)]
    assert '{"machine": {"gpu": "a GPU"' in file.read_text()
    assert gpu_attention.main([str(file)]) == 0
    assert len(measured) == 2
    file.write_text(file.read_text()[:-20])  # a run that was killed while it wrote
    assert gpu_attention.main([str(file)]) == 0
    assert measured[2:] == [Cell("bias", 512, 64)]
    assert len(gpu_attention.load(file)) == 2
    printed = capsys.readouterr().out
    assert "| full | 128 | 64 | 1.0000 | 1.0000 | 1.0000 | 1.0000 | 1.0000 | - |" in printed
    assert "not run" not in printed


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_attention.main([str(tmp_path / "results.jsonl")]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_the_ratio_is_to_the_best_peer() -> None:
    cell = Cell("causal", 2048, 128)
    times = {"cuda": 2.0, "triton": 2.5, "flash": 3.0, "efficient": 9.0, "cudnn": 1.0}
    text = table({cell: {name: {"forward": time, "backward": time} for name, time in times.items()} | {"flex": "-"}}, [cell])
    assert "| 0.50; 1.50 of flash (>= 1) | 0.40; 0.40 of cudnn (below 0.75) |" in text
    assert "| 0.50; 1.50 of flash (>= 1) | 0.40; 0.40 of cudnn (below 0.5) |" in text


def test_a_baseline_of_the_peers_does_not_stand_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def fake_measure(cell: Cell, providers: tuple[str, ...], device: str, seconds: float) -> dict:
        measured.append(providers)
        return {name: {"forward": 1.0, "backward": 2.0} for name in providers}

    monkeypatch.setattr(gpu_attention, "measure", fake_measure)
    monkeypatch.setattr(gpu_attention, "cells", lambda: [Cell("full", 128, 64)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    file = str(tmp_path / "results.jsonl")
    gpu_attention.main([file, "--peers-only"])
    gpu_attention.main([file])
    gpu_attention.main([file, "--peers-only"])
    assert measured == [gpu_attention.PROVIDERS[2:], gpu_attention.PROVIDERS]


def test_bars() -> None:
    full, dropout, deterministic = (Cell(feature, 2048, 64) for feature in ("full", "dropout", "deterministic"))
    fast, slow = {"forward": 1.0, "backward": 2.0}, {"forward": 2.0, "backward": 2.0}
    results = {
        full: {"triton": slow, "cuda": fast, "flash": {"forward": 1.0, "backward": 1.0}},
        dropout: {"triton": {"forward": 4.0, "backward": 2.5}},
        deterministic: {"cuda": {"forward": 9.0, "backward": 2.4}},
    }
    forward, backward = table(results, list(results)).split("## backward")
    assert "1.00; 1.00 of flash (>= 1) | 0.50; 0.50 of flash (below 0.75) |" in forward
    assert "0.50; 0.50 of flash (below 1) | 0.50; 0.50 of flash (>= 0.5) |" in backward
    assert "no peer; 0.50 of its own full (below 0.7) |" in forward
    assert "no peer; 0.80 of its own full (>= 0.7) |" in backward
    assert "own full" not in forward.split("deterministic")[1]
    assert "no peer; 0.83 of its own full (>= 0.82) |" in backward
