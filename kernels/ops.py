"""Runs a Problem on a backend: autograd, the registered operators with their fakes, and the cheap eager path.

Eager calls on plain tensors skip torch's dispatcher (`_takes_cheap_path` says when); everything that must see an operator
(torch.compile, export, dispatch modes, tensor subclasses) gets `torch.ops.fused_attention.attention_<layout>`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import cuda_backend, native, sharding, triton_backend
from .flops import backward_flops, forward_flops
from .problem import (
    DIFFERENTIABLE_SIDE_TENSORS,
    NUM_INPUTS,
    NUM_SIDE_TENSORS,
    Gradients,
    Layout,
    Problem,
    empty_output,
    has_contiguous_last_dim,
    split,
)
from .reference import attention_reference
from .torch_internals import forward_mode, functorch_interpreter, has_storage, is_zero_tensor, num_dispatch_modes
from .when_imported import when_imported

KERNEL_BACKENDS: dict[str, Any] = {"cuda": cuda_backend, "triton": triton_backend, "cpu": native}

_INPUT_SCHEMAS: dict[Layout, str] = {
    "separate": "Tensor query, Tensor key, Tensor value",
    "qkv": "Tensor qkv",
    "kv": "Tensor query, Tensor kv",
    "varlen": "Tensor query, Tensor key, Tensor value",
}
_PROBLEM_SCHEMA = (
    "Tensor? attn_mask, Tensor? key_mask, Tensor? key_lengths, Tensor? query_lengths, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? rng_state, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? mask_bits, Tensor? mask_bits_transposed, "
    "Tensor? row_tiles, Tensor? column_tiles, float scale, int? window_left, int? window_right, SymInt diagonal, bool bottom_right, "
    "float? softcap, float dropout_p, bool deterministic, SymInt max_seqlen_q, SymInt max_seqlen_k, str out_memory, str backend"
)
_WANTED_SCHEMA = "bool attn_mask_wanted, bool alibi_slopes_wanted, bool sinks_wanted"


def run(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Returns out (B, Hq, Lq, Dv) and lse (B, Hq, Lq); differentiable in the problem's tensors, any number of times."""
    if backend == "reference":
        return _formula(problem)
    if _takes_cheap_path(problem):
        if torch.is_grad_enabled() and problem.requires_grad():
            return _Attention.apply(problem, backend, *problem.inputs, problem.attn_mask, problem.alibi_slopes, problem.sinks)
        return KERNEL_BACKENDS[backend].forward(problem)
    if _transformed(problem) or torch.onnx.is_in_onnx_export():  # ONNX has the formula's operators, not ours
        return _formula(problem)
    if problem.rng_state is not None and sharding.is_sharded(problem.inputs[0]) and not sharding.is_sharded(problem.rng_state):
        problem.rng_state = sharding.on_all_processes(problem.rng_state, problem.inputs[0])
    return _REGISTERED[problem.layout](*problem.op_arguments(), backend)


def _formula(problem: Problem) -> tuple[Tensor, Tensor]:
    if not sharding.is_sharded(problem.inputs[0]):
        return attention_reference(problem)
    with sharding.plain_tensors_are_the_same_everywhere():
        return attention_reference(problem)


def reaches_kernels(problem: Problem, *others: Tensor) -> bool:
    """Whether the memory of the problem's and the other tensors may be handed to a kernel from Python, with no operator in between."""
    return _takes_cheap_path(problem) and all(map(_is_plain, others))


def _transformed(problem: Problem) -> bool:
    """Whether functorch or forward-mode differentiation is at work, or one of their zero tensors without memory: then the formula runs."""
    if _differentiates_otherwise():
        return True
    return not torch.compiler.is_compiling() and any([is_zero_tensor(tensor) for tensor in problem.inputs])


def _differentiates_otherwise() -> bool:
    return functorch_interpreter() is not None or forward_mode._current_level >= 0


# torch.compile cannot trace the question, but asks it while it traces, inside the levels that it traces (torch.compiler.
# assume_constant_result marks functions so, and imports the compiler). It guards functorch's levels and forward mode's itself.
_differentiates_otherwise._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _takes_cheap_path(problem: Problem) -> bool:
    if torch.compiler.is_compiling() or num_dispatch_modes() > 0 or _differentiates_otherwise():
        return False
    return all([tensor is None or _is_plain(tensor) for tensor in (*problem.inputs, *problem.side_tensors())])


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's memory holds its values: no subclass, no lazily negated view, no zero tensor without memory."""
    return (type(tensor) is Tensor or type(tensor) is Parameter) and not tensor.is_neg() and not is_zero_tensor(tensor)


