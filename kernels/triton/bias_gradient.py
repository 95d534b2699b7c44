"""The gradient of a float mask with all rows and keys that batches or heads share: one program per tile of the mask adds up theirs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .arguments import common_arguments, feature_class, padded_head_dim, rows_of
from .launch import launch, tile_for
from .parameters import AttnMask, Dropout, KeyMask, MaskBits, RowNumbers, Rows, Scores, Sizes, Slopes, Tiles, Window, kernel
from .tiles import (
    key_blocks,
    keys_exist,
    load_tile,
    of_batch,
    of_head,
    row_statistics,
    score_gradients,
    sequence_of,
    slope_of,
    tile_weights,
)


def summed_mask_gradient(problem: Problem, lse: Tensor, dout: Tensor, delta: Tensor, dmask: Tensor) -> None:
    """Writes every element of dmask (B or 1, Hq or 1, Lq, Lk), contiguous."""
    query, key, value = problem.query, problem.key, problem.value
    head_dim = max(padded_head_dim(query.shape[3]), padded_head_dim(value.shape[3]))
    tile = tile_for("dbias", query.dtype, head_dim, feature_class(problem))
    mask_batches, mask_heads, seqlen_q, seqlen_k = dmask.shape
    common = common_arguments(problem, None, problem.mask_bits)
    num_programs = triton.cdiv(seqlen_q, tile.BLOCK_M) * triton.cdiv(seqlen_k, tile.BLOCK_N) * mask_batches * mask_heads
    if num_programs:
        strides = (*rows_of(query), *rows_of(key), *rows_of(value), *rows_of(dout), *rows_of(lse)[:2], *rows_of(dmask))
        shares = (mask_heads, query.shape[0] // mask_batches, query.shape[1] // mask_heads)
        launch(
            attention_dbias,
            num_programs,
            (query, key, value, dout, lse, delta, dmask, *common.tensors),
            (*strides, *shares, *common.numbers),
            common.constants,
            tile,
        )


@kernel
def attention_dbias(
    query: Rows, key: Rows, value: Rows, dout: Rows, lse: RowNumbers,
    delta,  # like lse
    dmask: Rows,  # (B or 1, Hq or 1, Lq, Lk), each tile the sum over `batches_per_mask` batches and `heads_per_mask` heads
    mask_heads: tl.int32, batches_per_mask: tl.int32, heads_per_mask: tl.int32,
    attn_mask: AttnMask, key_mask: KeyMask, alibi_slopes: Slopes, mask_bits: MaskBits, tiles: Tiles, sizes: Sizes,
    window: Window, scoring: Scores, dropout: Dropout,
    HEAD_DIM_QK: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`tiles` is not used: what a batch sees of this tile, loop bounds say, and the masks in it."""
    program = tl.program_id(0)
    num_key_blocks = tl.cdiv(sizes.seqlen_k, BLOCK_N)
    num_row_blocks = tl.cdiv(sizes.seqlen_q, BLOCK_M)
    key_block = program % num_key_blocks
    start_n = key_block * BLOCK_N
    start_m = program // num_key_blocks % num_row_blocks * BLOCK_M
    mask_head = program // num_key_blocks // num_row_blocks % mask_heads
    mask_batch = program // num_key_blocks // num_row_blocks // mask_heads
    rows = start_m + tl.arange(0, BLOCK_M)
    keys = start_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for batch_of_mask in range(batches_per_mask):
        batch = mask_batch * batches_per_mask + batch_of_mask
        sequence = sequence_of(batch, sizes, window)
        blocks = key_blocks(start_m, sequence, window, BLOCK_M, BLOCK_N)
        batch_key_mask = of_batch(key_mask, batch)
        exist = keys_exist(keys, sequence.keys_present, batch_key_mask, key_mask, True)
        seen = (start_m < sequence.rows_present) & (blocks.first <= key_block) & (key_block < blocks.last)
        for head_of_mask in range(tl.where(seen, heads_per_mask, 0)):
            head = mask_head * heads_per_mask + head_of_mask
            group = head // sizes.heads_per_group
            place = batch * lse.stride_batch + head * lse.stride_head
            head_mask = of_head(attn_mask, batch, head)
            head_bits = of_head(mask_bits, batch, head)
            alibi_slope = slope_of(alibi_slopes, batch, head)
            row_lse, row_delta, attends = row_statistics(lse.data + place, delta + place, rows, sizes.seqlen_q, True, True)
            q = load_tile(of_head(query, batch, head), rows, attends, query.stride_row, HEAD_DIM_QK, BLOCK_DQK, True)
            do = load_tile(of_head(dout, batch, head), rows, attends, dout.stride_row, HEAD_DIM_V, BLOCK_DV, True)
            k = load_tile(of_head(key, batch, group), keys, exist, key.stride_row, HEAD_DIM_QK, BLOCK_DQK, True)
            v = load_tile(of_head(value, batch, group), keys, exist, value.stride_row, HEAD_DIM_V, BLOCK_DV, True)
            products = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK_M, BLOCK_N), not yet scaled
            weights, _capped = tile_weights(
                products, rows[:, None], keys[None, :], row_lse[:, None], sequence, exist[None, :], window, scoring,
                head_mask, attn_mask, alibi_slope, head_bits, mask_bits,
                dropout, batch * sizes.num_heads + head, start_m, start_n, True, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            dweights = tl.dot(do, tl.trans(v), input_precision=INPUT_PRECISION)
            acc += score_gradients(weights, dweights, row_delta[:, None], dropout, True)
    pointers = of_head(dmask, mask_batch, mask_head) + rows[:, None] * dmask.stride_row + keys[None, :]
    in_memory = (rows < sizes.seqlen_q)[:, None] & (keys < sizes.seqlen_k)[None, :]
    tl.store(pointers, acc.to(dmask.data.dtype.element_ty), mask=in_memory)
