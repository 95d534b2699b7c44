"""Decoding from a cache: the causal attention of the newest tokens, without a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.kernels.attention import attention, attention_decode
from fused_attention.kernels.native import cpu

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(cpu.status() is not None, reason=f"no kernels: {cpu.status()}")),
]
BATCH, NUM_HEADS, CAPACITY = 3, 4, 20
LENGTHS = torch.tensor([7, 20, 3])


def tensors(seqlen_q: int, num_heads_kv: int = NUM_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    cache = [torch.randn(BATCH, num_heads_kv, CAPACITY, 8) for _ in range(2)]
    return torch.randn(BATCH, NUM_HEADS, seqlen_q, 8), cache[0], cache[1]


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": (4, 0)},
    "softcap and scale": {"softcap": 2.0, "scale": 0.5},
    "slopes and sinks": {"alibi_slopes": torch.rand(BATCH, NUM_HEADS), "sinks": torch.randn(NUM_HEADS)},
    "key_mask": {"key_mask": torch.arange(CAPACITY).expand(BATCH, -1) % 3 > 0},
    "grouped heads": {},
}


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_sequence_continues_its_own_keys(feature: str, seqlen_q: int) -> None:
    query, keys, values = tensors(seqlen_q, num_heads_kv=2 if feature == "grouped heads" else NUM_HEADS)
    out, lse = attention_decode(query, keys, values, LENGTHS, **FEATURES[feature], return_lse=True)
    for index, length in enumerate(LENGTHS.tolist()):
        options = dict(FEATURES[feature])
        if "key_mask" in options:
            options["key_mask"] = options["key_mask"][index : index + 1, :length]
        if "alibi_slopes" in options:
            options["alibi_slopes"] = options["alibi_slopes"][index]
        parts = (query[index : index + 1], keys[index : index + 1, :, :length], values[index : index + 1, :, :length])
        expected, expected_lse = attention(*parts, is_causal="bottom_right", **options, return_lse=True, backend="reference")
        torch.testing.assert_close(out[index : index + 1], expected)
        torch.testing.assert_close(lse[index : index + 1], expected_lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_past_the_lengths_never_matters(backend: str) -> None:
    query, keys, values = tensors(1)
    expected = attention_decode(query, keys, values, LENGTHS, backend=backend)
    for index, length in enumerate(LENGTHS.tolist()):
        keys[index, :, length:], values[index, :, length:] = torch.nan, torch.inf
    assert torch.equal(attention_decode(query, keys, values, LENGTHS, backend=backend), expected)


def test_it_records_no_gradient_and_says_so() -> None:
    query, keys, values = tensors(1)
    sinks = torch.zeros(NUM_HEADS, requires_grad=True)
    for changes in ({"query": query.clone().requires_grad_()}, {"value_cache": values.clone().requires_grad_()}, {"sinks": sinks}):
        call = {"query": query, "key_cache": keys, "value_cache": values, "key_lengths": LENGTHS} | changes
        with pytest.raises(RuntimeError, match=r"attention_decode has no gradient.*torch.no_grad\(\)"):
            attention_decode(**call)
        with torch.no_grad():
            attention_decode(**call)


def test_bad_input() -> None:
    query, keys, values = tensors(1)
    with pytest.raises(TypeError, match="key_lengths must be a torch.Tensor, got NoneType"):
        attention_decode(query, keys, values, None)
    with pytest.raises(ValueError, match="key_lengths must have shape"):
        attention_decode(query, keys, values, LENGTHS[:2])
    with pytest.raises(ValueError, match="backend 'cuda' cannot run this call"):
        attention_decode(query, keys, values, LENGTHS, backend="cuda")


def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_decode(*tensors(1), LENGTHS).dtype == torch.bfloat16


@pytest.mark.usefixtures("kernels_by_reference")
def test_compiled_without_a_graph_break() -> None:
    query, keys, values = tensors(1)
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, keys, values, LENGTHS), attention_decode(query, keys, values, LENGTHS, backend="reference"))
