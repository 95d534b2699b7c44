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
from ..problem import PLACE, OptionalTensors, Problem, empty_lse, empty_output
from .arguments import common_arguments, common_tensors, feature_class, needs_tiles, padded_head_dim, rows_of
from .launch import Launch, tile_for
from .mask import tile_lists
from .parameters import AttnMask, Dropout, KeyMask, MaskBits, RowNumbers, Rows, Scores, Sizes, Slopes, Tiles, Window, kernel
from .tiles import (
    LN_2,
    LOG2_E,
    add_bias,
    allowed_pairs,
    block_start,
    dropout_keep,
    key_blocks,
    keys_exist,
    load_tile,
    num_blocks,
    of_batch,
    of_head,
    rows_from,
    sequence_of,
    slope_of,
    store_tile,
    tanh,
    tile_list,
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

    def call(query: Tensor, key: Tensor, value: Tensor, optional: OptionalTensors, needs_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = empty(out_shape, out_strides, dtype), empty(lse_shape, lse_strides, float32)
        if is_packed:
            out.zero_()
            lse.fill_(-torch.inf)
        if launch is not None:
            row_tiles = None
            if needs_lists:
                given = Problem.from_op_arguments("separate", (query, key, value, *optional, *options))
                row_tiles, _ = tile_lists(given, columns=False)
            sinks, mask_bits = optional[PLACE["sinks"]], optional[PLACE["mask_bits"]]
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
    query: Rows, key: Rows, value: Rows, out: Rows, lse: RowNumbers,
    sinks,  # (H,)
    attn_mask: AttnMask, key_mask: KeyMask, alibi_slopes: Slopes, mask_bits: MaskBits, tiles: Tiles, sizes: Sizes,
    window: Window, scoring: Scores, dropout: Dropout,
    HEAD_DIM_QK: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    HAS_BIAS: tl.constexpr = (attn_mask.data is not None and not attn_mask.IS_BOOL) or alibi_slopes.data is not None
    program = tl.program_id(0).to(tl.int64)
    num_row_blocks = tl.cdiv(sizes.seqlen_q, BLOCK_M)
    start_m = (num_row_blocks - 1 - (program % num_row_blocks).to(tl.int32)) * BLOCK_M  # the longest causal rows first
    head = program // num_row_blocks % sizes.num_heads
    batch = program // num_row_blocks // sizes.num_heads
    group = head // sizes.heads_per_group
    sequence = sequence_of(batch, sizes, window)
    if start_m >= sequence.seqlen_q:
        return
    head_query = rows_from(query, batch, head, sequence.first_row)
    head_key = rows_from(key, batch, group, sequence.first_key)
    head_value = rows_from(value, batch, group, sequence.first_key)
    head_out = rows_from(out, batch, head, sequence.first_row)
    head_lse = of_head(lse, batch, head) + sequence.first_row
    head_mask = of_head(attn_mask, batch, head)
    head_bits = of_head(mask_bits, batch, head)
    batch_key_mask = of_batch(key_mask, batch)
    row_tiles = tile_list(tiles, batch, head, start_m)
    alibi_slope = slope_of(alibi_slopes, batch, head)

    rows = start_m + tl.arange(0, BLOCK_M)
    row_present = rows < sequence.rows_present
    q = load_tile(head_query, rows, row_present, query.stride_row, HEAD_DIM_QK, BLOCK_DQK, True)
    if sinks is not None:
        row_max = tl.full((BLOCK_M,), 0.0, tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        row_sum = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
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
            scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK_M, BLOCK_N), not yet scaled
            if MASKED or HAS_BIAS or scoring.HAS_SOFTCAP:
                scores *= scoring.scale
                if scoring.HAS_SOFTCAP:
                    scores = tanh(scores) * scoring.softcap
                if HAS_BIAS:
                    scores = add_bias(
                        scores, rows[:, None], keys[None, :], sequence.seqlen_q, sequence, head_mask, attn_mask, alibi_slope, MASKED
                    )
                if MASKED:
                    allowed = allowed_pairs(
                        rows[:, None], keys[None, :], sequence.seqlen_q, sequence, exist[None, :], window,
                        head_mask, attn_mask, head_bits, mask_bits,
                    )  # fmt: skip
                    scores = tl.where(allowed, scores, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(scores, 1))
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that saw nothing yet: exp2(-inf - 0) = 0
                weights = tl.exp2(scores - shift[:, None])
            else:
                # One multiply-add per score: scale > 0, so the maximum of the scaled scores is the scaled maximum.
                new_max = tl.maximum(row_max, tl.max(scores, 1) * scoring.scale)
                shift = new_max
                weights = tl.exp2(scores * scoring.scale - shift[:, None])
            rescale = tl.exp2(row_max - shift)
            row_sum = row_sum * rescale + tl.sum(weights, 1)
            row_max = new_max
            acc *= rescale[:, None]
            if dropout.rng_state is not None:
                keep = dropout_keep(dropout, batch * sizes.num_heads + head, start_m, start_n, BLOCK_M, BLOCK_N)
                weights = tl.where(keep, weights, 0.0)
            v = load_tile(head_value, keys, exist, value.stride_row, HEAD_DIM_V, BLOCK_DV, MASKED)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)  # (BLOCK_M, BLOCK_DV)

    if dropout.rng_state is not None:
        acc *= 65536.0 / (65536 - dropout.threshold)
    nothing = (row_sum == 0.0) | ~row_present  # of a row of NaN scores the maximum is -inf, but the sum NaN
    acc = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, row_sum)[:, None])
    store_tile(head_out, acc, rows, rows < sequence.seqlen_q, out.stride_row, HEAD_DIM_V, BLOCK_DV)
    row_lse = tl.where(nothing, float("-inf"), row_max * LN_2 + tl.log2(tl.where(nothing, 1.0, row_sum)) * LN_2)
    tl.store(head_lse + rows, row_lse, mask=rows < sequence.seqlen_q)
