"""Turns a Problem into the arguments every Triton attention kernel takes, in parameter order: AttnMask to Dropout, head dims."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..dropout import dropout_threshold
from ..problem import OptionalTensors, Problem, strides

LOG2_E = math.log2(math.e)
UNLIMITED = 2**30  # a window side that no sequence reaches; sums with it fit an int32


class Arguments(NamedTuple):
    """A kernel's parameters: its pointers, its numbers and its constexprs, without the tile's."""

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[int | float, ...]
    constants: tuple[int | str | bool, ...]


def common_tensors(optional: OptionalTensors, tiles: Tensor | None, mask_bits: Tensor | None) -> tuple[Tensor | None, ...]:
    """tiles and mask_bits as for `common_arguments`."""
    mask, key_mask, key_lengths, query_lengths, alibi_slopes, _, rng_state, cu_seqlens_q, cu_seqlens_k, *_ = optional
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if key_mask is not None:
        key_mask = key_mask.view(torch.uint8)
    return mask, key_mask, alibi_slopes, mask_bits, tiles, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, rng_state


def common_arguments(problem: Problem, tiles: Tensor | None, mask_bits: Tensor | None) -> Arguments:
    """tiles: row_tiles, or column_tiles for a kernel that walks down the rows for a block of keys; mask_bits: the matching bits."""
    query, key = problem.query, problem.key
    attn_mask, key_mask, slopes = problem.attn_mask, problem.key_mask, problem.alibi_slopes
    mask_is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    numbers = (
        *strides(attn_mask, 4),
        *strides(key_mask, 2),
        *((0, slopes.stride(0)) if slopes is not None and slopes.dim() == 1 else strides(slopes, 2)),
        *strides(mask_bits, 3),
        *strides(tiles, 3),
        0 if tiles is None else tiles.shape[3] - 2,
        problem.max_seqlen_q,
        problem.max_seqlen_k,
        query.shape[2],
        key.shape[2],
        query.shape[1],
        query.shape[1] // max(key.shape[1], 1),  # there may be no heads
        *window_numbers(problem),
        problem.scale * LOG2_E if problem.softcap is None else problem.scale / problem.softcap,
        0.0 if problem.softcap is None else problem.softcap * LOG2_E,
        dropout_threshold(problem.dropout_p) if problem.rng_state is not None else 0,
    )
    constants = (
        mask_is_bool,
        *window_constants(problem),
        problem.softcap is not None,
        query.shape[3],
        problem.value.shape[3],
        padded_head_dim(query.shape[3]),
        padded_head_dim(problem.value.shape[3]),
        input_precision(query.dtype),
    )
    return Arguments(common_tensors(problem.optional_tensors(), tiles, mask_bits), numbers, constants)


def window_numbers(problem: Problem) -> tuple[int, int, int]:
    """left, right and diagonal of a Window."""
    left, right = problem.window_left, problem.window_right
    return UNLIMITED if left is None else min(left, UNLIMITED), UNLIMITED if right is None else min(right, UNLIMITED), problem.diagonal


def window_constants(problem: Problem) -> tuple[bool, bool, bool]:
    """HAS_LEFT, HAS_RIGHT and BOTTOM_RIGHT of a Window."""
    return problem.window_left is not None, problem.window_right is not None, problem.bottom_right


def input_precision(dtype: torch.dtype) -> str:
    """The precision of matrix products: torch's setting for float32. The older setting, allow_tf32, is unreadable once this one is set."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def rows_of(tensor: Tensor) -> tuple[int, int, int]:
    """(batch, head, row) strides of a (B, H, L, D) tensor."""
    batch, head, row = strides(tensor, 3)
    return batch, head, row


def padded_head_dim(head_dim: int) -> int:
    """The width of a tile: a power of two, at least the depth of a tensor-core product."""
    return max(16, triton.next_power_of_2(head_dim))


def feature_class(problem: Problem) -> str:
    """The feature class in the tile table: the most expensive feature in a kernel's inner loop."""
    if problem.rng_state is not None:
        return "dropout"
    float_mask = problem.attn_mask is not None and problem.attn_mask.dtype != torch.bool
    if float_mask or problem.softcap is not None or problem.alibi_slopes is not None:
        return "bias"
    return "masked" if needs_tiles(problem) else "plain"


def needs_tiles(problem: Problem) -> bool:
    """Whether lists of full and mixed tiles determine what is visited; otherwise loop bounds do."""
    bool_mask = problem.attn_mask is not None and problem.attn_mask.dtype == torch.bool
    return bool_mask or problem.key_mask is not None or problem.row_tiles is not None
