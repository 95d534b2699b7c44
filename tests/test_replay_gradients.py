"""A call with gradients like one before skips the checks that it would pass, and none that it would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fused_attention import attention
from fused_attention.kernels import attention as attention_module
from fused_attention.kernels import replay
from fused_attention.kernels.call import Call
from fused_attention.kernels.native import cpu
from fused_attention.kernels.problem import Problem

pytestmark = [
    pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}"),
    pytest.mark.skipif(replay.tensor_guard is None, reason="this torch has no guards that calls could be remembered by"),
]

MASK, LENGTHS = torch.arange(7) < torch.tensor([[7], [4]]), torch.tensor([7, 3], dtype=torch.int32)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, scale": {"is_causal": True, "scale": 0.5},
    "key_mask": {"key_mask": MASK},
    "key_lengths": {"key_lengths": LENGTHS, "is_causal": "bottom_right"},
    "both": {"key_mask": MASK, "key_lengths": LENGTHS},
    "named backend": {"backend": "cpu"},
}


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every call that goes all the way."""
    made: list[str] = []
    make_problem = attention_module.make_problem
    monkeypatch.setattr(attention_module, "make_problem", lambda *args, **more: made.append("checked") or make_problem(*args, **more))
    return made


def tensors(wanted: str = "qkv", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = {"q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 6)}
    return [torch.randn(shape, dtype=dtype).requires_grad_(name in wanted) for name, shape in shapes.items()]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("wanted", ["q", "qkv"])
def test_the_second_call_skips_the_checks_and_gives_the_same(wanted: str, option: str, return_lse: bool, checks: list[str]) -> None:
    def outcome(inputs: list[Tensor], **more: Any) -> list[Tensor]:
        results = attention(*inputs, **OPTIONS[option] | more, return_lse=return_lse)
        results = results if return_lse else (results,)
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        return [*results, *torch.autograd.grad(sum(result.square().sum() for result in results), leaves)]

    outcome(tensors(wanted))
    inputs = tensors(wanted)
    assert checks == ["checked"]
    ours = outcome(inputs)
    assert checks == ["checked"]
    assert_close(ours, outcome(inputs, backend="reference"), rtol=1e-4, atol=1e-5)


def again(call: Callable[[], Any], checks: list[str]) -> int:
    """How many checks a call makes after calls like it."""
    for _ in range(3):
        attention(*tensors())
    checks.clear()
    call()
    return len(checks)


def test_what_anything_else_has_a_say_in_goes_all_the_way(checks: list[str]) -> None:
    q, k, v = tensors()

    def under(context: Any) -> Callable[[], Any]:
        def call() -> Any:
            with context:
                return attention(q, k, v)

        return call

    def deterministic() -> None:
        torch.use_deterministic_algorithms(True)
        try:
            attention(q, k, v)
        finally:
            torch.use_deterministic_algorithms(False)

    assert again(lambda: attention(q, k, v), checks) == 0
    assert again(under(torch.autocast("cpu", torch.bfloat16)), checks) == 1
    assert again(under(FlopCounterMode(display=False)), checks) == 1
    assert again(under(forward_ad.dual_level()), checks) == 1
    assert again(under(torch.no_grad()), checks) == 0
    assert again(deterministic, checks) == 1
    assert again(lambda: torch.func.vmap(lambda x: attention(x, k, v))(q[None]), checks) == 1
    assert again(lambda: attention(torch._neg_view(q), k, v), checks) == 1
    assert again(lambda: attention(q, k, v, is_causal=True), checks) == 1
    assert again(lambda: attention(q, k, v, scale=0.5), checks) == 1
    assert again(lambda: attention(q, k.detach(), v), checks) == 1
    assert again(lambda: attention(q.transpose(0, 1).contiguous().transpose(0, 1), k, v), checks) == 1
    assert again(lambda: attention(q.double(), k.double(), v.double()), checks) == 1
    assert again(lambda: attention(q, k, v, key_mask=MASK), checks) == 1
    assert again(lambda: attention(torch.nn.Parameter(q.detach()), k, v), checks) == 1


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], type[Exception], str]] = {
    "a number for is_causal": (lambda q, k, v: attention(q, k, v, is_causal=0), ValueError, "is_causal must be"),
    "a bool for scale": (lambda q, k, v: attention(q, k, v, scale=True), TypeError, "scale must be a number"),
    "another dtype": (lambda q, k, v: attention(q, k, v.half()), TypeError, "value must have the dtype of query"),
    "another length": (lambda q, k, v: attention(q, k, v[:, :, 1:]), ValueError, "value must have the batch, heads and"),
    "a shorter mask": (lambda q, k, v: attention(q, k, v, key_mask=MASK[:, 1:]), ValueError, "key_mask must have"),
    "no tensor": (lambda q, k, v: attention(q, k, None), TypeError, "value must be a torch.Tensor"),
    "another backend": (lambda q, k, v: attention(q, k, v, backend="nonesuch"), ValueError, "backend must be None or one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_after_good_calls(case: str) -> None:
    call, error, message = REFUSED[case]
    for options in OPTIONS.values():
        for _ in range(2):
            attention(*tensors(), **options)
    with pytest.raises(error, match=message):
        call(*tensors())


def test_higher_derivatives_batched_ones_and_retained_graphs(checks: list[str]) -> None:
    def second(inputs: list[Tensor], backend: str | None) -> tuple[Tensor, ...]:
        out = attention(*inputs, backend=backend)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)

    attention(*tensors())
    inputs = tensors()
    ours = second(inputs, None)
    assert checks == ["checked"]
    assert_close(ours, second(inputs, "reference"), rtol=1e-4, atol=1e-4)
    out = attention(*inputs)
    batch = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, inputs, batch, is_grads_batched=True, retain_graph=True)
    for index, dout in enumerate(batch):
        each = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        assert_close([gradient[index] for gradient in batched], list(each), rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(out, inputs, forward_ad.make_dual(batch[0], batch[1]), retain_graph=True)
        assert_close(forward_ad.unpack_dual(gradients[0]).tangent, torch.autograd.grad(out, inputs[0], batch[1], retain_graph=True)[0])


def test_only_one_of_two_results_gets_a_gradient() -> None:
    for _ in range(2):
        inputs = tensors()
        out, lse = attention(*inputs, return_lse=True)
        ours = torch.autograd.grad(lse.sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        _, expected = attention(*inputs, return_lse=True, backend="reference")
        assert_close(ours, torch.autograd.grad(expected.sum(), inputs, allow_unused=True, materialize_grads=True))
        assert_close(
            torch.autograd.grad(out.sum(), inputs)[2], torch.autograd.grad(attention(*inputs, backend="reference").sum(), inputs)[2]
        )


def test_saved_tensors_are_guarded_and_hooked() -> None:
    attention(*tensors())
    query, key, value = tensors()
    doubled = key * 2
    out = attention(query, doubled, value)
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor.shape) or tensor, lambda tensor: tensor):
        attention(query, key, value)
    assert len(packed) == 5  # out, lse and the inputs


def test_tensors_that_a_call_declines_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, declined = cpu.prepare, []

    def choosy(problem: Problem) -> Call:
        call = prepare(problem)
        return lambda query, *others: None if query.data_ptr() in declined else call(query, *others)

    monkeypatch.setattr(cpu, "prepare", choosy)
    attention(*tensors())
    inputs = tensors()
    declined.append(inputs[0].data_ptr())
    out = attention(*inputs)
    expected = attention(*inputs, backend="reference")
    assert_close(out, expected)
    assert_close(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_REMEMBERED", 3)
    for length in range(2, 9):
        attention(*[torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3)])
    assert 0 < len(replay._calls) <= 3
    for wanted in ("q", "qk", "qv", "qkv"):
        for dtype in (torch.float32, torch.bfloat16):
            attention(*tensors(wanted, dtype))
    assert max(map(len, replay._calls.values())) == replay.MAX_ALIKE
