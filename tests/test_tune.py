"""The tile table as data: candidates, format, and tuning on a machine without a GPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton_offline import offline

from fused_attention.benchmarks import tune
from fused_attention.benchmarks.journal import Journal
from fused_attention.kernels.triton import launch as triton_launch
from fused_attention.kernels.triton.launch import TABLE_FILE, Tile, tile_table


def test_every_row_has_candidates_within_its_class() -> None:
    for family in tune.FAMILIES:
        for row in tune.rows(family):
            tiles = tune.candidates(row)
            assert tiles, row
            assert len(set(tiles)) == len(tiles)
            if row.feature_class != "plain":
                assert all(64 % tile.BLOCK_M == 64 % tile.BLOCK_N == 0 for tile in tiles)


def test_the_table_is_written_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TABLE_FILE", tmp_path / "table.json")
    tune.write_table(tile_table())
    assert (tmp_path / "table.json").read_text() == TABLE_FILE.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tuning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tune", str(tmp_path / "tiles.jsonl")])
    with pytest.raises(SystemExit, match=r"torch sees no GPU.*--choose"):
        tune.main()


ROW, OTHER_ROW = (tune.Row(name, "sm90", "16-bit", 64, "plain") for name in ("forward", "decode"))


def test_the_fastest_tiles_of_a_file_go_into_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tune, "TABLE_FILE", tmp_path / "table.json")
    monkeypatch.setattr(tune, "tile_table", lambda: table)
    table = dict(tile_table())
    before, faster = table[ROW], Tile(32, 32, 4, 1)
    journal = Journal(tmp_path / "tiles.jsonl")
    for row, tile, found in (
        (ROW, before, 2.0), (ROW, Tile(64, 16, 4, 1), "spills 8 registers"), (ROW, faster, 1.0), (ROW, Tile(16, 16, 4, 1), 3.0),
        (OTHER_ROW, Tile(16, 16, 4, 1), 0.1),  # whose present tile was not measured
    ):  # fmt: skip
        journal.keep(tune.key_of(row, tile), found)
    monkeypatch.setattr(sys, "argv", ["tune", str(tmp_path / "tiles.jsonl"), "--apply"])
    assert tune.main() == 0
    assert f"forward sm90 16-bit 64 plain: {tuple(faster)} 1.0000 ms, was {tuple(before)} 2.0000 ms" in capsys.readouterr().out
    written = json.loads((tmp_path / "table.json").read_text())
    expected = json.loads(TABLE_FILE.read_text())
    expected["forward sm90 16-bit 64"]["plain"] = list(faster)
    assert written == expected


def test_rows_are_measured_once_and_what_cannot_be_compiled_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = [Tile(64, 64, 4, 1), Tile(128, 128, 8, 3), Tile(32, 32, 4, 1)]
    ahead = SimpleNamespace(why_not=lambda row, tile: "PTXASError: too much shared memory" if tile == tiles[1] else None)
    run: list[Tile] = []

    def measured(row: tune.Row, tile: Tile, function: object) -> float:
        run.append(tile)
        if tile == tiles[2]:
            raise RuntimeError("CUDA error: out of memory")
        return 1.5

    monkeypatch.setattr(tune, "measure", measured)
    monkeypatch.setattr(tune, "runner", lambda row, problem: None)
    monkeypatch.setattr(tune, "representative", lambda *arguments: None)
    monkeypatch.setattr(tune, "is_lost", lambda: False)
    journal = Journal(tmp_path / "tiles.jsonl")
    tune.measure_rows([(ROW, tile) for tile in tiles], journal, ahead, time.monotonic() + 60)
    assert run == [tiles[0], tiles[2]]
    results = [1.5, "PTXASError: too much shared memory", "RuntimeError: CUDA error: out of memory"]
    assert list(Journal(journal.path).results.values()) == results
    monkeypatch.setattr(tune, "is_lost", lambda: True)
    monkeypatch.setattr(tune.os, "_exit", lambda status: pytest.fail(f"ended with {status}"))
    with pytest.raises(pytest.fail.Exception, match="ended with 3"):
        tune.measure_rows([(ROW, tiles[2])], journal, ahead, time.monotonic() + 60)


@pytest.mark.parametrize("kernel_name", tune.KERNELS)
def test_what_is_compiled_ahead_is_what_is_measured(kernel_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that Triton specialises a kernel on is the same for another length."""
    specialisation, compiled = triton_launch._specialisation, []

    def remembering(*arguments: object) -> tuple:
        compiled.append(specialisation(*arguments))
        return compiled[-1]

    monkeypatch.setattr(triton_launch, "_specialisation", remembering)
    monkeypatch.setattr(triton_launch, "_launch_through_triton", lambda *arguments: None)
    row = tune.Row(kernel_name, "sm90", "16-bit", 64, "plain" if tune.has_class(kernel_name, "plain") else "bias")
    found = []
    for size in (tune.COMPILED, tune.COMPILED._replace(seqlen=512)):
        with offline(arch=90):
            tune.runner(row, tune.representative(row, size, "cpu"))()
        found.append(set(compiled))
        compiled.clear()
    assert found[0] == found[1] != set()
