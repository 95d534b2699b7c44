"""`python tests/without_torch_internals.py`: the library on a torch without one of the private names that it uses, and without all of them.

They are hidden while the library is imported only, so that torch itself goes on as ever.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch.testing import assert_close

OF_GPUS = ("torch._C._cuda_getDevice", "torch._C._cuda_getCurrentRawStream", "torch._C._dynamo.guards._empty_strided_cuda")
NAMES = (
    "torch._C._len_torch_dispatch_stack",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._is_torch_function_enabled",
    "torch.autograd.forward_ad._current_level",
    "torch._C._get_tracing_state",
    "torch.Tensor._is_zerotensor",
    "torch._C._has_storage",
    "torch.overrides._get_current_function_mode_stack",
    "torch._C._get_fp32_precision_getter",
    "torch._C._dynamo.guards.TensorGuards",
    "torch._C._dynamo.guards._empty_strided_cpu",
    *OF_GPUS,
)


class NotThere:
    """Of a class: an attribute that its bases may have."""

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError("hidden")


@contextmanager
def hidden(name: str) -> Iterator[None]:
    path, _, attribute = name.removeprefix("torch.").rpartition(".")
    place = attrgetter(path)(torch)
    if isinstance(place, type):
        setattr(place, attribute, NotThere())
        yield
        delattr(place, attribute)
    elif hasattr(place, attribute):
        value = getattr(place, attribute)
        delattr(place, attribute)
        yield
        setattr(place, attribute, value)
    else:  # this torch was built for no GPU
        yield


def check(names: Sequence[str]) -> None:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(hidden(name))
        from fused_attention import attention, attention_varlen, attention_weights, scaled_dot_product_attention
        from fused_attention.integrations import sdpa
        from fused_attention.kernels import torch_internals
        from fused_attention.transformer.layers import dropout
    for_gpus = torch.version.cuda or torch.version.hip
    assert set(torch_internals.missing) == {name for name in names if for_gpus or name not in OF_GPUS}, torch_internals.missing

    inputs = [torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3)]
    plain = [tensor.detach() for tensor in inputs]

    def expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, is_causal=True, backend="reference")

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, is_causal=True)

    for change, modes in ((sdpa.enable, 1), (sdpa.disable, 0)):
        change()
        assert len(torch.overrides._get_current_function_mode_stack()) == modes

    for _ in range(3):  # the second and third may be repetitions
        assert_close(ours(*plain), expected(*plain))
        results = [torch.autograd.grad(function(*inputs).square().sum(), inputs) for function in (ours, expected)]
        assert_close(*results)
        leaf = inputs[0].detach().requires_grad_()
        results = [torch.autograd.grad(function(leaf, *plain[1:]).square().sum(), leaf) for function in (ours, expected)]
        assert_close(*results)
    higher = [torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)[0] for function in (ours, expected)]
    assert_close(*[torch.autograd.grad(gradient.square().sum(), inputs[1:]) for gradient in higher], rtol=1e-4, atol=1e-4)

    batched = [tensor[None].expand(3, *tensor.shape) for tensor in plain]
    assert_close(*[torch.func.vmap(function)(*batched) for function in (ours, expected)])
    loss = [lambda *tensors, function=function: function(*tensors).square().sum() for function in (ours, expected)]
    assert_close(*[torch.func.grad(function, (0, 1, 2))(*plain) for function in loss])
    assert_close(*[torch.func.jvp(function, tuple(plain), tuple(reversed(plain))) for function in (ours, expected)])
    assert_close(*[torch.func.hessian(lambda x, function=function: function(x, *plain[1:]))(plain[0]) for function in loss])
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(tensor, tensor) for tensor in plain]
        assert_close(*[torch.autograd.forward_ad.unpack_dual(function(*dual)).tangent for function in (ours, expected)])

    outputs = [function(*inputs) for function in (ours, expected)]
    directions = torch.randn(3, *outputs[0].shape)
    assert_close(*[torch.autograd.grad(out, inputs, directions, is_grads_batched=True) for out in outputs])
    zero = torch._efficientzerotensor(inputs[0].shape)
    assert_close(*[function(plain[0], zero, plain[2]) for function in (ours, expected)])
    assert_close(ours(torch._neg_view(plain[0]), *plain[1:]), expected(-plain[0], *plain[1:]))
    with pytest.raises(RuntimeError, match="cannot be traced"):
        torch.jit.trace(ours, tuple(plain), check_trace=False)

    _, lse = attention(*plain, return_lse=True)
    assert_close(attention_weights(*plain[:2], lse) @ plain[2], attention(*plain, backend="reference"))
    assert_close(scaled_dot_product_attention(*plain), torch.nn.functional.scaled_dot_product_attention(*plain))
    starts = torch.tensor([0, 9], dtype=torch.int32)
    packed = [tensor[0].transpose(0, 1) for tensor in plain]
    assert_close(attention_varlen(*packed, starts, starts, 9, 9).transpose(0, 1), attention(*plain, backend="reference")[0])
    kept = dropout(torch.ones(10_000), 0.25, True)
    assert 0.7 < kept.ne(0).float().mean() < 0.8
    assert_close(kept[kept != 0], torch.full_like(kept[kept != 0], 4 / 3))


def main() -> None:
    torch.set_num_threads(1)  # a process with more must not fork
    # torch imports what it needs for these the first time, and binds names of its own.
    torch.func.hessian(torch.sin)(torch.ones(()))
    torch.jit.trace(torch.sin, torch.ones(()))
    for label, names in (*((name, [name]) for name in NAMES), ("everything", NAMES)):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                check(names)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        if os.waitpid(child, 0)[1] == 0:
            print(label, flush=True)
        else:
            sys.exit(f"without {label}: see above")


if __name__ == "__main__":
    main()
