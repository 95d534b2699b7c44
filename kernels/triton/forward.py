"""The forward kernel in Triton: one program computes one block of query rows against all the keys that they see.

Method: FlashAttention-2 (Dao, arXiv 2307.08691).
  1. load a block of query rows
  2. visit the key blocks of which every score counts: a lean loop without masks
  3. visit the key blocks of which some scores count, with masks; blocks of which none count are never visited
  4. in both, scores = scale * Q K^T in log2 units, then softcap, bias and dropout where asked for
  5. out = acc / row_sum, lse = row_max + log(row_sum); a row that attends to nothing gives 0 and -inf
A sink is a first key with score `sink` and no value: row_max and row_sum start from it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, empty_strided
from ..problem import OptionalTensors, Problem, empty_lse, empty_output
from .arguments import (
    common_arguments,
    common_tensors,
    feature_class,
    kernel,
    needs_tiles,
    padded_head_dim,
    rows_of,
)
from .launch import Launch, tile_for
from .mask import tile_lists
from .tiles import (
    LN_2,
    LOG2_E,
    TILE,
    add_bias,
    allowed_pairs,
    block_start,
    dropout_keep,
    key_blocks,
    keys_exist,
    load_tile,
    num_blocks,
    sequence_sizes,
    store_tile,
    tanh,
)


def prepare(problem: Problem) -> Call:
    """The forward pass of problems that differ from this one in their tensors' memory alone, and agree in torch's setting for float32."""
    out, lse = empty_output(problem), empty_lse(problem.query)
    out_shape, out_strides = tuple(out.shape), out.stride()
    lse_shape, lse_strides = tuple(lse.shape), lse.stride()
    dtype, float32, empty = out.dtype, torch.float32, empty_strided(out)
    options, needs_lists = problem.options(), needs_tiles(problem)
    is_packed = problem.cu_seqlens_q is not None
    drops_all = problem.dropout_p == 1.0
    row_tiles, _ = tile_lists(problem, columns=False)
    launch = _launch_for(problem, out, lse, row_tiles) if out.numel() else None

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        optional: OptionalTensors,
        needs_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = empty(out_shape, out_strides, dtype), empty(lse_shape, lse_strides, float32)
        if is_packed:
            out.zero_()
            lse.fill_(-torch.inf)
        if launch is not None:
            row_tiles = None
            if needs_lists:
                given = Problem.from_op_arguments("separate", (query, key, value, *optional, *options))
                row_tiles, _ = tile_lists(given, columns=False)
            sinks, mask_bits = optional[5], optional[9]
            launch((query, key, value, out, lse, sinks, *common_tensors(optional, row_tiles, mask_bits)))
        if drops_all:
            out.zero_()
        return (out, lse) if needs_lse else out

    return call


def _launch_for(problem: Problem, out: Tensor, lse: Tensor, row_tiles: Tensor | None) -> Launch:
    query, key, value = problem.query, problem.key, problem.value
    head_dim = max(padded_head_dim(query.shape[3]), padded_head_dim(value.shape[3]))
    tile = tile_for("forward", query.dtype, head_dim, feature_class(problem))
    num_programs = triton.cdiv(problem.max_seqlen_q, tile.BLOCK_M) * problem.batch * query.shape[1]
    common = common_arguments(problem, row_tiles, problem.mask_bits)
    strides = (*rows_of(query), *rows_of(key), *rows_of(value), *rows_of(out), *rows_of(lse)[:2])
    return Launch(attention_forward, num_programs, (*strides, *common.numbers), common.constants, tile)


@kernel
def attention_forward(
    query, key, value, out,  # (B, H, L, D), or packed sequences (H, T, D)
    lse,  # (B, H, Lq) or (H, Tq) float32
    sinks,  # (H,)
    attn_mask, key_mask, key_lengths, query_lengths, alibi_slopes, rng_state, cu_seqlens_q, cu_seqlens_k, mask_bits, tiles,
    stride_query_batch: tl.int64, stride_query_head: tl.int64, stride_query_row: tl.int64,
    stride_key_batch: tl.int64, stride_key_head: tl.int64, stride_key_row: tl.int64,
    stride_value_batch: tl.int64, stride_value_head: tl.int64, stride_value_row: tl.int64,
    stride_out_batch: tl.int64, stride_out_head: tl.int64, stride_out_row: tl.int64,
    stride_lse_batch: tl.int64, stride_lse_head: tl.int64,
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
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    HAS_BIAS: tl.constexpr = (attn_mask is not None and not MASK_IS_BOOL) or alibi_slopes is not None
    program = tl.program_id(0).to(tl.int64)
    num_row_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    start_m = (num_row_blocks - 1 - (program % num_row_blocks).to(tl.int32)) * BLOCK_M  # the longest causal rows first
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
    out += batch * stride_out_batch + head * stride_out_head + first_row * stride_out_row
    lse += batch * stride_lse_batch + head * stride_lse_head + first_row
    if attn_mask is not None:
        attn_mask += batch * stride_mask_batch + head * stride_mask_head
    if key_mask is not None:
        key_mask += batch * stride_key_mask_batch
    if mask_bits is not None:
        mask_bits += batch * stride_bits_batch + head * stride_bits_head
    if tiles is not None:
        tiles += batch * stride_tiles_batch + head * stride_tiles_head + (start_m // TILE) * stride_tiles_line
    alibi_slope = 0.0
    if HAS_ALIBI:
        alibi_slope = tl.load(alibi_slopes + batch * stride_slopes_batch + head * stride_slopes_head).to(tl.float32)

    rows = start_m + tl.arange(0, BLOCK_M)
    row_present = rows < rows_present
    q = load_tile(query, rows, row_present, stride_query_row, HEAD_DIM_QK, BLOCK_DQK, True)
    if sinks is not None:
        row_max = tl.full((BLOCK_M,), 0.0, tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        row_sum = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
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
            scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK_M, BLOCK_N), not yet scaled
            if MASKED or HAS_BIAS or HAS_SOFTCAP:
                scores *= score_scale
                if HAS_SOFTCAP:
                    scores = tanh(scores) * softcap_log2
                if HAS_BIAS:
                    scores = add_bias(
                        scores, rows[:, None], keys[None, :], seqlen_q, keys_present, offset,
                        attn_mask, stride_mask_row, stride_mask_key, alibi_slope, MASK_IS_BOOL, HAS_ALIBI, MASKED,
                    )  # fmt: skip
                if MASKED:
                    allowed = allowed_pairs(
                        rows[:, None], keys[None, :], seqlen_q, keys_present, exist[None, :], offset, window_left, window_right,
                        attn_mask, stride_mask_row, stride_mask_key, mask_bits, rows[:, None], keys[None, :], stride_bits_line,
                        HAS_LEFT, HAS_RIGHT, MASK_IS_BOOL,
                    )  # fmt: skip
                    scores = tl.where(allowed, scores, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(scores, 1))
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that saw nothing yet: exp2(-inf - 0) = 0
                weights = tl.exp2(scores - shift[:, None])
            else:
                # One multiply-add per score: scale > 0, so the maximum of the scaled scores is the scaled maximum.
                new_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)
                shift = new_max
                weights = tl.exp2(scores * score_scale - shift[:, None])
            rescale = tl.exp2(row_max - shift)
            row_sum = row_sum * rescale + tl.sum(weights, 1)
            row_max = new_max
            acc *= rescale[:, None]
            if rng_state is not None:
                keep = dropout_keep(rng_state, batch * num_heads + head, start_m, start_n, dropout_threshold, BLOCK_M, BLOCK_N)
                weights = tl.where(keep, weights, 0.0)
            v = load_tile(value, keys, exist, stride_value_row, HEAD_DIM_V, BLOCK_DV, MASKED)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)  # (BLOCK_M, BLOCK_DV)

    if rng_state is not None:
        acc *= 65536.0 / (65536 - dropout_threshold)
    nothing = (row_sum == 0.0) | ~row_present  # of a row of NaN scores the maximum is -inf, but the sum NaN
    acc = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, row_sum)[:, None])
    store_tile(out, acc, rows, rows < seqlen_q, stride_out_row, HEAD_DIM_V, BLOCK_DV)
    row_lse = tl.where(nothing, float("-inf"), row_max * LN_2 + tl.log2(tl.where(nothing, 1.0, row_sum)) * LN_2)
    tl.store(lse + rows, row_lse, mask=rows < seqlen_q)
