"""Masks prepared for kernels once and used by many calls: bits instead of bytes, and lists of the nonempty tiles.

1. Fold everything that decides whether query i may attend to key j into one matrix of bits.
2. Pack it into 32-bit words along the keys, and along the queries for the backward pass.
3. Classify its 64 x 64 tiles as empty, full or mixed, and list the full and the mixed tiles of each row and each column of tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends import BACKENDS
from .checks import check_dense, checked_seqlen, make_problem
from .problem import PreparedMask, Problem
from .reference import MASKED_BELOW, diagonal_offset, present

TILE = 64
GATHER_BITS = 0x0102040810204080  # multiplied by eight bytes of 0 or 1, it puts byte k in bit 56 + k


def prepare_mask(
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
    is_causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    diagonal: int | str | None = None,
    gradients: bool = True,
) -> PreparedMask:
    """Prepares all masking once for many calls and layers. The arguments mean what they mean in `attention`.

    A float attn_mask is still added to the scores and keeps its gradient, but which entries it masks (below -1e30) is decided now.

    Args:
        attn_mask: bool (True = may attend) or float; (Lq, Lk), or 4-D and broadcastable to (B, Hq, Lq, Lk).
        key_mask: (B, Lk) bool, True = may attend.
        seqlen_q: Lq, if attn_mask does not give it. seqlen_k: Lk, if neither key_mask nor attn_mask gives it.
        gradients: also prepare what the backward pass needs; if False, no input of the call may require gradients.

    Returns:
        a PreparedMask, to pass as attn_mask to calls of the same sizes; size 1 fits any batch size or number of heads.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    given: dict[str, Any] = {"key_mask": key_mask, "key_lengths": key_lengths, "query_lengths": query_lengths, "attn_mask": attn_mask}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in tensors.items():
        check_dense(name, tensor)
    batch, num_heads = (1, 1) if attn_mask is None or attn_mask.dim() != 4 else attn_mask.shape[:2]
    batch = next((tensor.shape[0] for name, tensor in tensors.items() if name != "attn_mask" and tensor.dim() > 0), batch)
    device = next((tensor.device for tensor in tensors.values()), None)
    seqlen_q = _seqlen("seqlen_q", seqlen_q, (attn_mask, -2))
    seqlen_k = _seqlen("seqlen_k", seqlen_k, (key_mask, -1), (attn_mask, -1))
    nothing = torch.zeros(1, device=device)
    query, key = (nothing.expand(batch, num_heads, seqlen, 1) for seqlen in (seqlen_q, seqlen_k))
    problem = make_problem("separate", (query, key, key), is_causal=is_causal, window=window, diagonal=diagonal, **given)
    bias = None if problem.attn_mask is None or problem.attn_mask.dtype == torch.bool else problem.attn_mask
    with torch.no_grad():
        if bias is not None:
            problem.attn_mask = bias >= MASKED_BELOW
        prepare = BACKENDS["triton"].prepared_tiles if BACKENDS["triton"].prepares(problem) else prepared_tiles
        mask_bits, mask_bits_transposed, row_tiles, column_tiles = prepare(problem, gradients)
    return PreparedMask(
        bias=bias,
        key_mask=problem.key_mask,
        key_lengths=problem.key_lengths,
        query_lengths=problem.query_lengths,
        window=(problem.window_left, problem.window_right),
        diagonal=problem.diagonal,
        bottom_right=problem.bottom_right,
        shape=(batch, num_heads, seqlen_q, seqlen_k),
        mask_bits=mask_bits,
        mask_bits_transposed=mask_bits_transposed,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
    )


