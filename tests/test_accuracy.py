"""The accuracy rule must notice real faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate, assert_lse_accurate, exact_and_eager

from fused_attention.kernels.problem import Problem, make_problem
from fused_attention.kernels.reference import attention_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def example(dtype: torch.dtype) -> Problem:
    inputs = tuple(torch.randn(2, 3, 40, 32).to(dtype) for _ in range(3))
    return make_problem("separate", inputs, is_causal=True, attn_mask=torch.randn(3, 40, 40)[None])


def faulty(problem: Problem, fault: str) -> Problem:
    if fault == "scale 1 % off":
        return replace(problem, scale=problem.scale * 1.01)
    if fault == "mask shifted by one key":
        return replace(problem, attn_mask=torch.tril(torch.ones(40, 40, dtype=torch.bool), 1)[None, None], causal="none")
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
