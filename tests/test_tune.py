"""The tile table as data: candidates, format, and tuning on a machine without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fused_attention.benchmarks import tune
from fused_attention.kernels.triton_launch import TABLE_FILE, tile_table


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
def test_without_a_gpu_tuning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit, match=r"torch sees no GPU.*--choose"):
        tune.main()
