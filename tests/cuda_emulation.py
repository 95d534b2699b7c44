"""`backend="cuda"` on CPU tensors: the real host code plans the launches, and the emulator runs the PTX files of the build.

    with EmulatedGpu(schedule=1) as gpu:
        out = attention(query, key, value, backend="cuda")
    gpu.launched  # the names of the kernels

Every tensor whose address the host code asks for is memory that the kernels may touch, and no other is. Memory that is allocated meanwhile
holds NaN, or the largest integer, between guards. Any report of the emulator, a written input and a written guard are failures.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accuracy import assert_accurate, assert_lse_accurate, exact_and_eager
from attention_calls import CALL, build, options_of, prepared
from emulator import Module, Schedule, why_not_buildable
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fused_attention.kernels import replay
from fused_attention.kernels.attention import attention
from fused_attention.kernels.native import cuda as cuda_backend
from fused_attention.kernels.ops import forward
from fused_attention.kernels.problem import Problem, empty_output
from fused_attention.kernels.reference import present

GUARD_ELEMENTS = 64  # before and after every allocation: what is aligned stays so
ALLOCATING = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided)


class Gpu(NamedTuple):
    """What plans depend on."""

    compute_capability: int  # times ten
    multiprocessors: int
    shared_bytes: int  # that a block may ask for


A100 = Gpu(80, 108, 163 * 1024)
RTX_4090 = Gpu(89, 128, 99 * 1024)
SMALL = Gpu(80, 4, 163 * 1024)  # which few blocks fill, so that decoding is not split


class EmulatedGpu(TorchFunctionMode):
    """While it is entered, the CUDA backend takes CPU tensors."""

    def __init__(
        self,
        schedule: int = 0,
        gpu: Gpu = A100,
        kernels: str = "",
        *,
        backward: str = "chosen",
        resident_blocks: int | None = 1,
        ordered_additions: bool = False,
        modules: Mapping[str, Module] | None = None,
    ) -> None:
        """kernels: what the names of those that are to run begin with; the others are left out.

        backward: of cuda_backend.BACKWARD_KERNELS. resident_blocks: of every kernel, at the same time; None: all.
        ordered_additions: blocks must add floats to the same memory in a fixed order.
        modules: of kernels that are not to be those of the build, by the name that their kernel has there.
        """
        super().__init__()
        self.launched: list[str] = []
        self.planned: list[tuple[str, bytes]] = []  # name and arguments of every kernel, those left out too
        self.grids: list[tuple[int, int, int]] = []  # and its blocks, its threads and its bytes of shared memory
        self.workspace_bytes = 0  # of the last launch
        self._kernels = kernels
        self._modules = modules or {}
        self._schedule = replace(
            Schedule.of_seed(schedule), report_uninitialized=True, resident_blocks=resident_blocks, ordered_additions=ordered_additions
        )
        self._kernels_of_backward = backward
        self._gpu = gpu
        self._addressed: list[Tensor] = []  # tensors whose address was asked for
        self._allocated: list[tuple[Tensor, Tensor]] = []  # with the buffer around it

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.data_ptr:
            self._addressed.append(args[0])
        elif function in ALLOCATING and type(result) is Tensor and not result.is_meta:
            return self._guarded(result)
        return result

    def _guarded(self, plain: Tensor) -> Tensor:
        steps = zip(plain.shape, plain.stride(), strict=True)
        size = 1 + sum((n - 1) * stride for n, stride in steps) if plain.numel() else 0
        buffer = torch.full((size + 2 * GUARD_ELEMENTS,), _poison(plain), dtype=plain.dtype)
        tensor = buffer.as_strided(plain.shape, plain.stride(), GUARD_ELEMENTS)
        self._allocated.append((tensor, buffer))
        return tensor

    def __enter__(self) -> EmulatedGpu:
        self._patches = pytest.MonkeyPatch()
        self._patches.setattr(cuda_backend, "_machine_reason", lambda device: None)
        self._patches.setattr(cuda_backend, "_device_and_stream", lambda tensor: (0, 0))
        self._patches.setattr(cuda_backend, "_run", self._run)
        self._patches.setattr(cuda_backend, "_run_backward", self._run_backward)
        self._patches.setattr(cuda_backend, "backward", functools.partial(self._backward, cuda_backend.backward))
        replay.forget()
        self._patches.setattr("fused_attention.kernels.call.allocators", {})
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.undo()
        replay.forget()
        if exception[0] is None:
            for tensor, buffer in self._allocated:
                guards = torch.cat((buffer[:GUARD_ELEMENTS], buffer[-GUARD_ELEMENTS:]))
                intact = guards.isnan() if guards.is_floating_point() else guards == _poison(tensor)
                assert intact.all(), f"written outside of the {tensor.dtype} tensor of shape {tuple(tensor.shape)}"

    def _run(self, problem: bytes, device: int, stream: int, workspace: int, *addresses: Any) -> int:
        """In place of _native.cuda_forward."""
        *inputs_and_results, optional = addresses
        return self._launch(cuda_backend._native.cuda_plan(problem, *self._gpu, workspace, (*inputs_and_results, *optional)), workspace)

    def _backward(self, backward: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Autograd calls it without this mode."""
        options = {"kernels": self._kernels_of_backward} | options
        if torch.overrides._get_current_function_mode() is self:
            backward(*arguments, **options)
            return
        super().__enter__()
        try:
            backward(*arguments, **options)
        finally:
            super().__exit__(None, None, None)

    def _run_backward(self, problem: bytes, device: int, stream: int, workspace: int, *addresses: tuple[int, ...]) -> int:
        """In place of _native.cuda_backward."""
        _, _, *written, _ = addresses[1]  # between those of dout, dlse and the column tiles
        return self._launch(cuda_backend._native.cuda_backward_plan(problem, *self._gpu, workspace, *addresses), workspace, written)

    def _launch(self, plan: tuple[int, list], workspace: int, written: Sequence[int] = ()) -> int:
        wanted, launches = plan
        self.workspace_bytes = wanted
        if wanted and not workspace:
            return wanted
        outputs = {id(tensor) for tensor, _ in self._allocated}
        addressed = list(self._addressed)  # asking for addresses here adds to it
        inputs = [tensor for tensor in addressed if id(tensor) not in outputs and tensor.data_ptr() not in written]
        before = [_bits(tensor).clone() for tensor in inputs]
        buffers = {f"{tensor.dtype} {tuple(tensor.shape)} #{i}": tensor for i, tensor in enumerate(addressed)}
        for name, blocks, threads, shared_bytes, arguments in launches:
            self.planned.append((name, arguments))
            self.grids.append((blocks, threads, shared_bytes))
            if not name.startswith(self._kernels):
                continue
            assert shared_bytes <= self._gpu.shared_bytes, f"{name}: {shared_bytes} bytes of shared memory"
            run = self._modules[name] if name in self._modules else module(name)
            result = run.launch(name, (blocks,), (threads,), shared_bytes, [arguments], self._schedule, buffers)
            result.check()
            self.launched.append(name)
        for tensor, bits in zip(inputs, before, strict=True):
            assert torch.equal(_bits(tensor), bits), f"the {tensor.dtype} input of shape {tuple(tensor.shape)} was written"
        self._addressed = addressed
        return 0


