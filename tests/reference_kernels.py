"""A backend that takes every problem and computes it by the reference: for tests of everything around the kernels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from fused_attention.kernels.call import Call
from fused_attention.kernels.problem import Gradients, OptionalTensors, Problem, split
from fused_attention.kernels.reference import attention_reference
from fused_attention.kernels.weights import reference_weights

NAMES = ("attn_mask", "alibi_slopes", "sinks")
KEEPS_OUT_ERROR = ()  # the backward computes out again


def status() -> None:
    return None


def interpreted() -> bool:
    return False


def prepares(problem: Problem) -> bool:
    return False


def unsupported_reasons(problem: Problem) -> list[str]:
    return []


def prepare(problem: Problem) -> Call:
    options = problem.options()

    def call(query: Tensor, key: Tensor, value: Tensor, optional: OptionalTensors, needs_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = forward(Problem.from_op_arguments("separate", (query, key, value, *optional, *options)))
        return (out, lse) if needs_lse else out

    return call


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return attention_reference(problem)


def attention_weights(problem: Problem, lse: Tensor, average_heads: bool) -> Tensor:
    with torch.no_grad():
        return reference_weights(problem, lse, average_heads)


def backward(
    problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, gradients: Gradients, out_error: None = None
) -> None:
    expected = forward(problem)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    if problem.mask_bits is not None:
        assert problem.mask_bits_transposed is not None
        assert problem.column_tiles is not None
    with ThreadPoolExecutor(1) as pool:  # inside an operator this thread records no gradients
        pool.submit(_backward, problem, dout, dlse, gradients).result()


def _backward(problem: Problem, dout: Tensor, dlse: Tensor | None, gradients: Gradients) -> None:
    inputs = tuple(tensor.detach().requires_grad_() for tensor in problem.inputs)
    wanted = [name for name in NAMES if getattr(gradients, name) is not None]
    optional_tensors = {name: getattr(problem, name).detach().requires_grad_() for name in wanted}
    query, key, value = split(problem.layout, inputs)
    out, lse = attention_reference(replace(problem, inputs=inputs, query=query, key=key, value=value, **optional_tensors))
    given = [(out, dout)] if dlse is None else [(out, dout), (lse, dlse)]
    leaves = (query, key, value, *optional_tensors.values())
    results = torch.autograd.grad([output for output, _ in given], leaves, [gradient for _, gradient in given], materialize_grads=True)
    for name, result in zip(("query", "key", "value", *wanted), results, strict=True):
        getattr(gradients, name).copy_(result)
