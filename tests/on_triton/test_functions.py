"""The public functions on the Triton kernels: autograd, packed layouts, packed sequences, decoding, weights, and what routing says."""

from __future__ import annotations

import pytest
import torch
from attention_calls import DTYPES, build, guarded, options_of, watched
from function_calls import (
    DECODE,
    EVERYTHING,
    REPEATED,
    STARTS,
    VARLEN,
    WEIGHTS,
    check_autograd,
    check_decoding,
    check_only_the_gradients_that_are_asked_for,
    check_packed_sequences,
    check_packed_sequences_with_everything,
    check_repeated_call,
    check_starts,
    check_weights,
    leaves_of,
)

from fused_attention import explain
from fused_attention.kernels.attention import attention, attention_kv_packed, attention_qkv_packed
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.ops import forward
from fused_attention.kernels.triton import backend as triton_backend
from fused_attention.kernels.triton import decode as triton_decode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"is_causal": "top_left"}, EVERYTHING], ids=["causal", "everything"])
def test_autograd(options: dict, dtype: torch.dtype, device: str) -> None:
    check_autograd("triton", options, dtype, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", sorted(set(REPEATED) - {"key_mask"}))
def test_repeated_calls(call: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_repeated_call("triton", REPEATED[call], dtype, device, monkeypatch)


def test_only_the_gradients_that_are_asked_for(device: str) -> None:
    check_only_the_gradients_that_are_asked_for("triton", device)


def test_derivatives_of_derivatives(device: str) -> None:
    """They run through the reference."""
    problem, dout, _ = build(EVERYTHING | {"seqlens": (20, 17)}, device)
    results = []
    for backend in ("triton", "reference"):
        leaves = leaves_of(problem)
        out = attention(**options_of(problem) | leaves, backend=backend)
        first = torch.autograd.grad(out, list(leaves.values()), dout, create_graph=True)
        penalty = sum((gradient**2).sum() for gradient in first)
        results.append(torch.autograd.grad(penalty, list(leaves.values())))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["qkv", "kv"])
def test_packed_projections(layout: str, dtype: torch.dtype, device: str) -> None:
    """One packed gradient, the same numbers as from tensors of their own."""
    projection = torch.randn(2, 40, 3, 2, 24).to(device, dtype)
    dout = torch.randn(2, 2, 40, 24).to(device, dtype)
    options = {"is_causal": True, "key_mask": torch.rand(2, 40, device=device) > 0.3, "backend": "triton"}
    query, key, value = (tensor.transpose(1, 2).clone().requires_grad_() for tensor in projection.unbind(2))
    expected = attention(query, key, value, **options)
    expected.backward(dout)
    gradients = torch.stack([tensor.grad.transpose(1, 2) for tensor in (query, key, value)], dim=2)
    if layout == "qkv":
        leaf = projection.clone().requires_grad_()
        out = attention_qkv_packed(leaf, **options)
        (packed_gradient,) = torch.autograd.grad(out, leaf, dout)
    else:
        leaves = (query.detach().clone().requires_grad_(), projection[:, :, 1:].clone().requires_grad_())
        out = attention_kv_packed(*leaves, **options)
        query_gradient, packed_gradient = torch.autograd.grad(out, leaves, dout)
        assert torch.equal(query_gradient.transpose(1, 2), gradients[:, :, 0])
        gradients = gradients[:, :, 1:]
    assert torch.equal(out, expected)
    assert torch.equal(packed_gradient, gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VARLEN)
def test_packed_sequences(case: str, dtype: torch.dtype, device: str) -> None:
    check_packed_sequences("triton", case, dtype, device)


@pytest.mark.parametrize("starts", STARTS, ids=str)
def test_starts_of_packed_sequences_never_lead_out_of_memory(starts: list[int], device: str) -> None:
    check_starts("triton", starts, device)


def test_packed_sequences_with_everything(device: str) -> None:
    check_packed_sequences_with_everything("triton", device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DECODE)
def test_decoding(case: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(triton_decode, "prepare", watched(triton_decode.prepare, lambda: calls.append(1)))
    check_decoding("triton", case, dtype, device)
    assert calls == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average_heads", [False, True])
@pytest.mark.parametrize("options", WEIGHTS, ids=str)
def test_attention_weights(options: dict, average_heads: bool, dtype: torch.dtype, device: str) -> None:
    check_weights(triton_backend, options, average_heads, dtype, device)


def test_the_operator(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # guards around fresh memory show in its storage offset, which opcheck compares
    problem, _, _ = build(EVERYTHING | {"seqlens": (20, 17)}, device)
    for name, leaf in leaves_of(problem).items():
        setattr(problem, name, leaf)
    problem.inputs = (problem.query, problem.key, problem.value)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fused_attention.attention_separate.default, (*problem.op_arguments(), "triton"), test_utils=checks)


@pytest.mark.parametrize(
    ("tensor_options", "options", "reason"),
    [
        ({"dtype": torch.float64}, {}, "dtype torch.float64 is not covered"),
        ({}, {"scale": -1.0}, "scale must be in"),
        ({"size": (1, 1, 8, 320)}, {}, "head_dim 320 is above 256"),
    ],
    ids=["float64", "negative scale", "head_dim"],
)
def test_what_is_not_covered_is_said(tensor_options: dict, options: dict, reason: str, device: str) -> None:
    query = torch.randn(**{"size": (1, 1, 8, 16), "device": device} | tensor_options)
    assert reason in str(explain(query, query, query, **options).reasons["triton"])
    with pytest.raises(ValueError, match=f"backend 'triton' cannot run this call: .*{reason}"):
        attention(query, query, query, **options, backend="triton")


def test_routing_takes_the_gpu_and_never_the_interpreter(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 1, 8, 16, device=device)
    calls = []
    monkeypatch.setattr(triton_backend, "prepare", watched(triton_backend.prepare, lambda: calls.append(1)))
    attention(query, query, query)
    assert len(calls) == (device == "cuda")
    assert (explain(query, query, query).backend == "triton") == (device == "cuda")
    attention(query, query, query, backend="triton")
    assert len(calls) == 1 + (device == "cuda")


def test_decoding_on_one_problem_equals_the_other_forward(device: str) -> None:
    """The split kernel and the one for many rows are two programs for one formula."""
    tensors = [guarded(torch.randn(2, 2, length, 24).to(device), "batch first")[0] for length in (4, 150, 150)]
    problem = make_problem("separate", tuple(tensors), is_causal="bottom_right")
    assert triton_decode.takes(problem)
    ours, other = (forward(kernels, problem) for kernels in (triton_decode, triton_backend._module("forward")))
    for left, right in zip(ours, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
