"""Converts nested tensors of layout torch.jagged (sequences of a batch without padding) to what `attention_varlen` takes, and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_no_padding


def is_nested(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_nested


class Packed(NamedTuple):
    """Sequences one after another."""

    values: Tensor  # (T, H, D)
    offsets: Tensor  # (B + 1,)
    min_seqlen: int | None  # None if only the offsets would tell, which a compiled graph does not read
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
    packed = _packed(query), _packed(key), _packed(value)
    # Equal symbols mean equal offsets; different symbols may too, if the two tensors were made separately.
    if key.shape[2] != value.shape[2] and (torch.compiler.is_compiling() or not torch.equal(packed[1].offsets, packed[2].offsets)):
        raise ValueError("value must have the offsets of key: make it by torch.nested.nested_tensor_from_jagged(values, key.offsets())")
    return packed


def of_strided_sequences(attention_varlen: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention on nested tensors of strided layout, (B, H, ragged L, D) or (B, ragged L, D).

    Raises:
        TypeError: one is not nested.
        ValueError: the sequences do not match, or a mask is given, which would need them to have one size.
    """
    check_no_padding("nested tensors", attn_mask=options.pop("attn_mask"))
    sequences = []
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not tensor.is_nested or tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a nested tensor of layout torch.strided, as the others are, got layout {tensor.layout}")
        if tensor.dim() not in (3, 4):
            raise ValueError(f"{name} must have shape (batch, num_heads, ragged seqlen, head_dim) or (batch, ragged seqlen, head_dim)")
        sequences.append([part if part.dim() == 3 else part[None] for part in tensor.unbind()])  # (H, L, D) each
    lengths = [[part.shape[1] for part in parts] for parts in sequences]
    if not len(lengths[0]) == len(lengths[1]) or lengths[1] != lengths[2]:
        raise ValueError(f"key and value must have as many sequences as query, and each other's lengths, got {lengths}")
    starts = [torch.tensor([0, *itertools.accumulate(lengths[which])], device=query.device) for which in (0, 1)]
    tokens = [torch.cat([part.transpose(0, 1) for part in parts]) for parts in sequences]  # (T, H, D)
    out = attention_varlen(*tokens, *starts, *[max(lengths[which]) for which in (0, 1)], **options)
    parts = [part.transpose(0, 1) if query.dim() == 4 else part[:, 0] for part in out.split(lengths[0])]
    return torch.nested.as_nested_tensor(parts)


def _packed(tensor: Any) -> Packed:
    if not torch.compiler.is_compiling():
        tensor._get_max_seqlen()  # reads the offsets once and caches the result
    values, offsets, lengths = tensor.transpose(1, 2).values(), tensor.offsets(), tensor.lengths()
    if lengths is not None:  # the sequences are parts of longer ones, with gaps between them
        starts, offsets = offsets[:-1], torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        places = torch.repeat_interleave(starts - offsets[:-1], lengths)
        values = values[places + torch.arange(places.shape[0], device=places.device)]
    return Packed(values, offsets, tensor._maybe_min_seqlen, tensor._maybe_max_seqlen)
