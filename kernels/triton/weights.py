"""The attention weights themselves in Triton, from the queries, the keys and the lse that a forward gave.

  1. one program makes one tile of weights: scores as in the forward kernel, exp(scores - lse), dropout
  2. averaged over heads it loops over them and sums in float32, so that the weights of single heads are never held
A tile in which no row sees a key is written as zeros without reading anything.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .arguments import common_arguments, feature_class, padded_head_dim, rows_of
from .launch import launch, tile_for
from .parameters import AttnMask, Dropout, KeyMask, MaskBits, RowNumbers, Rows, Scores, Sizes, Slopes, Tiles, Window, kernel
from .tiles import (
    LOG2_E,
    add_bias,
    allowed_pairs,
    dropout_keep,
    key_blocks,
    keys_exist,
    load_tile,
    of_batch,
    of_head,
    sequence_of,
    slope_of,
    tanh,
)


def attention_weights(problem: Problem, lse: Tensor, average_heads: bool) -> Tensor:
    """Weights after dropout in the query's dtype: (B, Hq, Lq, Lk), or their mean over heads (B, Lq, Lk). lse: (B, Hq, Lq)."""
    query, key = problem.query, problem.key
    batch, num_heads, seqlen_q, _ = query.shape
    shape = (batch, 1 if average_heads else num_heads, seqlen_q, key.shape[2])
    if problem.dropout_p == 1.0:
        weights = query.new_zeros(shape)
    else:
        weights = query.new_empty(shape)
        common = common_arguments(problem, None, problem.mask_bits)
        tile = tile_for("weights", query.dtype, padded_head_dim(query.shape[3]), feature_class(problem))
        num_tiles = triton.cdiv(seqlen_q, tile.BLOCK_M) * triton.cdiv(key.shape[2], tile.BLOCK_N)
        if weights.numel():
            launch(
                weights_from_lse,
                shape[0] * shape[1] * num_tiles,
                (query, key, lse.contiguous(), weights, *common.tensors),
                (*rows_of(query), *rows_of(key), *rows_of(lse)[:2], *rows_of(weights), *common.numbers),
                (*common.constants, average_heads),
                tile,
            )
    return weights.squeeze(1) if average_heads else weights


@kernel
def weights_from_lse(
    query: Rows, key: Rows, lse: RowNumbers,
    weights: Rows,  # (B, H or 1, Lq, Lk)
    attn_mask: AttnMask, key_mask: KeyMask, alibi_slopes: Slopes, mask_bits: MaskBits, tiles: Tiles, sizes: Sizes,
    window: Window, scoring: Scores, dropout: Dropout,
    HEAD_DIM_QK: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, AVERAGE_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    HAS_BIAS: tl.constexpr = (attn_mask.data is not None and not attn_mask.IS_BOOL) or alibi_slopes.data is not None
    program = tl.program_id(0).to(tl.int64)
    num_key_blocks = tl.cdiv(sizes.seqlen_k, BLOCK_N)
    num_row_blocks = tl.cdiv(sizes.seqlen_q, BLOCK_M)
    key_block = (program % num_key_blocks).to(tl.int32)
    start_n = key_block * BLOCK_N
    start_m = (program // num_key_blocks % num_row_blocks).to(tl.int32) * BLOCK_M
    batch = program // num_key_blocks // num_row_blocks
    first_head = 0
    last_head = sizes.num_heads
    if not AVERAGE_HEADS:
        first_head = (batch % sizes.num_heads).to(tl.int32)
        last_head = first_head + 1
        batch = batch // sizes.num_heads
    sequence = sequence_of(batch, sizes, window)
    batch_key_mask = of_batch(key_mask, batch)
    rows = start_m + tl.arange(0, BLOCK_M)
    keys = start_n + tl.arange(0, BLOCK_N)
    row_present = rows < sequence.rows_present
    exist = keys_exist(keys, sequence.keys_present, batch_key_mask, key_mask, True)

    blocks = key_blocks(start_m, sequence, window, BLOCK_M, BLOCK_N)
    num_visible_heads = last_head - first_head
    if (start_m >= sequence.rows_present) | (key_block < blocks.first) | (key_block >= blocks.last):
        num_visible_heads = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for head in range(first_head, first_head + num_visible_heads):
        group = head // sizes.heads_per_group
        head_mask = of_head(attn_mask, batch, head)
        head_bits = of_head(mask_bits, batch, head)
        alibi_slope = slope_of(alibi_slopes, batch, head)
        q = load_tile(of_head(query, batch, head), rows, row_present, query.stride_row, HEAD_DIM_QK, BLOCK_DQK, True)
        k = load_tile(of_head(key, batch, group), keys, exist, key.stride_row, HEAD_DIM_QK, BLOCK_DQK, True)
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * scoring.scale  # (BLOCK_M, BLOCK_N)
        if scoring.HAS_SOFTCAP:
            scores = tanh(scores) * scoring.softcap
        if HAS_BIAS:
            scores = add_bias(scores, rows[:, None], keys[None, :], sequence.seqlen_q, sequence, head_mask, attn_mask, alibi_slope, True)
        allowed = allowed_pairs(
            rows[:, None],
            keys[None, :],
            sequence.rows_present,
            sequence,
            exist[None, :],
            window,
            head_mask,
            attn_mask,
            head_bits,
            mask_bits,
        )
        pointers = of_head(lse, batch, head) + rows
        row_lse = tl.load(pointers, mask=row_present, other=float("-inf")).to(tl.float32)
        nothing = row_lse == float("-inf")
        shift = tl.where(nothing, 0.0, row_lse * LOG2_E)
        exponent = tl.minimum(scores - shift[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)  # scores and lse are rounded
        head_weights = tl.where(allowed & ~nothing[:, None], tl.exp2(exponent), 0.0)
        if dropout.rng_state is not None:
            keep = dropout_keep(dropout, batch * sizes.num_heads + head, start_m, start_n, BLOCK_M, BLOCK_N)
            head_weights = tl.where(keep, head_weights, 0.0)
        acc += head_weights

    factor = 1.0
    if AVERAGE_HEADS:
        factor = factor / sizes.num_heads
    if dropout.rng_state is not None:
        factor *= 65536.0 / (65536 - dropout.threshold)
    tile = (acc * factor).to(weights.data.dtype.element_ty)
    pointers = of_head(weights, batch, first_head) + rows[:, None] * weights.stride_row + keys[None, :]
    if start_n + BLOCK_N <= sizes.seqlen_k:  # a mask along rows alone lets stores be wide
        tl.store(pointers, tile, mask=(rows < sequence.seqlen_q)[:, None])
    else:
        tl.store(pointers, tile, mask=(rows < sequence.seqlen_q)[:, None] & (keys < sizes.seqlen_k)[None, :])
