"""docs/support.md is true: each of its lines is a call that the backend refuses for that reason, and no line is missing."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_calls import watched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fused_attention import attention
from fused_attention.kernels import ops
from fused_attention.kernels.backends import BACKENDS
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cpu
from fused_attention.kernels.native import cuda as cuda_backend
from fused_attention.kernels.problem import Problem, uncovered_numbers
from fused_attention.kernels.support import KERNEL, OPERATOR, REFERENCE, TRANSFORMS
from fused_attention.kernels.triton import backend as triton_backend

PAGE = (Path(__file__).resolve().parents[1] / "docs/support.md").read_text()


def problem(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, query: Tensor | None = None, **options: Any) -> Problem:
    if query is None:
        query = torch.zeros(2, 2, 6, head_dim, dtype=dtype)
    key = torch.zeros(2, 2, 12, head_dim, dtype=dtype)
    return make_problem("separate", (query, key, key), **options)


def long_problem() -> Problem:
    key = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16).expand(1, 1, 2**30 + 1, 64)  # takes 128 bytes
    return make_problem("separate", (torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16), key, key))


def quantized(seqlen_q: int) -> Problem:
    numbers, scale = torch.zeros(2, 2, 12, 64, dtype=torch.int8), torch.ones(2, 2, 12)
    query = torch.zeros(2, 2, seqlen_q, 64, dtype=torch.bfloat16)
    return make_problem("separate", (query, numbers, numbers), key_scale=scale, value_scale=scale)


EVERYWHERE: dict[str, Callable[[], Problem]] = {
    "a head_dim above 256": lambda: problem(head_dim=320),
    "scale outside [2^-60, 2^20], or not above 0": lambda: problem(scale=-1.0),
    "softcap outside [2^-60, 2^20]": lambda: problem(softcap=1e30),
}
CALLS: dict[str, dict[str, Callable[[], Problem]]] = {
    "cuda": EVERYWHERE
    | {
        "float32 or float64": lambda: problem(torch.float32),
        "a head_dim that is not divisible by 8": lambda: problem(head_dim=59),
        "rows that are not 16 bytes apart, or a multiple of that": lambda: problem(query=torch.zeros(2, 2, 6, 68).bfloat16()[..., :64]),
        "a first element at another address than a multiple of 16": lambda: problem(
            query=torch.zeros(2 * 2 * 6 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 2, 6, 64)
        ),
        "more than 2^30 queries or keys": long_problem,
        "8-bit keys and values": lambda: quantized(1),
    },
    "triton": EVERYWHERE | {"float64": lambda: problem(torch.float64), "8-bit keys and values": lambda: quantized(1)},
    "cpu": EVERYWHERE
    | {"float64": lambda: problem(torch.float64), "8-bit keys and values for more than two queries": lambda: quantized(3)},
}


def lines(backend: str) -> dict[str, str]:
    """{call: reason} of a backend's table."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{backend}\n")]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {call: reason for call, reason in cells if call != "call"}


@pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
@pytest.mark.parametrize(("backend", "call"), [(backend, call) for backend, calls in CALLS.items() for call in calls])
def test_each_line_is_refused_for_its_reason(backend: str, call: str) -> None:
    assert BACKENDS[backend].uncovered(CALLS[backend][call]()) == [lines(backend)[call]]


@pytest.mark.parametrize("backend", CALLS)
def test_the_page_and_the_calls_are_the_same_list(backend: str) -> None:
    assert set(lines(backend)) == set(CALLS[backend])


@pytest.mark.parametrize(
    ("backend", "functions"),
    [
        ("cuda", (cuda_backend.uncovered, uncovered_numbers)),
        ("triton", (triton_backend.uncovered, uncovered_numbers)),
        ("cpu", (cpu.uncovered, uncovered_numbers)),
    ],
)
def test_no_reason_is_left_out(backend: str, functions: tuple[Callable, ...]) -> None:
    """As many lines as the source has reasons."""
    reasons = sum(inspect.getsource(function).count("reasons.append(") for function in functions)
    assert reasons == len(lines(backend))


def test_the_reference_takes_everything() -> None:
    for calls in CALLS.values():
        for call in calls.values():
            assert BACKENDS["reference"].uncovered(call()) == []


def plain_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 2, 6, 8, dtype=dtype, requires_grad=True) for _ in range(3))


def jagged_inputs() -> tuple[Tensor, ...]:
    leaf = torch.randn(6, 2, 8, requires_grad=True)
    return (torch.nested.nested_tensor_from_jagged(leaf, torch.tensor([0, 2, 6])).transpose(1, 2),) * 3


def one_process_mesh(inputs: tuple[Tensor, ...], folder: Path) -> Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        return attention(*(distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in inputs)).full_tensor()
    finally:
        torch.distributed.destroy_process_group()


