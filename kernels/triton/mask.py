"""Which 64 x 64 tiles of the scores are empty, full or mixed, and their lists per row block and per key block, made on the GPU.

  1. classify: one program looks at one tile of scores, and reads no mask where sequence ends, causal or window leave nothing
  2. list: one program turns some lines of that map into lists, the full tiles from the front and the mixed ones from the back
The format is that of PreparedMask, whose lists are used where the caller brings one; for prepare_mask step 1 also packs the bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .arguments import needs_tiles, window_constants, window_numbers
from .launch import Tile, launch
from .parameters import AttnMask, KeyMask, Sizes, Window, kernel
from .tiles import TILE, key_blocks, keys_exist, of_batch, of_head, pairs_in_window, sequence_of

TILE_SIDE = TILE.value
CLASSIFY_TILE = Tile(TILE_SIDE, TILE_SIDE, 4, 1)
LIST_TILE = Tile(32, 32, 4, 1)  # lines of the map, and their tiles at a time


def tile_lists(problem: Problem, columns: bool) -> tuple[Tensor | None, Tensor | None]:
    """(row_tiles, column_tiles) int32: (B', H', lines, 2 + tiles), B' and H' 1 where the mask is the same for every batch or head.

    A line is [number of full tiles, number of mixed ones, the full ones ascending, ..., the mixed ones descending]. Both are None where
    loop bounds say it all; column_tiles is None where `columns` does not ask for it.
    """
    if problem.row_tiles is not None:
        return problem.row_tiles, problem.column_tiles
    if not needs_tiles(problem):
        return None, None
    kinds = tile_kinds(problem)
    return _lists(kinds), _lists(kinds.transpose(2, 3)) if columns else None


def prepared_tiles(problem: Problem, gradients: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """mask_bits, mask_bits_transposed, row_tiles and column_tiles of a PreparedMask; without gradients no transposed ones."""
    batches, heads = _shared_by(problem)
    seqlen_q, seqlen_k = problem.query.shape[2], problem.key.shape[2]
    bits = problem.query.new_zeros(batches, heads, seqlen_q, triton.cdiv(seqlen_k, 32), dtype=torch.int32)
    transposed = problem.query.new_zeros(batches, heads, seqlen_k, triton.cdiv(seqlen_q, 32), dtype=torch.int32) if gradients else None
    kinds = tile_kinds(problem, bits, transposed)
    return bits, transposed, _lists(kinds), _lists(kinds.transpose(2, 3)) if gradients else None


def _shared_by(problem: Problem) -> tuple[int, int]:
    """B' and H': 1 where the mask is the same for every batch or head."""
    by_batch = any(tensor is not None for tensor in (problem.key_mask, problem.key_lengths, problem.query_lengths))
    if problem.attn_mask is None or problem.attn_mask.dtype != torch.bool:
        return problem.batch, 1
    return problem.batch if by_batch else problem.attn_mask.shape[0], problem.attn_mask.shape[1]


def tile_kinds(problem: Problem, mask_bits: Tensor | None = None, mask_bits_transposed: Tensor | None = None) -> Tensor:
    """(B', H', row blocks, key blocks) int8: 0 empty, 1 full, 2 mixed. Sets the bits of allowed pairs in what is given of zeros."""
    query, key_mask = problem.query, problem.key_mask
    seqlen_q, seqlen_k = query.shape[2], problem.key.shape[2]
    mask = problem.attn_mask if problem.attn_mask is not None and problem.attn_mask.dtype == torch.bool else None
    batches, heads = _shared_by(problem)
    if mask is not None:
        mask = mask.view(torch.uint8).expand(batches, heads, seqlen_q, seqlen_k)
    kinds = query.new_empty(batches, heads, triton.cdiv(seqlen_q, TILE_SIDE), triton.cdiv(seqlen_k, TILE_SIDE), dtype=torch.int8)
    if kinds.numel():
        launch(
            classify,
            kinds.numel(),
            (
                kinds,
                mask,
                None if key_mask is None else key_mask.view(torch.uint8),
                mask_bits,
                mask_bits_transposed,
                problem.query_lengths,
                problem.key_lengths,
                None,
                None,
            ),
            (
                *((0, 0, 0, 0) if mask is None else mask.stride()),
                *((0, 0) if key_mask is None else key_mask.stride()),
                *(seqlen_q, seqlen_k, seqlen_q, seqlen_k, heads, 1),
                *window_numbers(problem),
            ),
            (True, *window_constants(problem)),
            CLASSIFY_TILE,
        )
    return kinds


def _lists(kinds: Tensor) -> Tensor:
    """(B', H', lines, 2 + tiles) int32 from (B', H', lines, tiles), which may be a transposed view."""
    batches, heads, num_lines, num_tiles = kinds.shape
    lists = kinds.new_empty(batches, heads, num_lines, 2 + num_tiles, dtype=torch.int32)
    lines = batches * heads * num_lines
    if lines:
        launch(
            list_tiles,
            triton.cdiv(lines, LIST_TILE.BLOCK_M),
            (lists, kinds),
            (*kinds.stride()[2:], lines, num_lines, num_tiles),
            (),
            LIST_TILE,
        )
    return lists


@kernel
def classify(
    kinds,  # (B', H', row blocks, key blocks) int8
    attn_mask: AttnMask,  # a bool mask, expanded to (B', H', Lq, Lk)
    key_mask: KeyMask,
    mask_bits,  # (B', H', Lq, ceil(Lk / 32)) int32 zeros, or None
    mask_bits_transposed,  # (B', H', Lk, ceil(Lq / 32)) int32 zeros, or None
    sizes: Sizes,  # its heads are H'
    window: Window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    num_key_blocks = tl.cdiv(sizes.seqlen_k, BLOCK_N)
    num_row_blocks = tl.cdiv(sizes.seqlen_q, BLOCK_M)
    key_block = (program % num_key_blocks).to(tl.int32)
    start_n = key_block * BLOCK_N
    start_m = (program // num_key_blocks % num_row_blocks).to(tl.int32) * BLOCK_M
    head = program // num_key_blocks // num_row_blocks % sizes.num_heads
    batch = program // num_key_blocks // num_row_blocks // sizes.num_heads
    seqlen_q = sizes.seqlen_q
    seqlen_k = sizes.seqlen_k
    sequence = sequence_of(batch, sizes, window)
    blocks = key_blocks(start_m, sequence, window, BLOCK_M, BLOCK_N)
    kind = 0
    if (start_m < sequence.rows_present) & (blocks.first <= key_block) & (key_block < blocks.last):
        rows = start_m + tl.arange(0, BLOCK_M)
        keys = start_n + tl.arange(0, BLOCK_N)
        exist = keys_exist(keys, sequence.keys_present, of_batch(key_mask, batch), key_mask, True)
        allowed = pairs_in_window(rows[:, None], keys[None, :], sequence.rows_present, sequence, exist[None, :], window)
        if attn_mask.data is not None:
            pointers = of_head(attn_mask, batch, head)
            pointers += rows[:, None] * attn_mask.stride_row + keys[None, :] * attn_mask.stride_key
            if (start_m + BLOCK_M <= seqlen_q) & (start_n + BLOCK_N <= seqlen_k):
                mask = tl.load(pointers)
            else:
                mask = tl.load(pointers, mask=(rows < seqlen_q)[:, None] & (keys < seqlen_k)[None, :], other=0)
            allowed = allowed & (mask != 0)
        num_allowed = tl.sum(tl.sum(allowed.to(tl.int32), 1), 0)
        rows_in_tile = tl.minimum(BLOCK_M, seqlen_q - start_m)
        if num_allowed == rows_in_tile * BLOCK_N:
            kind = 1
        elif num_allowed > 0:
            kind = 2
        if mask_bits is not None:
            map_start = (batch * sizes.num_heads + head) * seqlen_q * tl.cdiv(seqlen_k, 32)
            _store_bits(mask_bits + map_start, allowed, start_m, start_n, seqlen_q, seqlen_k)
        if mask_bits_transposed is not None:
            map_start = (batch * sizes.num_heads + head) * seqlen_k * tl.cdiv(seqlen_q, 32)
            _store_bits(mask_bits_transposed + map_start, tl.trans(allowed), start_n, start_m, seqlen_k, seqlen_q)
    tl.store(kinds + program, kind)


@triton.jit
def _store_bits(bits, allowed, first_line, first_position, num_lines, num_positions):
    """Packs a tile, the second dim into words of 32. bits: (num_lines, ceil(num_positions / 32)) int32."""
    WORDS: tl.constexpr = allowed.shape[1] // 32
    values = allowed.to(tl.int32).reshape(allowed.shape[0], WORDS, 32) << tl.arange(0, 32)[None, None, :]
    words = tl.sum(values, 2)  # of different bits
    lines = (first_line + tl.arange(0, allowed.shape[0])).to(tl.int64)
    places = first_position // 32 + tl.arange(0, WORDS)
    num_words = tl.cdiv(num_positions, 32)
    in_memory = (lines < num_lines)[:, None] & (places < num_words)[None, :]
    tl.store(bits + lines[:, None] * num_words + places[None, :], words, mask=in_memory)


@kernel
def list_tiles(
    lists,  # (lines, 2 + num_tiles) int32, of all batches and heads
    kinds,  # (B' * H', lines_per_map, num_tiles) int8, a dense map in either order of its last two dims
    stride_kinds_row: tl.int64, stride_kinds_key: tl.int64, num_lines: tl.int32, lines_per_map: tl.int32, num_tiles: tl.int32,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    lines = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = lines < num_lines
    maps = lines // lines_per_map
    kinds += maps * lines_per_map * num_tiles + (lines % lines_per_map) * stride_kinds_row
    lists += lines * (2 + num_tiles)
    num_full = tl.zeros((BLOCK_M,), tl.int32)
    num_mixed = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, num_tiles, BLOCK_N):
        tiles = start + tl.arange(0, BLOCK_N)
        in_line = exists[:, None] & (tiles < num_tiles)[None, :]
        kind = tl.load(kinds[:, None] + tiles[None, :] * stride_kinds_key, mask=in_line, other=0)
        full = (kind == 1).to(tl.int32)
        mixed = (kind == 2).to(tl.int32)
        full_place = num_full[:, None] + tl.cumsum(full, 1) - 1
        mixed_place = num_tiles - num_mixed[:, None] - tl.cumsum(mixed, 1)
        place = tl.where(kind == 1, full_place, mixed_place)
        tl.store(lists[:, None] + 2 + place, tiles[None, :], mask=kind != 0)
        num_full += tl.sum(full, 1)
        num_mixed += tl.sum(mixed, 1)
    tl.store(lists, num_full, mask=exists)
    tl.store(lists + 1, num_mixed, mask=exists)