def prepared_tiles(problem: Problem, gradients: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """mask_bits, mask_bits_transposed, row_tiles and column_tiles in plain PyTorch. On a GPU, Triton makes them without a dense mask."""
    mask_bits = allowed_bits(problem)
    full, mixed = classify_tiles(mask_bits, problem.key.shape[2])
    if not gradients:
        return mask_bits, None, tile_lists(full, mixed), None
    column_tiles = tile_lists(full.transpose(2, 3), mixed.transpose(2, 3))
    return mask_bits, allowed_bits(problem, by_key=True), tile_lists(full, mixed), column_tiles


def allowed_bits(problem: Problem, by_key: bool = False) -> Tensor:
    """reference.allowed_pairs as bits, without a dense matrix if there is no attn_mask.

    (B, H or 1, Lq, ceil(Lk / 32)) int32, one line per query; with by_key (B, H or 1, Lk, ceil(Lq / 32)), one line per key.
    """
    queries, keys = present(problem)
    lines, places = (keys, queries) if by_key else (queries, keys)
    bits = pack_bits(places)[:, None, None, :]
    span = visible_span(problem, by_key)
    if span is not None:
        bits = bits & bits_between(*span, places.shape[1])
    bits = bits.masked_fill(~lines[:, None, :, None], 0)
    if problem.attn_mask is not None:
        mask = problem.attn_mask if problem.attn_mask.dtype == torch.bool else ~(problem.attn_mask < MASKED_BELOW)
        mask = mask.transpose(2, 3) if by_key else mask
        bits = bits & pack_bits(mask.expand(*mask.shape[:3], places.shape[1]))
    return bits.contiguous()


def visible_span(problem: Problem, by_key: bool) -> tuple[Tensor, Tensor] | None:
    """First and one past the last key that each query sees through causal and window; with by_key, the queries that see each key.

    (B or 1, 1, L) int64 each; None if there are no such limits.
    """
    left, right = problem.window_left, problem.window_right
    if left is None and right is None:
        return None
    before, after = (right, left) if by_key else (left, right)  # how far a line sees to each side of its diagonal; None: all
    seqlen_q, seqlen_k = problem.query.shape[2], problem.key.shape[2]
    num_lines, num_places = (seqlen_k, seqlen_q) if by_key else (seqlen_q, seqlen_k)
    offset = diagonal_offset(problem)
    offset = offset.view(-1, 1, 1) if isinstance(offset, Tensor) else offset
    middle = torch.arange(num_lines, device=problem.query.device)[None, None] + (-offset if by_key else offset)
    first = torch.zeros_like(middle) if before is None else middle - before
    return first, torch.full_like(middle, num_places) if after is None else middle + after + 1


def bits_between(first: Tensor, last: Tensor, length: int) -> Tensor:
    """(..., L) int64 -> (..., L, ceil(length / 32)) int32: in each line, bits first <= j < last are set."""
    starts = 32 * torch.arange(-(-length // 32), device=first.device)
    return _low_bits(last[..., None] - starts) & ~_low_bits(first[..., None] - starts)


def _low_bits(count: Tensor) -> Tensor:
    """int32 words with the lowest `count` bits set, where count is clamped to [0, 32]."""
    word = (1 << count.clamp(0, 32)) - 1
    return (word - ((word >> 31) << 32)).int()  # the highest bit is the sign


def _seqlen(name: str, seqlen: int | None, *sources: tuple[Tensor | None, int]) -> int:
    if seqlen is not None:
        return checked_seqlen(name, seqlen)
    for tensor, dim in sources:
        if tensor is not None and tensor.dim() >= -dim:
            return tensor.shape[dim]
    raise ValueError(f"{name} must be given: no mask says how long the sequences are")


def pack_bits(allowed: Tensor) -> Tensor:
    """(..., L) bool -> (..., ceil(L / 32)) int32: bit i % 32 of word i // 32; bits past L are 0."""
    *lines, length = allowed.shape
    num_words = -(-length // 32)
    if num_words == 0:
        return allowed.new_empty(allowed.shape, dtype=torch.int32)
    padded = allowed.new_zeros((*lines, 32 * num_words))  # not F.pad: it may keep strides with which bytes cannot be viewed as words
    padded[..., :length] = allowed
    eight_bools = padded.view(torch.int64)  # little-endian, like every platform torch supports
    return ((eight_bools * GATHER_BITS) >> 56).to(torch.uint8).view(torch.int32)


def classify_tiles(mask_bits: Tensor, seqlen_k: int) -> tuple[Tensor, Tensor]:
    """Which tiles are full and which are mixed, (B', H', ceil(Lq / 64), ceil(Lk / 64)) bool each.

    Full: all 64 keys of the tile exist, and every row that exists may attend to all of them.
    """
    seqlen_q, num_words = mask_bits.shape[2:]
    num_rows, num_columns = -(-seqlen_q // TILE), -(-seqlen_k // TILE)
    words = F.pad(mask_bits, (0, 2 * num_columns - num_words)).unflatten(3, (num_columns, 2))
    some = _by_row_blocks((words != 0).any(-1), num_rows, False).any(3)
    full = _by_row_blocks((words == -1).all(-1), num_rows, True).all(3)
    return full, some & ~full


def _by_row_blocks(rows: Tensor, num_blocks: int, fill: bool) -> Tensor:
    """(B', H', Lq, tiles) -> (B', H', blocks, 64, tiles), `fill` in rows past Lq."""
    return F.pad(rows, (0, 0, 0, num_blocks * TILE - rows.shape[2]), value=fill).unflatten(2, (num_blocks, TILE))


def tile_lists(full: Tensor, mixed: Tensor) -> Tensor:
    """(..., n) bool each -> (..., 2 + n) int32 lists.

    A list is [number of full tiles, number of mixed tiles, the full ones ascending, ..., the mixed ones descending].
    """
    num_tiles = full.shape[-1]
    tile = torch.arange(num_tiles, device=full.device)
    place = torch.where(full, tile, torch.where(mixed, 3 * num_tiles - tile, num_tiles + tile))  # empty ones in between
    return torch.cat((full.sum(-1, keepdim=True), mixed.sum(-1, keepdim=True), place.argsort(-1)), dim=-1).int()
