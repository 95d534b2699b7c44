"""Nested tensors of layout torch.jagged, the sequences of a batch without padding, as what `attention_varlen` takes, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def is_nested(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_nested


class Packed(NamedTuple):
    """Sequences one after another."""

    values: Tensor  # (T, H, D)
    offsets: Tensor  # (B + 1,)
    min_seqlen: int | None  # None where only the offsets would tell, which a compiled graph does not read
    max_seqlen: int | None

    def nested(self, values: Tensor) -> Tensor:
        """(T, H, ...) values with these offsets -> (B, H, j, ...)."""
        nested = torch.nested.nested_tensor_from_jagged(values, self.offsets, min_seqlen=self.min_seqlen, max_seqlen=self.max_seqlen)
        return nested.transpose(1, 2)


def packed_inputs(query: Any, key: Any, value: Any) -> tuple[Packed, Packed, Packed]:
    """(B, H, j, D) each -> their sequences one after another.

    Raises:
        TypeError: one is not a nested tensor of layout torch.jagged.
        ValueError: a shape does not fit.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not is_nested(tensor) or tensor.layout is not torch.jagged:
            given = f"layout {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a nested tensor of layout torch.jagged, as the others are, got {given}")
        if tensor.dim() != 4 or tensor._ragged_idx != 2:
            raise ValueError(f"{name} must have shape (batch, num_heads, ragged seqlen, head_dim), got {tuple(tensor.shape)}")
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have the batch size of query, {query.shape[0]}, got {key.shape[0]}")
    if key.shape[2] != value.shape[2]:  # the same symbol stands for the same offsets
        raise ValueError("value must have the offsets of key: make it by torch.nested.nested_tensor_from_jagged(values, key.offsets())")
    return _packed(query), _packed(key), _packed(value)


def _packed(tensor: Any) -> Packed:
    if not torch.compiler.is_compiling():
        tensor._get_max_seqlen()  # reads the offsets once, and remembers
    values, offsets, lengths = tensor.transpose(1, 2).values(), tensor.offsets(), tensor.lengths()
    if lengths is not None:  # the sequences are parts of longer ones, with something between them
        starts, offsets = offsets[:-1], torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        places = torch.repeat_interleave(starts - offsets[:-1], lengths)
        values = values[places + torch.arange(places.shape[0], device=places.device)]
    return Packed(values, offsets, tensor._maybe_min_seqlen, tensor._maybe_max_seqlen)
