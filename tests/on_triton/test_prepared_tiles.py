"""prepare_mask's work by the kernels gives what plain PyTorch gives: bits, and lists of full and mixed tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_attention.kernels import prepared_mask
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.triton import mask as triton_mask

SEQLENS = [(64, 64), (65, 130), (1, 31), (100, 64), (130, 33)]  # at, above and below tiles of 64 and words of 32
MASKS = {
    "bool": lambda batch, heads, seqlen_q, seqlen_k: {"attn_mask": torch.rand(batch, heads, seqlen_q, seqlen_k) > 0.4},
    "shared bool, mostly full": lambda batch, heads, seqlen_q, seqlen_k: {"attn_mask": torch.rand(seqlen_q, seqlen_k) > 0.0002},
    "key mask and causal": lambda batch, heads, seqlen_q, seqlen_k: {
        "key_mask": torch.rand(batch, seqlen_k) > 0.3, "is_causal": "bottom_right",
    },
    "lengths and window": lambda batch, heads, seqlen_q, seqlen_k: {
        "key_lengths": torch.tensor([seqlen_k, 20]), "query_lengths": torch.tensor([5, seqlen_q]), "window": (40, 10),
    },
    "lengths alone": lambda batch, heads, seqlen_q, seqlen_k: {"key_lengths": torch.tensor([seqlen_k, 0])},
}  # fmt: skip


def tiles_of(lists: Tensor) -> list[tuple[list[int], list[int]]]:
    """The full and the mixed tiles of each line; what stands between them is undefined."""
    lines = []
    for num_full, num_mixed, *tiles in lists.flatten(0, 2).tolist():
        lines.append((tiles[:num_full], tiles[len(tiles) - num_mixed :]))
    return lines


@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
@pytest.mark.parametrize("masks", MASKS)
def test_kernels_and_pytorch_prepare_the_same(masks: str, seqlens: tuple[int, int], device: str) -> None:
    seqlen_q, seqlen_k = seqlens
    options = MASKS[masks](2, 3, seqlen_q, seqlen_k)
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    heads = 3 if masks == "bool" else 1
    query, key = (torch.empty(1, device=device).expand(2, heads, seqlen, 1) for seqlen in seqlens)
    problem = make_problem("separate", (query, key, key), **options)
    bits, transposed, rows, columns = triton_mask.prepared_tiles(problem, gradients=True)
    expected = prepared_mask.prepared_tiles(problem, gradients=True)
    num_batches = bits.shape[0]
    for ours, theirs in ((bits, expected[0]), (transposed, expected[1])):
        assert torch.equal(ours.expand_as(theirs), theirs)
    for ours, theirs in ((rows, expected[2]), (columns, expected[3])):
        assert tiles_of(ours) == tiles_of(theirs[:num_batches])
    assert triton_mask.prepared_tiles(replace(problem), gradients=False)[1::2] == (None, None)
