"""Key-value caches of 8-bit numbers: int8 or float8, times a scale for each key head and block of tokens.

Method: symmetric quantization by the largest magnitude of a block. A backend that reads such a cache multiplies scores and weights by the
scales instead of keys and values: q . (scale k) = scale (q . k), and sum_j p_j (scale_j v_j) = sum_j (p_j scale_j) v_j.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .problem import Problem

# What a cache may hold, and the largest magnitude that a block's is mapped to.
CACHE_DTYPES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def quantize_kv(tensor: Tensor, dtype: torch.dtype = torch.int8, *, block_size: int = 1) -> tuple[Tensor, Tensor]:
    """Keys or values as 8-bit numbers and their scales, for `attention_decode`; not differentiable.

    Args:
        tensor: (B, Hkv, L, D), of any floating dtype: a whole cache or new tokens, to be written into one.
        dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
        block_size: tokens that share a scale, a divisor of L. With 1, tokens can be added without touching earlier ones; larger blocks save
            memory and lose accuracy.

    Returns:
        (B, Hkv, L, D) of `dtype`, in the memory order of `tensor`, and scales (B, Hkv, L / block_size) float32. Their product differs from
        a finite `tensor` by at most half a step of int8, the largest magnitude of the block / 254; by a relative 2^-4 (e4m3) or 2^-3
        (e5m2). A block that holds inf or NaN becomes NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype in CACHE_DTYPES:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"tensor must be a torch.Tensor of float32, float64, float16 or bfloat16, got {given}")
    if tensor.dim() != 4:
        raise ValueError(f"tensor must have shape (batch, num_heads, seqlen, head_dim), got {tuple(tensor.shape)}")
    if dtype not in CACHE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, CACHE_DTYPES))}, got {dtype}")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1 or tensor.shape[2] % block_size != 0:
        raise ValueError(f"block_size must be an int >= 1 that divides the {tensor.shape[2]} tokens of tensor, got {block_size!r}")
    numbers = tensor.detach().float()
    blocks = numbers.unflatten(2, (tensor.shape[2] // block_size, block_size))
    scale = blocks.abs().amax((3, 4)) / CACHE_DTYPES[dtype]
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # zeros stay zeros
    scaled = numbers / _by_token(scale, block_size)
    return (scaled.round_() if dtype is torch.int8 else scaled).to(dtype), scale


def dequantize_kv(tensor: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `quantize_kv`: the numbers (B, Hkv, L, D) of `dtype` that an 8-bit tensor and its scales stand for."""
    if tensor.shape[2] == 0:
        return tensor.to(dtype)
    numbers = tensor.to(torch.promote_types(dtype, torch.float32))
    return (numbers * _by_token(scale, tensor.shape[2] // scale.shape[2])).to(dtype)


def _by_token(scale: Tensor, block_size: int) -> Tensor:
    """(B, Hkv, blocks) -> (B, Hkv, tokens, 1)."""
    return (scale if block_size == 1 else scale.repeat_interleave(block_size, 2)).unsqueeze(3)


def dequantized(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem with keys and values of a floating dtype and no scales."""
    assert problem.key_scale is not None
    assert problem.value_scale is not None
    key = dequantize_kv(problem.key, problem.key_scale, dtype)
    value = dequantize_kv(problem.value, problem.value_scale, dtype)
    floating = replace(problem, inputs=(problem.query, key, value), key=key, value=value, key_scale=None, value_scale=None)
    floating.inputs_number = None
    return floating
