"""Runs a Problem on a backend: autograd, the registered operators with their fakes, and the cheap eager path.

Eager calls on plain tensors skip torch's dispatcher (see `_takes_cheap_path`); everything that must see an operator (torch.compile, export,
dispatch modes, tensor subclasses) gets `torch.ops.fused_attention.attention_<layout>`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import replay
from .backends import BACKENDS
from .call import Call
from .problem import (
    DIFFERENTIABLE,
    INPUTS,
    NO_OPTIONAL_TENSORS,
    NUM_INPUTS,
    OPTIONS,
    SAVED,
    TENSORS,
    Gradients,
    Layout,
    OptionalTensors,
    Problem,
    Results,
    empty_output,
    has_contiguous_last_dim,
    split,
)
from .reference import attention_reference
from .torch_integration import sharding
from .torch_integration.flops import backward_flops, forward_flops
from .torch_integration.when_imported import when_imported
from .torch_internals import constant_of_graph, forward_mode, functorch_interpreter, has_storage, is_zero_tensor, num_dispatch_modes

_INPUT_SCHEMAS: dict[Layout, str] = {layout: ", ".join([f"Tensor {name}" for name in inputs]) for layout, inputs in INPUTS.items()}
_PROBLEM_SCHEMA = ", ".join(
    [*[f"Tensor? {name}" for name in TENSORS], *[f"{option.schema} {name}" for name, option in OPTIONS.items()], "str backend"]
)
_SAVED_SCHEMA = ", ".join([f"{schema} {name}" for name, schema in SAVED.items()])
_NEEDS_GRAD_SCHEMA = ", ".join([f"bool {name}_needs_grad" for name in DIFFERENTIABLE])


def run(problem: Problem, backend: str, arguments: replay.Arguments | None = None) -> tuple[Tensor, Tensor]:
    """Returns out (B, Hq, Lq, Dv) and lse (B, Hq, Lq); differentiable in the problem's tensors, any number of times.

    arguments: what replay.repeat recognizes calls like this one by; None if replay does not cover the call.
    """
    if backend == "reference":
        return _reference(problem)
    needs_grad = torch.is_grad_enabled() and problem.requires_grad()
    # Parameters require a gradient in an exported program too, which mostly runs without.
    problem.keeps_out_error = needs_grad and problem.query.dtype in BACKENDS[backend].KEEPS_OUT_ERROR and not torch.compiler.is_exporting()
    if _takes_cheap_path(problem):
        if needs_grad:
            results = _Attention.apply((problem, backend), *problem.differentiable())
        else:
            results = forward(BACKENDS[backend], problem)
        if arguments is not None:
            replay.remember(arguments, problem, lambda: _call_again(problem, backend, needs_grad))
        return results
    if _transformed(problem) or torch.onnx.is_in_onnx_export():  # ONNX has the reference's operators, not ours
        return _reference(problem)
    if problem.rng_state is not None and sharding.is_sharded(problem.inputs[0]) and not sharding.is_sharded(problem.rng_state):
        problem = replace(problem, rng_state=sharding.on_all_processes(problem.rng_state, problem.inputs[0]))
    out, lse, _ = _REGISTERED[problem.layout](*problem.op_arguments(), backend)
    return out, lse


def forward(kernels: Any, problem: Problem) -> Any:
    """Returns out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) of a problem whose tensors have memory, then out_error if it keeps_out_error.

    kernels: a backend.
    """
    query = problem.query
    if query.is_cuda and query.get_device() != torch.cuda.current_device():
        with torch.cuda.device(query.device):
            return forward(kernels, problem)
    call = replay.prepared(kernels.prepare, problem)
    results = call(query, problem.key, problem.value, problem.optional_tensors(), True)
    # Eager routing would have chosen another backend, but a compiled graph learns addresses too late.
    return forward(kernels, problem.with_copied_inputs()) if results is None else results


def _reference(problem: Problem) -> tuple[Tensor, Tensor]:
    if not sharding.is_sharded(problem.inputs[0]):
        return attention_reference(problem)
    with sharding.plain_tensors_are_the_same_everywhere():
        return attention_reference(problem)


def reaches_kernels(problem: Problem, *others: Tensor) -> bool:
    """Whether the problem's tensors and the others can go straight to a kernel from Python, with no operator in between."""
    return _takes_cheap_path(problem) and all(map(_is_plain, others))


def reach_kernels(*tensors: Tensor) -> bool:
    """The same of any tensors."""
    return not _is_watched() and all([_is_plain(tensor) for tensor in tensors])


def _transformed(problem: Problem) -> bool:
    """Whether functorch or forward-mode differentiation is active, or a tensor is one of their zero tensors without memory; if so, the
    reference runs."""
    if _differentiates_otherwise():
        return True
    return not torch.compiler.is_compiling() and any([is_zero_tensor(tensor) for tensor in problem.inputs])


