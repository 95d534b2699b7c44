"""What torch may do with a call whose kernels are Triton's: tests/test_transforms.py and tests/test_compile.py have it all, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_attention.kernels.attention import attention

OPTIONS = {"is_causal": True, "dropout_p": 0.3}


def tensors(device: str, requires_grad: bool = False) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 2, length, 16, device=device, requires_grad=requires_grad) for length in (5, 7, 7))


def state(device: str) -> Tensor:
    return torch.tensor([3, 4], device=device)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "jacrev"])
def test_functorch_runs_the_reference(transform: str, device: str) -> None:
    inputs, others = tensors(device), tensors(device)

    def apply(function: Callable[..., Tensor]) -> object:
        if transform == "grad":
            return torch.func.grad(lambda *x: function(*x).square().sum(), (0, 1, 2))(*inputs)
        if transform == "jvp":
            return torch.func.jvp(function, inputs, others)
        if transform == "vmap":
            return torch.vmap(function)(*(torch.stack(pair) for pair in zip(inputs, others, strict=True)))
        return torch.func.jacrev(function, 2)(*inputs)

    options = OPTIONS | {"rng_state": state(device)}
    ours, expected = (apply(partial(attention, **options, backend=backend)) for backend in ("triton", "reference"))
    assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_forward_mode_and_a_tangent_of_the_gradient(device: str) -> None:
    inputs = tensors(device, requires_grad=True)
    out = attention(*inputs, backend="triton")
    dout, tangent = torch.randn_like(out), torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, tangent, retain_graph=True)
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(out, inputs, forward_ad.make_dual(dout, tangent))
        assert_close([forward_ad.unpack_dual(gradient).tangent for gradient in gradients], list(expected), rtol=1e-3, atol=1e-4)
        dual = forward_ad.make_dual(inputs[0].detach(), torch.ones_like(inputs[0]))
        assert forward_ad.unpack_dual(attention(dual, *inputs[1:], backend="triton")).tangent is not None


@pytest.mark.parametrize("way", ["checkpointed", "reentrant", "compiled", "counting FLOPs"])
def test_however_it_is_run_the_mask_and_the_numbers_are_the_same(way: str, device: str) -> None:
    call = partial(attention, **OPTIONS, rng_state=state(device), backend="triton")

    def outcome(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        out = function(*leaves)
        out.square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    def counted(*leaves: Tensor) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            out = call(*leaves)
        assert counter.get_total_flops() == 2 * 2 * 5 * 7 * 32
        return out

    ways: dict[str, Callable[..., Tensor]] = {
        "checkpointed": lambda *leaves: checkpoint(call, *leaves, use_reentrant=False),
        "reentrant": lambda *leaves: checkpoint(call, *leaves, use_reentrant=True),
        "compiled": torch.compile(call, fullgraph=True, backend="aot_eager"),
        "counting FLOPs": counted,
    }
    inputs = tensors(device)
    ours, expected = (outcome(function, [tensor.clone().requires_grad_() for tensor in inputs]) for function in (ways[way], call))
    assert_close(ours, expected, rtol=0, atol=0)


def test_repeated_calls_with_gradients(device: str) -> None:
    """The second one skips the checks."""
    for _ in range(3):
        inputs = tensors(device, requires_grad=True)
        out = attention(*inputs, is_causal=True, backend="triton")
        expected = attention(*inputs, is_causal=True, backend="reference")
        assert_close(out, expected, rtol=1e-4, atol=1e-5)
        dout = torch.randn_like(out)
        assert_close(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout), rtol=1e-3, atol=1e-4)
