"""The gradient of a float mask with all rows and keys that batches or heads share: one program per tile of the mask adds up theirs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .arguments import common_arguments, feature_class, kernel, padded_head_dim, rows_of
from .launch import launch, tile_for
from .tiles import key_blocks, keys_exist, load_tile, row_statistics, score_gradients, sequence_sizes, tile_weights


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
    query, key, value, dout,  # (B, H, L, D)
    lse, delta,  # (B, Hq, Lq) float32
    dmask,  # (B or 1, Hq or 1, Lq, Lk), each tile the sum over `batches_per_mask` batches and `heads_per_mask` heads
    attn_mask, key_mask, key_lengths, query_lengths, alibi_slopes, rng_state, cu_seqlens_q, cu_seqlens_k, mask_bits, tiles,
    stride_query_batch: tl.int64, stride_query_head: tl.int64, stride_query_row: tl.int64,
    stride_key_batch: tl.int64, stride_key_head: tl.int64, stride_key_row: tl.int64,
    stride_value_batch: tl.int64, stride_value_head: tl.int64, stride_value_row: tl.int64,
    stride_dout_batch: tl.int64, stride_dout_head: tl.int64, stride_dout_row: tl.int64,
    stride_lse_batch: tl.int64, stride_lse_head: tl.int64,
    stride_dmask_batch: tl.int64, stride_dmask_head: tl.int64, stride_dmask_row: tl.int64,
    mask_heads: tl.int32, batches_per_mask: tl.int32, heads_per_mask: tl.int32,
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
    """`tiles` is not used: what a batch sees of this tile, loop bounds say, and the masks in it."""
    program = tl.program_id(0)
    num_key_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    num_row_blocks = tl.cdiv(seqlen_q, BLOCK_M)
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
        _first_row, _first_key, _rows_in_memory, rows_present, keys_present, offset = sequence_sizes(
            batch, seqlen_q, seqlen_k, num_tokens_q, num_tokens_k, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k,
            diagonal, BOTTOM_RIGHT,
        )  # fmt: skip
        first, _first_full, _last_full, last = key_blocks(
            start_m, rows_present, keys_present, offset, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
        )
        batch_key_mask = key_mask
        if key_mask is not None:
            batch_key_mask += batch * stride_key_mask_batch
        exist = keys_exist(keys, keys_present, batch_key_mask, stride_key_mask_key, True)
        seen = (start_m < rows_present) & (first <= key_block) & (key_block < last)
        for head_of_mask in range(tl.where(seen, heads_per_mask, 0)):
            head = mask_head * heads_per_mask + head_of_mask
            group = head // heads_per_group
            place = batch * stride_lse_batch + head * stride_lse_head
            head_query = query + batch * stride_query_batch + head * stride_query_head
            head_dout = dout + batch * stride_dout_batch + head * stride_dout_head
            head_key = key + batch * stride_key_batch + group * stride_key_head
            head_value = value + batch * stride_value_batch + group * stride_value_head
            head_mask = attn_mask + batch * stride_mask_batch + head * stride_mask_head
            head_bits = mask_bits
            if mask_bits is not None:
                head_bits += batch * stride_bits_batch + head * stride_bits_head
            alibi_slope = 0.0
            if alibi_slopes is not None:
                alibi_slope = tl.load(alibi_slopes + batch * stride_slopes_batch + head * stride_slopes_head).to(tl.float32)
            row_lse, row_delta, attends = row_statistics(lse + place, delta + place, rows, seqlen_q, True, True)
            q = load_tile(head_query, rows, attends, stride_query_row, HEAD_DIM_QK, BLOCK_DQK, True)
            do = load_tile(head_dout, rows, attends, stride_dout_row, HEAD_DIM_V, BLOCK_DV, True)
            k = load_tile(head_key, keys, exist, stride_key_row, HEAD_DIM_QK, BLOCK_DQK, True)
            v = load_tile(head_value, keys, exist, stride_value_row, HEAD_DIM_V, BLOCK_DV, True)
            products = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK_M, BLOCK_N), not yet scaled
            weights, _capped = tile_weights(
                products, rows[:, None], keys[None, :], row_lse[:, None], rows_present, keys_present, exist[None, :],
                offset, window_left, window_right, score_scale, softcap_log2,
                head_mask, stride_mask_row, stride_mask_key, alibi_slope,
                head_bits, rows[:, None], keys[None, :], stride_bits_line,
                rng_state, batch * num_heads + head, start_m, start_n, dropout_threshold,
                HAS_SOFTCAP, HAS_LEFT, HAS_RIGHT, MASK_IS_BOOL, alibi_slopes is not None, True, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            dweights = tl.dot(do, tl.trans(v), input_precision=INPUT_PRECISION)
            acc += score_gradients(weights, dweights, row_delta[:, None], dropout_threshold, rng_state is not None, True)
    pointers = dmask + mask_batch * stride_dmask_batch + mask_head * stride_dmask_head + rows[:, None] * stride_dmask_row + keys[None, :]
    in_memory = (rows < seqlen_q)[:, None] & (keys < seqlen_k)[None, :]
    tl.store(pointers, acc.to(dmask.dtype.element_ty), mask=in_memory)