class _Attention(torch.autograd.Function):
    """The kernel with its gradient, straight from Python."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, backend: str, *differentiable: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = KERNEL_BACKENDS[backend].forward(problem)
        _save_for_backward(ctx, problem.layout, (*problem.op_arguments(), backend), out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[-len(DIFFERENTIABLE_SIDE_TENSORS) :]
        return (None, None, *eager_gradients(ctx.layout, dout, dlse, out, lse, (*tensors, *ctx.options), wanted))


def eager_gradients(
    layout: Layout, dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, arguments: tuple, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """`_gradients` in the backward pass of an eager call."""
    # torch.autograd.grad(is_grads_batched=True) hands over tensors without memory, which only the operator takes apart.
    readable = all(gradient is None or has_storage(gradient) for gradient in (dout, dlse))
    kernel_gradients = _kernel_gradients if readable else _registered_gradients
    return _gradients(layout, dout, dlse, out, lse, arguments, wanted, kernel_gradients)


def _save_for_backward(ctx: Any, layout: Layout, arguments: tuple, out: Tensor, lse: Tensor) -> None:
    ctx.layout = layout
    num_tensors = NUM_INPUTS[layout] + NUM_SIDE_TENSORS
    ctx.options = arguments[num_tensors:]
    ctx.save_for_backward(out, lse, *arguments[:num_tensors])
    ctx.set_materialize_grads(False)


def _gradients(
    layout: Layout,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    arguments: tuple,
    wanted: tuple[bool, ...],
    kernel_gradients: Any,
) -> tuple[Tensor | None, ...]:
    """The gradients of a layout's inputs, then those of attn_mask, alibi_slopes and sinks, None where not wanted.

    By the kernel, or by the formula when they will be differentiated again, are batched or have tangents. arguments: the operator's.
    """
    if dout is None and dlse is None:
        return (None,) * (NUM_INPUTS[layout] + len(wanted))
    if torch.is_grad_enabled() or _differentiates_otherwise():
        return _recomputed_gradients(layout, dout, dlse, arguments)
    dout = torch.zeros_like(out) if dout is None else _in_memory(dout)
    return kernel_gradients(layout, dout, None if dlse is None else _in_memory(dlse), out, lse, arguments, wanted)


def _in_memory(gradient: Tensor) -> Tensor:
    return gradient if torch.compiler.is_compiling() or _is_plain(gradient) else gradient.resolve_neg().clone()


def _recomputed_gradients(layout: Layout, dout: Tensor | None, dlse: Tensor | None, arguments: tuple) -> tuple[Tensor | None, ...]:
    higher = torch.is_grad_enabled()
    num_inputs = NUM_INPUTS[layout]
    tensors = list(arguments[:-1])
    with torch.enable_grad():
        # Aliases, because inputs may be one tensor, or computed from one another: each gets the gradient of its own part only.
        places = (*range(num_inputs), *(num_inputs + place for place in DIFFERENTIABLE_SIDE_TENSORS))
        for place in places:
            tensors[place] = None if tensors[place] is None else tensors[place].view_as(tensors[place])
        out, lse = _formula(Problem.from_op_arguments(layout, tuple(tensors)))
    outputs = [(value, gradient) for value, gradient in ((out, dout), (lse, dlse)) if gradient is not None]
    wanted = [place for place in places if tensors[place] is not None and tensors[place].requires_grad]
    gradients = torch.autograd.grad(
        [value for value, _ in outputs],
        [tensors[place] for place in wanted],
        [gradient for _, gradient in outputs],
        create_graph=higher,
        materialize_grads=True,
    )
    by_place = dict(zip(wanted, gradients, strict=True))
    return tuple(by_place.get(place) for place in places)


def _kernel_gradients(
    layout: Layout, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, arguments: tuple, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    problem = Problem.from_op_arguments(layout, arguments[:-1])
    gradients = _empty_gradients(problem, wanted)
    inputs, side_tensors = gradients[: len(problem.inputs)], gradients[len(problem.inputs) :]
    buffers = Gradients(*split(layout, inputs), *side_tensors)  # type: ignore[arg-type]  # inputs are never None
    KERNEL_BACKENDS[arguments[-1]].backward(problem, out, lse, dout, dlse, buffers)
    return gradients


def _registered_gradients(
    layout: Layout, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, arguments: tuple, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    gradients = _REGISTERED_BACKWARD[layout](dout, dlse, out, lse, *arguments, *wanted)
    is_wanted = (*[True] * NUM_INPUTS[layout], *wanted)
    return tuple(gradient if is_one else None for gradient, is_one in zip(gradients, is_wanted, strict=True))


def _empty_gradients(problem: Problem, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Uninitialised gradients of the inputs, attn_mask, alibi_slopes and sinks; None for what is not wanted of the last three."""
    gradients: list[Tensor | None] = [_empty_gradient(tensor) for tensor in problem.inputs]
    for tensor, is_wanted in zip((problem.attn_mask, problem.alibi_slopes, problem.sinks), wanted, strict=True):
        gradients.append(None if tensor is None or not is_wanted else torch.empty_like(tensor, memory_format=torch.contiguous_format))
    return tuple(gradients)


