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
from .arguments import common_arguments, feature_class, needs_tiles, padded_head_dim, rows_of
from .bias_gradient import summed_mask_gradient
from .launch import Tile, launch, tile_for
from .mask import tile_lists
from .parameters import AttnMask, Dropout, KeyMask, MaskBits, RowNumbers, Rows, Scores, Sizes, Slopes, Tiles, Window, kernel
from .tiles import (
    block_start,
    key_blocks,
    keys_exist,
    load_tile,
    num_blocks,
    of_batch,
    of_head,
    row_blocks,
    row_statistics,
    rows_from,
    score_gradients,
    sequence_of,
    slope_of,
    store_tile,
    tile_list,
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
        strides = (*rows_of(query), *rows_of(key), *rows_of(value), *rows_of(dout), *rows_of(lse)[:2], *rows_of(dkey), *rows_of(dvalue))
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
        strides = (*rows_of(query), *rows_of(key), *rows_of(value), *rows_of(dout), *rows_of(lse)[:2], *rows_of(dquery))
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
    out: Rows, dout: Rows, lse: RowNumbers,
    dlse, delta,  # (B, H, L) float32, like lse
    seqlen_q: tl.int32, num_heads: tl.int32, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N: the padded head dim."""
    program = tl.program_id(0)
    num_row_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    rows = program % num_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head = program // num_row_blocks % num_heads
    batch = program // num_row_blocks // num_heads
    place = batch * lse.stride_batch + head * lse.stride_head + rows
    attends = tl.load(lse.data + place, mask=rows < seqlen_q, other=float("-inf")) != float("-inf")
    out_tile = load_tile(of_head(out, batch, head), rows, attends, out.stride_row, HEAD_DIM, BLOCK_N, True)
    dout_tile = load_tile(of_head(dout, batch, head), rows, attends, dout.stride_row, HEAD_DIM, BLOCK_N, True)
    row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + place, mask=attends, other=0.0)
    tl.store(delta + place, row_delta, mask=rows < seqlen_q)


@kernel
def attention_dkdv(
    query: Rows, key: Rows, value: Rows, dout: Rows, lse: RowNumbers,
    delta,  # like lse
    dkey: Rows, dvalue: Rows,
    column_sums,  # (B, Hq, 2, Lk) float32: dscores summed over the rows of full and of mixed blocks, or None
    scale: tl.float32,
    attn_mask: AttnMask, key_mask: KeyMask, alibi_slopes: Slopes, mask_bits: MaskBits, tiles: Tiles, sizes: Sizes,
    window: Window, scoring: Scores, dropout: Dropout,
    HEAD_DIM_QK: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Works on transposed tiles (BLOCK_N, BLOCK_M): their products with dout and query sum over rows, the second dim."""
    # A full block by loop bounds has all its rows, one of a list may reach past the last row; a float mask can empty any row.
    EMPTY_ROWS: tl.constexpr = attn_mask.data is not None and not attn_mask.IS_BOOL
    CHECK_ROWS: tl.constexpr = EMPTY_ROWS or tiles.data is not None
    program = tl.program_id(0)
    num_key_blocks = tl.cdiv(sizes.seqlen_k, BLOCK_N)
    num_groups = sizes.num_heads // sizes.heads_per_group
    start_n = program % num_key_blocks * BLOCK_N
    group = program // num_key_blocks % num_groups
    batch = program // num_key_blocks // num_groups
    sequence = sequence_of(batch, sizes, window)
    seqlen_k = sizes.seqlen_k
    if sizes.cu_seqlens_q is not None:
        seqlen_k = sequence.keys_present
    if start_n >= seqlen_k:
        return
    head_key = rows_from(key, batch, group, sequence.first_key)
    head_value = rows_from(value, batch, group, sequence.first_key)
    head_dkey = rows_from(dkey, batch, group, sequence.first_key)
    head_dvalue = rows_from(dvalue, batch, group, sequence.first_key)
    batch_key_mask = of_batch(key_mask, batch)

    keys = start_n + tl.arange(0, BLOCK_N)
    exist = keys_exist(keys, sequence.keys_present, batch_key_mask, key_mask, True)
    k = load_tile(head_key, keys, exist, key.stride_row, HEAD_DIM_QK, BLOCK_DQK, True)
    v = load_tile(head_value, keys, exist, value.stride_row, HEAD_DIM_V, BLOCK_DV, True)
    dk = tl.zeros((BLOCK_N, BLOCK_DQK), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    blocks = row_blocks(start_n, sequence, window, BLOCK_M, BLOCK_N)
    # First the row blocks of which every score counts, for all heads, then the mixed ones: what one loop keeps, the other need not.
    for MASKED in tl.static_range(2):
        for head_of_group in range(sizes.heads_per_group):
            head = group * sizes.heads_per_group + head_of_group
            head_query = rows_from(query, batch, head, sequence.first_row)
            head_dout = rows_from(dout, batch, head, sequence.first_row)
            place = batch * lse.stride_batch + head * lse.stride_head + sequence.first_row
            head_mask = of_head(attn_mask, batch, head)
            head_bits = of_head(mask_bits, batch, head)
            column_tiles = tile_list(tiles, batch, head, start_n)
            alibi_slope = slope_of(alibi_slopes, batch, head)
            column_sum = tl.zeros((BLOCK_N,), tl.float32)
            steps = num_blocks(blocks, column_tiles, MASKED, BLOCK_M)
            if start_n >= sequence.keys_present:
                steps = 0
            for step in tl.range(steps, num_stages=1 if MASKED else None):
                start_m = block_start(step, blocks, column_tiles, tiles.num_tiles, MASKED, BLOCK_M)
                rows = start_m + tl.arange(0, BLOCK_M)
                row_lse, row_delta, attends = row_statistics(
                    lse.data + place, delta + place, rows, sequence.seqlen_q, MASKED or CHECK_ROWS, MASKED or EMPTY_ROWS
                )
                q = load_tile(head_query, rows, attends, query.stride_row, HEAD_DIM_QK, BLOCK_DQK, MASKED or CHECK_ROWS)
                do = load_tile(head_dout, rows, attends, dout.stride_row, HEAD_DIM_V, BLOCK_DV, MASKED or CHECK_ROWS)
                products = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)  # (BLOCK_N, BLOCK_M), not yet scaled
                weights, capped = tile_weights(
                    products, rows[None, :], keys[:, None], row_lse[None, :], sequence, exist[:, None], window, scoring,
                    head_mask, attn_mask, alibi_slope, head_bits, mask_bits,
                    dropout, batch * sizes.num_heads + head, start_m, start_n, MASKED, BLOCK_M, BLOCK_N, True,
                )  # fmt: skip
                kept = weights
                if dropout.rng_state is not None:
                    kept = tl.where(weights < 0.0, 0.0, weights)
                dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=INPUT_PRECISION)
                dweights = tl.dot(v, tl.trans(do), input_precision=INPUT_PRECISION)
                dscores = score_gradients(weights, dweights, row_delta[None, :], dropout, MASKED)
                dproducts = dscores
                if scoring.HAS_SOFTCAP:
                    dproducts = dscores * (1.0 - capped * capped)
                dk = tl.dot(dproducts.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)
                if column_sums is not None:
                    column_sum += tl.sum(dscores, 1)
            if column_sums is not None:
                line = ((batch * sizes.num_heads + head) * 2 + MASKED).to(tl.int64)
                tl.store(column_sums + line * seqlen_k + keys, column_sum, mask=keys < seqlen_k)

    if dropout.rng_state is not None:
        dv *= 65536.0 / (65536 - dropout.threshold)
    dk = tl.where(exist[:, None], dk * scale, 0.0)
    dv = tl.where(exist[:, None], dv, 0.0)
    store_tile(head_dkey, dk, keys, keys < seqlen_k, dkey.stride_row, HEAD_DIM_QK, BLOCK_DQK)
    store_tile(head_dvalue, dv, keys, keys < seqlen_k, dvalue.stride_row, HEAD_DIM_V, BLOCK_DV)


