"""The attention weights themselves, from the scores and their log-sum-exp: by a kernel, or differentiable in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import routing
from .ops import KERNEL_BACKENDS, reaches_kernels
from .problem import Problem
from .reference import dropout, masked_scores, without_autocast


def weights_of(problem: Problem, lse: Tensor, average_heads: bool) -> Tensor:
    """Weights after dropout: by the Triton kernel where that one runs and no gradient is asked for, else by the formula."""
    needs_gradient = torch.is_grad_enabled() and (problem.requires_grad() or lse.requires_grad)
    by_kernel = not needs_gradient and lse.dtype == torch.float32 and reaches_kernels(problem, lse)
    if by_kernel and not routing.routed_reasons("triton", problem):
        return KERNEL_BACKENDS["triton"].attention_weights(problem, lse, average_heads)
    return weights_by_formula(problem, lse, average_heads)


def weights_by_formula(problem: Problem, lse: Tensor, average_heads: bool) -> Tensor:
    """Weights after dropout, from the scores and their lse: (B, Hq, Lq, Lk), or (B, Lq, Lk) summed up head by head."""
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