@constant_of_graph  # constant within the levels it traces; torch.compile guards on functorch and forward-mode levels
def _differentiates_otherwise() -> bool:
    return functorch_interpreter() is not None or forward_mode._current_level >= 0


def _takes_cheap_path(problem: Problem) -> bool:
    if _is_watched():
        return False
    return all([tensor is None or _is_plain(tensor) for tensor in (*problem.inputs, *problem.optional_tensors())])


def _is_watched() -> bool:
    """Whether anything besides plain eager mode must see the operators that run."""
    return torch.compiler.is_compiling() or num_dispatch_modes() > 0 or _differentiates_otherwise()


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's memory holds its values: no subclass, no lazily negated view, no zero tensor without memory."""
    return (type(tensor) is Tensor or type(tensor) is Parameter) and not tensor.is_neg() and not is_zero_tensor(tensor)


class _Attention(torch.autograd.Function):
    """The kernel and its gradient, called directly from Python."""

    @staticmethod
    def forward(ctx: Any, given: tuple[Problem, str], *differentiable: Tensor | None) -> tuple[Tensor, Tensor]:
        """differentiable: problem.differentiable()."""
        problem, backend = given
        results = forward(BACKENDS[backend], problem)
        ctx.kind = problem.layout, (*problem.options(), backend)
        ctx.save_for_backward(*_with_out_error(results), *problem.inputs, *problem.optional_tensors())
        ctx.set_materialize_grads(False)  # one of the two results may have no gradient
        return results[:2]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        layout, options = ctx.kind
        num_inputs = NUM_INPUTS[layout]
        out, lse, out_error, *tensors = ctx.saved_tensors
        optional = NO_OPTIONAL_TENSORS if len(tensors) == num_inputs else ()
        needs_grad = ctx.needs_input_grad[1 + num_inputs :] or (False,) * len(DIFFERENTIABLE)
        gradients = _eager_gradients(layout, dout, dlse, (out, lse, out_error), (*tensors, *optional, *options), needs_grad)
        return (None, *gradients[: len(ctx.needs_input_grad) - 1])


