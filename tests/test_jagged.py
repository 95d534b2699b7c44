"""Nested tensors of layout torch.jagged: each of their sequences gets what it would get alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from fused_attention import attention, attention_decode, attention_varlen, prepare_mask, scaled_dot_product_attention
from fused_attention.kernels.native import cpu

needs_cpu_kernels = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]

LENGTHS_Q, LENGTHS_K = (5, 0, 3, 17), (4, 3, 0, 21)
STATE = torch.tensor([3, 4])
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bottom right": {"is_causal": "bottom_right"},
    "window, softcap, scale": {"window": (2, 1), "softcap": 1.5, "scale": 0.8},
    "slopes and sinks": {"alibi_slopes": torch.linspace(0, 1, 16).view(4, 4), "sinks": torch.linspace(-1, 1, 4)},
    "query lengths": {"query_lengths": torch.tensor([2, 1, 9, 11])},
}


def nested(lengths: tuple[int, ...], num_heads: int, head_dim: int, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B, H, j, D), from a leaf (T, H, D)."""
    leaf = torch.randn(sum(lengths), num_heads, head_dim, requires_grad=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0) if offsets is None else offsets
    return torch.nested.nested_tensor_from_jagged(leaf, offsets).transpose(1, 2), leaf


def inputs() -> tuple[list[Tensor], list[Tensor]]:
    query, key = nested(LENGTHS_Q, 4, 8), nested(LENGTHS_K, 2, 8)
    value = nested(LENGTHS_K, 2, 6, key[0].offsets())
    tensors, leaves = zip(query, key, value, strict=True)
    return list(tensors), list(leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_sequence_is_alone(feature: str, backend: str) -> None:
    tensors, leaves = inputs()
    out, lse = attention(*tensors, **FEATURES[feature], return_lse=True, backend=backend)
    assert out.layout is lse.layout is torch.jagged
    assert out.shape == (4, 4, tensors[0].shape[2], 6)  # the query's own ragged size
    assert lse.shape == (4, 4, tensors[0].shape[2])
    results = (out.unbind(), lse.unbind())
    gradients = torch.autograd.grad(
        sum((part * part).sum() for part in results[0]) + sum(part[part.isfinite()].sum() for part in results[1]), leaves
    )
    expected_loss: Any = 0.0
    parts = [tensor.unbind() for tensor in tensors]
    for index, (query, key, value) in enumerate(zip(*parts, strict=True)):
        options = dict(FEATURES[feature])
        if "query_lengths" in options:
            options["query_lengths"] = options["query_lengths"][index : index + 1]
        if "alibi_slopes" in options:
            options["alibi_slopes"] = options["alibi_slopes"][index]
        expected, expected_lse = attention(query[None], key[None], value[None], **options, return_lse=True, backend="reference")
        assert_close(results[0][index], expected[0])
        assert_close(results[1][index], expected_lse[0])
        expected_loss = expected_loss + expected.square().sum() + expected_lse[expected_lse.isfinite()].sum()
    assert_close(gradients, torch.autograd.grad(expected_loss, leaves), rtol=1e-4, atol=1e-5)


def test_it_is_torchs() -> None:
    query, _ = nested((5, 2, 9), 4, 8)
    for options in ({}, {"scale": 0.3}):
        ours, theirs = (
            scaled_dot_product_attention(query, query, query, **options),
            F.scaled_dot_product_attention(query, query, query, **options),
        )
        assert ours.shape == theirs.shape
        assert_close(ours.transpose(1, 2).values(), theirs.transpose(1, 2).values())


@needs_cpu_kernels
def test_results_are_nested_as_modules_need_them() -> None:
    """In and out through linear layers and a residual sum, whose ragged size must be the query's."""
    x = torch.nested.nested_tensor_from_jagged(torch.randn(10, 16), torch.tensor([0, 3, 10]))
    projection, output = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in projection(x).chunk(3, -1))
        return x + output(attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))

    out = forward(x)
    for index, part in enumerate(x.unbind()):
        q, k, v = projection(part).view(-1, 3, 2, 8).permute(1, 2, 0, 3)
        assert_close(out.unbind()[index], part + output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)))
    out.values().square().sum().backward()
    assert projection.weight.grad.abs().sum() > 0
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x).values(), out.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_with_something_between_them(backend: str) -> None:
    """torch.nested.narrow: parts of padded rows, where they lie."""
    starts, lengths = torch.tensor([0, 2]), torch.tensor([3, 4])
    padded = [torch.randn(2, 6, 4, 8, requires_grad=True) for _ in range(2)]
    query = torch.nested.narrow(padded[0], 1, starts, lengths, layout=torch.jagged).transpose(1, 2)
    key = torch.nested.narrow(padded[1], 1, starts, lengths, layout=torch.jagged).transpose(1, 2)
    out = attention(query, key, key, backend=backend)
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        q, k = (tensor[index, start : start + length].transpose(0, 1)[None] for tensor in padded)
        assert_close(out.unbind()[index], attention(q, k, k)[0])
    gradient = torch.autograd.grad(sum(part.square().sum() for part in out.unbind()), padded[1])[0]
    assert gradient[0, :3].abs().sum() > 0
    assert gradient[0, 3:].abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_counts_as_in_packed_sequences(backend: str) -> None:
    tensors, leaves = inputs()
    out = attention(*tensors, dropout_p=0.4, rng_state=STATE, backend=backend)
    offsets = [tensor.offsets() for tensor in tensors[:2]]
    expected = attention_varlen(*leaves, *offsets, 17, 21, dropout_p=0.4, rng_state=STATE)
    assert_close(out.transpose(1, 2).values(), expected)


