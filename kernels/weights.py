"""The attention weights, from the scores and their log-sum-exp: computed by a kernel, differentiable through plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import routing
from .backends import BACKENDS
from .checks import saveable
from .ops import reaches_kernels
from .problem import NUM_INPUTS, PLACE, TENSORS, Problem
from .reference import dropout, masked_scores, without_autocast


def weights_of(problem: Problem, lse: Tensor, average_heads: bool) -> Tensor:
    """Weights after dropout, from a kernel if one can run, else from the reference. The gradient always comes from the reference."""
    lse = saveable(lse)
    if lse.dtype == torch.float32 and reaches_kernels(problem, lse):
        for backend, kernels in BACKENDS.items():
            if hasattr(kernels, "attention_weights") and not routing.routed_reasons(backend, problem):
                differentiable = (lse, *problem.inputs[:2], problem.attn_mask, problem.alibi_slopes)
                return _Weights.apply(problem, backend, average_heads, *differentiable)
    return reference_weights(problem, lse, average_heads)


def output_and_mean_weights(problem: Problem, backend: str) -> tuple[Tensor, Tensor] | None:
    """out, and the weights after dropout averaged over heads, if the backend has a kernel for both and no gradient is recorded."""
    kernels = BACKENDS[backend]
    if not hasattr(kernels, "forward_with_weights") or not kernels.takes_with_weights(problem) or not reaches_kernels(problem):
        return None
    if torch.is_grad_enabled() and problem.requires_grad():
        return None
    out, _, weights = kernels.forward_with_weights(problem)
    return out, weights


class _Weights(torch.autograd.Function):
    """The kernel's weights, with a backward that differentiates the reference."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, backend: str, average_heads: bool, lse: Tensor, *differentiable: Tensor | None) -> Tensor:
        num_tensors = NUM_INPUTS[problem.layout] + len(TENSORS)
        arguments = problem.op_arguments()
        ctx.layout, ctx.average_heads, ctx.options = problem.layout, average_heads, arguments[num_tensors:]
        ctx.save_for_backward(lse, *arguments[:num_tensors])
        return BACKENDS[backend].attention_weights(problem, lse, average_heads)

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
        higher = torch.is_grad_enabled()
        tensors = list(ctx.saved_tensors)
        num_inputs = NUM_INPUTS[ctx.layout]
        optional = 1 + num_inputs  # lse comes first
        places = (0, 1, 2, optional + PLACE["attn_mask"], optional + PLACE["alibi_slopes"])  # lse, query, key, and these
        with torch.enable_grad():
            for place in places:  # aliases: a tensor may be the same as another, or computed from it
                tensors[place] = None if tensors[place] is None else tensors[place].view_as(tensors[place])
            problem = Problem.from_op_arguments(ctx.layout, (*tensors[1:], *ctx.options))
            weights = reference_weights(problem, tensors[0], ctx.average_heads)
        wanted = [place for place in places if tensors[place] is not None and tensors[place].requires_grad]
        leaves = [tensors[place] for place in wanted]
        gradients = torch.autograd.grad(weights, leaves, dweights, create_graph=higher, materialize_grads=True)
        by_place = dict(zip(wanted, gradients, strict=True))
        return (None, None, None, *(by_place.get(place) for place in places))


def reference_weights(problem: Problem, lse: Tensor, average_heads: bool) -> Tensor:
    """Weights after dropout, from the scores and their lse: (B, Hq, Lq, Lk), or (B, Lq, Lk) accumulated head by head."""
    query, num_heads = problem.query, problem.query.shape[1]
    with without_autocast(query):
        chunks = [(head, head + 1) for head in range(num_heads)] if average_heads else [(0, num_heads)]
        total: Tensor | None = None
        for first, last in chunks:
            chunk_lse = lse[:, first:last, :, None]
            weights = torch.exp(masked_scores(problem, first, last) - chunk_lse.masked_fill(chunk_lse == -torch.inf, 0.0))
            if problem.dropout_p > 0.0:
                weights = weights * dropout(problem, first, last).to(weights.dtype)
            total = weights if total is None else total + weights
        assert total is not None
        return (total.squeeze(1) / num_heads if average_heads else total).to(query.dtype)
