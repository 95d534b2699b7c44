"""What a fused attention must give, by plain torch in float64: one head of one batch element at a time, so that any length fits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 2048  # of scores at a time
LEAST = 1e-3  # to which an error is relative: a gradient that is nothing but rounding has no largest element


class Inputs(NamedTuple):
    """Of every provider, (B, H, L, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    bias: Tensor | None = None  # broadcast to (B, H, Lq, Lk), added to the scores
    mask: Tensor | None = None  # bool, broadcast to (B, H, Lq, Lk), True = may attend
    is_causal: bool = False


def all_finite(results: tuple[Tensor, ...]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in results)


def largest_error(inputs: Inputs, results: tuple[Tensor, ...]) -> float:
    """Of out and, if they are there, dquery, dkey, dvalue and dbias, in the first head of the first batch element and in the last of the
    last: the largest difference relative to the largest element of its tensor there.
    """
    batch, heads = inputs.query.shape[:2]
    errors = []
    for element, head in dict.fromkeys([(0, 0), (batch - 1, heads - 1)]):
        wanted = one_head(inputs, element, head, gradients=len(results) > 1)
        errors += [_error(ours[element, head], theirs) for ours, theirs in zip(results, wanted, strict=False)]
        if len(results) > 4:
            gradient = _bias_gradient(inputs, element, head)
            errors.append(_error(results[4][_place(results[4], element, head)], gradient))
    return max(errors)


def one_head(inputs: Inputs, element: int, head: int, bias: Tensor | None = None, *, gradients: bool = True) -> tuple[Tensor, ...]:
    """out, dquery, dkey and dvalue, (L, D) float64, or out alone. bias: float64, broadcast to (Lq, Lk), in place of the inputs' own, to
    gather its gradient.
    """
    query, key, value = (tensor[element, head].detach().double().requires_grad_(gradients) for tensor in inputs[:3])
    dout = inputs.dout[element, head].double()
    seqlen_q, seqlen_k, scale = query.shape[0], key.shape[0], query.shape[1] ** -0.5
    keys, positions = torch.arange(seqlen_k, device=query.device), torch.arange(seqlen_q, device=query.device)
    mask = None if inputs.mask is None else inputs.mask[_place(inputs.mask, element, head)].expand(seqlen_q, seqlen_k)
    if bias is None and inputs.bias is not None:
        bias = inputs.bias[_place(inputs.bias, element, head)].detach().double()
    out = torch.empty_like(dout)
    with torch.set_grad_enabled(gradients):
        for start in range(0, seqlen_q, ROWS):
            rows = slice(start, start + ROWS)
            scores = scale * query[rows] @ key.T
            if bias is not None:
                scores = scores + bias.expand(seqlen_q, seqlen_k)[rows]
            if mask is not None:
                scores = scores.masked_fill(~mask[rows], -torch.inf)
            if inputs.is_causal:
                scores = scores.masked_fill(keys > positions[rows, None], -torch.inf)
            part = scores.softmax(-1) @ value
            if gradients:
                part.backward(dout[rows])
            out[rows] = part.detach()
    return (out, *(leaf.grad for leaf in (query, key, value) if leaf.grad is not None))


def _place(tensor: Tensor, element: int, head: int) -> tuple[int, int]:
    """Where a tensor that is broadcast over (B, H) holds this head."""
    return min(element, tensor.shape[0] - 1), min(head, tensor.shape[1] - 1)


def _bias_gradient(inputs: Inputs, element: int, head: int) -> Tensor:
    """Of the part of the bias that this head adds, summed over every head that adds it."""
    assert inputs.bias is not None
    bias = inputs.bias[_place(inputs.bias, element, head)].detach().double().requires_grad_()
    batch, heads = inputs.query.shape[:2]
    for b in range(batch) if inputs.bias.shape[0] == 1 else [element]:
        for h in range(heads) if inputs.bias.shape[1] == 1 else [head]:
            one_head(inputs, b, h, bias)
    assert bias.grad is not None
    return bias.grad


def _error(ours: Tensor, wanted: Tensor) -> float:
    largest = max(float(wanted.abs().max()), LEAST)
    return float((ours.detach().double() - wanted).abs().max()) / largest
