"""The CUDA C++ kernels (csrc/cuda) as a backend: what they support, and how a Problem is passed to them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import replay
from ..call import Call, empty_strided
from ..dropout import dropout_threshold
from ..problem import Gradients, OptionalTensors, Problem, strides, uncovered_numbers
from ..torch_internals import answered_once, current_stream
from . import packed_problem
from .packed_problem import MASK_DTYPES, NO_ADDRESSES, NOT_BUILT, UNLIMITED, Plain, _native, address, optional_addresses

MAX_HEAD_DIM = 256
KEEPS_OUT_ERROR: tuple[torch.dtype, ...] = ()
ROWS_PER_BLOCK = 64  # of the backward kernel for dquery
DTYPES = (torch.bfloat16, torch.float16)
BACKWARD_KERNELS = {"chosen": 0, "two passes": 1, "one pass": 2}


def status() -> str | None:
    """None if this machine can run the kernels, else the reason why not."""
    return _machine_reason(None)


@answered_once
def _machine_reason(device: torch.device | None) -> str | None:
    """Why the kernels cannot run on a device (None: on any device of this machine)."""
    if _native is None:
        return NOT_BUILT
    if device is not None and device.type != "cuda":
        return f"the tensors are on {device}, not on a GPU"
    if torch.version.cuda is None and device is not None:
        return "this torch is not built for NVIDIA GPUs"
    return _native.cuda_why_not(-1 if device is None else device.index or 0)


def compiled() -> str:
    """How many kernels this build has, what compiled them and for which GPUs; or why it has none."""
    if _native is None:
        return f"none ({NOT_BUILT})"
    images = _native.cuda_images()
    return f"{len(images)}, by {_native.cuda_built()}" if images else f"none ({_native.cuda_why_not(-1)})"


def driver() -> str:
    """What the NVIDIA driver supports, queried without initializing CUDA."""
    version = _native.cuda_versions()[0] if _native is not None else 0
    return f"supports CUDA {version // 1000}.{version % 1000 // 10}" if version else "none"


def gpus() -> list[str]:
    """For each GPU the NVIDIA driver sees: its name, compute capability and how it gets the kernels. Initializes CUDA."""
    return [_described(device) for device in range(_native.cuda_device_count())] if _native is not None else []


def _described(device: int) -> str:
    capability = _native.cuda_device_limits(device)[0]
    if not _native.cuda_images():
        kernels = "none in this build"
    elif reason := _native.cuda_why_not(device):
        kernels = f"none: {reason}"
    elif _native.cuda_has_machine_code(capability):
        kernels = "native machine code"
    else:
        kernels = f"compiled at first use, from PTX (built with FUSED_ATTENTION_CUDA_ARCHS='80 {capability}' they would be native)"
    return f"{_native.cuda_device_name(device)}, compute capability {capability // 10}.{capability % 10}; CUDA kernels: {kernels}"


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the CUDA kernels cannot run this problem here; empty if they can."""
    machine = _machine_reason(problem.query.device)
    return [machine, *uncovered(problem)] if machine else uncovered(problem)


def uncovered(problem: Problem) -> list[str]:
    """What the kernels do not support on any machine."""
    query, key, value = problem.query, problem.key, problem.value
    reasons = []
    if query.dtype not in DTYPES:
        reasons.append(f"dtype {query.dtype} is not covered (bfloat16 and float16 are)")
    if problem.key_scale is not None:
        reasons.append("8-bit keys and values are not covered")
    head_dim, head_dim_v = query.shape[3], value.shape[3]
    if head_dim > MAX_HEAD_DIM or head_dim_v > MAX_HEAD_DIM:
        reasons.append(f"head_dim {max(head_dim, head_dim_v)} is above {MAX_HEAD_DIM}")
    if head_dim % 8 or head_dim_v % 8:
        reasons.append(f"head_dim {head_dim if head_dim % 8 else head_dim_v} is not divisible by 8")
    elif not reasons:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not _has_aligned_strides(tensor):
                reasons.append(f"the strides of {name}, {tensor.stride()}, are not multiples of 8")
            elif _address_if_known(tensor) % 16:
                reasons.append(f"the address of {name} is not a multiple of 16 bytes")
    reasons += uncovered_numbers(problem)
    # With a symbolic size, this check would become a bound of the exported program.
    if not torch.compiler.is_compiling():
        seqlen, distance = max(problem.max_seqlen_q, problem.max_seqlen_k), abs(problem.diagonal)
        if seqlen + distance > UNLIMITED:
            reasons.append(f"seqlen {seqlen} is above 2^30" + (f" - {distance}, the diagonal's distance" if distance else ""))
    return reasons


