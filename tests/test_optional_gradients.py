"""Gradients of a float attn_mask, of alibi_slopes and of sinks, through every way to a kernel that has them."""

from __future__ import annotations

from typing import Any

import pytest
import reference_kernels
import torch
from torch import Tensor

from fused_attention.kernels import ops
from fused_attention.kernels.attention import attention, attention_kv_packed, attention_qkv_packed
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.problem import Gradients

pytestmark = pytest.mark.usefixtures("kernels_by_reference", "poisoned_memory")

BATCH, NUM_HEADS, SEQLEN, HEAD_DIM = 2, 4, 6, 8
CALLS = {"separate": attention, "qkv": attention_qkv_packed, "kv": attention_kv_packed}
INPUT_SHAPES = {
    "separate": [(BATCH, NUM_HEADS, SEQLEN, HEAD_DIM), *[(BATCH, 2, SEQLEN, HEAD_DIM)] * 2],
    "qkv": [(BATCH, SEQLEN, 3, NUM_HEADS, HEAD_DIM)],
    "kv": [(BATCH, NUM_HEADS, SEQLEN, HEAD_DIM), (BATCH, SEQLEN, 2, NUM_HEADS, HEAD_DIM)],
}
OPTIONAL = {
    "mask": {"attn_mask": (BATCH, NUM_HEADS, SEQLEN, SEQLEN)},
    "mask for all": {"attn_mask": (SEQLEN, SEQLEN)},
    "mask per key": {"attn_mask": (BATCH, 1, 1, SEQLEN)},
    "slopes": {"alibi_slopes": (NUM_HEADS,)},
    "slopes per batch": {"alibi_slopes": (BATCH, NUM_HEADS)},
    "sinks": {"sinks": (NUM_HEADS,)},
    "all three": {"attn_mask": (1, NUM_HEADS, SEQLEN, SEQLEN), "alibi_slopes": (NUM_HEADS,), "sinks": (NUM_HEADS,)},
}
all_optional_tensors = pytest.mark.parametrize("case", OPTIONAL)


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "operator":
        monkeypatch.setattr(ops, "_takes_cheap_path", lambda problem: False)
    return request.param


def leaves_of(layout: str, case: str, inputs_require_grad: bool = True) -> tuple[list[Tensor], dict[str, Tensor]]:
    inputs = [torch.randn(shape, requires_grad=inputs_require_grad) for shape in INPUT_SHAPES[layout]]
    return inputs, {name: torch.randn(shape, requires_grad=True) for name, shape in OPTIONAL[case].items()}


def loss(layout: str, inputs: list[Tensor], optional_tensors: dict[str, Tensor], **options: Any) -> Tensor:
    out, lse = CALLS[layout](*inputs, **optional_tensors, is_causal=True, return_lse=True, **options)
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + lse[0].square().sum()


@all_optional_tensors
@pytest.mark.parametrize("layout", CALLS)
@pytest.mark.parametrize("path", ["cheap", "operator"], indirect=True)
def test_first_derivatives(path: str, layout: str, case: str) -> None:
    inputs, optional_tensors = leaves_of(layout, case)
    leaves = [*inputs, *optional_tensors.values()]
    ours = torch.autograd.grad(loss(layout, inputs, optional_tensors, backend="triton"), leaves)
    expected = torch.autograd.grad(loss(layout, inputs, optional_tensors, backend="reference"), leaves)
    torch.testing.assert_close(ours, expected)


@all_optional_tensors
def test_when_only_they_require_gradients(case: str) -> None:
    inputs, optional_tensors = leaves_of("separate", case, inputs_require_grad=False)
    leaves = list(optional_tensors.values())
    ours = torch.autograd.grad(loss("separate", inputs, optional_tensors), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(loss("separate", inputs, optional_tensors, backend="reference"), leaves))


@all_optional_tensors
@pytest.mark.parametrize("path", ["cheap", "operator"], indirect=True)
def test_second_derivatives(path: str, case: str) -> None:
    inputs, optional_tensors = leaves_of("separate", case)
    leaves = [*inputs, *optional_tensors.values()]

    def second(backend: str) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss("separate", inputs, optional_tensors, backend=backend), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    for ours, expected in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


