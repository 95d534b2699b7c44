"""Eager calls without gradients that are like one before: what its checks depend on is the same, so that only the launch is left.

The checks of a small call take longer than its kernel. A backend that has run a call may leave a function in `Problem.repeat` that runs
it again on other tensors; `remember` keeps it beside a guard, and `find` gives it to a call that the guard lets pass. The guard is
torch.compile's own: it compares the tensors' types, dtypes, devices, sizes, strides and dispatch keys, and through these whether
functorch, autocast, inference mode, a lazily negated view or tracing has a say. It lets no tensor pass for two of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from .torch_internals import allocators, current_device, forward_mode, num_dispatch_modes, tensor_guard

if TYPE_CHECKING:
    from .problem import OutMemory, Problem

# (query, key, value, key_mask, key_lengths, return_lse) -> out and lse, or None: this call must be checked first
Repeat = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool], tuple[Tensor, Tensor | None] | None]

Entry = TypeVar("Entry")

# Looking names up through three modules takes longer than the calls.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

MAX_REMEMBERED = 4096  # different calls
MAX_ALIKE = 4  # of the same sizes and options, with other strides or dtypes


class _Remembered(NamedTuple):
    guard: Callable[..., bool]  # takes the call's tensors
    device: int  # must be the current one; -1: the CPU
    repeat: Repeat


_memories: list[dict[tuple, list]] = []  # all that `forget` clears


def new_memory() -> dict[tuple, list]:
    """For `store`: calls by all that they have in common but the strides and dtypes of their tensors."""
    _memories.append({})
    return _memories[-1]


_calls: dict[tuple, list[_Remembered]] = new_memory()


def find(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool | str,
    scale: float | None,
    backend: str | None,
    out_memory: OutMemory,
) -> Repeat | None:
    """What runs a call without its checks; None of a call that no remembered one is like."""
    if _is_dynamo_compiling() or num_dispatch_modes() > 0 or forward_mode._current_level >= 0:
        return None
    if type(query) is not Tensor or type(key) is not Tensor or not are_comparable(is_causal, scale, backend):
        return None
    try:
        alike = _calls.get((query.shape, key.shape, is_causal, scale, backend, key_mask is None, key_lengths is None, out_memory))
    except RuntimeError:  # a nested tensor of the strided layout has no shape
        return None
    if alike is None:
        return None
    for guard, device, repeat in alike:
        if key_mask is None:
            passes = guard(query, key, value) if key_lengths is None else guard(query, key, value, key_lengths)
        else:
            passes = guard(query, key, value, key_mask) if key_lengths is None else guard(query, key, value, key_mask, key_lengths)
        if passes:
            return repeat if device < 0 or device == current_device() else None
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
) -> None:
    """Keeps what runs calls like this one again, if its backend left that, no gradient may be asked of it and none of its tensors was
    cast or copied.
    """
    given = query, key, value, key_mask, key_lengths
    guard = guard_of(problem, given) if are_comparable(is_causal, scale, backend) else None
    if guard is None or any([tensor is not None and tensor.requires_grad for tensor in given]):
        return
    kind = query.shape, key.shape, is_causal, scale, backend, key_mask is None, key_lengths is None, problem.out_memory
    store(_calls, kind, _Remembered(guard, query.get_device(), problem.repeat))  # type: ignore[arg-type]  # it is there


def guard_of(problem: Problem, given: tuple[Tensor | None, ...]) -> Callable[..., bool] | None:
    """Lets calls pass whose tensors are like these; None where the backend left no repetition, or a tensor was cast or copied.

    given: query, key, value, key_mask and key_lengths of the call that the problem was made for.
    """
    if problem.repeat is None or tensor_guard is None:
        return None
    own = problem.query, problem.key, problem.value, problem.key_mask, problem.key_lengths
    tensors = [tensor for tensor in given if tensor is not None]
    if not all(map(operator.is_, given, own)) or any([type(tensor) is not Tensor for tensor in tensors]):
        return None
    if len(set(map(id, tensors))) < len(tensors):
        return None
    return tensor_guard(*tensors)


def store(calls: dict[tuple, list[Entry]], kind: tuple, entry: Entry) -> None:
    """Puts an entry before those of the same kind, the oldest of which are forgotten."""
    if len(calls) >= MAX_REMEMBERED:
        calls.clear()
    alike = calls.setdefault(kind, [])
    del alike[MAX_ALIKE - 1 :]
    alike.insert(0, entry)


def forget() -> None:
    """To be called when what calls follow from has changed."""
    for memory in _memories:
        memory.clear()


def are_comparable(is_causal: bool | str, scale: float | None, backend: str | None) -> bool:
    """Whether equal options mean the same: True is no 1, and what is refused must not pass for what is equal to it."""
    if not (is_causal is False or is_causal is True or type(is_causal) is str):
        return False
    return (scale is None or type(scale) is float) and (backend is None or type(backend) is str)


def empty_strided(like: Tensor) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """torch.empty_strided(shape, strides, dtype) where `like` is, in half the time if torch has what torch.compile's code calls; of a GPU
    only while it is the current one.
    """
    fast = allocators.get(like.device.type)
    if fast is not None:
        return fast
    there = like.new_empty(0)
    return lambda shape, strides, dtype: there.new_empty_strided(shape, strides, dtype=dtype)
