"""In bfloat16 and float16 the forward keeps what rounding took from out, because delta = rowsum(dout * out) has to cancel dout V^T."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from accuracy import assert_accurate, exact_and_eager, saved_rounding
from attention_calls import build
from torch import Tensor

from fused_attention.kernels import ops
from fused_attention.kernels.attention import attention, attention_kv_packed, attention_qkv_packed, attention_varlen
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cpu
from fused_attention.kernels.problem import Gradients, Problem
from fused_attention.kernels.reference import attention_reference

pytestmark = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")

SHAPE = (1, 2, 96, 64)
DTYPES = (torch.bfloat16, torch.float16)
NAMES = ("query", "key", "value")


def rounds_weights(instruction_set: str, dtype: torch.dtype) -> bool:
    """Whether the products are of bfloat16 tiles, to which P and dS are rounded, as they are without a fused kernel."""
    return instruction_set in ("amx", "avx512_bf16") and dtype is torch.bfloat16


def problem_of(case: str, dtype: torch.dtype) -> tuple[Problem, Tensor]:
    """A problem whose dP - delta cancel to a few digits, and its dout."""
    query, key, value, dout = (torch.randn(SHAPE) for _ in range(4))
    if "dout of ones" in case:
        dout = torch.ones(SHAPE)
    if "values around 10" in case:
        value = value + 10.0
    if "equal values" in case:
        value = value[:, :, :1].repeat(1, 1, SHAPE[2], 1)
    if "equal keys" in case:
        key = key[:, :, :1].repeat(1, 1, SHAPE[2], 1)
    if "lse of 1e4" in case:  # the first column gives every score the same 1e4
        query[..., 0] = key[..., 0] = (1e4 * SHAPE[3] ** 0.5) ** 0.5
    return make_problem("separate", tuple(tensor.to(dtype) for tensor in (query, key, value))), dout.to(dtype)


def kernel_gradients(problem: Problem, dout: Tensor, keeps_out_error: bool) -> tuple[Tensor, ...]:
    problem = replace(problem, keeps_out_error=keeps_out_error)
    out, lse, *out_error = ops.forward(cpu, problem)
    gradients = tuple(torch.empty_like(tensor) for tensor in problem.inputs)
    cpu.backward(problem, out, lse, dout, None, Gradients(*gradients), *out_error)
    return gradients


def gradients_of(function: Callable[..., Tensor], problem: Problem, dout: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in problem.inputs]
    return torch.autograd.grad(function(*leaves), leaves, dout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "needs_out_error"),
    [
        ("dout of ones", False),
        ("values around 10, dout of ones", True),
        ("equal values", False),
        ("equal keys", True),
        ("equal keys, dout of ones", True),
        ("lse of 1e4", True),
        ("lse of 1e4, dout of ones", True),
    ],
)
def test_gradients_that_cancel(case: str, needs_out_error: bool, dtype: torch.dtype, instruction_set: str) -> None:
    """Compared with an unfused backward that computes in float32, or in bfloat16 if the kernel rounds dS; from the stored out alone they
    fail."""
    problem, dout = problem_of(case, dtype)
    exact, eager = exact_and_eager(problem, dout, None)
    rounding = saved_rounding(problem, dout, exact, rounds_weights=rounds_weights(instruction_set, dtype))
    # What rounding dS leaves does not cancel where all keys have a part in common.
    in_bfloat16 = rounds_weights(instruction_set, dtype) and ("equal keys" in case or "lse" in case)
    in_float32 = dict(zip(NAMES, gradients_of(partial(attention, backend="reference"), problem, dout), strict=True))
    unfused = eager if in_bfloat16 else in_float32
    for name, gradient in zip(NAMES, gradients_of(plain, problem, dout), strict=True):
        assert_accurate(f"gradient of {name}", "gradient", gradient, unfused[name], exact[name], rounding[name])
    without = kernel_gradients(problem, dout, False)[0]
    if needs_out_error and not rounds_weights(instruction_set, dtype):
        with pytest.raises(AssertionError, match="gradient of query: .* error"):
            assert_accurate("gradient of query", "gradient", without, unfused["query"], exact["query"], rounding["query"])
    if "values around 10" in case:
        ours = kernel_gradients(problem, dout, True)[0]
        left, before = ((gradient.double() - exact["query"]).abs().max() for gradient in (ours, without))
        assert left < 0.3 * before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlens", [(40, 75), (2, 75), (40, 600), (1, 600)], ids=str)
def test_out_with_its_error(seqlens: tuple[int, int], dtype: torch.dtype, instruction_set: str) -> None:
    """Together they have the digits of two numbers. An infinite out has no error, nor has a row that is absent or sees nothing."""
    call = {"dtype": dtype, "seqlens": seqlens, "sizes": (3, 1, 1), "query_lengths": (70, 1, 0), "key_lengths": (600, 0, 600)}
    problem, _, _ = build(call | {"head_dims": (40, 40)}, "cpu")
    problem.keeps_out_error = True
    out, lse, out_error = ops.forward(cpu, problem)
    assert out_error.dtype == dtype
    assert out_error.stride() == out.stride()
    assert (out_error[lse == -torch.inf] == 0).all()
    exact = attention_reference(make_problem("separate", tuple(tensor[:1].double() for tensor in problem.inputs)))[0]
    left = (out[:1].double() + out_error[:1].double() - exact).abs().max()
    if not rounds_weights(instruction_set, dtype):
        assert left < 0.02 * (out[:1].double() - exact).abs().max()
    problem.value[..., 0] = torch.inf
    out, lse, out_error = ops.forward(cpu, problem)
    assert out[0, ..., 0].isinf().all()
    assert out_error.isfinite().all()


def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As attention_varlen."""
    starts = torch.tensor([0, SHAPE[2]], dtype=torch.int32)
    return attention_varlen(*[tensor[0].transpose(0, 1) for tensor in (query, key, value)], starts, starts, backend="cpu").transpose(0, 1)[
        None
    ]