def test_tensors_of_equal_lengths_that_were_made_apart() -> None:
    query, key, value = nested(LENGTHS_Q, 4, 8)[0], nested(LENGTHS_K, 4, 8)[0], nested(LENGTHS_K, 4, 6)[0]
    together = nested(LENGTHS_K, 4, 6, key.offsets())[0]
    together.values().data.copy_(value.values())
    for function in (attention, scaled_dot_product_attention):
        out = function(query, key, value)
        assert out.shape[2] == query.shape[2]
        assert_close(out.values(), function(query, key, together).values())


def test_a_bound_above_all_tokens_costs_nothing() -> None:
    values, offsets = torch.randn(10, 16, dtype=torch.float64), torch.tensor([0, 3, 10])
    generous = torch.nested.nested_tensor_from_jagged(values, offsets, min_seqlen=0, max_seqlen=10**6).unflatten(-1, (2, 8)).transpose(1, 2)
    close = torch.nested.nested_tensor_from_jagged(values, offsets).unflatten(-1, (2, 8)).transpose(1, 2)
    assert_close(attention(generous, generous, generous).values(), attention(close, close, close).values())


def test_what_is_refused() -> None:
    (query, key, value), leaves = inputs()
    for name, argument in {"attn_mask": torch.ones(5, 5), "key_mask": torch.ones(4, 4) > 0, "key_lengths": torch.ones(4).int()}.items():
        with pytest.raises(ValueError, match=f"{name} must be None for nested tensors"):
            attention(query, key, value, **{name: argument})
    with pytest.raises(ValueError, match="attn_mask must be None for nested tensors"):
        attention(query, key, value, attn_mask=prepare_mask(is_causal=True, seqlen_q=5, seqlen_k=5))
    with pytest.raises(TypeError, match="key must be a nested tensor of layout torch.jagged, as the others are, got layout torch.strided"):
        attention(query, leaves[1], value)
    with pytest.raises(TypeError, match="key must be a dense tensor, got a nested one, layout torch.jagged"):
        attention(torch.randn(4, 4, 5, 8), key, value)
    with pytest.raises(ValueError, match="value must have the offsets of key"):
        attention(query, key, nested((4, 3, 1, 20), 2, 6)[0])
    with pytest.raises(ValueError, match="key must have the batch size of query, 4, got 2"):
        attention(query, *[nested((2, 3), 2, 8)[0]] * 2)
    with pytest.raises(ValueError, match=r"query must have shape \(batch, num_heads, ragged seqlen, head_dim\)"):
        attention(query.transpose(1, 2), key, value)
    with pytest.raises(ValueError, match="key must have the head_dim of query, 8, got 6"):
        attention(query, value, value)
    with pytest.raises(TypeError, match="query must be a dense tensor, got a nested one"), torch.no_grad():
        attention_decode(query, key, value, torch.ones(4).int())


def test_those_made_apart_under_compile() -> None:
    """A compiled graph cannot compare their offsets, so the call runs outside it; torch compiles no nested tensors on a CPU."""
    query, key, value = (nested((3, 7), 4, 8)[0] for _ in range(3))
    expected = attention(query, key, value).values()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="value must have the offsets of key"):
        torch.compile(attention, backend="eager", fullgraph=True)(query, key, value)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(F.scaled_dot_product_attention, backend="eager", fullgraph=True)(query, key, value)
    torch._dynamo.reset()
    assert_close(torch.compile(attention, backend="eager")(query, key, value).values(), expected)
