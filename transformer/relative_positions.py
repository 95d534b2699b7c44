"""Positions inside the attention, which sees distances: rotary (Su et al. 2021) and T5's learned bias (Raffel et al. 2020)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(heads: Tensor, start: int) -> Tensor:
    """Queries or keys (B, L, ..., D), the first at position `start`, each turned by its position times D / 2 frequencies.

    Elements i and i + D / 2 are the two coordinates of a pair; frequency i is 10000^(-2i / D). D is even. The product of a query and
    a key then depends only on their distance.
    """
    half, length = heads.shape[-1] // 2, heads.shape[1]
    # float64, as for sinusoidal positions: the angle of a late position would be off by more than the cosine's rounding.
    position = torch.arange(start, start + length, dtype=torch.float64, device=heads.device)
    frequency = torch.exp(torch.arange(half, dtype=torch.float64, device=heads.device) * (-math.log(10000.0) / half))
    angle = (position[:, None] * frequency).view(length, *[1] * (heads.ndim - 3), half)
    cos, sin = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    first, second = heads.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class RelativeBias(nn.Module):
    """What is added to the score of a query and a key: a learned number for each head and bucket of distances.

    `weight` (num_buckets, num_heads) starts at 0. Half of the buckets hold one distance each, the others grow with the distance up to
    max_distance, and the last holds everything beyond. bidirectional: half of the buckets are for keys after the query; otherwise all
    such keys share the bucket of distance 0.
    """

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool) -> None:
        super().__init__()
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def buckets(self, distance: Tensor) -> Tensor:
        """distance (...) int64, key minus query -> (...) int64 in [0, num_buckets)."""
        count, first = self.num_buckets, torch.zeros_like(distance)
        if self.bidirectional:
            count //= 2
            first, distance = (distance > 0) * count, distance.abs()
        else:
            distance = -distance.clamp(max=0)
        exact = count // 2
        # In float32 and in this order, because T5's weights were trained with the rounding of just these operations.
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact) * (count - exact)
        far = (exact + growth.to(torch.int64)).clamp(max=count - 1)
        return first + torch.where(distance < exact, distance, far)

    def forward(self, seqlen_q: int, seqlen_k: int, start: int = 0) -> Tensor:
        """The bias (1, H, seqlen_q, seqlen_k) of queries from position `start` on and keys from position 0 on; differentiable."""
        keys = torch.arange(seqlen_k, device=self.weight.device)
        queries = torch.arange(start, start + seqlen_q, device=self.weight.device)
        by_pair = F.embedding(self.buckets(keys - queries[:, None]), self.weight)
        return by_pair.permute(2, 0, 1)[None].contiguous()  # kernels read masks that are contiguous along keys

    def extra_repr(self) -> str:
        return f"num_buckets={self.num_buckets}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"
