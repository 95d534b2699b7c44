"""The accuracy rule: our error against that of plain PyTorch in the same dtype, both measured against float64.

For out and gradients t:
    max|t - exact|  <= factor * max|eager - exact| + 2 ulp of t's dtype at max|exact|       (factor 2 for out, 3 for gradients)
    mean|t - exact| <= 1.1 * mean|eager - exact| + the mean of 2 ulp at |exact|, for 16 numbers or more
float32 may in both lines use 16 * eps * |exact| instead where that is larger. For lse: |lse - exact| <= 1e-5 + 2e-6 * max(1, |exact|).
Gradients get the budget of `saved_rounding` on top, for what the fused backward is given: lse in float32, and out with what rounding took.
Inf and NaN patterns are compared first.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fused_attention.kernels.problem import Problem
from fused_attention.kernels.reference import attention_reference, dropout, key_minus_diagonal, masked_scores, present, repeat_heads

MAX_FACTOR = {"out": 2.0, "gradient": 3.0}
MEAN_FACTOR = 1.1
LEAST_FOR_A_MEAN = 16  # numbers; the mean error of fewer, and eager's, is luck
BUDGET_ULPS = 2
FLOAT32_EPS_FACTOR = 16
LSE_ABSOLUTE, LSE_RELATIVE = 1e-5, 2e-6


def assert_accurate(name: str, kind: str, actual: Tensor, eager: Tensor, exact: Tensor, extra: Tensor | float = 0.0) -> None:
    """Fails with the tensor's name, the worst coordinate, both values and the budget.

    kind: "out" or "gradient". extra: for gradients, the budget of `saved_rounding`.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    _assert_same_non_finite(name, actual, exact)
    finite = exact.isfinite()
    target = exact.masked_fill(~finite, 0.0).double()
    error = (actual.double() - target).masked_fill(~finite, 0.0).abs()
    eager_error = (eager.double() - target).masked_fill(~finite, 0.0).abs()
    budget = _budget(target.abs(), actual.dtype) + extra
    max_allowed = MAX_FACTOR[kind] * eager_error.max().item() + budget.max().item()
    if error.max().item() > max_allowed:
        raise AssertionError(_report(f"{name}: max error", actual, target, error, max_allowed))
    mean_allowed = MEAN_FACTOR * eager_error.mean().item() + budget.mean().item()
    if actual.numel() >= LEAST_FOR_A_MEAN and error.mean().item() > mean_allowed:
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
    """out, lse and every gradient, by name: by the reference in float64, and by plain PyTorch in the problem's dtype."""
    exact = _with_gradients(attention_reference, _cast(problem, torch.float64), dout.double(), None if dlse is None else dlse.double())
    eager = _with_gradients(_eager, problem, dout, dlse)
    if not all(tensor.isfinite().all() for name, tensor in eager.items() if name != "lse"):
        eager = _with_gradients(partial(_eager, scores_dtype=torch.float32), problem, dout, dlse)
    return exact, eager


