"""Tile functions that the Triton kernels share: which keys a block of rows sees, loads, scores with bias and masks, dropout.

Conventions: scores are in log2 units (natural ones times log2(e)), so that exp2 follows without another product. `rows` and `keys` are
sequence positions shaped to broadcast against the tile - (M, 1) and (1, N), or the other way round on transposed scores. An argument that
is None is absent, decided at compile time. Groups of arguments are those of parameters.py; head_mask and head_bits are where the part of
attn_mask and mask_bits that belongs to the head starts. Address products are int64 because strides are.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MASKED_BELOW = tl.constexpr(-1e30)  # a float mask value below this masks
TILE = tl.constexpr(64)  # side of the tiles that tile lists classify


class Sequence(NamedTuple):
    """One sequence of a call."""

    first_row: tl.tensor  # in memory
    first_key: tl.tensor
    seqlen_q: tl.tensor  # rows in memory
    rows_present: tl.tensor
    keys_present: tl.tensor
    offset: tl.tensor  # row i is on the diagonal with key i + offset


class Blocks(NamedTuple):
    """Those that are visited, [first, last), and those all scores of which count, [first_full, last_full)."""

    first: tl.tensor
    first_full: tl.tensor
    last_full: tl.tensor
    last: tl.tensor


@triton.jit
def sequence_of(batch, sizes, window):
    """The Sequence with this number."""
    first_row = tl.zeros((), dtype=tl.int64)
    first_key = tl.zeros((), dtype=tl.int64)
    seqlen_q = sizes.seqlen_q
    seqlen_k = sizes.seqlen_k
    if sizes.cu_seqlens_q is not None:
        # Clamped, so that no value leads out of the memory there is.
        start_q = tl.minimum(tl.maximum(tl.load(sizes.cu_seqlens_q + batch), 0), sizes.num_tokens_q)
        start_k = tl.minimum(tl.maximum(tl.load(sizes.cu_seqlens_k + batch), 0), sizes.num_tokens_k)
        end_q = tl.minimum(tl.load(sizes.cu_seqlens_q + batch + 1), sizes.num_tokens_q)
        end_k = tl.minimum(tl.load(sizes.cu_seqlens_k + batch + 1), sizes.num_tokens_k)
        seqlen_q = tl.minimum(seqlen_q, tl.maximum(end_q - start_q, 0))
        seqlen_k = tl.minimum(seqlen_k, tl.maximum(end_k - start_k, 0))
        first_row += start_q
        first_key += start_k
    rows_present = seqlen_q
    keys_present = seqlen_k
    if sizes.query_lengths is not None:
        rows_present = tl.minimum(tl.maximum(tl.load(sizes.query_lengths + batch), 0), seqlen_q)
    if sizes.key_lengths is not None:
        keys_present = tl.minimum(tl.maximum(tl.load(sizes.key_lengths + batch), 0), seqlen_k)
    offset = window.diagonal
    if window.BOTTOM_RIGHT:
        offset += keys_present - rows_present
    return Sequence(first_row, first_key, seqlen_q, rows_present, keys_present, offset)


@triton.jit
def rows_from(tensor, batch, head, first_row):
    """Where a sequence of a head starts in a tensor of Rows."""
    return tensor.data + (batch * tensor.stride_batch + head * tensor.stride_head + first_row * tensor.stride_row)


@triton.jit
def of_head(tensor, batch, head):
    """Where a head starts in a tensor with strides for batch and head; None if it is absent."""
    if tensor.data is not None:
        return tensor.data + (batch * tensor.stride_batch + head * tensor.stride_head)


@triton.jit
def of_batch(key_mask, batch):
    """Where a batch starts in a KeyMask; None if it is absent."""
    if key_mask.data is not None:
        return key_mask.data + batch * key_mask.stride_batch


@triton.jit
def tile_list(tiles, batch, head, start):
    """The line of Tiles for the block of rows or keys from `start` on; None if there are no lists."""
    if tiles.data is not None:
        return tiles.data + (batch * tiles.stride_batch + head * tiles.stride_head + (start // TILE) * tiles.stride_line)


@triton.jit
def slope_of(slopes, batch, head):
    """A head's ALiBi slope, None without."""
    if slopes.data is not None:
        return tl.load(of_head(slopes, batch, head)).to(tl.float32)


