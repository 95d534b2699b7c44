"""The keys and values a decoder keeps between steps, so that each new token costs only one position of work.

There are two kinds, as in fairseq's incremental state. The decoder's self-attention grows by one position per token, in
preallocated buffers, of the model's dtype or of 8-bit numbers (kernels/quantized.py). The cross-attention's keys and values
depend only on the source and are projected once, here or in the memory (Memory.keys_values).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.checks import checked_integer
from ..kernels.quantized import CACHE_DTYPES, quantize_kv


class LayerCache:
    """Keys and values of one decoder layer."""

    def __init__(self, capacity: int, dtype: torch.dtype | None = None) -> None:
        self.capacity, self.dtype = capacity, dtype
        self.length = 0
        self.self_kv: Tensor | None = None  # (B, capacity, 2, H, D), of which the first `length` positions are filled
        self.self_scale: Tensor | None = None  # (B, capacity, 2, H) float32, of 8-bit keys and values
        self.cross_kv: Tensor | None = None  # (B, S, 2, H, D), None if the memory holds them
        self.state: Tensor | None = None  # (B, 1, d_model), of an SSRU

    def append(self, kv: Tensor) -> Tensor:
        """Appends kv (B, n, 2, H, D) and returns the buffer, of which the first `length` positions are filled.

        The whole buffer, so that the sizes of the attention call stay the same from step to step.
        """
        end = self.length + kv.shape[1]
        if self.dtype is not None:
            kv, scale = _quantized(kv, self.dtype)
            self.self_scale = _grown(self.self_scale, scale, self.length, end, self.capacity)
            self.self_scale[:, self.length : end] = scale
        self.self_kv = _grown(self.self_kv, kv, self.length, end, self.capacity)
        self.self_kv[:, self.length : end] = kv
        self.length = end
        return self.self_kv

    def select(self, rows: RowSelection) -> None:
        if self.self_kv is not None:
            self.self_kv = rows.of(self.self_kv, self.length)
        if self.self_scale is not None:
            self.self_scale = rows.of(self.self_scale, self.length)
        if self.cross_kv is not None:
            self.cross_kv = rows.of(self.cross_kv, self.cross_kv.shape[1])
        if self.state is not None:
            self.state = rows.of(self.state, 1)


class KVCache:
    """What Transformer.decode carries from call to call. Start with an empty one and pass it to every call with the
    same memory.

    capacity: positions to allocate at first; a full buffer doubles. Nothing is allocated before the first call, which
    determines device and batch size, and the dtype if none is given. dtype: torch.int8, torch.float8_e4m3fn or
    torch.float8_e5m2 keeps the target's keys and values as `quantize_kv` makes them, in a quarter of float32's memory, with
    its error. For inference only: under autograd, decode refuses a cache.
    """

    def __init__(self, capacity: int = 64, dtype: torch.dtype | None = None) -> None:
        capacity = checked_integer("capacity", capacity)
        if dtype is not None and dtype not in CACHE_DTYPES:
            raise ValueError(f"dtype must be None or one of {', '.join(map(str, CACHE_DTYPES))}, got {dtype}")
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity, self.dtype = capacity, dtype
        self.length = 0  # target positions held
        self.layers: list[LayerCache] = []
        self._key_mask: Tensor | None = None  # (B, capacity) bool

    def append(self, key_mask: Tensor, num_layers: int) -> dict[str, Tensor]:
        """Adds key_mask.shape[1] new positions in num_layers layers; returns the options of `attention` that say which keys are there."""
        if not self.layers:
            self.layers = [LayerCache(self.capacity, self.dtype) for _ in range(num_layers)]
        end = self.length + key_mask.shape[1]
        self._key_mask = _grown(self._key_mask, key_mask, self.length, end, self.capacity)
        self._key_mask[:, self.length : end] = key_mask
        self.length = end
        lengths = torch.full((key_mask.shape[0],), end, dtype=torch.int32, device=key_mask.device)
        return {"key_mask": self._key_mask, "key_lengths": lengths}

    @property
    def batch_size(self) -> int | None:
        """Rows held, None while the cache is empty."""
        return None if self._key_mask is None else self._key_mask.shape[0]

    def select(self, rows: Tensor) -> None:
        """Keeps, drops, repeats or reorders batch rows. rows: (n,) int64; new row i is old row rows[i].

        Rows that keep their position are not copied, unless there are more rows than before. If rows is on a GPU, Python
        waits for it.
        """
        if self._key_mask is None:
            return
        selection = RowSelection(rows, self._key_mask.shape[0], self._key_mask.device)
        self._key_mask = selection.of(self._key_mask, self.length)
        for layer in self.layers:
            layer.select(selection)


class RowSelection:
    """The rows of a batch that continue, in their new order, to apply to any number of buffers."""

    def __init__(self, rows: Tensor, batch_size: int, device: torch.device) -> None:
        """rows: (n,) int64; new row i is old row rows[i] of batch_size rows. device: the buffers' device."""
        self.count = rows.shape[0]
        self.repeated = rows.to(device) if self.count > batch_size else None
        targets = (rows != torch.arange(self.count, device=rows.device)).nonzero()[:, 0]
        self.targets, self.sources = targets.to(device), rows[targets].to(device)

    def of(self, buffer: Tensor, filled: int) -> Tensor:
        """The selected rows of buffer (B, L, ...), of which [:, :filled] is in use: in the buffer's first rows, or in a new buffer if
        it has too few."""
        if self.repeated is not None:
            selected = buffer.new_empty(self.count, *buffer.shape[1:])
            torch.index_select(buffer[:, :filled], 0, self.repeated, out=selected[:, :filled])
            return selected
        if self.targets.shape[0] > 0:
            buffer = _writable(buffer)
            buffer[self.targets, :filled] = buffer[self.sources, :filled]
        return buffer[: self.count]


def _quantized(kv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """kv (B, n, 2, H, D) as 8-bit numbers, and a scale for each key and each value, (B, n, 2, H)."""
    numbers, scale = quantize_kv(kv.flatten(2, 3).transpose(1, 2), dtype)
    return numbers.transpose(1, 2).reshape(kv.shape), scale.transpose(1, 2).unflatten(2, kv.shape[2:4])


def _grown(buffer: Tensor | None, new: Tensor, filled: int, needed: int, capacity: int) -> Tensor:
    """A buffer (B, >= needed, ...) like `new` that starts with the filled part of the old one; the old one itself if it
    is large enough."""
    if buffer is None:
        return new.new_empty(new.shape[0], max(needed, capacity), *new.shape[2:])
    if buffer.shape[1] >= needed:
        return _writable(buffer)
    grown = buffer.new_empty(buffer.shape[0], max(needed, 2 * buffer.shape[1]), *buffer.shape[2:])
    grown[:, :filled] = buffer[:, :filled]
    return grown


def _writable(buffer: Tensor) -> Tensor:
    """Copies a buffer allocated in torch.inference_mode if used outside, where torch cannot write to it."""
    return buffer.clone() if buffer.is_inference() and not torch.is_inference_mode_enabled() else buffer
