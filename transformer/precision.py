"""Where to run and in which precision: the device and autocast choices of training, scoring and translation."""

from __future__ import annotations

import contextlib

import torch

from fused_attention.kernels import native

AUTOCAST_CHOICES = ("auto", "bf16", "off")


def choose_device(name: str = "auto") -> torch.device:
    """The named device, or for "auto" the GPU if there is one. Raises ValueError if torch cannot use it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def bf16_pays(device: torch.device) -> bool:
    """Whether bfloat16 autocast is faster than float32 there: GPUs with bf16 tensor cores, CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return native.status() is None and native.instruction_sets()[0] == "amx"
    return False


def autocast(device: torch.device, choice: str = "auto") -> contextlib.AbstractContextManager[object]:
    """The autocast context for a choice of "auto" (bf16 where it pays), "bf16" or "off"."""
    if choice not in AUTOCAST_CHOICES:
        raise ValueError(f"autocast must be one of {', '.join(AUTOCAST_CHOICES)}, not {choice!r}")
    if choice == "bf16" or (choice == "auto" and bf16_pays(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
