"""Eager calls without gradients that are like one before: what its checks depend on is the same, so that only the launch is left.

On a GPU the checks of a small call take longer than its kernel. Only the CUDA backend remembers calls (cuda_backend.repeat).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Looking names up through three modules takes longer than the calls.
_strided, _int32, _is_grad_enabled = torch.strided, torch.int32, torch.is_grad_enabled
_dispatch_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_any_autocast = torch._C._is_any_autocast_enabled
_functorch_level = torch._C._functorch.peek_interpreter_stack


def kind_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool | str,
    scale: float | None,
    backend: str | None,
) -> tuple | None:
    """All that decides how such a call is checked, routed and launched, but for the addresses; None where anything else has a say.

    Types are looked at before values are compared: True is no 1, and what is refused must not pass for what is equal to it.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() > 0 or _any_autocast():
        return None
    if _functorch_level() is not None or forward_ad._current_level >= 0 or _tracing() is not None:
        return None
    if not (type(query) is type(key) is type(value) is Tensor) or query.is_neg() or key.is_neg() or value.is_neg():
        return None
    if not (query.layout is key.layout is value.layout is _strided):
        return None
    if _is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if not (is_causal is False or is_causal is True or type(is_causal) is str) or not (scale is None or type(scale) is float):
        return None
    if not (backend is None or type(backend) is str):
        return None
    dtype, device = query.dtype, query.device
    if key.dtype is not dtype or value.dtype is not dtype or key.device != device or value.device != device:
        return None
    mask = lengths = None
    if key_mask is not None:
        if type(key_mask) is not Tensor or key_mask.layout is not _strided or key_mask.is_neg():
            return None
        mask = (key_mask.dtype, key_mask.device, key_mask.shape, key_mask.stride())
    if key_lengths is not None:
        # Others are converted or copied first.
        if type(key_lengths) is not Tensor or key_lengths.dtype is not _int32 or key_lengths.is_neg() or not key_lengths.is_contiguous():
            return None
        lengths = (key_lengths.device, key_lengths.shape)
    shapes = query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride()
    return (dtype, device, shapes, mask, lengths, is_causal, scale, backend)