@all_optional_tensors
def test_compiled(case: str) -> None:
    inputs, optional_tensors = leaves_of("separate", case)
    leaves = [*inputs, *optional_tensors.values()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled("separate", inputs, optional_tensors), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(loss("separate", inputs, optional_tensors, backend="reference"), leaves))


@pytest.mark.parametrize(("layout", "case"), [*(("separate", case) for case in OPTIONAL), ("qkv", "all three"), ("kv", "all three")])
def test_opcheck(layout: str, case: str) -> None:
    inputs, optional_tensors = leaves_of(layout, case)
    problem = make_problem(layout, tuple(inputs), **optional_tensors)
    torch.library.opcheck(getattr(torch.ops.fused_attention, f"attention_{layout}").default, (*problem.op_arguments(), "triton"))


def test_only_wanted_gradients_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backward = reference_kernels.backward

    def spy(*arguments: Any) -> None:
        asked.append([name for name in reference_kernels.NAMES if getattr(arguments[5], name) is not None])
        backward(*arguments)

    monkeypatch.setattr(reference_kernels, "backward", spy)
    inputs, optional_tensors = leaves_of("separate", "all three")
    loss("separate", inputs, optional_tensors).backward()
    optional_tensors["attn_mask"].requires_grad_(False)
    torch.autograd.grad(loss("separate", inputs, optional_tensors), inputs[0])
    optional_tensors["attn_mask"] = optional_tensors["attn_mask"] > 0
    loss("separate", inputs, optional_tensors).backward()
    optional_tensors["sinks"] = optional_tensors["sinks"].detach()
    loss("separate", inputs, optional_tensors).backward()
    assert asked == [["attn_mask", "alibi_slopes", "sinks"], *[["alibi_slopes", "sinks"]] * 2, ["alibi_slopes"]]


@pytest.mark.parametrize("path", ["cheap", "operator"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_they_keep_their_dtype_and_get_contiguous_buffers(dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = []
    backward = reference_kernels.backward
    monkeypatch.setattr(reference_kernels, "backward", lambda *arguments: buffers.append(arguments[5]) or backward(*arguments))
    inputs = [torch.randn(shape, requires_grad=True) for shape in INPUT_SHAPES["separate"]]
    leaf = torch.randn(SEQLEN, NUM_HEADS, dtype=dtype, requires_grad=True)
    mask = leaf.t()[:, :, None].expand(BATCH, NUM_HEADS, SEQLEN, SEQLEN)  # strides in no order, 0 among them
    sinks = torch.randn(NUM_HEADS, dtype=dtype, requires_grad=True)
    attention(*inputs, attn_mask=mask, sinks=sinks).sum().backward()
    (gradients,) = buffers
    assert isinstance(gradients, Gradients)
    assert (gradients.attn_mask.shape, gradients.attn_mask.dtype) == (mask.shape, dtype)
    assert gradients.attn_mask.is_contiguous()
    assert leaf.grad.shape == leaf.shape
    assert sinks.grad.dtype == leaf.grad.dtype == dtype
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("path", ["cheap", "operator"], indirect=True)
def test_batched_gradients(path: str) -> None:
    inputs, optional_tensors = leaves_of("separate", "all three")
    leaves = [*inputs, *optional_tensors.values()]
    out = attention(*inputs, **optional_tensors)
    batch = torch.randn(3, *out.shape)
    ours = torch.autograd.grad(out, leaves, batch, is_grads_batched=True, retain_graph=True)
    each = zip(*(torch.autograd.grad(out, leaves, dout, retain_graph=True) for dout in batch), strict=True)
    for gradients, expected in zip(ours, each, strict=True):
        torch.testing.assert_close(gradients, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_tensor_that_depends_on_another_input() -> None:
    """Each gets the gradient of its own part only, also where the graph recomputes the reference."""
    query = torch.randn(1, 2, 4, 4, requires_grad=True)

    def derivatives(backend: str) -> tuple[Tensor, Tensor]:
        mask = query @ query.transpose(-1, -2)
        out = attention(query, query, query, attn_mask=mask, sinks=mask[0, :, 0, 0], backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), query)[0]

    torch.testing.assert_close(derivatives("triton"), derivatives("reference"), rtol=1e-4, atol=1e-4)
