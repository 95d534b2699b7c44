"""Nested tensors (N, ragged, E) in MultiHeadAttention: attention within each sequence, packed or padded to the longest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..kernels.attention import attention, attention_varlen
from ..kernels.prepared_mask import prepare_mask
from ..kernels.problem import PreparedMask


def check(
    module: torch.nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | PreparedMask | None,
) -> None:
    """Raises AssertionError, like torch.nn.MultiheadAttention, for arguments that nested inputs do not support."""
    inputs = (query, key, value)
    for wrong, reason in (
        (not all(tensor.is_nested for tensor in inputs), "query, key and value must all be nested"),
        (len({tensor.layout for tensor in inputs}) > 1, "query, key and value must have one layout"),
        (not module.batch_first, "batch_first must be True"),
        (attn_mask is not None, "attn_mask must be None"),
        (key_padding_mask is not None, "key_padding_mask must be None: a sequence ends where it ends"),
        (module.bias_k is not None or module.add_zero_attn, "add_bias_kv and add_zero_attn must be off"),
        (any(tensor.dim() != 3 for tensor in inputs), f"they must be 3-D, got {[tensor.dim() for tensor in inputs]}"),
    ):
        if wrong:
            raise AssertionError(f"MultiHeadAttention with NestedTensor: {reason}")
    if key.size(0) != query.size(0):
        raise AssertionError(f"key's batch size {key.size(0)} does not match query's {query.size(0)}")
    if query.size(-1) != module.embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {module.embed_dim}, but got {query.size(-1)}")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    project: Callable[..., list[Tensor]],
    out_proj: Callable[[Tensor], Tensor],
    **options: Any,
) -> Tensor:
    """Attends without padding; the output is nested like the query.

    project: query, key and value (..., E) -> (..., H, D) each. out_proj: (..., E) -> (..., E).
    """
    if query.layout is torch.jagged:
        out = attention(*(x.transpose(1, 2) for x in project(query, key, value)), **options)
        assert isinstance(out, Tensor)
        return out_proj(out.transpose(1, 2).flatten(-2))
    queries, keys, values = _sequences(query, key, value)
    cu_seqlens = [torch.tensor([0, *accumulate(map(len, sequences))], device=query.device) for sequences in (queries, keys)]
    out = attention_varlen(*project(*_each(torch.cat, queries, keys, values)), *cu_seqlens, **options)
    assert isinstance(out, Tensor)
    return _nested_like(query, list(out_proj(out.flatten(-2)).split([len(x) for x in queries])))


def pad(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[tuple[Tensor, Tensor, Tensor], PreparedMask]:
    """query, key and value (N, longest, E), still the same object if they were, and the mask that hides the padding."""
    queries, keys, values = _sequences(query, key, value)
    padded = _each(partial(pad_sequence, batch_first=True), queries, keys, values)
    query_lengths, key_lengths = (torch.tensor([len(x) for x in parts], device=query.device) for parts in (queries, keys))
    mask = prepare_mask(
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        is_causal=is_causal,
        seqlen_q=padded[0].shape[1],
        seqlen_k=padded[1].shape[1],
        gradients=torch.is_grad_enabled(),
    )
    return padded, mask


def unpad(output: Tensor, like: Tensor) -> Tensor:
    """The rows of output (N, longest, E) that are not padding, nested in the layout of `like`."""
    return _nested_like(like, [row[: len(sequence)] for row, sequence in zip(output, like.unbind(), strict=True)])


def _each(function: Callable[[Any], Any], query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Applies function to each, only once to inputs that are the same object."""
    of_query = function(query)
    of_key = of_query if key is query else function(key)
    return of_query, of_key, of_key if value is key else function(value)


def _sequences(query: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The sequences (L, E) of each, the same list if the inputs are the same object."""
    queries, keys, values = _each(lambda x: list(x.unbind()), query, key, value)
    if [len(x) for x in keys] != [len(x) for x in values]:
        raise AssertionError("key's sequence lengths do not match value's")
    return queries, keys, values


def _nested_like(query: Any, sequences: list[Tensor]) -> Tensor:
    """Nests sequences (L, E) of the query's lengths in the query's layout; a jagged result shares the query's ragged size."""
    if query.layout is torch.jagged and query.lengths() is None:
        return torch.nested.nested_tensor_from_jagged(torch.cat(sequences), query.offsets())
    return torch.nested.as_nested_tensor(sequences, layout=query.layout)
