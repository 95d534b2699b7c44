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
from .arguments import common_arguments, feature_class, kernel, padded_head_dim, rows_of
from .launch import launch, tile_for
from .tiles import LOG2_E, add_bias, allowed_pairs, dropout_keep, key_blocks, keys_exist, load_tile, sequence_sizes, tanh


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
                (query, key, lse, weights, *common.tensors),
                (*rows_of(query), *rows_of(key), *lse.stride(), *rows_of(weights), *common.numbers),
                (*common.constants, average_heads),
                tile,
            )
    return weights.squeeze(1) if average_heads else weights


@kernel
def weights_from_lse(
    query, key,  # (B, H, L, D)
    lse,  # (B, H, Lq)
    weights,  # (B, H or 1, Lq, Lk)
    attn_mask, key_mask, key_lengths, query_lengths, alibi_slopes, rng_state, cu_seqlens_q, cu_seqlens_k, mask_bits, tiles,
    stride_query_batch: tl.int64, stride_query_head: tl.int64, stride_query_row: tl.int64,
    stride_key_batch: tl.int64, stride_key_head: tl.int64, stride_key_row: tl.int64,
    stride_lse_batch: tl.int64, stride_lse_head: tl.int64, stride_lse_row: tl.int64,
    stride_weights_batch: tl.int64, stride_weights_head: tl.int64, stride_weights_row: tl.int64,
    stride_mask_batch: tl.int64, stride_mask_head: tl.int64, stride_mask_row: tl.int64, stride_mask_key,
    stride_key_mask_batch: tl.int64, stride_key_mask_key,
    stride_slopes_batch: tl.int64, stride_slopes_head: tl.int64,
    stride_bits_batch: tl.int64, stride_bits_head: tl.int64, stride_bits_line: tl.int64,
    stride_tiles_batch: tl.int64, stride_tiles_head: tl.int64, stride_tiles_line: tl.int64, num_tiles: tl.int32,
    seqlen_q: tl.int32, seqlen_k: tl.int32, num_tokens_q: tl.int32, num_tokens_k: tl.int32,
    num_heads: tl.int32, heads_per_group: tl.int32,
    score_scale: tl.float32, softcap_log2: tl.float32, window_left: tl.int32, window_right: tl.int32, diagonal: tl.int32,
    dropout_threshold: tl.int32,
    HEAD_DIM_QK: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr, INPUT_PRECISION: tl.constexpr, AVERAGE_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    HAS_BIAS: tl.constexpr = (attn_mask is not None and not MASK_IS_BOOL) or alibi_slopes is not None
    program = tl.program_id(0).to(tl.int64)
    num_key_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    num_row_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    key_block = (program % num_key_blocks).to(tl.int32)
    start_n = key_block * BLOCK_N
    start_m = (program // num_key_blocks % num_row_blocks).to(tl.int32) * BLOCK_M
    batch = program // num_key_blocks // num_row_blocks
    first_head = 0
    last_head = num_heads
    if not AVERAGE_HEADS:
        first_head = (batch % num_heads).to(tl.int32)
        last_head = first_head + 1
        batch = batch // num_heads
    _, _, seqlen_q, rows_present, keys_present, offset = sequence_sizes(
        batch, seqlen_q, seqlen_k, num_tokens_q, num_tokens_k, query_lengths, key_lengths, None, None, diagonal, BOTTOM_RIGHT
    )
    query += batch * stride_query_batch
    key += batch * stride_key_batch
    lse += batch * stride_lse_batch
    weights += batch * stride_weights_batch + first_head * stride_weights_head
    if key_mask is not None:
        key_mask += batch * stride_key_mask_batch
    rows = start_m + tl.arange(0, BLOCK_M)
    keys = start_n + tl.arange(0, BLOCK_N)
    row_present = rows < rows_present
    exist = keys_exist(keys, keys_present, key_mask, stride_key_mask_key, True)

    first, _, _, last = key_blocks(
        start_m, rows_present, keys_present, offset, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    num_visible_heads = last_head - first_head
    if (start_m >= rows_present) | (key_block < first) | (key_block >= last):
        num_visible_heads = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for head in range(first_head, first_head + num_visible_heads):
        group = head // heads_per_group
        head_mask = attn_mask
        if attn_mask is not None:
            head_mask = attn_mask + batch * stride_mask_batch + head * stride_mask_head
        head_bits = mask_bits
        if mask_bits is not None:
            head_bits = mask_bits + batch * stride_bits_batch + head * stride_bits_head
        alibi_slope = 0.0
        if HAS_ALIBI:
            alibi_slope = tl.load(alibi_slopes + batch * stride_slopes_batch + head * stride_slopes_head).to(tl.float32)
        q = load_tile(query + head * stride_query_head, rows, row_present, stride_query_row, HEAD_DIM_QK, BLOCK_DQK, True)
        k = load_tile(key + group * stride_key_head, keys, exist, stride_key_row, HEAD_DIM_QK, BLOCK_DQK, True)
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * score_scale  # (BLOCK_M, BLOCK_N)
        if HAS_SOFTCAP:
            scores = tanh(scores) * softcap_log2
        if HAS_BIAS:
            scores = add_bias(
                scores, rows[:, None], keys[None, :], seqlen_q, keys_present, offset,
                head_mask, stride_mask_row, stride_mask_key, alibi_slope, MASK_IS_BOOL, HAS_ALIBI, True,
            )  # fmt: skip
        allowed = allowed_pairs(
            rows[:, None], keys[None, :], rows_present, keys_present, exist[None, :], offset, window_left, window_right,
            head_mask, stride_mask_row, stride_mask_key, head_bits, rows[:, None], keys[None, :], stride_bits_line,
            HAS_LEFT, HAS_RIGHT, MASK_IS_BOOL,
        )  # fmt: skip
        row_lse = tl.load(lse + head * stride_lse_head + rows * stride_lse_row, mask=row_present, other=float("-inf")).to(tl.float32)
        nothing = row_lse == float("-inf")
        shift = tl.where(nothing, 0.0, row_lse * LOG2_E)
        exponent = tl.minimum(scores - shift[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)  # scores and lse are rounded
        head_weights = tl.where(allowed & ~nothing[:, None], tl.exp2(exponent), 0.0)
        if rng_state is not None:
            keep = dropout_keep(rng_state, batch * num_heads + head, start_m, start_n, dropout_threshold, BLOCK_M, BLOCK_N)
            head_weights = tl.where(keep, head_weights, 0.0)
        acc += head_weights

    factor = 1.0
    if AVERAGE_HEADS:
        factor = factor / num_heads
    if rng_state is not None:
        factor *= 65536.0 / (65536 - dropout_threshold)
    tile = (acc * factor).to(weights.dtype.element_ty)
    pointers = weights + rows[:, None] * stride_weights_row + keys[None, :]
    if start_n + BLOCK_N <= seqlen_k:  # a mask along rows alone lets stores be wide
        tl.store(pointers, tile, mask=(rows < seqlen_q)[:, None])
    else:
        tl.store(pointers, tile, mask=(rows < seqlen_q)[:, None] & (keys < seqlen_k)[None, :])
