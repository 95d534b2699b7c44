"""torch's own attention signature, with torch's numbers, ranks, broadcasting and errors, on top of `attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from . import replay
from .attention import attention, attention_varlen, autocast_inputs
from .checks import as_number, causal_bias, make_problem
from .ops import run
from .problem import OutMemory, PreparedMask
from .routing import choose
from .torch_integration.jagged import of_strided_sequences
from .torch_internals import RESULTS_LIKE_3D_QUERIES


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | PreparedMask | None = None,
    dropout_p: float | Tensor = 0.0,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention on the fused kernels: same signature, shapes and errors.

    One difference: a query that may attend to nothing gives 0, never NaN. Tensor subclasses and modes that override torch functions see
    the call.

    Args:
        query: (..., Hq, Lq, E), 2-D and up; the leading dims of query, key and value broadcast against each other. Or all three
            nested: (B, Hq, ragged Lq, E) of layout torch.jagged or torch.strided; the latter may also be (B, ragged Lq, E), without heads.
        key: (..., Hk, Lk, E).
        value: (..., Hv, Lk, Ev).
        attn_mask: bool (True = may attend) or float, broadcastable to (..., Hq, Lq, Lk); or a torch.nn.attention.bias.CausalBias.
        enable_gqa: allow Hq to be a multiple of Hk and of Hv.

    Returns:
        (..., Hq, Lq, Ev). Differentiable in query, key, value and a float attn_mask.

    Raises:
        TypeError: an argument is of the wrong Python type.
        RuntimeError: anything else does not fit, including attn_mask together with is_causal; the message names the argument.
        ValueError: a CausalBias together with is_causal.
    """
    if has_torch_function_variadic(query, key, value, attn_mask):
        overriding = (query, key, value) if causal_bias(attn_mask) else (query, key, value, attn_mask)
        if has_torch_function(overriding):
            options: dict[str, Any] = {
                "attn_mask": attn_mask,
                "dropout_p": dropout_p,
                "is_causal": is_causal,
                "scale": scale,
                "enable_gqa": enable_gqa,
            }
            return handle_torch_function(scaled_dot_product_attention, overriding, query, key, value, **options)
    if is_causal is not False and not isinstance(is_causal, (bool, torch.SymBool)):
        raise TypeError(f"is_causal must be a bool, got {type(is_causal).__name__}")
    if attn_mask is not None and is_causal:
        if causal_bias(attn_mask):
            raise ValueError("CausalBias should not be used with causal=True: attn_mask says what is_causal would")
        raise RuntimeError("Explicit attn_mask should not be set when is_causal=True: combine them, or call attention(), which takes both")
    if attn_mask is not None and not isinstance(attn_mask, (Tensor, PreparedMask)):
        raise TypeError(f"attn_mask must be a torch.Tensor or a PreparedMask, got {type(attn_mask).__name__}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    scale = None if scale is None else as_number("scale", scale)
    dropout_p = as_number("dropout_p", dropout_p)
    try:
        if query.is_nested or key.is_nested or value.is_nested:
            options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "dropout_p": dropout_p}
            if query.layout is torch.strided:
                return of_strided_sequences(attention_varlen, query, key, value, **options)
            return attention(query, key, value, **options)  # type: ignore[return-value]  # without lse
        return _of_any_rank(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from error


def _of_any_rank(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | PreparedMask | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """`attention` on dense tensors whose leading dims broadcast or whose heads are grouped; head_dim may be 0."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dims (..., seqlen, head_dim), got {tuple(tensor.shape)}")
    head_dims = 3 if enable_gqa else 2  # how many trailing dims do not broadcast
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise ValueError("enable_gqa needs a head dim: query, key and value must have at least 3 dims")
    leading, *others = (tensor.shape[:-head_dims] for tensor in (query, key, value))
    if others != [leading, leading]:  # broadcast_shapes costs as much as a small attention call
        try:
            leading = torch.broadcast_shapes(leading, *others)
        except RuntimeError as error:
            shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
            raise ValueError(f"the leading dims of query, key and value must broadcast, got {shapes}") from error
        query, key, value = (tensor.expand(*leading, *tensor.shape[-head_dims:]) for tensor in (query, key, value))
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        key, value = (_with_heads_of(query, name, tensor) for name, tensor in (("key", key), ("value", value)))
    head_dim_v = value.shape[-1]
    if query.shape[-1] == 0:  # all scores are 0
        query, key, scale = F.pad(query, (0, 1)), F.pad(key, (0, 1)), 1.0
    if head_dim_v == 0:
        value = F.pad(value, (0, 1))
    full_shape = (*leading, *query.shape[-head_dims:-1], key.shape[-2])  # (..., Lq, Lk)
    if isinstance(attn_mask, Tensor) and not causal_bias(attn_mask):
        attn_mask = _mask_as_4d(attn_mask, full_shape)
    # torch's fused kernels (4-D inputs, and since torch 2.14 also 3-D) keep the query's memory layout; other results are contiguous.
    like_query = query.dim() == 4 or (query.dim() == 3 and RESULTS_LIKE_3D_QUERIES)
    out_memory: OutMemory = "like query" if like_query else "contiguous"
    inputs = _as_4d(query), _as_4d(key), _as_4d(value)
    out = _attention_in(out_memory, inputs, attn_mask, dropout_p, is_causal, scale)
    out = out.reshape(*full_shape[:-1], value.shape[-1])
    return out if head_dim_v else out[..., :0]


def _attention_in(
    out_memory: OutMemory,
    inputs: tuple[Tensor, Tensor, Tensor],
    attn_mask: Tensor | PreparedMask | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """`attention` on 4-D tensors, with a result in the layout `out_memory`."""
    arguments = (*inputs, None, None, is_causal, scale, None, out_memory, False)
    repeatable = attn_mask is None and dropout_p == 0.0
    if repeatable:
        out = replay.repeat(arguments)
        if out is not None:
            return out  # type: ignore[return-value]  # without lse
    options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    problem = make_problem("separate", autocast_inputs(*inputs), **options, out_memory=out_memory)
    return run(problem, choose(problem, None), arguments if repeatable else None)[0]


def _with_heads_of(query: Tensor, name: str, tensor: Tensor) -> Tensor:
    """Repeats each head once per query head that uses it; needed if key and value have different numbers of heads."""
    num_heads, own = query.shape[-3], tensor.shape[-3]
    if own == 0 or num_heads % own != 0:
        raise ValueError(f"the {num_heads} heads of query must be a multiple of the {own} heads of {name}")
    return tensor.repeat_interleave(num_heads // own, dim=-3)


def _as_4d(tensor: Tensor) -> Tensor:
    """(..., H, L, D) -> (B, H, L, D): leading dims merged, missing ones added."""
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() > 4:
        return tensor.flatten(0, tensor.dim() - 4)
    return tensor[(None,) * (4 - tensor.dim())]


def _mask_as_4d(mask: Tensor, full_shape: tuple[int, ...]) -> Tensor:
    """A mask that broadcasts to (..., H, Lq, Lk) -> one that broadcasts to (B, H, Lq, Lk), expanded only in dims that merge."""
    try:
        expanded = mask.expand(full_shape)
    except RuntimeError as error:
        raise ValueError(f"attn_mask must broadcast to {tuple(full_shape)}, got {tuple(mask.shape)}") from error
    if len(full_shape) <= 4:  # no leading dims to merge: the mask stays unexpanded
        return mask[(None,) * (4 - mask.dim())]
    return _as_4d(expanded)