class _Replayed(_Attention):
    """A call that replay knows: no optional tensor has a gradient, and lse need not be returned."""

    @staticmethod
    def forward(  # type: ignore[override]  # every argument costs time, so four come as one
        ctx: Any, given: tuple[Call, tuple, OptionalTensors, bool], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        call, kind, optional, return_lse = given
        results: Any = call(query, key, value, optional, True)
        if results is None:
            layout, options = kind
            problem = Problem.from_op_arguments(layout, (query, key, value, *optional, *options[:-1]))
            results = forward(BACKENDS[options[-1]], problem)
        ctx.kind = kind
        if optional is NO_OPTIONAL_TENSORS:
            ctx.save_for_backward(*_with_out_error(results), query, key, value)
        else:
            ctx.save_for_backward(*_with_out_error(results), query, key, value, *optional)
        if not return_lse:
            return results[0]
        ctx.set_materialize_grads(False)
        return results[:2]


def _with_out_error(results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return results if len(results) == 3 else (*results, None)


# torch.autograd.Function.apply without its functorch handling; replay's guard rejects functorch tensors.
_apply_replayed = super(torch.autograd.Function, _Replayed).apply


def _call_again(problem: Problem, backend: str, needs_grad: bool) -> Call:
    """The Call for a problem that just ran, with separate inputs and no other differentiable tensor."""
    call = replay.prepared(BACKENDS[backend].prepare, problem)
    kind = problem.layout, (*problem.options(), backend)

    def differentiable(query: Tensor, key: Tensor, value: Tensor, optional: OptionalTensors, needs_lse: bool) -> Any:
        return _apply_replayed((call, kind, optional, needs_lse), query, key, value)

    return differentiable if needs_grad else call


def _eager_gradients(
    layout: Layout, dout: Tensor | None, dlse: Tensor | None, results: Results, arguments: tuple, needs_grad: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """`_gradients` in the backward pass of an eager call."""
    # torch.autograd.grad(is_grads_batched=True) passes tensors without memory, which only the operator can unpack.
    readable = all(gradient is None or has_storage(gradient) for gradient in (dout, dlse))
    kernel_gradients = _kernel_gradients if readable else _registered_gradients
    return _gradients(layout, dout, dlse, results, arguments, needs_grad, kernel_gradients)


def _gradients(
    layout: Layout,
    dout: Tensor | None,
    dlse: Tensor | None,
    results: Results,
    arguments: tuple,
    needs_grad: tuple[bool, ...],
    kernel_gradients: Any,
) -> tuple[Tensor | None, ...]:
    """The gradients of a layout's inputs, then those of DIFFERENTIABLE, None where not needed.

    Computed by the kernel, or by the reference if they will be differentiated again, are batched or have tangents.
    arguments: the operator's.
    """
    if dout is None and dlse is None:
        return (None,) * (NUM_INPUTS[layout] + len(needs_grad))
    if torch.is_grad_enabled() or _differentiates_otherwise():
        return _recomputed_gradients(layout, dout, dlse, arguments)
    dout = torch.zeros_like(results[0]) if dout is None else _in_memory(dout)
    return kernel_gradients(layout, dout, None if dlse is None else _in_memory(dlse), results, arguments, needs_grad)


def _in_memory(gradient: Tensor) -> Tensor:
    return gradient if torch.compiler.is_compiling() or _is_plain(gradient) else gradient.resolve_neg().clone()


def _recomputed_gradients(layout: Layout, dout: Tensor | None, dlse: Tensor | None, arguments: tuple) -> tuple[Tensor | None, ...]:
    higher = torch.is_grad_enabled()
    num_inputs = NUM_INPUTS[layout]
    tensors = list(arguments[:-1])
    with torch.enable_grad():
        # Aliases, because the inputs may be the same tensor, or computed from each other: each must get only its own gradient.
        places = (*range(num_inputs), *(num_inputs + place for place in DIFFERENTIABLE.values()))
        for place in places:
            tensors[place] = None if tensors[place] is None else tensors[place].view_as(tensors[place])
        out, lse = _reference(Problem.from_op_arguments(layout, tuple(tensors)))
    outputs = [(value, gradient) for value, gradient in ((out, dout), (lse, dlse)) if gradient is not None]
    leaves = [place for place in places if tensors[place] is not None and tensors[place].requires_grad]
    gradients = torch.autograd.grad(
        [value for value, _ in outputs],
        [tensors[place] for place in leaves],
        [gradient for _, gradient in outputs],
        create_graph=higher,
        materialize_grads=True,
    )
    by_place = dict(zip(leaves, gradients, strict=True))
    return tuple(by_place.get(place) for place in places)


def _kernel_gradients(
    layout: Layout, dout: Tensor, dlse: Tensor | None, results: Results, arguments: tuple, needs_grad: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    out, lse, out_error = results
    problem = Problem.from_op_arguments(layout, arguments[:-1])
    gradients = _empty_gradients(problem, needs_grad)
    inputs, optional_tensors = gradients[: len(problem.inputs)], gradients[len(problem.inputs) :]
    buffers = Gradients(*split(layout, inputs), **dict(zip(DIFFERENTIABLE, optional_tensors, strict=True)))  # type: ignore[arg-type]  # inputs are never None
    BACKENDS[arguments[-1]].backward(problem, out, lse, dout, dlse, buffers, out_error)
    return gradients


def _registered_gradients(
    layout: Layout, dout: Tensor, dlse: Tensor | None, results: Results, arguments: tuple, needs_grad: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    gradients = _REGISTERED_BACKWARD[layout](dout, dlse, *results, *arguments, *needs_grad)
    needs_grad = (*[True] * NUM_INPUTS[layout], *needs_grad)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs_grad, strict=True))


def gradients(problem: Problem, backend: str, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the problem's inputs by a kernel, for a caller that keeps the results of `run` itself. dout: (B, Hq, Lq, Dv)."""
    nothing_else = (False,) * len(DIFFERENTIABLE)
    found = _kernel_gradients(problem.layout, dout, None, (out, lse, None), (*problem.op_arguments(), backend), nothing_else)
    return found[: NUM_INPUTS[problem.layout]]


def _empty_gradients(problem: Problem, needs_grad: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Uninitialized gradients of the inputs, and of the tensors in DIFFERENTIABLE that need one; None for the others."""
    gradients: list[Tensor | None] = [_empty_gradient(tensor) for tensor in problem.inputs]
    for tensor, needed in zip(problem.differentiable()[len(problem.inputs) :], needs_grad, strict=True):
        gradients.append(None if tensor is None or not needed else torch.empty_like(tensor, memory_format=torch.contiguous_format))
    return tuple(gradients)


def _empty_gradient(tensor: Tensor) -> Tensor:
    """Uninitialized, in the memory order of `tensor`; the last dim is contiguous even if rows of `tensor` overlap."""
    gradient = torch.empty_like(tensor)
    if has_contiguous_last_dim(gradient):
        return gradient
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _split_backward(arguments: tuple) -> tuple[tuple, tuple, tuple[bool, ...]]:
    """The arguments of a backward operator: those in SAVED, the forward operator's, and needs_grad."""
    return arguments[: len(SAVED)], arguments[len(SAVED) : -len(DIFFERENTIABLE)], arguments[-len(DIFFERENTIABLE) :]


_library = torch.library.Library("fused_attention", "DEF")
_REGISTERED: dict[str, Any] = {}
_REGISTERED_BACKWARD: dict[str, Any] = {}


def _register(layout: Layout) -> None:
    """Defines the forward and backward operators of one layout, their fakes and their autograd."""
    name, inputs, num_inputs = f"attention_{layout}", _INPUT_SCHEMAS[layout], NUM_INPUTS[layout]
    num_differentiable = len(DIFFERENTIABLE)
    tags = (torch.Tag.pt2_compliant_tag,)
    _library.define(f"{name}({inputs}, {_PROBLEM_SCHEMA}) -> (Tensor, Tensor, Tensor)", tags=tags)  # out, lse and out_error
    returns = ", ".join(["Tensor"] * (num_inputs + num_differentiable))
    _library.define(f"{name}_backward({_SAVED_SCHEMA}, {inputs}, {_PROBLEM_SCHEMA}, {_NEEDS_GRAD_SCHEMA}) -> ({returns})", tags=tags)
    _REGISTERED_BACKWARD[layout] = getattr(torch.ops.fused_attention, f"{name}_backward").default

    def run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        results = forward(BACKENDS[arguments[-1]], Problem.from_op_arguments(layout, arguments[:-1]))
        return results if len(results) == 3 else (*results, results[0].new_empty(0))

    def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        problem = Problem.from_op_arguments(layout, arguments[:-1])
        query = problem.query
        out_error = empty_output(problem) if problem.keeps_out_error else query.new_empty(0)
        return empty_output(problem), query.new_empty(query.shape[:3], dtype=torch.float32), out_error

    def returned(out: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        return tuple(out.new_empty(0) if gradient is None else gradient for gradient in gradients)  # schemas have no optional returns

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        (dout, dlse, *results), given, needs_grad = _split_backward(arguments)
        return returned(dout, _kernel_gradients(layout, dout, dlse, tuple(results), given, needs_grad))

    def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
        (dout, *_), given, needs_grad = _split_backward(arguments)
        return returned(dout, _empty_gradients(Problem.from_op_arguments(layout, given[:-1]), needs_grad))

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        out, lse, out_error = output
        num_tensors = num_inputs + len(TENSORS)
        tensors, ctx.options = inputs[:num_tensors], inputs[num_tensors:]
        keeps_out_error = ctx.options[list(OPTIONS).index("keeps_out_error")]
        ctx.save_for_backward(out, lse, out_error if keeps_out_error else None, *tensors)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_grad = tuple(ctx.needs_input_grad[num_inputs + place] for place in DIFFERENTIABLE.values())
        out, lse, out_error, *tensors = ctx.saved_tensors
        gradients = _gradients(layout, dout, dlse, (out, lse, out_error), (*tensors, *ctx.options), needs_grad, _registered_gradients)
        by_place = dict(zip(DIFFERENTIABLE.values(), gradients[num_inputs:], strict=True))
        optional_tensors = (by_place.get(place) for place in range(len(TENSORS)))
        return (*gradients[:num_inputs], *optional_tensors, *[None] * len(ctx.options))

    for device in ("CPU", "CUDA"):
        _library.impl(name, run_forward, device)
        _library.impl(f"{name}_backward", backward, device)
    torch.library.register_fake(f"fused_attention::{name}", fake_forward, lib=_library)
    torch.library.register_fake(f"fused_attention::{name}_backward", fake_backward, lib=_library)
    torch.library.register_autograd(f"fused_attention::{name}", differentiate, setup_context=setup_context, lib=_library)
    _REGISTERED[layout] = getattr(torch.ops.fused_attention, name).default


for _layout in NUM_INPUTS:
    _register(_layout)


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import register_flop_formula

    def register(layout: Layout) -> None:
        forward = getattr(torch.ops.fused_attention, f"attention_{layout}")
        backward = getattr(torch.ops.fused_attention, f"attention_{layout}_backward")

        @register_flop_formula(forward, get_raw=True)
        def count_forward(*arguments: Any, out_val: Any = None) -> int:
            return forward_flops(layout, arguments)

        @register_flop_formula(backward, get_raw=True)
        def count_backward(*arguments: Any, out_val: Any = None) -> int:
            return backward_flops(layout, _split_backward(arguments)[1])

    for layout in NUM_INPUTS:
        register(layout)


def _register_sharding() -> None:
    for layout in NUM_INPUTS:
        names = (f"attention_{layout}", f"attention_{layout}_backward")
        sharding.register(layout, *[getattr(torch.ops.fused_attention, name).default for name in names])


when_imported("torch.utils.flop_counter", _register_flop_formulas)
when_imported("torch.distributed.tensor", _register_sharding)
