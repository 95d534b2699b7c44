"""Attention of a few query rows, as in decoding, in Triton: the keys of one KV head are split among several programs.

Method: Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023).
  1. pack the query rows of all heads that share a KV head into blocks, mostly one
  2. each program visits its share of the key blocks that these rows see, and writes softmax-weighted values and their lse
  3. combine: the sum of the shares, weighted by exp(lse); a row that attends to nothing gives 0 and -inf
A call that fills the GPU without splitting writes its result in step 2.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, empty_strided
from ..problem import PLACE, OptionalTensors, Problem, empty_lse, empty_output
from .arguments import common_arguments, common_tensors, feature_class, padded_head_dim, rows_of
from .launch import INTERPRETED, Launch, Tile, tile_for
from .parameters import (
    AttnMask,
    Dropout,
    KeyMask,
    MaskBits,
    RowNumbers,
    Rows,
    Scores,
    Sizes,
    Slopes,
    Splits,
    Tiles,
    Window,
    kernel,
)
from .tiles import (
    LN_2,
    LOG2_E,
    add_alibi,
    key_blocks,
    keys_exist,
    load_tile,
    of_batch,
    of_head,
    pairs_in_window,
    rows_from,
    sequence_of,
    store_tile,
    tanh,
)

MAX_ROWS = tl.constexpr(64)  # query rows per KV head, all heads together
MAX_SPLITS = 128
KEYS_PER_SPLIT = 64 if INTERPRETED else 256  # at least, so that combining costs little
PROGRAMS_PER_PROCESSOR = 2  # that keep enough loads in flight
COMBINE_TILE = Tile(1, 16, 4, 1)  # one row, and its splits at a time


def takes(problem: Problem) -> bool:
    """Whether these kernels cover a problem: few rows, and masks that need nothing per row but its position."""
    rows = problem.query.shape[1] // max(problem.key.shape[1], 1) * problem.query.shape[2]
    absent = (problem.attn_mask, problem.row_tiles, problem.query_lengths, problem.cu_seqlens_q)
    return rows <= MAX_ROWS.value and problem.dropout_p == 0.0 and all(tensor is None for tensor in absent)


def prepare(problem: Problem) -> Call:
    """The forward pass of problems that differ from this one in their tensors' memory alone, and agree in torch's setting for float32.

    One launch, or with more than one split two: sinks then take part in the second.
    """
    out, lse = empty_output(problem), empty_lse(problem.query)
    out_shape, out_strides = tuple(out.shape), out.stride()
    lse_shape, lse_strides = tuple(lse.shape), lse.stride()
    dtype, float32, empty = out.dtype, torch.float32, empty_strided(out)
    splits, decode, combine = _launches(problem, out, lse) if lse.numel() else (1, None, None)
    split_out_shape = (splits * out.numel(),)
    split_lse_shape = (splits * lse.numel(),)

    def call(query: Tensor, key: Tensor, value: Tensor, optional: OptionalTensors, needs_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = empty(out_shape, out_strides, dtype), empty(lse_shape, lse_strides, float32)
        sinks = optional[PLACE["sinks"]]
        common = common_tensors(optional, None, None)
        if decode is not None and combine is not None:
            split_out = empty(split_out_shape, (1,), float32)
            split_lse = empty(split_lse_shape, (1,), float32)
            decode((query, key, value, split_out, split_lse, None, *common))
            combine((split_out, split_lse, out, lse, sinks))
        elif decode is not None:
            decode((query, key, value, out, lse, sinks, *common))
        return (out, lse) if needs_lse else out

    return call


class Launches(NamedTuple):
    splits: int
    decode: Launch
    combine: Launch | None  # with one split there is nothing to combine


def _launches(problem: Problem, out: Tensor, lse: Tensor) -> Launches:
    splits = num_splits(problem)
    decode = _decode_launch(problem, out, lse, splits)
    return Launches(splits, decode, _combine_launch(out, lse, splits) if splits > 1 else None)


def _decode_launch(problem: Problem, out: Tensor, lse: Tensor, splits: int) -> Launch:
    query, key, value = problem.query, problem.key, problem.value
    batch, num_heads, seqlen_q, _ = query.shape
    head_dim_v = value.shape[3]
    num_groups = key.shape[1]
    rows = num_heads // num_groups * seqlen_q
    head_dim = max(padded_head_dim(query.shape[3]), padded_head_dim(head_dim_v))
    tile = tile_for("decode", query.dtype, head_dim, feature_class(problem))
    tile = tile._replace(BLOCK_M=max(16, min(tile.BLOCK_M, triton.next_power_of_2(rows))))
    if splits == 1:
        split_out_strides, split_lse_strides = rows_of(out), rows_of(lse)[:2]
        split_strides = (0, 0)
    else:  # (num_splits, B, H, Lq, Dv) and (num_splits, B, H, Lq), contiguous
        split_out_strides = (num_heads * seqlen_q * head_dim_v, seqlen_q * head_dim_v, head_dim_v)
        split_lse_strides = (num_heads * seqlen_q, seqlen_q)
        split_strides = (lse.numel() * head_dim_v, lse.numel())
    common = common_arguments(problem, None, None)
    input_strides = (*rows_of(query), *rows_of(key), *rows_of(value))
    return Launch(
        attention_decode,
        triton.cdiv(rows, tile.BLOCK_M) * splits * batch * num_groups,
        (*input_strides, *split_out_strides, *split_lse_strides, *common.numbers, *split_strides, splits),
        common.constants,
        tile,
    )


def _combine_launch(out: Tensor, lse: Tensor, splits: int) -> Launch:
    _, num_heads, seqlen_q, head_dim = out.shape
    return Launch(
        combine,
        lse.numel(),  # one program for each row
        (*rows_of(out), *rows_of(lse)[:2], lse.numel(), seqlen_q, num_heads, splits),
        (head_dim, padded_head_dim(head_dim)),
        COMBINE_TILE,
    )


def num_splits(problem: Problem) -> int:
    """Enough programs to keep every processor of the GPU busy; from sizes alone, never from lengths, which are on the device."""
    visible = problem.key.shape[2]
    if problem.window_left is not None and problem.window_right is not None:
        visible = min(visible, problem.query.shape[2] + problem.window_left + problem.window_right)
    unsplit = problem.query.shape[0] * problem.key.shape[1]
    wanted = 3 if INTERPRETED else triton.cdiv(PROGRAMS_PER_PROCESSOR * _processors(problem.query.get_device()), unsplit)
    return max(1, min(wanted, MAX_SPLITS, triton.cdiv(visible, KEYS_PER_SPLIT)))


@functools.cache
def _processors(device: int) -> int:
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(device)["multiprocessor_count"]


@kernel
def attention_decode(
    query: Rows, key: Rows, value: Rows,
    out: Rows,  # (num_splits, B, H, Lq, Dv)
    lse: RowNumbers,  # (num_splits, B, H, Lq) float32
    sinks,  # (H,)
    attn_mask: AttnMask, key_mask: KeyMask, alibi_slopes: Slopes, mask_bits: MaskBits, tiles: Tiles, sizes: Sizes,
    window: Window, scoring: Scores, dropout: Dropout,
    splits: Splits,
    HEAD_DIM_QK: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    num_groups = sizes.num_heads // sizes.heads_per_group
    num_rows = sizes.heads_per_group * sizes.seqlen_q
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)  # the fastest index: they read the same keys
    split = program // num_row_blocks % splits.count
    group = program // num_row_blocks // splits.count % num_groups
    batch = program // num_row_blocks // splits.count // num_groups
    sequence = sequence_of(batch, sizes, window)
    packed = (program % num_row_blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = packed < num_rows
    rows = packed % sizes.seqlen_q
    heads = group * sizes.heads_per_group + packed // sizes.seqlen_q
    head_key = of_head(key, batch, group)
    head_value = of_head(value, batch, group)
    batch_key_mask = of_batch(key_mask, batch)
    if alibi_slopes.data is not None:
        slopes = tl.load(of_head(alibi_slopes, batch, heads), mask=row_exists, other=0.0).to(tl.float32)[:, None]

    q = load_tile(of_head(query, batch, heads)[:, None], rows, row_exists, query.stride_row, HEAD_DIM_QK, BLOCK_DQK, True)
    if sinks is not None:
        row_max = tl.load(sinks + heads, mask=row_exists, other=0.0).to(tl.float32) * LOG2_E
        row_sum = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    blocks = key_blocks(0, sequence, window, MAX_ROWS, BLOCK_N)
    num_blocks = blocks.last - blocks.first
    split_first = blocks.first + (num_blocks * split // splits.count).to(tl.int32)
    split_last = blocks.first + (num_blocks * (split + 1) // splits.count).to(tl.int32)
    for block in range(split_first, split_last):
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        exist = keys_exist(keys, sequence.keys_present, batch_key_mask, key_mask, True)
        k = load_tile(head_key, keys, exist, key.stride_row, HEAD_DIM_QK, BLOCK_DQK, True)
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * scoring.scale  # (BLOCK_M, BLOCK_N)
        if scoring.HAS_SOFTCAP:
            scores = tanh(scores) * scoring.softcap
        if alibi_slopes.data is not None:
            scores = add_alibi(scores, rows[:, None], keys[None, :], sequence, slopes)
        allowed = pairs_in_window(rows[:, None], keys[None, :], sequence.seqlen_q, sequence, exist[None, :], window)
        scores = tl.where(allowed, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that saw nothing yet: exp2(-inf - 0) = 0
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        v = load_tile(head_value, keys, exist, value.stride_row, HEAD_DIM_V, BLOCK_DV, True)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=INPUT_PRECISION)  # (BLOCK_M, BLOCK_DV)

    nothing = row_sum == 0.0
    acc = tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, row_sum)[:, None])
    head_out = of_head(out, batch, heads) + split * splits.stride_out
    store_tile(head_out[:, None], acc, rows, row_exists, out.stride_row, HEAD_DIM_V, BLOCK_DV)
    row_lse = tl.where(nothing, float("-inf"), row_max * LN_2 + tl.log2(tl.where(nothing, 1.0, row_sum)) * LN_2)
    tl.store(of_head(lse, batch, heads) + split * splits.stride_lse + rows, row_lse, mask=row_exists)


@kernel
def combine(
    split_out,  # (num_splits, B, H, Lq, Dv) float32, dense
    split_lse,  # (num_splits, B, H, Lq) float32, dense
    out: Rows, lse: RowNumbers,
    sinks,  # (H,)
    num_rows: tl.int32, seqlen_q: tl.int32, num_heads: tl.int32, num_splits: tl.int32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program % seqlen_q
    head = program // seqlen_q % num_heads
    batch = program // seqlen_q // num_heads
    columns = tl.arange(0, BLOCK_D)
    row_max = float("-inf")
    row_sum = 0.0
    if sinks is not None:
        row_max = tl.load(sinks + head).to(tl.float32) * LOG2_E
        row_sum = 1.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, num_splits, BLOCK_N):
        splits = start + tl.arange(0, BLOCK_N)
        exists = splits < num_splits
        lines = splits.to(tl.int64) * num_rows + program
        shares = tl.load(split_lse + lines, mask=exists, other=float("-inf")) * LOG2_E
        new_max = tl.maximum(row_max, tl.max(shares, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(shares - shift)
        rescale = tl.exp2(row_max - shift)
        tile = load_tile(split_out, lines, exists, HEAD_DIM, HEAD_DIM, BLOCK_D, True)
        acc = acc * rescale + tl.sum(tile * weights[:, None], 0)
        row_sum = row_sum * rescale + tl.sum(weights, 0)
        row_max = new_max
    nothing = row_sum == 0.0
    acc = tl.where(nothing, 0.0, acc / tl.where(nothing, 1.0, row_sum))
    head_out = rows_from(out, batch, head, row)
    tl.store(head_out + columns, acc.to(out.data.dtype.element_ty), mask=columns < HEAD_DIM)
    row_lse = tl.where(nothing, float("-inf"), row_max * LN_2 + tl.log2(tl.where(nothing, 1.0, row_sum)) * LN_2)
    tl.store(of_head(lse, batch, head) + row, row_lse)