def _mask_gradient_kind(problem: Problem, shape: tuple[int, ...]) -> str:
    """How a float mask's gradient is made from those of the scores: stored as is, or summed over keys, over rows, or only over the heads
    that share it."""
    if shape[3] != problem.max_seqlen_k:
        return "over keys"
    if shape[2] != problem.max_seqlen_q:
        return "over rows"
    return "stored" if tuple(shape[:2]) == tuple(problem.query.shape[:2]) else "summed"


def _has_aligned_strides(tensor: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes from the first one."""
    batch, head, row, _ = tensor.stride()
    if (batch | head | row) % 8 == 0:
        return True
    return all(size == 1 or stride % 8 == 0 for size, stride in zip(tensor.shape[:3], (batch, head, row), strict=True))


def _address_if_known(tensor: Tensor) -> int:
    """0 for tensors without memory: fake ones and functorch's. When such a call runs, `ops.forward` copies unaligned inputs."""
    if torch.compiler.is_compiling():
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


@contextlib.contextmanager
def single_tile_kernels(used: bool) -> Iterator[None]:
    """Turns the single-tile kernels on or off, to compare them with the others."""
    before = _native.cuda_set_single_tile_kernels(used)
    replay.forget()
    try:
        yield
    finally:
        _native.cuda_set_single_tile_kernels(before)
        replay.forget()


def prepare(problem: Problem) -> Call:
    """The forward pass for all problems that differ from this one only in their tensors' memory."""
    plain = replay.prepared(_plain, problem)
    numbers, out_shape, out_strides, lse_shape, lse_strides = (
        plain.numbers, plain.out_shape, plain.out_strides, plain.lse_shape, plain.lse_strides,
    )  # fmt: skip
    dtype, float32, empty, as_read = problem.query.dtype, torch.float32, empty_strided(problem.query), packed_problem.as_read
    is_packed, converts = problem.cu_seqlens_q is not None, not packed_problem.are_as_read(problem.optional_tensors())
    places = packed_problem.given(problem.optional_tensors())
    drops_all = problem.dropout_p == 1.0
    lse_bytes, workspace_bytes = 4 * math.prod(lse_shape), 0  # workspace_bytes: as reported by the first launch

    def call(
        query: Tensor, key: Tensor, value: Tensor, optional: OptionalTensors, needs_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        nonlocal workspace_bytes
        q, k, v = query.data_ptr(), key.data_ptr(), value.data_ptr()
        if (q | k | v) % 16:
            return None
        out = empty(out_shape, out_strides, dtype)
        lse = workspace = None
        # An lse the caller does not want goes into the workspace's allocation, because an allocation costs as much as many checks.
        if needs_lse:
            lse = empty(lse_shape, lse_strides, float32)
            if workspace_bytes:
                workspace = empty((workspace_bytes // 2,), (1,), dtype)  # counted in 16-bit elements
        else:
            workspace = empty(((workspace_bytes + lse_bytes) // 2,), (1,), dtype)
        if is_packed:
            out.zero_()
            if lse is not None:
                lse.fill_(-torch.inf)
        if converts:
            optional = as_read(optional)
        scratch = 0 if workspace is None else workspace.data_ptr()
        device, stream = _device_and_stream(query)
        wanted = _run(
            numbers,
            device,
            stream,
            scratch if workspace_bytes else 0,
            q,
            k,
            v,
            out.data_ptr(),
            scratch + workspace_bytes if lse is None else lse.data_ptr(),
            optional_addresses(optional, places) if places else NO_ADDRESSES,
        )
        if wanted:  # nothing was launched: the workspace was missing or too small
            workspace_bytes = wanted
            return call(query, key, value, optional, needs_lse)
        if drops_all:
            out.zero_()
        return out if lse is None else (out, lse)

    return call


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: Gradients,
    out_error: None = None,
    kernels: str = "chosen",
) -> None:
    """Writes every requested gradient. All are bit-reproducible; the query's only if the problem is deterministic.

    out_error: these kernels keep none.
    kernels: a name from BACKWARD_KERNELS, for tests and measurements; the one-pass kernels do not support every problem.
    """
    if problem.row_tiles is not None and problem.column_tiles is None:
        raise ValueError("the mask was prepared without what gradients need")
    query, key, value = problem.query, problem.key, problem.value
    if problem.dropout_p == 1.0:  # out is 0 for any inputs
        dout = dout.new_zeros(dout.shape[3]).expand(dout.shape)
    if gradients.sinks is not None and problem.sinks is not None:
        gradients.sinks.copy_(_sink_gradient(problem.sinks, out, lse, dout, dlse))
    if not out.numel() or not key.numel():
        for name in ("query", "key", "value", "attn_mask", "alibi_slopes"):
            gradient = getattr(gradients, name)
            if gradient is not None:
                gradient.zero_()
        return
    if (query.data_ptr() | key.data_ptr() | value.data_ptr()) % 16:
        backward(problem.with_copied_inputs(), out, lse, dout, dlse, gradients, kernels=kernels)
        return
    if not _has_aligned_strides(dout) or dout.stride(3) != 1 or dout.data_ptr() % 16:
        dout = dout.clone(memory_format=torch.contiguous_format)
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    if problem.cu_seqlens_q is not None:  # tokens that belong to no sequence
        for gradient in (gradients.query, gradients.key, gradients.value):
            gradient.zero_()

    mask_gradient, stored = gradients.attn_mask, None
    row_sums = column_sums = slope_sums = None
    if mask_gradient is not None:
        kind = _mask_gradient_kind(problem, mask_gradient.shape)
        if kind == "over keys":
            row_sums = torch.zeros_like(lse)
        elif kind == "over rows":
            column_sums = lse.new_zeros(*lse.shape[:2], problem.max_seqlen_k)
        else:
            stored = (
                mask_gradient if mask_gradient.dtype in MASK_DTYPES else mask_gradient.new_empty(mask_gradient.shape, dtype=torch.float32)
            )
    if gradients.alibi_slopes is not None:
        slope_sums = lse.new_zeros(problem.batch, query.shape[1], -(-problem.max_seqlen_q // ROWS_PER_BLOCK))

    optional = packed_problem.as_read(problem.optional_tensors())
    device, stream = _device_and_stream(query)
    addresses = packed_problem.addresses(query, key, value, optional, out, lse)
    gradient_addresses = (
        *packed_problem.gradient_addresses(dout, dlse, gradients),
        address(stored),
        address(row_sums),
        address(column_sums),
        address(slope_sums),
        address(problem.column_tiles),
    )
    call = _native.cuda_backward_problem(
        replay.prepared(_plain, problem).numbers,
        strides(dout, 3),
        strides(gradients.query, 3),
        strides(gradients.key, 3),
        strides(gradients.value, 3),
        strides(stored, 3),
        (1, 1) if stored is None else (stored.shape[0], stored.shape[1]),
        strides(problem.column_tiles, 3),
        0 if problem.column_tiles is None else problem.column_tiles.shape[3] - 2,
        problem.deterministic,
        BACKWARD_KERNELS[kernels],
    )
    wanted = _run_backward(call, device, stream, 0, addresses, gradient_addresses)
    if wanted:  # otherwise a kernel ran that writes every element
        if stored is not None and kind == "stored":
            stored.zero_()  # tiles that nothing visits
        workspace = query.new_empty(wanted, dtype=torch.uint8)
        _run_backward(call, device, stream, workspace.data_ptr(), addresses, gradient_addresses)

    if mask_gradient is not None:
        if row_sums is not None:
            mask_gradient.copy_(row_sums[:, :, :, None].sum_to_size(mask_gradient.shape))
        elif column_sums is not None:
            mask_gradient.copy_(column_sums[:, :, None].sum_to_size(mask_gradient.shape))
        elif stored is not None and stored is not mask_gradient:
            mask_gradient.copy_(stored)
    if gradients.alibi_slopes is not None and slope_sums is not None:
        gradients.alibi_slopes.copy_(slope_sums.sum(2).sum_to_size(gradients.alibi_slopes.shape))


def _sink_gradient(sinks: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """(Hq,): a sink takes weight from the keys, so its gradient is -weight * (rowsum(dout * out) - dlse), summed over batch and rows."""
    seen = lse != -torch.inf
    delta = (out.float() * dout.float()).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    weights = torch.exp(sinks.float()[:, None] - lse)
    return -torch.where(seen, weights * delta, 0.0).sum((0, 2))


def _run_backward(problem: bytes, device: int, stream: int, workspace: int, addresses: tuple[int, ...], gradients: tuple[int, ...]) -> int:
    """Launches the kernels, or returns how many bytes of workspace they need."""
    return _native.cuda_backward(problem, device, stream, workspace, addresses, gradients)


# Launches the kernels, or returns how many bytes of workspace they need: (problem, device, stream,
# workspace, query, key, value, out, lse, optional) -> int.
# Tests replace it with a function that calls _native.cuda_plan.
_run: Callable[..., int] = getattr(_native, "cuda_forward", None)  # type: ignore[assignment]


def _device_and_stream(tensor: Tensor) -> tuple[int, int]:
    """The tensor's device, and torch's current stream on it."""
    device = tensor.get_device()
    return device, current_stream(device)


def _plain(problem: Problem) -> Plain:
    return packed_problem.plain(problem, 0 if problem.rng_state is None else dropout_threshold(problem.dropout_p))
