"""Linear layers of few rows on the CPU, in float32 and without gradients: what a decoder runs with every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import reach_kernels
from ..replay import MAX_REMEMBERED, may_repeat
from ..torch_internals import tensor_guard, tracing_state
from .packed_problem import _native, address

MAX_ROWS = 64  # above, torch's products of packed weights are as fast

# Checks that accept tensors like those of an earlier call that the kernel took without recording gradients, by sizes.
_guards: dict[tuple, Callable[..., bool]] = {}


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel covers torch.nn.functional.linear(x, weight, bias): float32 on the CPU, few rows, no gradient, no autocast, and
    nothing that must see the operation."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() or tensor_guard is None or not may_repeat():
        return _covers(*tensors)
    # As replay.py does for attention: the checks of one row take as long as a small product.
    kind = x.shape, weight.shape, type(weight), len(tensors)
    guard = _guards.get(kind)
    if guard is not None and guard(*tensors):
        return True
    if not _covers(*tensors):
        return False
    if len(_guards) >= MAX_REMEMBERED:
        _guards.clear()
    _guards[kind] = tensor_guard(*tensors)
    return True


def _covers(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if _native is None or torch.is_autocast_enabled("cpu") or tracing_state() is not None:
        return False
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return False
    if not reach_kernels(*tensors) or (torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])):
        return False
    in_features = x.shape[-1]
    fits = weight.dim() == 2 and weight.shape[1] == in_features > 0 and (bias is None or bias.shape == weight.shape[:1])
    contiguous = x.is_contiguous() and weight.stride(1) == 1 and (bias is None or bias.stride(0) == 1)
    return fits and contiguous and x.numel() <= MAX_ROWS * in_features


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias; x (..., in_features), weight (out_features, in_features), bias (out_features,) -> (..., out_features).

    A row of the result depends on no other row, bit for bit.
    """
    out_features, in_features = weight.shape
    out = x.new_empty(*x.shape[:-1], out_features)
    _native.cpu_linear(
        torch.get_num_threads(),
        x.data_ptr(),
        in_features,
        weight.data_ptr(),
        weight.stride(0),
        address(bias),
        out.data_ptr(),
        x.numel() // in_features,
        in_features,
        out_features,
    )
    return out
