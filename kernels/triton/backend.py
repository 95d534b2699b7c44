"""The Triton kernels as a backend: what they support, and which kernel a call goes to. Importing this module does not need Triton."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..problem import Gradients, OptionalTensors, Problem, uncovered_numbers
from ..torch_internals import answered_once, constant_of_graph, num_dispatch_modes

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEEPS_OUT_ERROR: tuple[torch.dtype, ...] = ()
OLDEST_COMPUTE_CAPABILITY = (8, 0)  # the first with bfloat16 and asynchronous copies


@functools.cache
def _missing() -> str | None:
    """Why Triton cannot be imported, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}); it comes with torch's GPU builds, or: pip install 'fused-attention[triton]'"
    return None


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported: kernels then run on CPU tensors, slowly, for tests."""
    return _missing() is None and _module("launch").INTERPRETED


def status() -> str | None:
    """None if this machine can run the kernels, else the reason why not."""
    return _machine_reason(None)


@answered_once
def _machine_reason(device: torch.device | None) -> str | None:
    """Why the kernels cannot run on a device (None: on any device of this machine)."""
    if device is not None and device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") == "0":
        return f"the tensors are on {device}, not on a GPU"  # no need to import Triton for this, which takes a quarter of a second
    return _missing() or _device_reason(device)


def _device_reason(device: torch.device | None) -> str | None:
    if interpreted():
        return f"Triton's interpreter takes CPU tensors, these are on {device}" if device is not None and device.type != "cpu" else None
    if device is not None and device.type != "cuda":
        return f"the tensors are on {device}, not on a GPU"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_COMPUTE_CAPABILITY:
        given, oldest = torch.cuda.get_device_capability(device), OLDEST_COMPUTE_CAPABILITY
        return f"compute capability {given[0]}.{given[1]} is below {oldest[0]}.{oldest[1]}"
    return None


@constant_of_graph
def _bfloat16_reason() -> str | None:
    """Why Triton's interpreter cannot run bfloat16 kernels."""
    if not interpreted() or _module("launch").multiplies_bfloat16():
        return None
    return "Triton's interpreter multiplies the bit patterns of bfloat16 instead of its numbers"


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the Triton kernels cannot run this problem here; empty if they can."""
    machine = _machine_reason(problem.query.device)
    if machine is None and problem.query.dtype is torch.bfloat16:
        machine = _bfloat16_reason()
    return [machine, *uncovered(problem)] if machine else uncovered(problem)


def uncovered(problem: Problem) -> list[str]:
    """What the kernels do not support on any machine."""
    reasons = []
    if problem.query.dtype not in DTYPES:
        reasons.append(f"dtype {problem.query.dtype} is not covered (float32, bfloat16 and float16 are)")
    if problem.key_scale is not None:
        reasons.append("8-bit keys and values are not covered")
    head_dim = max(problem.query.shape[3], problem.value.shape[3])
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim {head_dim} is above {MAX_HEAD_DIM}")
    reasons += uncovered_numbers(problem)
    return reasons


def prepare(problem: Problem) -> Call:
    """The forward pass for all problems that differ from this one only in their tensors' memory."""
    decode = _module("decode")
    kernels = decode if decode.takes(problem) else _module("forward")
    if problem.query.dtype != torch.float32:
        return kernels.prepare(problem)
    input_precision, options = _module("arguments").input_precision, problem.options()
    calls: dict[str, Call] = {}  # keyed by a torch setting

    def call(query: Tensor, key: Tensor, value: Tensor, optional: OptionalTensors, needs_lse: bool) -> Tensor | tuple[Tensor, ...] | None:
        precision = input_precision(torch.float32)
        if precision not in calls:
            calls[precision] = kernels.prepare(Problem.from_op_arguments("separate", (query, key, value, *optional, *options)))
        return calls[precision](query, key, value, optional, needs_lse)

    return call


def backward(
    problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, gradients: Gradients, out_error: None = None
) -> None:
    """Writes every requested gradient, bit-reproducibly. out_error: these kernels keep none."""
    if _is_elsewhere(problem.query):
        with torch.cuda.device(problem.query.device):
            backward(problem, out, lse, dout, dlse, gradients)
        return
    _module("backward").backward(problem, out, lse, dout, dlse, gradients)


def attention_weights(problem: Problem, lse: Tensor, average_heads: bool) -> Tensor:
    """The weights after dropout (B, Hq, Lq, Lk), or their mean over heads (B, Lq, Lk), without storing the weights of each head."""
    if _is_elsewhere(problem.query):
        with torch.cuda.device(problem.query.device):
            return attention_weights(problem, lse, average_heads)
    return _module("weights").attention_weights(problem, lse, average_heads)


def prepares(problem: Problem) -> bool:
    """Whether prepare_mask may use the kernels: for eager calls on a GPU."""
    eager = not torch.compiler.is_compiling() and num_dispatch_modes() == 0 and type(problem.query) is Tensor
    return eager and problem.query.is_cuda and _machine_reason(problem.query.device) is None


def prepared_tiles(problem: Problem, gradients: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """mask_bits, mask_bits_transposed, row_tiles and column_tiles of a PreparedMask."""
    if _is_elsewhere(problem.query):
        with torch.cuda.device(problem.query.device):
            return prepared_tiles(problem, gradients)
    return _module("mask").prepared_tiles(problem, gradients)


def _is_elsewhere(tensor: Tensor) -> bool:
    """Whether the current GPU is not the tensor's. It may be of another kind, and tiles are chosen for the current one."""
    return tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}")