@kernel
def attention_dq(
    query: Rows, key: Rows, value: Rows, dout: Rows, lse: RowNumbers,
    delta,  # like lse
    dquery: Rows,
    dmask: Rows,  # (B, Hq, Lq, Lk): the float mask's gradient, or None
    row_sums,  # like lse: dscores summed over keys, or None
    slope_sums,  # (B, Hq, row blocks) float32: each program's part of the slope's gradient, or None
    scale: tl.float32,
    attn_mask: AttnMask, key_mask: KeyMask, alibi_slopes: Slopes, mask_bits: MaskBits, tiles: Tiles, sizes: Sizes,
    window: Window, scoring: Scores, dropout: Dropout,
    HEAD_DIM_QK: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_row_blocks = tl.cdiv(sizes.seqlen_q, BLOCK_M)
    row_block = num_row_blocks - 1 - program % num_row_blocks  # the longest causal rows first
    start_m = row_block * BLOCK_M
    head = program // num_row_blocks % sizes.num_heads
    batch = program // num_row_blocks // sizes.num_heads
    group = head // sizes.heads_per_group
    sequence = sequence_of(batch, sizes, window)
    if start_m >= sequence.seqlen_q:
        return
    head_query = rows_from(query, batch, head, sequence.first_row)
    head_key = rows_from(key, batch, group, sequence.first_key)
    head_value = rows_from(value, batch, group, sequence.first_key)
    head_dout = rows_from(dout, batch, head, sequence.first_row)
    head_dquery = rows_from(dquery, batch, head, sequence.first_row)
    place = batch * lse.stride_batch + head * lse.stride_head + sequence.first_row
    head_dmask = of_head(dmask, batch, head)
    head_mask = of_head(attn_mask, batch, head)
    head_bits = of_head(mask_bits, batch, head)
    batch_key_mask = of_batch(key_mask, batch)
    row_tiles = tile_list(tiles, batch, head, start_m)
    alibi_slope = slope_of(alibi_slopes, batch, head)

    rows = start_m + tl.arange(0, BLOCK_M)
    row_lse, row_delta, attends = row_statistics(lse.data + place, delta + place, rows, sequence.seqlen_q, True, True)
    q = load_tile(head_query, rows, attends, query.stride_row, HEAD_DIM_QK, BLOCK_DQK, True)
    do = load_tile(head_dout, rows, attends, dout.stride_row, HEAD_DIM_V, BLOCK_DV, True)
    dq = tl.zeros((BLOCK_M, BLOCK_DQK), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    slope_sum = tl.zeros((BLOCK_M,), tl.float32)
    blocks = key_blocks(start_m, sequence, window, BLOCK_M, BLOCK_N)
    for MASKED in tl.static_range(2):  # first the key blocks of which every score counts, then the mixed ones
        steps = num_blocks(blocks, row_tiles, MASKED, BLOCK_N)
        if start_m >= sequence.rows_present:
            steps = 0
        for step in range(steps):
            start_n = block_start(step, blocks, row_tiles, tiles.num_tiles, MASKED, BLOCK_N)
            keys = start_n + tl.arange(0, BLOCK_N)
            exist = keys_exist(keys, sequence.keys_present, batch_key_mask, key_mask, MASKED)
            k = load_tile(head_key, keys, exist, key.stride_row, HEAD_DIM_QK, BLOCK_DQK, MASKED)
            v = load_tile(head_value, keys, exist, value.stride_row, HEAD_DIM_V, BLOCK_DV, MASKED)
            products = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK_M, BLOCK_N), not yet scaled
            weights, capped = tile_weights(
                products, rows[:, None], keys[None, :], row_lse[:, None], sequence, exist[None, :], window, scoring,
                head_mask, attn_mask, alibi_slope, head_bits, mask_bits,
                dropout, batch * sizes.num_heads + head, start_m, start_n, MASKED, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            dweights = tl.dot(do, tl.trans(v), input_precision=INPUT_PRECISION)
            dscores = score_gradients(weights, dweights, row_delta[:, None], dropout, MASKED)
            dproducts = dscores
            if scoring.HAS_SOFTCAP:
                dproducts = dscores * (1.0 - capped * capped)
            dq = tl.dot(dproducts.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)
            if head_dmask is not None:
                in_memory = (rows < sequence.seqlen_q)[:, None]
                if MASKED:
                    in_memory = in_memory & (keys < sizes.seqlen_k)[None, :]
                pointers = head_dmask + rows[:, None] * dmask.stride_row + keys[None, :]
                tl.store(pointers, dscores.to(head_dmask.dtype.element_ty), mask=in_memory)
            if row_sums is not None:
                row_sum += tl.sum(dscores, 1)
            if slope_sums is not None:
                slope_sum -= tl.sum(dscores * tl.abs(keys[None, :] - (rows[:, None] + sequence.offset)).to(tl.float32), 1)

    store_tile(head_dquery, dq * scale, rows, rows < sequence.seqlen_q, dquery.stride_row, HEAD_DIM_QK, BLOCK_DQK)
    if row_sums is not None:
        tl.store(row_sums + place + rows, row_sum, mask=rows < sequence.seqlen_q)
    if slope_sums is not None:
        tl.store(slope_sums + (batch * sizes.num_heads + head).to(tl.int64) * num_row_blocks + row_block, tl.sum(slope_sum, 0))
