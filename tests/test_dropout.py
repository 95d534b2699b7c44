"""The dropout generator against a direct transcription of its definition, and its statistics."""

from __future__ import annotations

import pytest
import torch

from fused_attention.kernels.dropout import dropout_factors, dropout_threshold

MASK = 0xFFFFFFFF


def number(seed: int, offset: int, batch_head: int, i: int, j: int) -> int:
    """The 16-bit number of one (query, key) pair in plain Python integers."""
    counter = [(j // 16) * 4 + (j % 8) // 2, (i // 16) * 8 + i % 8, batch_head, offset & MASK]
    key = [seed & MASK, ((seed >> 32) ^ (offset >> 32)) & MASK]
    for _ in range(7):
        low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(high >> 32) ^ counter[1] ^ key[0], high & MASK, (low >> 32) ^ counter[3] ^ key[1], low & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    lane = ((i // 8) % 2) * 4 + ((j // 8) % 2) * 2 + j % 2
    return (counter[lane // 2] >> (16 * (lane % 2))) & 0xFFFF


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (2**62 + 12345, 2**40 + 7), (-1, -2)])
def test_mapping(seed: int, offset: int) -> None:
    factors = dropout_factors(torch.tensor([seed, offset]), 0.25, torch.tensor([0, 3, 1000]), 35, 50)
    threshold = dropout_threshold(0.25)
    for index, batch_head in enumerate((0, 3, 1000)):
        for i in range(35):
            for j in range(50):
                kept = number(seed % 2**64, offset % 2**64, batch_head, i, j) >= threshold
                assert factors[index, i, j] == (65536 / (65536 - threshold) if kept else 0)


@pytest.mark.parametrize(("dropout_p", "threshold"), [(0.0, 0), (1e-9, 1), (0.1, 6554), (0.5, 32768), (1 - 1e-9, 65535), (1.0, 65536)])
def test_threshold(dropout_p: float, threshold: int) -> None:
    assert dropout_threshold(dropout_p) == threshold


def test_share_kept_and_independence() -> None:
    kept = dropout_factors(torch.tensor([5, 9]), 0.3, torch.arange(4), 256, 256) > 0
    standard_error = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - 0.7) < 5 * standard_error
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(8, 1), kept.roll(1, 2), kept.roll(8, 2)):
        assert abs((kept & other).double().mean().item() - 0.49) < 5 * (0.49 * 0.51 / kept.numel()) ** 0.5