def saved_rounding(
    problem: Problem,
    dout: Tensor,
    exact: dict[str, Tensor],
    dlse: Tensor | None = None,
    keeps_out_error: bool = True,
    rounds_weights: bool = True,
) -> dict[str, Tensor]:
    """How far the gradients may move because the backward starts from a float32 lse and from the stored out.

    P = exp(s - lse) changes by the relative rounding of lse, eps32 * |lse|; and in dS = P * (dP - delta), delta = rowsum(dout * out)
    changes by the rounding of out, eps * rowsum(|dout| * |out|), while eager keeps its weights and sums what it rounded. A backend that
    keeps out_error, in the same 16 bits, rounds twice: eps^2; but its forward may have multiplied V by weights of 16 bits, whose sum it
    knew (rounds_weights), so delta is off by eps * P * (dP - delta) at each key, by chance. Where dP and delta cancel (one key takes all
    the weight) what is off in delta is all that is left of the gradient, with the rounding of the two float32 sums dP and delta themselves.
    The gradients of mask, slopes and sinks are sums of dS that cancel further, down to 0 for a mask that is the same for all keys: what
    is left is the float32 rounding of the terms, for which the budget is that of any float32 result, 16 * eps32. Rows round by chance, so
    over rows the budgets add up as squares.
    """
    num_heads = problem.query.shape[1]
    eps, keeps_out_error = torch.finfo(dout.dtype).eps, keeps_out_error and dout.dtype is not torch.float32
    delta_eps = (eps**2 if keeps_out_error else eps) + 2 * torch.finfo(torch.float32).eps  # of out as stored, of the sums delta and dP
    problem = _cast(problem, torch.float64)
    queries_present, keys_present = (rows[:, None, :, None] for rows in present(problem))
    query = problem.query.masked_fill(~queries_present, 0.0)
    key, value = (repeat_heads(tensor.masked_fill(~keys_present, 0.0), num_heads) for tensor in (problem.key, problem.value))
    finite_lse = exact["lse"].masked_fill(~exact["lse"].isfinite(), 0.0)[..., None]
    weights = torch.exp(masked_scores(problem) - finite_lse)
    dout = dout.double().masked_fill(~queries_present, 0.0)
    delta = (dout * exact["out"]).abs().sum(-1, keepdim=True)
    dweights = dout @ value.transpose(-1, -2)
    if problem.dropout_p > 0.0:
        dweights = dweights * dropout(problem, 0, num_heads)
    delta_rounding = delta_eps * delta
    if keeps_out_error and rounds_weights:
        off = weights * (dweights - (dout * exact["out"]).sum(-1, keepdim=True))
        delta_rounding = delta_rounding + eps * (off**2).sum(-1, keepdim=True).sqrt()
    lse_rounding = torch.finfo(torch.float32).eps * (finite_lse.abs().max().item() if finite_lse.numel() else 0.0)
    slope = problem.scale  # of a score in what it is made of
    if problem.softcap is not None:
        slope = slope * (1.0 - torch.tanh(problem.scale * (query @ key.transpose(-1, -2)) / problem.softcap) ** 2)
    moved = slope * weights * delta_rounding
    groups = (problem.key.shape[1], num_heads // max(problem.key.shape[1], 1))
    rounding = {
        "query": (slope * weights @ key).abs() * delta_rounding + lse_rounding * exact["query"].abs(),
        "key": (moved.transpose(-1, -2) @ query.abs()).unflatten(1, groups).sum(2) + lse_rounding * exact["key"].abs(),
        "value": lse_rounding * exact["value"].abs(),
    }
    term_eps = lse_rounding + FLOAT32_EPS_FACTOR * torch.finfo(torch.float32).eps
    dlse = torch.zeros_like(delta) if dlse is None else dlse.double()[..., None].masked_fill(~queries_present, 0.0).abs()
    row_rounding = delta_rounding + term_eps * (delta + dlse)
    score_rounding = weights * (row_rounding + term_eps * dweights.abs())  # the same for all keys of a row, rows differ by chance
    if "attn_mask" in exact:
        shape = exact["attn_mask"].shape
        by_row = score_rounding if shape[3] == score_rounding.shape[3] else score_rounding.sum(3, keepdim=True)
        rounding["attn_mask"] = (by_row**2).sum_to_size(shape).sqrt()
    if "alibi_slopes" in exact:
        by_row = (score_rounding * key_minus_diagonal(problem).abs()).sum(3)
        rounding["alibi_slopes"] = (by_row**2).sum(2).sum_to_size(exact["alibi_slopes"].shape).sqrt()
    if "sinks" in exact:
        sink_weights = torch.exp(problem.sinks[:, None, None] - finite_lse).masked_fill(~queries_present, 0.0)
        rounding["sinks"] = ((sink_weights * row_rounding) ** 2).sum((0, 2, 3)).sqrt()
    return rounding


FLOAT_TENSORS = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")  # what a problem may have gradients of


def _float_tensors(problem: Problem) -> dict[str, Tensor]:
    tensors = {name: getattr(problem, name) for name in FLOAT_TENSORS}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.is_floating_point()}


def _with_tensors(problem: Problem, tensors: dict[str, Tensor]) -> Problem:
    inputs = (tensors["query"], tensors["key"], tensors["value"])
    return replace(problem, layout="separate", inputs=inputs, **tensors)


def _cast(problem: Problem, dtype: torch.dtype) -> Problem:
    return _with_tensors(problem, {name: tensor.detach().to(dtype) for name, tensor in _float_tensors(problem).items()})


def _with_gradients(function, problem: Problem, dout: Tensor, dlse: Tensor | None) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in _float_tensors(problem).items()}
    with torch.enable_grad():
        out, lse = function(_with_tensors(problem, leaves))
        outputs, gradients = [out], [dout]
        if dlse is not None:
            seen = lse.isfinite()
            outputs.append(torch.where(seen, lse, 0.0))
            gradients.append(torch.where(seen, dlse, 0.0).to(lse.dtype))
        results = torch.autograd.grad(outputs, list(leaves.values()), gradients, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, results, strict=True))}


def _eager(problem: Problem, scores_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """What a user would write: the score matrix in the inputs' dtype (or the given one), torch's softmax, and nothing fused."""
    dtype, num_heads = problem.query.dtype, problem.query.shape[1]
    scores_dtype = scores_dtype or dtype
    queries_present, keys_present = (rows[:, None, :, None] for rows in present(problem))
    query = problem.query.masked_fill(~queries_present, 0.0)
    key, value = (repeat_heads(tensor.masked_fill(~keys_present, 0.0), num_heads) for tensor in (problem.key, problem.value))
    zeros = {name: torch.zeros_like(getattr(problem, name), dtype=torch.float32) for name in ("query", "key")}
    bias = masked_scores(replace(problem, **zeros))  # everything that is added to the scores, -inf where masked
    scores = problem.scale * (query.to(scores_dtype) @ key.to(scores_dtype).transpose(-1, -2))
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores + bias.to(scores_dtype)
    nothing = (bias == -torch.inf).all(-1, keepdim=True)
    if problem.sinks is not None:  # one more key, whose weight nobody uses
        nothing = ~queries_present
        sinks = problem.sinks.to(scores_dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0).to(dtype)[..., : key.shape[2]]
    if problem.dropout_p > 0.0:
        weights = weights * dropout(problem, 0, num_heads).to(dtype)
    lse = torch.logsumexp(scores.float().masked_fill(nothing, 0.0), dim=-1)
    return weights @ value, lse.masked_fill(nothing.squeeze(-1), -torch.inf)
