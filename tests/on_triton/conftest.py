"""The Triton kernels on a device: Triton's interpreter with TRITON_INTERPRET=1, otherwise the GPU. A process does one or the other.

TRITON_INTERPRET=1 python -m pytest tests/on_triton
python -m pytest tests/on_triton
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.zeros, InterpretedFunction):
        raise pytest.UsageError("triton was imported before TRITON_INTERPRET=1 was set: its own functions are compiled, not interpreted")
    import triton_interpreter  # noqa: F401  # bfloat16 for the interpreter
elif triton.knobs.runtime.interpret or not torch.cuda.is_available():
    raise pytest.UsageError("these tests need a GPU, or TRITON_INTERPRET=1 in the environment")

GUARD_ELEMENTS = 64  # before and after every allocation: rows stay aligned


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, or -1, and lies between guards: what a kernel forgets to write or writes past the end shows up."""
    allocated = []

    def guarded(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args, **kwargs) -> torch.Tensor:
            plain = allocate(*args, **kwargs)
            if plain.is_meta or type(plain) is not torch.Tensor:
                return plain
            size = 1 + sum((n - 1) * stride for n, stride in zip(plain.shape, plain.stride(), strict=True)) if plain.numel() else 0
            guard = torch.nan if plain.dtype.is_floating_point else -1
            buffer = torch.full((size + 2 * GUARD_ELEMENTS,), guard, dtype=plain.dtype, device=plain.device)
            allocated.append(buffer)
            tensor = buffer.as_strided(plain.shape, plain.stride(), GUARD_ELEMENTS)
            return tensor.requires_grad_(plain.requires_grad)

        return wrapper

    monkeypatch.setattr(torch, "empty", guarded(torch.empty))
    monkeypatch.setattr(torch, "empty_like", guarded(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded(torch.Tensor.new_empty))
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", guarded(torch.Tensor.new_empty_strided))
    monkeypatch.setattr("fused_attention.kernels.call.allocators", {})
    yield
    for buffer in allocated:
        for guard in (buffer[:GUARD_ELEMENTS], buffer[-GUARD_ELEMENTS:]):
            assert (guard.isnan() if buffer.dtype.is_floating_point else guard == -1).all(), f"{buffer.dtype} memory written past its end"
