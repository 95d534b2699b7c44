"""Other libraries' attention on GPUs, each with what it takes of a call; whoever is not installed, or refuses the call, has a reason.

None has run here beside ours yet: what a library returns is held against float64 before it is timed, and is listed as wrong if it differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .exact import Inputs
from .peers import Missing, library_of

# Of query, key, value as (B, H, L, D) and the bias or mask if there is one: out, (B, H, L, D).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def flash_attn_2(inputs: Inputs, dropout_p: float, deterministic: bool) -> Attend:
    _without_masks(inputs)
    function = library_of("flash_attn").flash_attn_func
    return _sequence_first(function, causal=inputs.is_causal, dropout_p=dropout_p, deterministic=deterministic)


def flash_attn_3(inputs: Inputs, dropout_p: float, deterministic: bool) -> Attend:
    _without_masks(inputs)
    _without_dropout(dropout_p)
    return _sequence_first(library_of("flash_attn_interface").flash_attn_func, causal=inputs.is_causal, deterministic=deterministic)


def flash_attn_4(inputs: Inputs, dropout_p: float, deterministic: bool) -> Attend:
    _without_masks(inputs)
    _without_dropout(dropout_p)
    return _sequence_first(library_of("flash_attn.cute").flash_attn_func, causal=inputs.is_causal, deterministic=deterministic)


def xformers(inputs: Inputs, dropout_p: float, deterministic: bool) -> Attend:
    """Whose kernels are mslk's in newer versions."""
    _unless_deterministic(deterministic)
    if inputs.mask is not None:
        raise Missing("takes no bool mask")
    ops = library_of("xformers.ops")
    causal = ops.LowerTriangularMask() if inputs.is_causal else None

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        attn_bias = causal if bias is None else bias.expand(query.shape[0], -1, -1, -1)
        swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return ops.memory_efficient_attention(*swapped, attn_bias=attn_bias, p=dropout_p).transpose(1, 2)

    return attend


def ffpa_attn(inputs: Inputs, dropout_p: float, deterministic: bool) -> Attend:
    _unless_deterministic(deterministic)
    function = library_of("ffpa_attn").ffpa_attn_func
    return lambda query, key, value, mask: function(query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=inputs.is_causal)


LIBRARIES: dict[str, Callable[[Inputs, float, bool], Attend]] = {
    "flash-attn 2": flash_attn_2,
    "flash-attn 3": flash_attn_3,
    "flash-attn 4": flash_attn_4,
    "xformers": xformers,
    "ffpa-attn": ffpa_attn,
}


def _sequence_first(function: Callable[..., Any], **options: Any) -> Attend:
    """flash-attn's functions take and return (B, L, H, D), some of them with the log-sum-exp."""

    def attend(query: Tensor, key: Tensor, value: Tensor, _: Tensor | None) -> Tensor:
        found = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return attend


def _without_masks(inputs: Inputs) -> None:
    if inputs.mask is not None or inputs.bias is not None:
        raise Missing("takes no mask and no bias")


def _without_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise Missing("has no dropout")


def _unless_deterministic(deterministic: bool) -> None:
    if deterministic:
        raise Missing("has no deterministic backward to ask for")
