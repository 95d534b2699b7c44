"""Eager calls with gradients that are like one before, as kernels/repeated.py has those without: the kernel in the thinnest autograd node.

The node keeps what the call was given, and its backward pass goes the way of every other (ops.eager_gradients).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops import KERNEL_BACKENDS, eager_gradients
from .problem import NUM_SIDE_TENSORS, OutMemory, Problem
from .repeated import Repeat, are_comparable, guard_of, new_memory, store
from .torch_internals import current_device, forward_mode, num_dispatch_modes

# Looking names up through modules takes longer than the calls.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled, _is_deterministic = torch.is_grad_enabled, torch.are_deterministic_algorithms_enabled


class _Call(NamedTuple):
    guard: Callable[..., bool]  # takes the call's tensors
    device: int  # must be the current one; -1: the CPU
    repeat: Repeat
    options: tuple  # of the operator, and the backend


_calls: dict[tuple, list[_Call]] = new_memory()


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool | str,
    scale: float | None,
    backend: str | None,
    out_memory: OutMemory,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The results of a call whose query requires a gradient; None of a call that no remembered one is like."""
    if _is_dynamo_compiling() or num_dispatch_modes() > 0 or forward_mode._current_level >= 0:
        return None
    if type(key) is not Tensor or not are_comparable(is_causal, scale, backend):
        return None
    try:
        kind = (
            query.shape, key.shape, is_causal, scale, backend, key_mask is None, key_lengths is None, out_memory, _is_deterministic(),
        )  # fmt: skip
    except RuntimeError:  # a nested tensor of the strided layout has no shape
        return None
    alike = _calls.get(kind)
    if alike is None:
        return None
    if key_mask is None and key_lengths is None:
        tensors: tuple[Tensor, ...] = (query, key, value)
    else:
        tensors = tuple([tensor for tensor in (query, key, value, key_mask, key_lengths) if tensor is not None])
    for call in alike:
        if call.guard(*tensors):
            if call.device >= 0 and call.device != current_device():
                return None
            return _apply((call, key_mask, key_lengths, return_lse), query, key, value)  # every argument costs time
    return None


def remember(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool | str,
    scale: float | None,
    backend: str | None,
    chosen: str,
) -> None:
    """Keeps what runs calls like this one again, if its backend left that and none of its tensors was cast or copied."""
    if not _is_grad_enabled() or not query.requires_grad or not are_comparable(is_causal, scale, backend):
        return
    guard = guard_of(problem, (query, key, value, key_mask, key_lengths))
    if guard is None:
        return
    kind = (
        query.shape, key.shape, is_causal, scale, backend, key_mask is None, key_lengths is None, problem.out_memory, _is_deterministic(),
    )  # fmt: skip
    options = (*problem.options(), chosen)
    store(_calls, kind, _Call(guard, query.get_device(), problem.repeat, options))  # type: ignore[arg-type]  # it is there


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: tuple[_Call, Tensor | None, Tensor | None, bool], query: Tensor, key: Tensor, value: Tensor) -> Any:
        call, key_mask, key_lengths, return_lse = given
        done = call.repeat(query, key, value, key_mask, key_lengths, True)
        if done is None:  # the backend wants to look at it again
            arguments = _operator_arguments(call, query, key, value, key_mask, key_lengths)
            done = KERNEL_BACKENDS[call.options[-1]].forward(Problem.from_op_arguments("separate", arguments[:-1]))
        out, lse = done
        ctx.call = call
        if key_mask is None and key_lengths is None:
            ctx.save_for_backward(out, lse, query, key, value)
        else:
            ctx.save_for_backward(out, lse, query, key, value, key_mask, key_lengths)
        if not return_lse:
            return out
        ctx.set_materialize_grads(False)  # of two results one may have no gradient
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        arguments = _operator_arguments(ctx.call, *tensors)
        return (None, *eager_gradients("separate", dout, dlse, out, lse, arguments, (False, False, False))[:3])


# torch.autograd.Function.apply without what it does for functorch, whose tensors the guard keeps out.
_apply = super(torch.autograd.Function, _Repeated).apply


def _operator_arguments(
    call: _Call, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, key_lengths: Tensor | None = None
) -> tuple:
    others = [None] * (NUM_SIDE_TENSORS - 3)  # attn_mask comes before key_mask and key_lengths, everything else after
    return (query, key, value, None, key_mask, key_lengths, *others, *call.options)
