"""Checks of token tensors, integers and the settings of layers, shared by the models and their searches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.checks import checked_integer


def checked_integer_in(name: str, value: object, low: int, high: int | None = None) -> int:
    integer = checked_integer(name, value)
    if integer < low or (high is not None and integer > high):
        limits = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {limits}, got {integer}")
    return integer


def check_layers(d_model: int, num_heads: int, dropout: object, layer_norm_eps: object) -> None:
    if d_model % num_heads:
        raise ValueError(f"d_model must be divisible by num_heads, got d_model = {d_model} and num_heads = {num_heads}")
    check_dropout(dropout)
    if not isinstance(layer_norm_eps, float) or not layer_norm_eps >= 0:
        raise ValueError(f"layer_norm_eps must be a float >= 0, got {layer_norm_eps!r}")


def check_dropout(dropout: object, name: str = "dropout") -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(dropout).__name__}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {dropout}")


def check_tokens(name: str, tokens: Tensor, max_len: int, start: int = 0) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        given = f"dtype {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} must be a tensor of int64 token ids, got {given}")
    if tokens.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions (batch, length), got shape {tuple(tokens.shape)}")
    if start + tokens.shape[1] > max_len:
        cached = f" after {start} cached ones" if start else ""
        raise ValueError(f"{name} has {tokens.shape[1]} tokens a row{cached}, more than max_len = {max_len}")


def check_features(src: Tensor, bands: int, max_frames: int) -> None:
    if not isinstance(src, Tensor) or not src.dtype.is_floating_point:
        given = f"dtype {src.dtype}" if isinstance(src, Tensor) else type(src).__name__
        raise TypeError(f"src must be a tensor of floating point log-mel features, got {given}")
    if src.ndim != 3 or src.shape[1] != bands or src.shape[2] > max_frames:
        raise ValueError(f"src must have shape (batch, src_features = {bands}, frames <= {max_frames}), got {tuple(src.shape)}")
