"""The keys and values a decoder keeps between steps, so that each new token costs one position of work.

Two kinds, after fairseq's incremental state: the decoder's self-attention gains one position a token, in buffers
allocated ahead; the cross-attention's keys and values depend on the source alone and are projected once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.checks import checked_integer


class LayerCache:
    """Keys and values of one decoder layer."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.self_kv: Tensor | None = None  # (B, capacity, 2, H, D), the first `length` positions are filled
        self.cross_kv: Tensor | None = None  # (B, S, 2, H, D)

    def append(self, kv: Tensor) -> Tensor:
        """Stores kv (B, n, 2, H, D) behind what is held and returns all of it, (B, length, 2, H, D), as a view."""
        end = self.length + kv.shape[1]
        self.self_kv = _grown(self.self_kv, kv, self.length, end, self.capacity)
        self.self_kv[:, self.length : end] = kv
        self.length = end
        return self.self_kv[:, :end]

    def select(self, rows: Tensor) -> None:
        if self.self_kv is not None:
            self.self_kv = _selected(self.self_kv, rows, self.length)
        if self.cross_kv is not None:
            self.cross_kv = self.cross_kv[rows]


class KVCache:
    """What Transformer.decode carries from call to call. Start with an empty one and pass it to every call for the
    same memory.

    capacity: positions to allocate at first; a full buffer doubles. Nothing is allocated before the first call, whose
    dtype, device and batch size the buffers take. For inference only: under autograd, decode refuses a cache.
    """

    def __init__(self, capacity: int = 64) -> None:
        capacity = checked_integer("capacity", capacity)
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.length = 0  # target positions held
        self.layers: list[LayerCache] = []
        self._key_mask: Tensor | None = None  # (B, capacity) bool

    def append(self, key_mask: Tensor, num_layers: int) -> Tensor:
        """Opens key_mask.shape[1] new positions in num_layers layers; returns the mask of all positions, (B, length)
        bool."""
        if not self.layers:
            self.layers = [LayerCache(self.capacity) for _ in range(num_layers)]
        end = self.length + key_mask.shape[1]
        self._key_mask = _grown(self._key_mask, key_mask, self.length, end, self.capacity)
        self._key_mask[:, self.length : end] = key_mask
        self.length = end
        return self._key_mask[:, :end]

    @property
    def batch_size(self) -> int | None:
        """Rows held, None while the cache is empty."""
        return None if self._key_mask is None else self._key_mask.shape[0]

    def select(self, rows: Tensor) -> None:
        """Keeps, drops, repeats or reorders batch rows in place. rows: (n,) int64, the new row i is the old row
        rows[i]."""
        if self._key_mask is not None:
            self._key_mask = _selected(self._key_mask, rows, self.length)
        for layer in self.layers:
            layer.select(rows)


def _grown(buffer: Tensor | None, new: Tensor, filled: int, needed: int, capacity: int) -> Tensor:
    """A buffer (B, >= needed, ...) like `new` that starts with the filled part of the old one; the old one if it is
    large enough."""
    if buffer is None:
        return new.new_empty(new.shape[0], max(needed, capacity), *new.shape[2:])
    if buffer.shape[1] >= needed:
        # Outside torch.inference_mode torch does not write into a buffer that was allocated inside it.
        return buffer.clone() if buffer.is_inference() and not torch.is_inference_mode_enabled() else buffer
    grown = buffer.new_empty(buffer.shape[0], max(needed, 2 * buffer.shape[1]), *buffer.shape[2:])
    grown[:, :filled] = buffer[:, :filled]
    return grown


def _selected(buffer: Tensor, rows: Tensor, filled: int) -> Tensor:
    """The given rows of buffer, in a new buffer of the same capacity; only the filled part is copied."""
    selected = buffer.new_empty(rows.shape[0], *buffer.shape[1:])
    torch.index_select(buffer[:, :filled], 0, rows, out=selected[:, :filled])
    return selected
