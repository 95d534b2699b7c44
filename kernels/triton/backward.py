"""The backward kernels in Triton, with every sum in a fixed order: the same gradients, bit for bit, in every run.

With P = exp(scores - lse), D the dropout factors and dscores = P * (D * (dout V^T) - delta):
  1. delta = rowsum(dout * out) - dlse, one program per block of rows
  2. dvalue = (D * P)^T dout and dkey = scale * dscores^T Q, one program per block of keys: it walks down the row blocks that see them, of
     all query heads that share the keys one after the other
  3. dquery = scale * dscores K, one program per block of rows, which walks along the key blocks like the forward
  4. the float mask's gradient is dscores summed over the dims that the mask is broadcast along: stored by 3., summed over rows in 2. or
     over keys in 3., or summed over batches and heads by triton_bias_gradient; those of slopes and sinks follow from 3. and 1.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Gradients, Problem, with_contiguous_last_dim
from .arguments import common_arguments, feature_class, kernel, needs_tiles, padded_head_dim, rows_of
from .bias_gradient import summed_mask_gradient
from .launch import Tile, launch, tile_for
from .mask import tile_lists
from .tiles import (
    TILE,
    block_start,
    key_blocks,
    keys_exist,
    load_tile,
    num_blocks,
    row_blocks,
    row_statistics,
    score_gradients,
    sequence_sizes,
    store_tile,
    tile_weights,
)

DELTA_ELEMENTS = 2048  # of a tile in attention_delta


def backward(problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, gradients: Gradients) -> None:
    """Writes every gradient asked for; out and lse are the forward's, dout and dlse their gradients."""
    if problem.row_tiles is not None and problem.column_tiles is None:
        raise ValueError("the mask was prepared without what gradients need")
    if not out.shape[1]:  # keys may have heads all the same, which no query reads
        for gradient in (getattr(gradients, field.name) for field in fields(gradients)):
            if gradient is not None:
                gradient.zero_()
        return
    if problem.cu_seqlens_q is not None:  # tokens that belong to no sequence
        for gradient in (gradients.query, gradients.key, gradients.value):
            gradient.zero_()
    if problem.dropout_p == 1.0:  # out is 0 whatever the inputs are
        dout = dout.new_zeros(dout.shape[3]).expand(dout.shape)
    dout, lse = with_contiguous_last_dim(dout), lse.contiguous()
    delta = attention_delta_of(out, lse, dout, dlse)
    row_tiles, column_tiles = tile_lists(problem, columns=True)
    mask_gradient = gradients.attn_mask
    # The mask's dims that stand for several rows or keys. With neither it may still be shared by batches or heads.
    one_row = mask_gradient is not None and mask_gradient.shape[2] != problem.max_seqlen_q
    one_key = mask_gradient is not None and mask_gradient.shape[3] != problem.max_seqlen_k
    whole = mask_gradient is not None and mask_gradient.shape[:2] == out.shape[:2] and not one_row and not one_key

    column_sums = _key_gradients(problem, lse, dout, delta, column_tiles, gradients, one_row and not one_key)
    row_sums, slope_sums = _query_gradients(problem, lse, dout, delta, row_tiles, gradients, whole, one_key)
    if mask_gradient is not None:
        if column_sums is not None:
            mask_gradient.copy_(column_sums.sum_to_size(mask_gradient.shape))
        elif row_sums is not None:
            mask_gradient.copy_(row_sums[:, :, :, None].sum_to_size(mask_gradient.shape))
        elif not whole:
            summed_mask_gradient(problem, lse, dout, delta, mask_gradient)
    if gradients.alibi_slopes is not None and slope_sums is not None:
        gradients.alibi_slopes.copy_(slope_sums.sum(2).sum_to_size(gradients.alibi_slopes.shape))
    if gradients.sinks is not None and problem.sinks is not None:
        sink_weights = torch.exp(problem.sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        gradients.sinks.copy_(-(sink_weights * delta).sum((0, 2)))


def attention_delta_of(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """(B, H, Lq) float32: rowsum(dout * out) - dlse, and 0 in rows that attend to nothing."""
    delta = torch.empty_like(lse)
    batch, num_heads, seqlen_q, head_dim = out.shape
    block_d = padded_head_dim(head_dim)
    tile = Tile(DELTA_ELEMENTS // block_d, block_d, 8, 1)
    num_programs = triton.cdiv(seqlen_q, tile.BLOCK_M) * batch * num_heads
    if num_programs:
        launch(
            attention_delta,
            num_programs,
            (out, dout, lse, None if dlse is None else dlse.contiguous(), delta),
            (*rows_of(out), *rows_of(dout), *rows_of(lse)[:2], seqlen_q, num_heads),
            (head_dim,),
            tile,
        )
    return delta


def _key_gradients(
    problem: Problem, lse: Tensor, dout: Tensor, delta: Tensor, tiles: Tensor | None, gradients: Gradients, with_column_sums: bool
) -> Tensor | None:
    """Writes those of key and value; returns the sums of dscores over rows (B, Hq, 2, Lk) float32, in two parts, where asked for."""
    query, key, value = problem.query, problem.key, problem.value
    column_sums = query.new_empty(*query.shape[:2], 2, key.shape[2], dtype=torch.float32) if with_column_sums else None
    tile = _tile("dkdv", problem)
    common = common_arguments(problem, tiles, problem.mask_bits_transposed)
    num_programs = triton.cdiv(problem.max_seqlen_k, tile.BLOCK_N) * problem.batch * key.shape[1]
    if num_programs:
        dkey, dvalue = gradients.key, gradients.value
        tensors = (query, key, value, dout, lse, delta, dkey, dvalue, column_sums, *common.tensors)
        strides = (*rows_of(query), *rows_of(key), *rows_of(value), *rows_of(dout), *rows_of(dkey), *rows_of(dvalue), *rows_of(lse)[:2])
        launch(attention_dkdv, num_programs, tensors, (*strides, problem.scale, *common.numbers), common.constants, tile)
    return column_sums


def _query_gradients(
    problem: Problem,
    lse: Tensor,
    dout: Tensor,
    delta: Tensor,
    tiles: Tensor | None,
    gradients: Gradients,
    store_mask_gradient: bool,
    with_row_sums: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes those of query and, if asked to, of a mask that nothing shares.

    Returns sums of dscores over keys (B, Hq, Lq), where asked for, and the slopes' gradient by row block (B, Hq, blocks); float32.
    """
    query, key, value = problem.query, problem.key, problem.value
    num_heads = query.shape[1]
    tile = _tile("dq", problem)
    num_row_blocks = triton.cdiv(problem.max_seqlen_q, tile.BLOCK_M)
    dmask = gradients.attn_mask if store_mask_gradient else None
    if dmask is not None and _skips_tiles(problem):
        dmask.zero_()
    row_sums = torch.empty_like(lse) if with_row_sums else None
    slope_sums = None
    if gradients.alibi_slopes is not None:
        slope_sums = query.new_zeros(problem.batch, num_heads, num_row_blocks, dtype=torch.float32)
    common = common_arguments(problem, tiles, problem.mask_bits)
    num_programs = num_row_blocks * problem.batch * num_heads
    if num_programs:
        dquery = gradients.query
        tensors = (query, key, value, dout, lse, delta, dquery, dmask, row_sums, slope_sums, *common.tensors)
        strides = (*rows_of(query), *rows_of(key), *rows_of(value), *rows_of(dout), *rows_of(dquery), *rows_of(lse)[:2])
        dmask_strides = (0, 0, 0) if dmask is None else rows_of(dmask)
        launch(attention_dq, num_programs, tensors, (*strides, *dmask_strides, problem.scale, *common.numbers), common.constants, tile)
    return row_sums, slope_sums


def _tile(kernel_name: str, problem: Problem) -> Tile:
    head_dim = max(padded_head_dim(problem.query.shape[3]), padded_head_dim(problem.value.shape[3]))
    return tile_for(kernel_name, problem.query.dtype, head_dim, feature_class(problem))


def _skips_tiles(problem: Problem) -> bool:
    """Whether there may be tiles that no kernel visits."""
    bounds = (problem.window_left, problem.window_right, problem.key_lengths, problem.query_lengths)
    return needs_tiles(problem) or any(bound is not None for bound in bounds)


@kernel
def attention_delta(
    out, dout,  # (B, H, L, D)
    lse, dlse, delta,  # (B, H, L) float32
    stride_out_batch: tl.int64, stride_out_head: tl.int64, stride_out_row: tl.int64,
    stride_dout_batch: tl.int64, stride_dout_head: tl.int64, stride_dout_row: tl.int64,
    stride_lse_batch: tl.int64, stride_lse_head: tl.int64,
    seqlen_q: tl.int32, num_heads: tl.int32,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N: the padded head dim."""
    program = tl.program_id(0)
    num_row_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    rows = program % num_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = program // num_row_blocks % num_heads
    batch = program // num_row_blocks // num_heads
    place = batch * stride_lse_batch + head * stride_lse_head + rows
    attends = tl.load(lse + place, mask=rows < seqlen_q, other=float("-inf")) != float("-inf")
    out_tile = load_tile(out + batch * stride_out_batch + head * stride_out_head, rows, attends, stride_out_row, HEAD_DIM, BLOCK_N, True)
    dout_tile = load_tile(
        dout + batch * stride_dout_batch + head * stride_dout_head, rows, attends, stride_dout_row, HEAD_DIM, BLOCK_N, True
    )
    row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + place, mask=attends, other=0.0)
    tl.store(delta + place, row_delta, mask=rows < seqlen_q)


@kernel
def attention_dkdv(
    query, key, value, dout,  # (B, H, L, D), or packed sequences (H, T, D)
    lse, delta,  # (B, Hq, Lq) or (Hq, Tq) float32
    dkey, dvalue,  # like key and value
    column_sums,  # (B, Hq, 2, Lk) float32: dscores summed over the rows of full and of mixed blocks, or None
    attn_mask, key_mask, key_lengths, query_lengths, alibi_slopes, rng_state, cu_seqlens_q, cu_seqlens_k, mask_bits, tiles,
    stride_query_batch: tl.int64, stride_query_head: tl.int64, stride_query_row: tl.int64,
    stride_key_batch: tl.int64, stride_key_head: tl.int64, stride_key_row: tl.int64,
    stride_value_batch: tl.int64, stride_value_head: tl.int64, stride_value_row: tl.int64,
    stride_dout_batch: tl.int64, stride_dout_head: tl.int64, stride_dout_row: tl.int64,
    stride_dkey_batch: tl.int64, stride_dkey_head: tl.int64, stride_dkey_row: tl.int64,
    stride_dvalue_batch: tl.int64, stride_dvalue_head: tl.int64, stride_dvalue_row: tl.int64,
    stride_lse_batch: tl.int64, stride_lse_head: tl.int64,
    scale: tl.float32,
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
    MASK_IS_BOOL: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Works on transposed tiles (BLOCK_N, BLOCK_M): their products with dout and query sum over rows, the second dim."""
    # A full block by loop bounds has all its rows, one of a list may reach past the last row; a float mask can empty any row.
    EMPTY_ROWS: tl.constexpr = attn_mask is not None and not MASK_IS_BOOL
    CHECK_ROWS: tl.constexpr = EMPTY_ROWS or tiles is not None
    program = tl.program_id(0)
    num_key_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    num_groups = num_heads // heads_per_group
    start_n = program % num_key_blocks * BLOCK_N
    group = program // num_key_blocks % num_groups
    batch = program // num_key_blocks // num_groups
    first_row, first_key, seqlen_q, rows_present, keys_present, offset = sequence_sizes(
        batch, seqlen_q, seqlen_k, num_tokens_q, num_tokens_k, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k,
        diagonal, BOTTOM_RIGHT,
    )  # fmt: skip
    if cu_seqlens_q is not None:
        seqlen_k = keys_present
    if start_n >= seqlen_k:
        return
    key += batch * stride_key_batch + group * stride_key_head + first_key * stride_key_row
    value += batch * stride_value_batch + group * stride_value_head + first_key * stride_value_row
    dkey += batch * stride_dkey_batch + group * stride_dkey_head + first_key * stride_dkey_row
    dvalue += batch * stride_dvalue_batch + group * stride_dvalue_head + first_key * stride_dvalue_row
    if key_mask is not None:
        key_mask += batch * stride_key_mask_batch

    keys = start_n + tl.arange(0, BLOCK_N)
    exist = keys_exist(keys, keys_present, key_mask, stride_key_mask_key, True)
    k = load_tile(key, keys, exist, stride_key_row, HEAD_DIM_QK, BLOCK_DQK, True)
    v = load_tile(value, keys, exist, stride_value_row, HEAD_DIM_V, BLOCK_DV, True)
    dk = tl.zeros((BLOCK_N, BLOCK_DQK), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    first, first_full, last_full, last = row_blocks(
        start_n, rows_present, keys_present, offset, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    # First the row blocks of which every score counts, for all heads, then the mixed ones: what one loop keeps, the other need not.
    for MASKED in tl.static_range(2):
        for head_of_group in range(heads_per_group):
            head = group * heads_per_group + head_of_group
            head_query = query + batch * stride_query_batch + head * stride_query_head + first_row * stride_query_row
            head_dout = dout + batch * stride_dout_batch + head * stride_dout_head + first_row * stride_dout_row
            place = batch * stride_lse_batch + head * stride_lse_head + first_row
            head_mask, head_bits, head_tiles = attn_mask, mask_bits, tiles
            if attn_mask is not None:
                head_mask += batch * stride_mask_batch + head * stride_mask_head
            if mask_bits is not None:
                head_bits += batch * stride_bits_batch + head * stride_bits_head
            if tiles is not None:
                head_tiles += batch * stride_tiles_batch + head * stride_tiles_head + (start_n // TILE) * stride_tiles_line
            alibi_slope = 0.0
            if alibi_slopes is not None:
                alibi_slope = tl.load(alibi_slopes + batch * stride_slopes_batch + head * stride_slopes_head).to(tl.float32)
            column_sum = tl.zeros((BLOCK_N,), tl.float32)
            steps = num_blocks(first, first_full, last_full, last, head_tiles, MASKED, BLOCK_M)
            if start_n >= keys_present:
                steps = 0
            for step in tl.range(steps, num_stages=1 if MASKED else None):
                start_m = block_start(step, first, first_full, last_full, head_tiles, num_tiles, MASKED, BLOCK_M)
                rows = start_m + tl.arange(0, BLOCK_M)
                row_lse, row_delta, attends = row_statistics(
                    lse + place, delta + place, rows, seqlen_q, MASKED or CHECK_ROWS, MASKED or EMPTY_ROWS
                )
                q = load_tile(head_query, rows, attends, stride_query_row, HEAD_DIM_QK, BLOCK_DQK, MASKED or CHECK_ROWS)
                do = load_tile(head_dout, rows, attends, stride_dout_row, HEAD_DIM_V, BLOCK_DV, MASKED or CHECK_ROWS)
                products = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)  # (BLOCK_N, BLOCK_M), not yet scaled
                weights, capped = tile_weights(
                    products, rows[None, :], keys[:, None], row_lse[None, :], rows_present, keys_present, exist[:, None],
                    offset, window_left, window_right, score_scale, softcap_log2,
                    head_mask, stride_mask_row, stride_mask_key, alibi_slope,
                    head_bits, keys[:, None], rows[None, :], stride_bits_line,
                    rng_state, batch * num_heads + head, start_m, start_n, dropout_threshold,
                    HAS_SOFTCAP, HAS_LEFT, HAS_RIGHT, MASK_IS_BOOL, alibi_slopes is not None, MASKED, BLOCK_M, BLOCK_N, True,
                )  # fmt: skip
                kept = weights
                if rng_state is not None:
                    kept = tl.where(weights < 0.0, 0.0, weights)
                dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=INPUT_PRECISION)
                dweights = tl.dot(v, tl.trans(do), input_precision=INPUT_PRECISION)
                dscores = score_gradients(weights, dweights, row_delta[None, :], dropout_threshold, rng_state is not None, MASKED)
                dproducts = dscores
                if HAS_SOFTCAP:
                    dproducts = dscores * (1.0 - capped * capped)
                dk = tl.dot(dproducts.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)
                if column_sums is not None:
                    column_sum += tl.sum(dscores, 1)
            if column_sums is not None:
                line = ((batch * num_heads + head) * 2 + MASKED).to(tl.int64)
                tl.store(column_sums + line * seqlen_k + keys, column_sum, mask=keys < seqlen_k)

    if rng_state is not None:
        dv *= 65536.0 / (65536 - dropout_threshold)
    dk = tl.where(exist[:, None], dk * scale, 0.0)
    dv = tl.where(exist[:, None], dv, 0.0)
    store_tile(dkey, dk, keys, keys < seqlen_k, stride_dkey_row, HEAD_DIM_QK, BLOCK_DQK)
    store_tile(dvalue, dv, keys, keys < seqlen_k, stride_dvalue_row, HEAD_DIM_V, BLOCK_DV)


@kernel
def attention_dq(
    query, key, value, dout,  # (B, H, L, D), or packed sequences (H, T, D)
    lse, delta,  # (B, Hq, Lq) or (Hq, Tq) float32
    dquery,  # like query
    dmask,  # (B, Hq, Lq, Lk): the float mask's gradient, or None
    row_sums,  # like lse: dscores summed over keys, or None
    slope_sums,  # (B, Hq, row blocks) float32: each program's part of the slope's gradient, or None
    attn_mask, key_mask, key_lengths, query_lengths, alibi_slopes, rng_state, cu_seqlens_q, cu_seqlens_k, mask_bits, tiles,
    stride_query_batch: tl.int64, stride_query_head: tl.int64, stride_query_row: tl.int64,
    stride_key_batch: tl.int64, stride_key_head: tl.int64, stride_key_row: tl.int64,
    stride_value_batch: tl.int64, stride_value_head: tl.int64, stride_value_row: tl.int64,
    stride_dout_batch: tl.int64, stride_dout_head: tl.int64, stride_dout_row: tl.int64,
    stride_dquery_batch: tl.int64, stride_dquery_head: tl.int64, stride_dquery_row: tl.int64,
    stride_lse_batch: tl.int64, stride_lse_head: tl.int64,
    stride_dmask_batch: tl.int64, stride_dmask_head: tl.int64, stride_dmask_row: tl.int64,
    scale: tl.float32,
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
    MASK_IS_BOOL: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_row_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    row_block = num_row_blocks - 1 - program % num_row_blocks  # the longest causal rows first
    start_m = row_block * BLOCK_M
    head = program // num_row_blocks % num_heads
    batch = program // num_row_blocks // num_heads
    group = head // heads_per_group
    first_row, first_key, seqlen_q, rows_present, keys_present, offset = sequence_sizes(
        batch, seqlen_q, seqlen_k, num_tokens_q, num_tokens_k, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k,
        diagonal, BOTTOM_RIGHT,
    )  # fmt: skip
    if start_m >= seqlen_q:
        return
    query += batch * stride_query_batch + head * stride_query_head + first_row * stride_query_row
    key += batch * stride_key_batch + group * stride_key_head + first_key * stride_key_row
    value += batch * stride_value_batch + group * stride_value_head + first_key * stride_value_row
    dout += batch * stride_dout_batch + head * stride_dout_head + first_row * stride_dout_row
    dquery += batch * stride_dquery_batch + head * stride_dquery_head + first_row * stride_dquery_row
    place = batch * stride_lse_batch + head * stride_lse_head + first_row
    if dmask is not None:
        dmask += batch * stride_dmask_batch + head * stride_dmask_head
    if attn_mask is not None:
        attn_mask += batch * stride_mask_batch + head * stride_mask_head
    if key_mask is not None:
        key_mask += batch * stride_key_mask_batch
    if mask_bits is not None:
        mask_bits += batch * stride_bits_batch + head * stride_bits_head
    if tiles is not None:
        tiles += batch * stride_tiles_batch + head * stride_tiles_head + (start_m // TILE) * stride_tiles_line
    alibi_slope = 0.0
    if alibi_slopes is not None:
        alibi_slope = tl.load(alibi_slopes + batch * stride_slopes_batch + head * stride_slopes_head).to(tl.float32)

    rows = start_m + tl.arange(0, BLOCK_M)
    row_lse, row_delta, attends = row_statistics(lse + place, delta + place, rows, seqlen_q, True, True)
    q = load_tile(query, rows, attends, stride_query_row, HEAD_DIM_QK, BLOCK_DQK, True)
    do = load_tile(dout, rows, attends, stride_dout_row, HEAD_DIM_V, BLOCK_DV, True)
    dq = tl.zeros((BLOCK_M, BLOCK_DQK), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    slope_sum = tl.zeros((BLOCK_M,), tl.float32)
    first, first_full, last_full, last = key_blocks(
        start_m, rows_present, keys_present, offset, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    for MASKED in tl.static_range(2):  # first the key blocks of which every score counts, then the mixed ones
        steps = num_blocks(first, first_full, last_full, last, tiles, MASKED, BLOCK_N)
        if start_m >= rows_present:
            steps = 0
        for step in range(steps):
            start_n = block_start(step, first, first_full, last_full, tiles, num_tiles, MASKED, BLOCK_N)
            keys = start_n + tl.arange(0, BLOCK_N)
            exist = keys_exist(keys, keys_present, key_mask, stride_key_mask_key, MASKED)
            k = load_tile(key, keys, exist, stride_key_row, HEAD_DIM_QK, BLOCK_DQK, MASKED)
            v = load_tile(value, keys, exist, stride_value_row, HEAD_DIM_V, BLOCK_DV, MASKED)
            products = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK_M, BLOCK_N), not yet scaled
            weights, capped = tile_weights(
                products, rows[:, None], keys[None, :], row_lse[:, None], rows_present, keys_present, exist[None, :],
                offset, window_left, window_right, score_scale, softcap_log2,
                attn_mask, stride_mask_row, stride_mask_key, alibi_slope,
                mask_bits, rows[:, None], keys[None, :], stride_bits_line,
                rng_state, batch * num_heads + head, start_m, start_n, dropout_threshold,
                HAS_SOFTCAP, HAS_LEFT, HAS_RIGHT, MASK_IS_BOOL, alibi_slopes is not None, MASKED, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            dweights = tl.dot(do, tl.trans(v), input_precision=INPUT_PRECISION)
            dscores = score_gradients(weights, dweights, row_delta[:, None], dropout_threshold, rng_state is not None, MASKED)
            dproducts = dscores
            if HAS_SOFTCAP:
                dproducts = dscores * (1.0 - capped * capped)
            dq = tl.dot(dproducts.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)
            if dmask is not None:
                in_memory = (rows < seqlen_q)[:, None]
                if MASKED:
                    in_memory = in_memory & (keys < seqlen_k)[None, :]
                pointers = dmask + rows[:, None] * stride_dmask_row + keys[None, :]
                tl.store(pointers, dscores.to(dmask.dtype.element_ty), mask=in_memory)
            if row_sums is not None:
                row_sum += tl.sum(dscores, 1)
            if slope_sums is not None:
                slope_sum -= tl.sum(dscores * tl.abs(keys[None, :] - (rows[:, None] + offset)).to(tl.float32), 1)

    store_tile(dquery, dq * scale, rows, rows < seqlen_q, stride_dquery_row, HEAD_DIM_QK, BLOCK_DQK)
    if row_sums is not None:
        tl.store(row_sums + place + rows, row_sum, mask=rows < seqlen_q)
    if slope_sums is not None:
        tl.store(slope_sums + (batch * num_heads + head).to(tl.int64) * num_row_blocks + row_block, tl.sum(slope_sum, 0))