def without_gradients(inputs: tuple[Tensor, ...]) -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            attention(*inputs)


def second_derivatives(inputs: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(attention(*inputs).sum(), inputs, create_graph=True)


def dual_numbers(inputs: tuple[Tensor, ...]) -> None:
    with forward_ad.dual_level():
        attention(forward_ad.make_dual(inputs[0].detach(), inputs[1].detach()), *inputs[1:])


def batched_gradients(inputs: tuple[Tensor, ...]) -> None:
    out = attention(*inputs)
    torch.autograd.grad(out, inputs, torch.ones(3, *out.shape), is_grads_batched=True)


def checkpointed(inputs: tuple[Tensor, ...], **options: Any) -> None:
    for use_reentrant in (False,) if options else (False, True):
        checkpoint(attention, *inputs, use_reentrant=use_reentrant, **options).sum().backward()


def under(context: Any, inputs: tuple[Tensor, ...]) -> None:
    with context:
        attention(*inputs).float().sum().backward()


def functorch(inputs: tuple[Tensor, ...]) -> None:
    torch.func.grad(lambda query: attention(query, *inputs[1:]).sum())(inputs[0])
    torch.vmap(lambda query: attention(query, *inputs[1:]))(inputs[0][None])
    torch.func.jvp(lambda query: attention(query, *inputs[1:]), inputs[:1], inputs[1:2])


class Attend(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value)


def fake(inputs: tuple[Tensor, ...]) -> None:
    with FakeTensorMode() as mode:
        attention(*map(mode.from_tensor, inputs))


compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
SELECTIVE = {"context_fn": partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)}
TRANSFORMED: dict[str, Callable[[tuple[Tensor, ...], Path], Any]] = {
    "no gradient, inference mode": lambda inputs, _: without_gradients(inputs),
    "gradients": lambda inputs, _: attention(*inputs).sum().backward(),
    "derivatives of derivatives, of any order": lambda inputs, _: second_derivatives(inputs),
    "forward-mode AD": lambda inputs, _: dual_numbers(inputs),
    "torch.func: vmap, grad, vjp, jvp, jacrev, jacfwd, hessian": lambda inputs, _: functorch(inputs),
    "torch.autograd.grad with is_grads_batched": lambda inputs, _: batched_gradients(inputs),
    "torch.compile(fullgraph=True), sizes may change": lambda inputs, _: compiled(attention)(*inputs).sum().backward(),
    "torch.func inside torch.compile": lambda inputs, _: compiled(functorch)(inputs),
    "torch.export, AOTInductor": lambda inputs, _: torch.export.export(Attend(), inputs).module()(*inputs),
    "checkpointing, reentrant or not": lambda inputs, _: checkpointed(inputs),
    "selective checkpointing": lambda inputs, _: checkpointed(inputs, **SELECTIVE),
    "autocast": lambda inputs, _: under(torch.autocast("cpu", torch.bfloat16), inputs),
    "FLOP counter": lambda inputs, _: under(FlopCounterMode(display=False), inputs),
    "fake tensors": lambda inputs, _: fake(inputs),
    "meta tensors": lambda inputs, _: attention(*[tensor.to("meta") for tensor in inputs]),
    "nested tensors, layout torch.jagged": lambda inputs, _: attention(*jagged_inputs()),
    "DTensor, sharded over batch or heads": one_process_mesh,
}


@pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_runs_is_what_the_table_of_transforms_says(transform: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def noted(what: str, function: Callable) -> Callable:
        return lambda *arguments: seen.append(what) or function(*arguments)

    if transform.startswith("DTensor") and not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    if "compile" not in transform and "export" not in transform:  # of these the operators in the graph tell, and the reference is none
        for name in ops._REGISTERED:
            monkeypatch.setitem(ops._REGISTERED, name, noted(OPERATOR, ops._REGISTERED[name]))
        monkeypatch.setattr(ops, "attention_reference", noted(REFERENCE, ops.attention_reference))
    watching = {"prepare": watched(cpu.prepare, lambda: seen.append(KERNEL)), "backward": noted(KERNEL, cpu.backward)}
    monkeypatch.setitem(BACKENDS, "cpu", types.SimpleNamespace(**vars(cpu) | watching))
    TRANSFORMED[transform](plain_inputs(), tmp_path)
    if "inside torch.compile" in transform:
        assert KERNEL not in seen
    elif "compile" in transform or "export" in transform:
        assert KERNEL in seen
    elif TRANSFORMS[transform] == REFERENCE:
        assert REFERENCE in seen
    elif TRANSFORMS[transform] == OPERATOR:
        assert seen[0] == OPERATOR
    else:
        assert set(seen) == {KERNEL}
