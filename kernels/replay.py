"""Memory of calls: a call that matches an earlier one goes straight to the Call prepared for it.

There are two memories. `prepared` keeps what depends only on a problem's sizes, strides, dtypes and options, for every problem that shares
them. `repeat` does not even make a problem: the checks of a small call take longer than its kernel, so a call that matches an earlier one
in everything the checks look at runs the Call that `remember` was given. torch.compile's own guard decides what matches: it compares the
tensors' types, dtypes, devices, sizes, strides and dispatch keys, which also reveal functorch, autocast, inference mode, lazily negated
views and tracing. One tensor passed twice never matches two different tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .call import Call
from .problem import NO_OPTIONAL_TENSORS, TENSORS, Problem
from .torch_internals import current_device, forward_mode, num_dispatch_modes, tensor_guard

Prepared = TypeVar("Prepared")

MAX_REMEMBERED = 4096  # different calls, and the same number of kinds of problems
MAX_ALIKE = 4  # calls with the same sizes and options but other strides or dtypes

# Looking a name up through modules takes longer than the call.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled, _is_deterministic = torch.is_grad_enabled, torch.are_deterministic_algorithms_enabled


class _Remembered(NamedTuple):
    guard: Callable[..., bool]  # takes the call's tensors
    device: int  # must be the current device; -1: the CPU
    deterministic: bool | None  # must equal torch's setting; None: there is no gradient
    call: Callable[..., Any]  # a Call whose results the caller may have


_NO_OTHERS = (None,) * (len(TENSORS) - 3)  # all but attn_mask, key_mask and key_lengths
_calls: dict[tuple, list[_Remembered]] = {}
_prepared: dict[tuple, Any] = {}


# query, key, value, key_mask, key_lengths, is_causal, scale, backend, caller and return_lse of a call whose other arguments are defaults.
# caller: "attention"; "attention_decode", whose calls have no gradient; or, for torch's signature, the memory layout of the result.
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool | str, float | None, str | None, str, bool]


def may_repeat() -> bool:
    """Whether nothing that a guard cannot see must see the call."""
    return not (_is_dynamo_compiling() or num_dispatch_modes() > 0 or forward_mode._current_level >= 0)


def repeat(arguments: Arguments) -> Tensor | tuple[Tensor, Tensor] | None:
    """Runs a call that matches an earlier one, without its checks; returns None if none matches."""
    query, key, value, key_mask, key_lengths, is_causal, scale, backend, caller, return_lse = arguments
    if not may_repeat():
        return None
    if type(query) is not Tensor or type(key) is not Tensor or not _are_comparable(is_causal, scale, backend):
        return None
    try:
        alike = _calls.get((query.shape, key.shape, is_causal, scale, backend, key_mask is None, key_lengths is None, caller))
    except RuntimeError:  # a nested tensor of strided layout has no shape
        return None
    if alike is None:
        return None
    for guard, device, deterministic, call in alike:
        if key_mask is None:
            passes = guard(query, key, value) if key_lengths is None else guard(query, key, value, key_lengths)
        else:
            passes = guard(query, key, value, key_mask) if key_lengths is None else guard(query, key, value, key_mask, key_lengths)
        if passes and (deterministic is None or deterministic is _is_deterministic()):
            if device >= 0 and device != current_device():
                return None
            if key_mask is None and key_lengths is None:
                return call(query, key, value, NO_OPTIONAL_TENSORS, return_lse)
            return call(query, key, value, (None, key_mask, key_lengths, *_NO_OTHERS), return_lse)
    return None


def remember(arguments: Arguments, problem: Problem, make_call: Callable[[], Call]) -> None:
    """Remembers the Call for arguments like these, unless a tensor was cast or copied to make the problem.

    make_call: returns the Call, differentiable if a gradient is needed.
    """
    query, key, value, key_mask, key_lengths, is_causal, scale, backend, caller, _ = arguments
    needs_grad = query.requires_grad and _is_grad_enabled()
    guard = _guard_of((query, key, value, key_mask, key_lengths), problem) if _are_comparable(is_causal, scale, backend) else None
    if guard is None or (not needs_grad and any([tensor.requires_grad for tensor in (query, key, value)])):
        return
    kind = query.shape, key.shape, is_causal, scale, backend, key_mask is None, key_lengths is None, caller
    if len(_calls) >= MAX_REMEMBERED:
        _calls.clear()
    alike = _calls.setdefault(kind, [])
    del alike[MAX_ALIKE - 1 :]
    alike.insert(0, _Remembered(guard, query.get_device(), _is_deterministic() if needs_grad else None, make_call()))


def _guard_of(given: tuple[Tensor | None, ...], problem: Problem) -> Callable[..., bool] | None:
    """A guard that accepts calls whose tensors match these; None if the problem has other tensors, or if one is given twice."""
    if tensor_guard is None:
        return None
    own = problem.query, problem.key, problem.value, problem.key_mask, problem.key_lengths
    tensors = [tensor for tensor in given if tensor is not None]
    if not all(map(operator.is_, given, own)) or any([type(tensor) is not Tensor for tensor in tensors]):
        return None
    if len(set(map(id, tensors))) < len(tensors):
        return None
    return tensor_guard(*tensors)


def _are_comparable(is_causal: bool | str, scale: float | None, backend: str | None) -> bool:
    """Whether equal options mean the same thing: 1 == True, but 1 is refused and must not match a remembered True."""
    if not (is_causal is False or is_causal is True or type(is_causal) is str):
        return False
    return (scale is None or type(scale) is float) and (backend is None or type(backend) is str)


def prepared(prepare: Callable[[Problem], Prepared], problem: Problem) -> Prepared:
    """prepare(problem), called once for all problems that differ only in their tensors' memory."""
    kind = prepare, problem.kind()
    found = _prepared.get(kind)
    if found is None:
        found = prepare(problem)
        if len(_prepared) >= MAX_REMEMBERED:
            _prepared.clear()
        _prepared[kind] = found
    return found


def forget() -> None:
    """Empties both memories. Call it when the tile table, the kind of GPU or the choice of kernels changes."""
    _calls.clear()
    _prepared.clear()