@triton.jit
def key_blocks(start_m, sequence, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The key Blocks of a block of rows: that some row sees, and that every row sees wholly."""
    last_row = tl.minimum(start_m + BLOCK_M, sequence.rows_present) - 1
    seen_from, seen_to = 0, sequence.keys_present
    all_from, all_to = 0, sequence.keys_present
    if window.HAS_LEFT:
        seen_from = start_m + sequence.offset - window.left
        all_from = last_row + sequence.offset - window.left
    if window.HAS_RIGHT:
        seen_to = tl.minimum(sequence.keys_present, last_row + sequence.offset + window.right + 1)
        all_to = tl.minimum(sequence.keys_present, start_m + sequence.offset + window.right + 1)
    return _blocks(seen_from, seen_to, all_from, all_to, BLOCK_N)


@triton.jit
def row_blocks(start_n, sequence, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row Blocks of a block of keys: that see some key, and all rows of which see all of them."""
    last_key = tl.minimum(start_n + BLOCK_N, sequence.keys_present) - 1
    seen_from, seen_to = 0, sequence.rows_present
    all_from, all_to = 0, sequence.rows_present
    if window.HAS_RIGHT:  # key j is seen from row j - offset - window.right on
        seen_from = start_n - sequence.offset - window.right
        all_from = last_key - sequence.offset - window.right
    if window.HAS_LEFT:  # and up to row j - offset + window.left
        seen_to = tl.minimum(sequence.rows_present, last_key - sequence.offset + window.left + 1)
        all_to = tl.minimum(sequence.rows_present, start_n - sequence.offset + window.left + 1)
    if start_n + BLOCK_N > sequence.keys_present:
        all_to = 0
    return _blocks(seen_from, seen_to, all_from, all_to, BLOCK_M)


@triton.jit
def _blocks(seen_from, seen_to, all_from, all_to, BLOCK: tl.constexpr):
    first = tl.maximum(seen_from, 0) // BLOCK
    last = tl.maximum(tl.cdiv(tl.maximum(seen_to, 0), BLOCK), first)
    first_full = tl.minimum(tl.cdiv(tl.maximum(all_from, 0), BLOCK), last)
    first_full = tl.maximum(first_full, first)
    last_full = tl.minimum(tl.maximum(tl.maximum(all_to, 0) // BLOCK, first_full), last)
    return Blocks(first, first_full, last_full, last)


@triton.jit
def block_start(step, blocks, tiles, num_tiles, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Where the block of a loop step starts. The full ones are first_full ..., the mixed ones those to both sides of them.

    tiles: None, or in place of the blocks a line of a tile list (numbers of full and mixed tiles, then the full ones from the front and
    the mixed ones from the back), whose tiles of 64 hold 64 / BLOCK blocks each; num_tiles: how many tiles the line has room for.
    """
    if tiles is not None:
        PER_TILE: tl.constexpr = TILE // BLOCK
        place = step // PER_TILE
        within = step - place * PER_TILE
        if MASKED:
            place = num_tiles - 1 - place
        start = tl.load(tiles + 2 + place) * TILE + within * BLOCK
    elif MASKED:
        left = blocks.first_full - blocks.first
        start = tl.where(step < left, blocks.first + step, blocks.last_full + step - left) * BLOCK
    else:
        start = (blocks.first_full + step) * BLOCK
    return tl.multiple_of(start, BLOCK)


@triton.jit
def num_blocks(blocks, tiles, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks of a kind the loop visits."""
    if tiles is not None:
        count = tl.load(tiles + MASKED) * (TILE // BLOCK)
    elif MASKED:
        count = (blocks.first_full - blocks.first) + (blocks.last - blocks.last_full)
    else:
        count = blocks.last_full - blocks.first_full
    return count


@triton.jit
def load_tile(base, lines, exists, stride_line, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """(len(lines), BLOCK_D) of a tensor whose last dim is contiguous; columns past HEAD_DIM are 0, and with MASKED absent lines too."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + lines[:, None] * stride_line + columns[None, :]
    if MASKED and HEAD_DIM != BLOCK_D:
        tile = tl.load(pointers, mask=exists[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=exists[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(base, tile, lines, exists, stride_line, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a (len(lines), BLOCK_D) tile in the tensor's dtype, the lines that exist and the columns below HEAD_DIM."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + lines[:, None] * stride_line + columns[None, :]
    mask = exists[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def keys_exist(keys, keys_present, batch_key_mask, key_mask, MASKED: tl.constexpr):
    """Which keys of a block exist: those whose key and value rows may be read. Not asked of a full block, where all do."""
    exist = keys < keys_present
    if MASKED and batch_key_mask is not None:
        exist = exist & (tl.load(batch_key_mask + keys.to(tl.int64) * key_mask.stride_key, mask=exist, other=0) != 0)
    return exist


@triton.jit
def tanh(x):
    """float32, to float32 accuracy also where tanh(x) is about x."""
    square = x * x
    # The Taylor series, for |x| < 0.3 (next term: 3e-10 relative).
    series = x + x * square * (
        -1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0 - square * (1382.0 / 155925.0))))
    )
    limited = tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL)  # by default the minimum of NaN and 20 is 20
    exponential = tl.exp2(limited * (2.0 * LOG2_E))
    far = 1.0 - 2.0 / (exponential + 1.0)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0.0, -far, far))


@triton.jit
def pairs_in_window(rows, keys, rows_in_memory, sequence, exist, window):
    """Which scores of a tile lengths, key_mask, causal and window allow: bool, the shape of the tile. exist: keys_exist, like `keys`."""
    allowed = (rows < rows_in_memory) & (keys < sequence.keys_present) & exist
    distance = keys - (rows + sequence.offset)
    if window.HAS_LEFT:
        allowed = allowed & (distance >= -window.left)
    if window.HAS_RIGHT:
        allowed = allowed & (distance <= window.right)
    return allowed


@triton.jit
def allowed_pairs(
    rows, keys, rows_in_memory, sequence, exist, window, head_mask, attn_mask, head_bits, mask_bits, TRANSPOSED: tl.constexpr = False
):  # fmt: skip
    """Which scores of a mixed tile are allowed: bool, the shape of the tile.

    head_bits: a PreparedMask's bits, which hold everything but say nothing past the rows in memory; the transposed ones if TRANSPOSED.
    """
    if head_bits is not None:
        in_memory = (rows < rows_in_memory) & (keys < sequence.keys_present)
        lines, positions = rows, keys
        if TRANSPOSED:
            lines, positions = keys, rows
        word = tl.load(head_bits + lines * mask_bits.stride_line + (positions >> 5), mask=in_memory, other=0)
        allowed = in_memory & exist & (((word >> (positions & 31)) & 1) != 0)
    else:
        allowed = pairs_in_window(rows, keys, rows_in_memory, sequence, exist, window)
        if attn_mask.IS_BOOL:
            in_memory = (rows < rows_in_memory) & (keys < sequence.keys_present)
            pointers = head_mask + rows * attn_mask.stride_row + keys.to(tl.int64) * attn_mask.stride_key
            allowed = allowed & (tl.load(pointers, mask=in_memory, other=0) != 0)
    return allowed


@triton.jit
def add_bias(scores, rows, keys, rows_in_memory, sequence, head_mask, attn_mask, alibi_slope, MASKED: tl.constexpr):
    """log2 scores plus the float mask (-inf where that masks), and with ALiBi."""
    if head_mask is not None and not attn_mask.IS_BOOL:
        in_memory = rows < rows_in_memory
        if MASKED:
            in_memory = in_memory & (keys < sequence.keys_present)
        pointers = head_mask + rows * attn_mask.stride_row + keys.to(tl.int64) * attn_mask.stride_key
        bias = tl.load(pointers, mask=in_memory, other=0.0).to(tl.float32)
        scores = tl.where(bias < MASKED_BELOW, float("-inf"), scores + bias * LOG2_E)
    if alibi_slope is not None:
        scores = add_alibi(scores, rows, keys, sequence, alibi_slope)
    return scores


@triton.jit
def add_alibi(scores, rows, keys, sequence, alibi_slope):
    """log2 scores minus alibi_slope * |distance to the diagonal|."""
    return scores - (alibi_slope * LOG2_E) * tl.abs(keys - (rows + sequence.offset)).to(tl.float32)


@triton.jit
def dropout_keep(
    dropout, batch_head, start_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr = False
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) bool, or transposed: which weights of a tile survive. start_m and start_n are multiples of 16.

    The mapping is that of csrc/philox.h: one Philox4x32-7 draw covers rows {i, i + 8} and keys {j, j + 1, j + 8, j + 9}, so a tile needs
    (BLOCK_M / 2) x (BLOCK_N / 4) draws, whose 8 halves are then put in their places.
    """
    seed = tl.load(dropout.rng_state)
    counter_offset = tl.load(dropout.rng_state + 1)
    key0 = seed.to(tl.uint32)
    key1 = ((seed >> 32) ^ (counter_offset >> 32)).to(tl.uint32)
    # Words that do not depend on the row or the key stay scalars and vectors: the first two rounds cost next to nothing.
    word0 = (start_n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    word1 = (start_m // 2 + tl.arange(0, BLOCK_M // 2)).to(tl.uint32)[:, None]
    word2 = batch_head.to(tl.uint32)
    word3 = counter_offset.to(tl.uint32)
    for _ in tl.static_range(7):
        high0, low0 = _multiply(word0, 0xD2511F53)
        high2, low2 = _multiply(word2, 0xCD9E8D57)
        word0, word1, word2, word3 = high2 ^ word1 ^ key0, low2, high0 ^ word3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    # Axes: i // 16, i % 8, j // 16, (j % 8) // 2, then j % 2 (half), (j // 8) % 2 and (i // 8) % 2 (word).
    upper = tl.join(_halves_kept(word0, dropout.threshold), _halves_kept(word1, dropout.threshold))
    lower = tl.join(_halves_kept(word2, dropout.threshold), _halves_kept(word3, dropout.threshold))
    kept = tl.join(upper, lower).reshape(BLOCK_M // 16, 8, BLOCK_N // 16, 4, 2, 2, 2)
    if TRANSPOSED:
        keep = kept.permute(2, 5, 3, 4, 0, 6, 1).reshape(BLOCK_N, BLOCK_M) != 0
    else:
        keep = kept.permute(0, 6, 1, 2, 5, 3, 4).reshape(BLOCK_M, BLOCK_N) != 0
    return keep


@triton.jit
def _multiply(word, MULTIPLIER: tl.constexpr):
    multiplier = tl.full((), MULTIPLIER, tl.uint32)
    return tl.umulhi(word, multiplier + tl.zeros_like(word)), word * multiplier


@triton.jit
def _halves_kept(word, threshold):
    """(..., 2) int8: whether the low and the high half of each word reach the threshold."""
    low = ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int8)
    high = ((word >> 16).to(tl.int32) >= threshold).to(tl.int8)
    return tl.join(low, high)


@triton.jit
def row_statistics(lse, delta, rows, seqlen_q, CHECKED: tl.constexpr, EMPTY_ROWS: tl.constexpr):
    """lse in log2 units and delta of some rows, and which of the rows to read: with EMPTY_ROWS those that attend to something.

    lse is +inf where a row is not read, so that its weights are 0. Not CHECKED: all rows exist and attend to something.
    """
    if CHECKED:
        attends = rows < seqlen_q
        row_lse = tl.load(lse + rows, mask=attends, other=float("-inf"))
        if EMPTY_ROWS:
            attends = row_lse != float("-inf")
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
        row_delta = tl.load(delta + rows, mask=attends, other=0.0)
    else:
        attends = rows < seqlen_q
        row_lse = tl.load(lse + rows) * LOG2_E
        row_delta = tl.load(delta + rows)
    return row_lse, row_delta, attends


@triton.jit
def tile_weights(
    products, rows, keys, row_lse, sequence, exist, window, scoring, head_mask, attn_mask, alibi_slope, head_bits, mask_bits,
    dropout, batch_head, start_m, start_n,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Weights of a tile from its products Q K^T, with a minus sign where dropout drops them; and tanh(score / softcap) if there is one.

    Everything is (BLOCK_M, BLOCK_N), or transposed. A weight that is not allowed is 0, whatever its product is.
    """
    scores = products * scoring.scale
    capped = scores
    if scoring.HAS_SOFTCAP:
        capped = tanh(scores)
        scores = capped * scoring.softcap
    scores = add_bias(scores, rows, keys, sequence.rows_present, sequence, head_mask, attn_mask, alibi_slope, MASKED)
    exponent = scores - row_lse
    if head_mask is not None and not attn_mask.IS_BOOL:
        # A mask of -1e8 in a whole row leaves scores and lse some log2 units of rounding, which may differ from the forward's.
        exponent = tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    weights = tl.exp2(exponent)
    if MASKED:
        allowed = allowed_pairs(
            rows, keys, sequence.rows_present, sequence, exist, window, head_mask, attn_mask, head_bits, mask_bits, TRANSPOSED
        )
        weights = tl.where(allowed, weights, 0.0)
    if dropout.rng_state is not None:
        keep = dropout_keep(dropout, batch_head, start_m, start_n, BLOCK_M, BLOCK_N, TRANSPOSED)
        weights = tl.where(keep, weights, -weights)
    return weights, capped


@triton.jit
def score_gradients(weights, dweights, row_delta, dropout, MASKED: tl.constexpr):
    """Gradients of a tile's scores, which are those of the mask too, from tile_weights and from the gradients of the weights."""
    if dropout.rng_state is not None:
        dweights = tl.where(weights < 0.0, 0.0, dweights * (65536.0 / (65536 - dropout.threshold)))
        weights = tl.abs(weights)
    dscores = weights * (dweights - row_delta)
    if MASKED:
        dscores = tl.where(weights == 0.0, 0.0, dscores)  # where nothing is allowed the gradient of the weight may be infinite
    return dscores
