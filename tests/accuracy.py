"""The accuracy rule: our error against that of plain PyTorch in the same dtype, both measured against float64.

For out and gradients t:
    max|t - exact|  <= factor * max|eager - exact| + 2 ulp of t's dtype at max|exact|       (factor 2 for out, 3 for gradients)
    mean|t - exact| <= 1.1 * mean|eager - exact| + the mean of 2 ulp at |exact|
float32 may in both lines use 16 * eps * |exact| instead where that is larger. For lse: |lse - exact| <= 1e-5 + 2e-6 * max(1, |exact|).
Inf and NaN patterns are compared first.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_attention.kernels.problem import Problem
from fused_attention.kernels.reference import attention_reference, dropout, masked_scores, present, repeat_heads

MAX_FACTOR = {"out": 2.0, "gradient": 3.0}
MEAN_FACTOR = 1.1
BUDGET_ULPS = 2
FLOAT32_EPS_FACTOR = 16
LSE_ABSOLUTE, LSE_RELATIVE = 1e-5, 2e-6


def assert_accurate(name: str, kind: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Fails with the tensor's name, the worst coordinate, both values and the budget; kind is "out" or "gradient"."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    _assert_same_non_finite(name, actual, exact)
    finite = exact.isfinite()
    target = exact.masked_fill(~finite, 0.0).double()
    error = (actual.double() - target).masked_fill(~finite, 0.0).abs()
    eager_error = (eager.double() - target).masked_fill(~finite, 0.0).abs()
    budget = _budget(target.abs(), actual.dtype)
    max_allowed = MAX_FACTOR[kind] * eager_error.max().item() + budget.max().item()
    if error.max().item() > max_allowed:
        raise AssertionError(_report(f"{name}: max error", actual, target, error, max_allowed))
    mean_allowed = MEAN_FACTOR * eager_error.mean().item() + budget.mean().item()
    if error.mean().item() > mean_allowed:
        raise AssertionError(_report(f"{name}: mean error {error.mean().item():.3e} is the worse,", actual, target, error, mean_allowed))


def assert_lse_accurate(actual: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape, f"lse: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    _assert_same_non_finite("lse", actual, exact)
    target = exact.masked_fill(~exact.isfinite(), 0.0).double()
    error = (actual.double() - target).masked_fill(~exact.isfinite(), 0.0).abs()
    allowed = LSE_ABSOLUTE + LSE_RELATIVE * target.abs().clamp(min=1.0)
    if (error > allowed).any():
        raise AssertionError(_report("lse: max error", actual, target, error - allowed, 0.0))


def _budget(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    ulp = info.eps * torch.exp2(torch.floor(torch.log2(magnitude.clamp(min=info.smallest_normal))))
    budget = BUDGET_ULPS * ulp
    return torch.maximum(budget, FLOAT32_EPS_FACTOR * info.eps * magnitude) if dtype == torch.float32 else budget


def _assert_same_non_finite(name: str, actual: Tensor, exact: Tensor) -> None:
    fits = exact.abs() <= torch.finfo(actual.dtype).max
    for what, ours, theirs in (
        ("NaN", actual.isnan(), exact.isnan()),
        ("inf", actual.isinf(), exact.isinf() | ~(fits | exact.isnan())),
    ):
        different = ours != theirs
        if different.any():
            index = tuple(different.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {what} pattern differs, first at {index}: {actual[index].item()}, expected {exact[index].item()}"
            )


def _report(title: str, actual: Tensor, exact: Tensor, error: Tensor, allowed: float) -> str:
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return (
        f"{title} {error.max().item():.3e} at {index}: {actual[index].item():.9g}, expected {exact[index].item():.9g}; "
        f"allowed {allowed:.3e} ({actual.dtype}, shape {tuple(actual.shape)})"
    )


def exact_and_eager(problem: Problem, dout: Tensor, dlse: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """out, lse and the gradients of query, key and value: by the reference in float64, and by plain PyTorch in the problem's dtype."""
    exact = _with_gradients(attention_reference, _cast(problem, torch.float64), dout.double(), None if dlse is None else dlse.double())
    eager = _with_gradients(_eager, problem, dout, dlse)
    if not all(tensor.isfinite().all() for name, tensor in eager.items() if name != "lse"):
        widened = _with_gradients(_eager, _cast(problem, torch.float32), dout.float(), dlse)
        eager = {name: tensor.to(problem.query.dtype) for name, tensor in widened.items()}
    return exact, eager


def _cast(problem: Problem, dtype: torch.dtype) -> Problem:
    query, key, value = (tensor.detach().to(dtype) for tensor in (problem.query, problem.key, problem.value))
    return replace(problem, layout="separate", inputs=(query, key, value), query=query, key=key, value=value)


def _with_gradients(function, problem: Problem, dout: Tensor, dlse: Tensor | None) -> dict[str, Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (problem.query, problem.key, problem.value)]
    with torch.enable_grad():
        out, lse = function(replace(problem, layout="separate", inputs=tuple(leaves), query=leaves[0], key=leaves[1], value=leaves[2]))
        outputs, gradients = [out], [dout]
        if dlse is not None:
            seen = lse.isfinite()
            outputs.append(torch.where(seen, lse, 0.0))
            gradients.append(torch.where(seen, dlse, 0.0).to(lse.dtype))
        dquery, dkey, dvalue = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach(), "query": dquery, "key": dkey, "value": dvalue}


def _eager(problem: Problem) -> tuple[Tensor, Tensor]:
    """What a user would write: the score matrix in the inputs' dtype, torch's softmax, and nothing fused."""
    dtype, num_heads = problem.query.dtype, problem.query.shape[1]
    queries_present, keys_present = present(problem)
    query = problem.query.masked_fill(~queries_present[:, None, :, None], 0.0)
    key, value = (
        repeat_heads(tensor.masked_fill(~keys_present[:, None, :, None], 0.0), num_heads) for tensor in (problem.key, problem.value)
    )
    with torch.no_grad():  # everything that is added to the scores, -inf where masked
        zeros = torch.zeros_like(problem.query, dtype=torch.float32)
        bias = masked_scores(replace(problem, query=zeros, key=torch.zeros_like(problem.key, dtype=torch.float32)))
    scores = problem.scale * (query @ key.transpose(-1, -2)) + bias.to(dtype)
    nothing = (bias == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    if problem.dropout_p > 0.0:
        weights = weights * dropout(problem, 0, num_heads).to(dtype)
    lse = torch.logsumexp(scores.float().masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing.squeeze(-1), -torch.inf)
    return weights @ value, lse
