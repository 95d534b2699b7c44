"""Launches Triton kernels, and looks up the tile sizes they run with in triton_tile_table.json."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


class Tile(NamedTuple):
    BLOCK_M: int  # query rows
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int


# The interpreter takes a few milliseconds per tile of any size: small enough that 130 rows are several tiles, and never square.
INTERPRETER_TILES = {"plain": Tile(64, 32, 1, 1), "masked": Tile(32, 64, 1, 1), "bias": Tile(64, 32, 1, 1), "dropout": Tile(32, 64, 1, 1)}

FAMILIES = {80: "sm80", 86: "sm86", 87: "sm80", 89: "sm86", 90: "sm90", 100: "sm100", 103: "sm100", 120: "sm86", 121: "sm86"}
OTHER_FAMILY = "other"  # no measurements and no knowledge of its shared memory: tiles that fit 64 KB

TABLE_FILE = Path(__file__).with_name("triton_tile_table.json")


def tile_for(kernel_name: str, dtype: torch.dtype, head_dim: int, feature_class: str) -> Tile:
    """The tile of a kernel on the current device.

    Args:
        kernel_name: forward, dkdv, dq, dbias, decode or weights.
        head_dim: the padded one, a power of two from 16 to 256; the larger of query's and value's.
        feature_class: plain (full, causal, window and lengths, by loop bounds), masked (tile lists, key_mask, bool mask), bias (float mask,
            softcap, alibi, sinks, gradient of the mask) or dropout.
    """
    if INTERPRETED:
        return INTERPRETER_TILES[feature_class]
    return tile_table()[kernel_name, current_family(), dtype_class(dtype), head_dim, feature_class]


def dtype_class(dtype: torch.dtype) -> str:
    return "fp32" if dtype is torch.float32 else "16-bit"


def current_family() -> str:
    target = triton.runtime.driver.active.get_current_target()
    return FAMILIES.get(target.arch, OTHER_FAMILY) if target.backend == "cuda" else OTHER_FAMILY


@functools.cache
def tile_table() -> dict[tuple[str, str, str, int, str], Tile]:
    """{(kernel, architecture family, dtype class, head_dim, feature class): tile}"""
    table = {}
    for row, tiles in json.loads(TABLE_FILE.read_text()).items():
        kernel_name, family, dtype, head_dim = row.split()
        for feature_class, tile in tiles.items():
            table[kernel_name, family, dtype, int(head_dim), feature_class] = Tile(*tile)
    return table


def launch(
    kernel: Any,
    num_programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    tile: Tile,
) -> None:
    """Runs a kernel whose parameters are tensors, numbers, constexprs and the constexprs BLOCK_M and BLOCK_N, in this order."""
    block_m, block_n, num_warps, num_stages = tile
    kernel[(num_programs,)](*tensors, *numbers, *constants, block_m, block_n, num_warps=num_warps, num_stages=num_stages)