def tokens_first(*tensors: Tensor) -> Tensor:
    return torch.stack([tensor.transpose(1, 2) for tensor in tensors], 2)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, backend="cpu")


PATHS: dict[str, Callable[..., Tensor]] = {
    "first call": plain,
    "repeated call": plain,
    "operator": plain,
    "compiled": plain,
    "qkv": lambda query, key, value: attention_qkv_packed(tokens_first(query, key, value), backend="cpu"),
    "kv": lambda query, key, value: attention_kv_packed(query, tokens_first(key, value), backend="cpu"),
    "varlen": packed,
    "checkpoint": lambda *inputs: torch.utils.checkpoint.checkpoint(plain, *inputs, use_reentrant=False),
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_hands_it_to_the_backward(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, dout = problem_of("values around 10, dout of ones", torch.bfloat16)
    expected = kernel_gradients(problem, dout, True)
    assert not torch.equal(kernel_gradients(problem, dout, False)[0], expected[0])
    function = PATHS[path]
    if path == "operator":
        monkeypatch.setattr(ops, "_takes_cheap_path", lambda problem: False)
    if path == "compiled":
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2 if path == "repeated call" else 1):
        results = gradients_of(function, problem, dout)
    for name, ours, theirs in zip(NAMES, results, expected, strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("call", ["no gradient wanted", "grad mode off", "float32", "exported"])
def test_calls_that_do_not_need_it_make_none(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = problem_of("", torch.float32 if call == "float32" else torch.bfloat16)
    inputs = [tensor.requires_grad_(call != "no gradient wanted") for tensor in problem.inputs]
    kept = []
    forward: Any = ops.forward
    monkeypatch.setattr(ops, "forward", lambda kernels, problem: kept.append(problem.keeps_out_error) or forward(kernels, problem))
    with torch.set_grad_enabled(call != "grad mode off"):
        if call == "exported":

            class Module(torch.nn.Module):
                def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                    return plain(query, key, value)

            torch.export.export(Module(), tuple(inputs)).module()(*inputs)
        else:
            plain(*inputs)
    assert kept == [False]
