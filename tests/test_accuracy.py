"""The accuracy rule must notice real faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate, assert_lse_accurate, exact_and_eager, saved_rounding

from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.problem import Problem
from fused_attention.kernels.reference import attention_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def example(dtype: torch.dtype) -> Problem:
    inputs = tuple(torch.randn(2, 3, 40, 32).to(dtype) for _ in range(3))
    return make_problem("separate", inputs, is_causal=True, attn_mask=torch.randn(3, 40, 40)[None])


def faulty(problem: Problem, fault: str) -> Problem:
    if fault == "scale 1 % off":
        return replace(problem, scale=problem.scale * 1.01)
    if fault == "mask shifted by one key":
        return replace(problem, attn_mask=torch.tril(torch.ones(40, 40, dtype=torch.bool), 1)[None, None], window_right=None)
    key = problem.key.clone()
    key[:, :, 7] *= 1.1
    return replace(problem, key=key, inputs=(problem.query, key, problem.value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", ["scale 1 % off", "mask shifted by one key", "one key 10 % off"])
def test_a_seeded_fault_is_noticed(fault: str, dtype: torch.dtype) -> None:
    problem = example(dtype)
    exact, eager = exact_and_eager(problem, torch.randn(2, 3, 40, 32).to(dtype), None)
    out, lse = attention_reference(faulty(problem, fault))
    with pytest.raises(AssertionError, match="max error"):
        assert_lse_accurate(lse, exact["lse"])
    if not (dtype == torch.bfloat16 and fault.startswith("scale")):  # bfloat16 scores round by as much: only lse shows it
        with pytest.raises(AssertionError, match="error"):
            assert_accurate("out", "out", out, eager["out"], exact["out"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dropped_bias_gradient_is_noticed(dtype: torch.dtype) -> None:
    """The gradient that reaches the bias is the score gradient; a kernel that leaves it out returns zeros."""
    problem = example(torch.float32)
    mask = problem.attn_mask.clone().requires_grad_()
    attention_reference(replace(problem, attn_mask=mask))[0].sum().backward()
    exact = mask.grad.double()
    with pytest.raises(AssertionError, match="max error"):
        assert_accurate("attn_mask", "gradient", torch.zeros_like(mask.grad).to(dtype), mask.grad.to(dtype), exact)


def test_a_wrong_lse_is_noticed() -> None:
    exact = torch.tensor([0.0, 5.0, -torch.inf], dtype=torch.float64)
    assert_lse_accurate(exact.float(), exact)
    with pytest.raises(AssertionError, match="lse: max error"):
        assert_lse_accurate(exact.float() + 3e-5, exact)
    with pytest.raises(AssertionError, match="lse: inf pattern"):
        assert_lse_accurate(torch.tensor([0.0, 5.0, 0.0]), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_passes(dtype: torch.dtype) -> None:
    problem = example(dtype)
    exact, eager = exact_and_eager(problem, torch.randn(2, 3, 40, 32).to(dtype), None)
    out, lse = attention_reference(problem)
    assert_accurate("out", "out", out, eager["out"], exact["out"])
    assert_lse_accurate(lse, exact["lse"])


FAULTS = {None: None, "sinks 5 higher": "sinks", "slopes 5 % off": "alibi_slopes", "mask gradient of one key dropped": "attn_mask"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_gradients_of_mask_slopes_and_sinks(fault: str | None, dtype: torch.dtype) -> None:
    """The reference in the problem's own dtype passes; with a fault the gradient of what is at fault fails."""
    inputs = tuple(torch.randn(2, heads, 40, 32).to(dtype) for heads in (4, 2, 2))
    problem = make_problem(
        "separate", inputs, softcap=2.0, attn_mask=torch.randn(1, 4, 1, 40), alibi_slopes=torch.rand(4), sinks=torch.randn(4),
        query_lengths=torch.tensor([40, 25]),
    )  # fmt: skip
    dout, dlse = torch.randn(2, 4, 40, 32).to(dtype), torch.randn(2, 4, 40)
    exact, eager = exact_and_eager(problem, dout, dlse)
    rounding = saved_rounding(problem, dout, exact, dlse)
    leaves = {name: getattr(problem, name).clone().requires_grad_() for name in rounding}
    ours = replace(problem, **leaves)
    if fault == "sinks 5 higher":
        ours.sinks = leaves["sinks"] + 5.0
    if fault == "slopes 5 % off":
        ours.alibi_slopes = leaves["alibi_slopes"] * 1.05
    out, lse = attention_reference(ours)
    results = torch.autograd.grad((out, lse.masked_fill(lse == -torch.inf, 0.0)), list(leaves.values()), (dout, dlse))
    gradients = dict(zip(leaves, results, strict=True))
    if fault == "mask gradient of one key dropped":
        gradients["attn_mask"][0, 1, :, 7] = 0.0
    for name, gradient in gradients.items():
        if name == FAULTS[fault]:
            with pytest.raises(AssertionError, match="error"):
                assert_accurate(name, "gradient", gradient, eager[name], exact[name], rounding[name])
        elif fault is None:
            assert_accurate(name, "gradient", gradient, eager[name], exact[name], rounding[name])
