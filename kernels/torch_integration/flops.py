"""FLOP counts of the operators for torch.utils.flop_counter.FlopCounterMode, the same as for torch's own attention of the same sizes.

Two per multiplication of a matrix product. As in torch, masks, windows and lengths are not deducted. Each packed sequence counts with its
own length if the starts can be read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problem import Layout, Problem


def forward_flops(layout: Layout, arguments: tuple) -> int:
    """Q K^T and P V. arguments: the operator's."""
    problem, scores = _problem_and_scores(layout, arguments)
    return 2 * scores * (problem.query.shape[3] + problem.value.shape[3])


def backward_flops(layout: Layout, arguments: tuple) -> int:
    """Q K^T again; dP and dV, with the head dim of the value; dQ and dK, with that of the query. arguments: the forward operator's."""
    problem, scores = _problem_and_scores(layout, arguments)
    return 2 * scores * (3 * problem.query.shape[3] + 2 * problem.value.shape[3])


def _problem_and_scores(layout: Layout, arguments: tuple) -> tuple[Problem, Any]:
    """The problem, and its number of scores over all heads."""
    problem = Problem.from_op_arguments(layout, arguments[:-1])
    num_heads = problem.query.shape[1]
    if problem.cu_seqlens_q is None or problem.cu_seqlens_k is None:
        return problem, problem.batch * num_heads * problem.max_seqlen_q * problem.max_seqlen_k
    if _has_values(problem.cu_seqlens_q) and _has_values(problem.cu_seqlens_k):
        return problem, num_heads * int((problem.cu_seqlens_q.diff().long() * problem.cu_seqlens_k.diff().long()).sum())
    return problem, problem.batch * num_heads * problem.max_seqlen_q * problem.max_seqlen_k


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type != "meta" and not torch.compiler.is_compiling()
