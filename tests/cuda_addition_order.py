"""How long blocks of keys wait for their turns in the backward in one pass, in steps: one tile of rows times one block of keys.

    python tests/cuda_addition_order.py    the table of docs/cuda-kernels.md

A block takes a processor when one is free, in the order of tickets. A step takes as long everywhere; the block adds in its second half, and
not before the block whose turn came before it at the same tile of rows has.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

ADDING = 0.5  # of a step
PROCESSORS = 132  # of an H200, one block on each
SIZES = ((4, 16, 1024), (4, 16, 4096), (1, 16, 4096))  # batch, heads, rows and keys
BLOCK_M, BLOCK_N = 64, 128


def steps(heads: int, row_tiles: int, key_blocks: int, visits: str, ordered: bool = True) -> float:
    """Until the last block ends. visits: full, full but shifted (block n starts at tile n * M / N and wraps around), or causal."""
    free = [0.0] * PROCESSORS
    for _ in range(heads):
        added: dict[int, float] = {}  # when the block before had added to the tile
        for ticket in range(key_blocks):
            now = heapq.heappop(free)
            for tile in tiles(ticket, row_tiles, key_blocks, visits):
                now += 1
                if ordered and tile in added:
                    now = max(now, added[tile] + ADDING)
                added[tile] = now
            heapq.heappush(free, now)
    return max(free)


def tiles(ticket: int, row_tiles: int, key_blocks: int, visits: str) -> Iterable[int]:
    if visits == "causal":  # the last keys first
        return range((key_blocks - 1 - ticket) * row_tiles // key_blocks, row_tiles)
    start = ticket * row_tiles // key_blocks if visits == "shifted" else 0
    return ((start + i) % row_tiles for i in range(row_tiles))


def table() -> str:
    lines = ["| batch, heads, seqlen | visits | any order | one order | of the speed |", "|---|---|---:|---:|---:|"]
    for batch, heads, length in SIZES:
        for visits in ("full", "shifted", "causal"):
            shape = (batch * heads, length // BLOCK_M, length // BLOCK_N, visits)
            free, ordered = steps(*shape, ordered=False), steps(*shape)
            name = "full, block n from tile n M / N on" if visits == "shifted" else visits
            lines.append(f"| {batch}, {heads}, {length} | {name} | {free:.0f} | {ordered:.0f} | {free / ordered:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