def _poison(tensor: Tensor) -> float | int:
    return torch.nan if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory from its first to its last element, as bytes."""
    distinct = tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]
    return distinct.contiguous().view(torch.uint8)


def why_not() -> str | None:
    """Why the kernels cannot run here; None when they can."""
    if cuda_backend._native is None:
        return cuda_backend.NOT_BUILT
    if not any("_forward_" in name for name in cuda_backend._native.cuda_images()):
        return f"CUDA kernels: {cuda_backend.compiled()}"  # without which the host code plans nothing
    return why_not_buildable()


@functools.cache
def module(name: str) -> Module:
    """The kernel's PTX as the build left it; the kernels of the pre-pass are one file."""
    folder = Path(__file__).resolve().parents[1] / "build" / str(sysconfig.get_config_var("SOABI")) / "cuda"
    return Module((folder / f"{'mask_tiles' if name.startswith('mask_tiles') else name}.ptx").read_text())


def check(problem: Problem, *, schedule: int = 0, stored: float = torch.nan, prepare: bool = False, gpu: Gpu = A100) -> EmulatedGpu:
    """Runs `attention` on the CUDA kernels and holds out and lse against the accuracy rule.

    stored: what absent keys, values and queries hold.
    prepare: the kernels get a PreparedMask, the reference the problem as it is.
    """
    shape = (*problem.query.shape[:3], problem.value.shape[3])
    exact, eager = exact_and_eager(problem, torch.zeros(shape, dtype=problem.query.dtype), None)
    for tensor, rows in zip((problem.query, problem.key, problem.value), (present(problem)[i] for i in (0, 1, 1)), strict=True):
        if 0 not in tensor.stride():
            tensor.masked_fill_(~rows[:, None, :, None], stored)
    with EmulatedGpu(schedule, gpu) as emulated:
        assert cuda_backend.unsupported_reasons(problem) == []
        if prepare:
            out, lse = forward(cuda_backend, prepared(problem, gradients=False))
        else:
            out, lse = attention(*problem.inputs, **options_of(problem), return_lse=True, backend="cuda")
    assert out.stride() == empty_output(problem).stride()
    assert_accurate("out", "out", out, eager["out"], exact["out"])
    assert_lse_accurate(lse, exact["lse"])
    return emulated


def check_call(call: dict[str, Any], *, schedule: int = 0, gpu: Gpu = A100) -> EmulatedGpu:
    """`check` on a call as attention_calls.build takes it."""
    problem, _, _ = build(call, "cpu")
    return check(problem, schedule=schedule, prepare=(CALL | call)["prepare"], gpu=gpu)