def _empty_gradient(tensor: Tensor) -> Tensor:
    """Uninitialised, in the memory order of `tensor`; the last dim is contiguous even where rows of `tensor` overlap."""
    gradient = torch.empty_like(tensor)
    if has_contiguous_last_dim(gradient):
        return gradient
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


_library = torch.library.Library("fused_attention", "DEF")
_REGISTERED: dict[str, Any] = {}
_REGISTERED_BACKWARD: dict[str, Any] = {}


def _register(layout: Layout) -> None:
    """Defines the forward and backward operators of one layout, their fakes and their autograd."""
    name, inputs, num_inputs = f"attention_{layout}", _INPUT_SCHEMAS[layout], NUM_INPUTS[layout]
    num_wanted = len(DIFFERENTIABLE_SIDE_TENSORS)
    tags = (torch.Tag.pt2_compliant_tag,)
    _library.define(f"{name}({inputs}, {_PROBLEM_SCHEMA}) -> (Tensor, Tensor)", tags=tags)
    saved, returns = "Tensor dout, Tensor? dlse, Tensor out, Tensor lse", ", ".join(["Tensor"] * (num_inputs + num_wanted))
    _library.define(f"{name}_backward({saved}, {inputs}, {_PROBLEM_SCHEMA}, {_WANTED_SCHEMA}) -> ({returns})", tags=tags)
    _REGISTERED_BACKWARD[layout] = getattr(torch.ops.fused_attention, f"{name}_backward").default

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return KERNEL_BACKENDS[arguments[-1]].forward(Problem.from_op_arguments(layout, arguments[:-1]))

    def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        problem = Problem.from_op_arguments(layout, arguments[:-1])
        query = problem.query
        return empty_output(problem), query.new_empty(query.shape[:3], dtype=torch.float32)

    def returned(out: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        return tuple(out.new_empty(0) if gradient is None else gradient for gradient in gradients)  # a schema knows no Tensor? return

    def backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        arguments, wanted = arguments[:-num_wanted], arguments[-num_wanted:]
        return returned(out, _kernel_gradients(layout, dout, dlse, out, lse, arguments, wanted))

    def fake_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        arguments, wanted = arguments[:-num_wanted], arguments[-num_wanted:]
        return returned(out, _empty_gradients(Problem.from_op_arguments(layout, arguments[:-1]), wanted))

    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        _save_for_backward(ctx, layout, inputs, *output)

    def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[num_inputs + place] for place in DIFFERENTIABLE_SIDE_TENSORS)
        out, lse, *tensors = ctx.saved_tensors
        gradients = _gradients(layout, dout, dlse, out, lse, (*tensors, *ctx.options), wanted, _registered_gradients)
        by_place = dict(zip(DIFFERENTIABLE_SIDE_TENSORS, gradients[num_inputs:], strict=True))
        side_tensors = (by_place.get(place) for place in range(NUM_SIDE_TENSORS))
        return (*gradients[:num_inputs], *side_tensors, *[None] * len(ctx.options))

    for device in ("CPU", "CUDA"):
        _library.impl(name, forward, device)
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
        not_the_forwards = 4, -len(DIFFERENTIABLE_SIDE_TENSORS)  # dout, dlse, out and lse come first, what is wanted last

        @register_flop_formula(forward, get_raw=True)
        def count_forward(*arguments: Any, out_val: Any = None) -> int:
            return forward_flops(layout, arguments)

        @register_flop_formula(backward, get_raw=True)
        def count_backward(*arguments: Any, out_val: Any = None) -> int:
            return backward_flops(layout, arguments[slice(*not_the_forwards)])

    for layout in NUM_INPUTS:
        register(layout)


def _register_sharding() -> None:
    for layout in NUM_INPUTS:
        names = (f"attention_{layout}", f"attention_{layout}_backward")
        sharding.register(layout, *[getattr(torch.ops.fused_attention, name).default for name in names])


when_imported("torch.utils.flop_counter", _register_flop_formulas)
when_imported("torch.distributed.tensor", _register_sharding)
