"""The dropout mask of every backend: Philox4x32 with 7 rounds, here in plain PyTorch for the reference.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The mapping from (batch, head, query, key) to a
16-bit number is given in csrc/philox.h; one draw covers queries {i, i + 8} and keys {j, j + 1, j + 8, j + 9}.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def dropout_threshold(dropout_p: float) -> int:
    """A weight is kept if its 16-bit number is >= this, then scaled by 65536 / (65536 - threshold). 0 keeps all weights, 65536 none."""
    if dropout_p == 0.0:
        return 0
    if dropout_p == 1.0:
        return 65536
    return min(max(round(dropout_p * 65536), 1), 65535)


def dropout_factors(rng_state: Tensor | None, dropout_p: float, batch_heads: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """(len(batch_heads), seqlen_q, seqlen_k) float32: 0 for dropped weights, the scale for kept ones.

    batch_heads: (N,) int64, each batch * num_heads + head. rng_state: (2,) int64; may be None only for dropout_p = 1.
    """
    threshold = dropout_threshold(dropout_p)
    if threshold == 65536:
        return torch.zeros(len(batch_heads), seqlen_q, seqlen_k, device=batch_heads.device)
    assert rng_state is not None
    numbers = _random_numbers(rng_state, batch_heads, -(-seqlen_q // 16), -(-seqlen_k // 16))[:, :seqlen_q, :seqlen_k]
    return (numbers >= threshold) * (65536.0 / (65536 - threshold))


def _random_numbers(rng_state: Tensor, batch_heads: Tensor, blocks_q: int, blocks_k: int) -> Tensor:
    """(N, 16 * blocks_q, 16 * blocks_k) numbers in [0, 65536), int64."""
    seed, offset = rng_state.unbind()
    device = rng_state.device
    shape = (len(batch_heads), 8 * blocks_q, 4 * blocks_k)
    words = [
        torch.arange(4 * blocks_k, device=device).expand(shape),  # (j // 16) * 4 + (j % 8) // 2
        torch.arange(8 * blocks_q, device=device)[:, None].expand(shape),  # (i // 16) * 8 + i % 8
        batch_heads[:, None, None].expand(shape),
        (offset & WORD).expand(shape),
    ]
    words = _philox(words, seed & WORD, ((seed >> 32) & WORD) ^ ((offset >> 32) & WORD))
    # number[lane] with lane = ((i // 8) % 2) * 4 + ((j // 8) % 2) * 2 + j % 2 is a half of word lane // 2
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    halves = halves.view(
        len(batch_heads), blocks_q, 8, blocks_k, 4, 2, 2, 2
    )  # N, i // 16, i % 8, j // 16, (j % 8) // 2, i // 8, j // 8, j % 2
    return halves.permute(0, 1, 5, 2, 3, 6, 4, 7).reshape(len(batch_heads), 16 * blocks_q, 16 * blocks_k)


def _philox(words: list[Tensor], key0: Tensor, key1: Tensor) -> list[Tensor]:
    # int64 products wrap, but bits 0..63 equal those of the unsigned product, and only they are used.
    for _ in range(ROUNDS):
        product0, product1 = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
        words = [
            ((product1 >> 32) & WORD) ^ words[1] ^ key0,
            product1 & WORD,
            ((product0 >> 32) & WORD) ^ words[3] ^ key1,
            product0 & WORD,
        ]
        key0, key1 = (key0 + WEYL[0]) & WORD, (key1 + WEYL[1]) & WORD
    return words
