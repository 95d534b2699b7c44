"""What a fused attention must give, by plain torch in float32: one head of one batch element at a time, so that any length fits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 2048  # of scores at a time


class Inputs(NamedTuple):
    """Of every provider, (B, H, L, D) bfloat16."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    bias: Tensor | None = None  # (1, H, L, L)
    mask: Tensor | None = None  # (B or 1, 1, L or 1, L) bool, True = may attend
    is_causal: bool = False


def all_finite(results: tuple[Tensor, ...]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in results)


def largest_error(inputs: Inputs, results: tuple[Tensor, ...]) -> float:
    """Of out, dquery, dkey, dvalue and, if they hold it, dbias, in the first head of the first batch element and in the last of the last:
    the largest difference relative to the largest element of its tensor there.
    """
    batch, heads = inputs.query.shape[:2]
    errors = []
    for element, head in dict.fromkeys([(0, 0), (batch - 1, heads - 1)]):
        wanted = one_head(inputs, element, head)
        errors += [_error(ours[element, head], theirs) for ours, theirs in zip(results, wanted, strict=False)]
        if len(results) > len(wanted):
            errors.append(_error(results[-1][0, head], _bias_gradient(inputs, head)))
    return max(errors)


def one_head(inputs: Inputs, element: int, head: int, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """out, dquery, dkey and dvalue, (L, D) float32. bias: (L, L) float32 in place of the inputs' own, to gather its gradient."""
    query, key, value = (tensor[element, head].detach().float().requires_grad_() for tensor in inputs[:3])
    dout = inputs.dout[element, head].float()
    length, scale = query.shape[0], query.shape[1] ** -0.5
    keys = torch.arange(length, device=query.device)
    mask = None if inputs.mask is None else inputs.mask.expand(inputs.query.shape[0], 1, length, length)[element, 0]
    if bias is None and inputs.bias is not None:
        bias = inputs.bias[0, head].detach().float()
    out = torch.empty_like(dout)
    with torch.enable_grad():
        for start in range(0, length, ROWS):
            rows = slice(start, start + ROWS)
            scores = scale * query[rows] @ key.T
            if bias is not None:
                scores = scores + bias[rows]
            if mask is not None:
                scores = scores.masked_fill(~mask[rows], -torch.inf)
            if inputs.is_causal:
                scores = scores.masked_fill(keys > keys[rows, None], -torch.inf)
            part = scores.softmax(-1) @ value
            part.backward(dout[rows])
            out[rows] = part.detach()
    gradients = [leaf.grad for leaf in (query, key, value) if leaf.grad is not None]
    return (out, *gradients)


def _bias_gradient(inputs: Inputs, head: int) -> Tensor:
    """(L, L), summed over the batch."""
    assert inputs.bias is not None
    bias = inputs.bias[0, head].detach().float().requires_grad_()
    for element in range(inputs.query.shape[0]):
        one_head(inputs, element, head, bias)
    assert bias.grad is not None
    return bias.grad


def _error(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.detach().float() - wanted).abs().max() / wanted.abs().max())
