"""Which backend runs, and what is said about the others."""

from __future__ import annotations

import os
import warnings

import pytest
import reference_kernels
import torch
from attention_calls import watched
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_attention.kernels import routing
from fused_attention.kernels.attention import attention, attention_weights, explain
from fused_attention.kernels.native import cpu
from fused_attention.kernels.triton import backend as triton_backend

needs_cpu_kernels = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")


def tensors(head_dim: int = 16, **options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(1, 2, 8, head_dim, **options) for _ in range(3))


@needs_cpu_kernels
def test_a_covered_call_runs_on_the_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cpu, "prepare", watched(cpu.prepare, lambda: calls.append(1)))
    assert explain(*tensors()).backend == "cpu"
    attention(*tensors())
    assert calls == [1]
    attention(*tensors(), backend="reference")
    assert calls == [1]


REASONS = {
    "float64": ({}, {"dtype": torch.float64}, "dtype torch.float64 is not covered"),
    "head_dim": ({}, {"head_dim": 320}, "head_dim 320 is above 256"),
    "negative scale": ({"scale": -1.0}, {}, "scale must be in"),
    "scale below float32's range": ({"scale": 1e-50}, {}, "scale must be in"),
    "scale whose products leave float32's range": ({"scale": 3e38}, {}, "scale must be in"),
    "large softcap": ({"softcap": 1e30}, {}, "softcap must be in"),
    "small softcap": ({"softcap": 1e-30}, {}, "softcap must be in"),
}


@needs_cpu_kernels
@pytest.mark.parametrize("case", REASONS)
def test_what_the_cpu_kernels_do_not_cover_runs_on_the_reference(case: str) -> None:
    options, tensor_options, reason = REASONS[case]
    explanation = explain(*tensors(**tensor_options), **options)
    assert explanation.backend == "reference"
    assert reason in str(explanation.reasons["cpu"])
    attention(*tensors(**tensor_options), **options)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call"):
        attention(*tensors(**tensor_options), **options, backend="cpu")


def test_a_backend_that_is_not_there_says_so() -> None:
    with pytest.raises(ValueError, match="backend 'cuda' cannot run this call: "):
        attention(*tensors(), backend="cuda")
    assert routing.backend_status()["cuda"] is not None


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="the interpreter takes CPU tensors")
def test_triton_says_that_it_wants_a_gpu() -> None:
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call: the tensors are on cpu, not on a GPU"):
        attention(*tensors(), backend="triton")
    assert explain(*tensors(dtype=torch.float64)).reasons["triton"] == [
        "the tensors are on cpu, not on a GPU",
        "dtype torch.float64 is not covered (float32, bfloat16 and float16 are)",
    ]
    assert routing.backend_status()["triton"] == triton_backend.status()


@pytest.mark.usefixtures("kernels_by_reference")
def test_triton_comes_before_the_cpu_kernels_and_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    explanation = explain(*tensors(), softcap=2.0)
    assert explanation.backend == "triton"
    assert explanation.reasons["reference"] == ["triton comes first"]
    calls = []
    monkeypatch.setattr(reference_kernels, "prepare", watched(reference_kernels.prepare, lambda: calls.append(1)))
    attention(*tensors(), softcap=2.0)
    assert calls == [1]


@pytest.mark.usefixtures("kernels_by_reference")
def test_weights_come_from_the_kernel_and_their_gradient_from_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = reference_kernels.attention_weights
    monkeypatch.setattr(reference_kernels, "attention_weights", lambda *arguments: calls.append(1) or kernel(*arguments))
    query, key, value = tensors()
    _, lse = attention(query, key, value, return_lse=True)
    expected = torch.softmax(query @ key.transpose(-1, -2) / 4, dim=-1)
    torch.testing.assert_close(attention_weights(query, key, lse), expected)
    assert calls == [1]
    leaf = query.clone().requires_grad_()
    weights = attention_weights(leaf, key, lse, average_heads=True)
    torch.testing.assert_close(weights, expected.mean(1))
    assert calls == [1, 1]
    ours = torch.autograd.grad(weights.square().sum(), leaf, create_graph=True)[0]
    second = torch.autograd.grad(ours.square().sum(), leaf)[0]
    formula = torch.exp(leaf @ key.transpose(-1, -2) / 4 - lse[..., None]).mean(1)
    first = torch.autograd.grad(formula.square().sum(), leaf, create_graph=True)[0]
    torch.testing.assert_close(ours, first)
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), leaf)[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        attention_weights(query, key, lse)
    torch.func.vmap(lambda query: attention_weights(query, key, lse))(query[None])
    torch.compile(attention_weights, fullgraph=True, backend="aot_eager")(query, key, lse)
    assert calls == [1, 1]


@needs_cpu_kernels
def test_a_missing_extension_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.setattr(cpu, "NOT_BUILT", "the compiled extension is not available", raising=False)
    assert explain(*tensors()).backend == "reference"
    assert routing.backend_status()["cpu"] == "the compiled extension is not available"


def test_a_large_unfused_call_warns() -> None:
    query = torch.zeros(1, 1, 2**11, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="(?s)attention runs unfused.*not cpu"):
        attention(query, query, query)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(query[:, :, :64], query[:, :, :64], query[:, :, :64])
        attention(query, query, query, backend="reference")


def test_explanation_reads_well() -> None:
    text = str(explain(*tensors(dtype=torch.float64)))
    assert text.startswith("reference runs\n  not cuda: ")


def test_asking_does_not_advance_the_generator() -> None:
    query = torch.randn(1, 1, 4, 8)
    state = torch.get_rng_state()
    explain(query, query, query, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


EDGES = {
    "smallest scale": {"scale": 2.0**-60},
    "largest scale": {"scale": 2.0**20},
    "smallest quotient": {"scale": 2.0**-60, "softcap": 2.0**20},
    "largest quotient": {"scale": 2.0**20, "softcap": 2.0**-60},
    "smallest product": {"softcap": 2.0**-60},
    "largest product": {"softcap": 2.0**20},
    "dropout below float32": {"dropout_p": 1e-300, "rng_state": torch.tensor([3, 4])},
    "scale that runs on the reference": {"scale": 1e-50},
    "softcap that runs on the reference": {"softcap": 1e30},
}


@pytest.mark.parametrize("case", EDGES)
def test_numbers_at_the_edge_of_what_kernels_take_mean_what_they_do_in_float64(case: str) -> None:
    torch.manual_seed(0)
    inputs = tensors(dtype=torch.float64)
    expected_inputs = [tensor.float().double().requires_grad_() for tensor in inputs]
    expected = attention(*expected_inputs, **EDGES[case], backend="reference")
    given = [tensor.float().requires_grad_() for tensor in inputs]
    out = attention(*given, **EDGES[case])
    assert isinstance(out, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(out.square().sum(), given)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.square().sum(), expected_inputs), strict=True):
        # What float32 rounds of a score, the scale makes larger in a gradient.
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-4 * max(1.0, EDGES[case].get("scale", 1.0)))
