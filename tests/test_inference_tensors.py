"""What is made under torch.inference_mode and not differentiated may be used in training: autograd saves no such tensor itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fused_attention import MultiHeadAttention, attention, attention_varlen, attention_weights, prepare_mask
from fused_attention.kernels import replay
from fused_attention.kernels.attention import attention_kv_packed, attention_qkv_packed
from fused_attention.kernels.native import cpu
from fused_attention.transformer.cache import KVCache
from fused_attention.transformer.model import Transformer

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(cpu.status() is not None, reason=str(cpu.status())))]
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "bool mask": lambda: {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()},
    "expanded mask": lambda: {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 4, 6, 6)},
    "float mask": lambda: {"attn_mask": torch.linspace(-1, 1, 36).view(6, 6)},
    "key_mask": lambda: {"key_mask": torch.arange(6) < torch.tensor([[6], [4]])},
    "lengths": lambda: {
        "key_lengths": torch.tensor([6, 3], dtype=torch.int32),
        "query_lengths": torch.tensor([2, 6], dtype=torch.int32),
    },
    "slopes, sinks": lambda: {"alibi_slopes": torch.tensor([1.0, 0.5, 0.2, 0.1]), "sinks": torch.linspace(-1, 1, 4)},
    "rng_state": lambda: {"dropout_p": 0.3, "rng_state": torch.tensor([3, 4])},
    "prepared": lambda: {"attn_mask": prepare_mask(key_mask=torch.arange(6) < torch.tensor([[6], [4]]), is_causal=True, seqlen_q=6)},
    "prepared bias": lambda: {"attn_mask": prepare_mask(torch.linspace(-1, 1, 36).view(6, 6))},
}


def both_ways(make: Callable[[], Any]) -> tuple[Any, Any]:
    """What `make` returns, made normally and under inference_mode."""
    with torch.inference_mode():
        made_in_inference = make()
    return make(), made_in_inference


def gradients_of(run: Callable[..., Tensor], *shapes: tuple[int, ...], create_graph: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    gradients = torch.autograd.grad(run(*inputs).square().sum(), inputs, create_graph=create_graph)
    if create_graph:
        return list(torch.autograd.grad(gradients[0].square().sum(), inputs))
    return list(gradients)


@pytest.mark.parametrize("higher", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("operator", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", OPTIONS)
def test_attention(case: str, backend: str, operator: bool, higher: bool) -> None:
    normal, inference = both_ways(OPTIONS[case])

    def gradients(options: dict[str, Any]) -> list[Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(query, key, value, backend=backend, **options)  # type: ignore[return-value]

        return gradients_of(run, *[(2, 4, 6, 8)] * 3, create_graph=higher)

    if operator:
        with FlopCounterMode(display=False):
            assert_close(gradients(inference), gradients(normal), rtol=0, atol=0)
    else:
        assert_close(gradients(inference), gradients(normal), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "shapes"), [(attention_qkv_packed, [(2, 6, 3, 4, 8)]), (attention_kv_packed, [(2, 4, 6, 8), (2, 6, 2, 4, 8)])]
)
def test_packed(call: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    normal, inference = both_ways(lambda: OPTIONS["key_mask"]() | OPTIONS["bool mask"]())
    assert_close(gradients_of(lambda *x: call(*x, **inference), *shapes), gradients_of(lambda *x: call(*x, **normal), *shapes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend: str) -> None:
    normal, inference = both_ways(lambda: torch.tensor([0, 2, 9], dtype=torch.int32))

    def gradients(offsets: Tensor) -> list[Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention_varlen(query, key, value, offsets, offsets, 7, 7, backend=backend)  # type: ignore[return-value]

        return gradients_of(run, *[(9, 4, 8)] * 3)

    assert_close(gradients(inference), gradients(normal))


@pytest.mark.skipif(cpu.status() is not None, reason=str(cpu.status()))
@pytest.mark.parametrize("name", ["key_mask", "lengths"])
def test_a_call_like_one_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_calls", {})
    normal, inference = both_ways(OPTIONS[name])
    for options in (normal, inference):
        options.pop("query_lengths", None)
    expected = gradients_of(lambda *x: attention(*x, **normal), *[(2, 4, 6, 8)] * 3)  # type: ignore[arg-type, return-value]
    for options in (inference, normal, inference, inference):
        assert_close(gradients_of(lambda *x: attention(*x, **options), *[(2, 4, 6, 8)] * 3), expected)  # type: ignore[arg-type, return-value] # noqa: B023


def test_a_change_of_the_mask_between_the_passes_does_not_count() -> None:
    """Such tensors have no version, so autograd could not report the change."""
    with torch.inference_mode():
        mask = torch.ones(6, 6, dtype=torch.bool).tril()

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = attention(query, key, value, attn_mask=mask)
        with torch.inference_mode():
            mask.fill_(True)
        return out  # type: ignore[return-value]

    expected = gradients_of(lambda *x: attention(*x, is_causal=True), *[(2, 4, 6, 8)] * 3)  # type: ignore[arg-type, return-value]
    assert_close(gradients_of(run, *[(2, 4, 6, 8)] * 3), expected)


def test_a_change_of_a_normal_mask_is_an_error() -> None:
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    out = attention(query, query, query, attn_mask=mask)
    mask.fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("average_heads", [False, True])
def test_weights(average_heads: bool) -> None:
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    normal, inference = both_ways(lambda: (OPTIONS["key_mask"](), attention(query, key, key, **OPTIONS["key_mask"](), return_lse=True)[1]))

    def gradients(given: tuple[dict[str, Tensor], Tensor]) -> list[Tensor]:
        options, lse = given
        run = lambda query, key: attention_weights(query, key, lse, average_heads=average_heads, **options)  # noqa: E731
        return gradients_of(run, (2, 4, 6, 8), (2, 4, 6, 8))

    assert_close(gradients(inference), gradients(normal))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_multi_head_attention(dtype: torch.dtype, need_weights: bool) -> None:
    module = MultiHeadAttention(8, 2, batch_first=True)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    normal, inference = both_ways(lambda: causal.clone() if dtype is torch.bool else torch.zeros(6, 6).masked_fill(causal, -torch.inf))

    def gradients(mask: Tensor) -> list[Tensor]:
        def run(x: Tensor) -> Tensor:
            out, weights = module(x, x, x, attn_mask=mask, need_weights=need_weights)
            return out if weights is None else torch.cat((out, weights), -1)

        return gradients_of(run, (2, 6, 8))

    assert_close(gradients(inference), gradients(normal))


def test_a_cache_goes_on_outside_inference_mode() -> None:
    torch.manual_seed(0)
    model = Transformer(20, 20, 16, 2, 1, 1, 32).eval()
    source, target = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 6, 7, 8]])
    cache = KVCache()
    with torch.inference_mode():
        memory = model.encode(source)
        model.decode(target[:, :2], memory, cache)
    with torch.no_grad():
        steps = [model.decode(target[:, step : step + 1], memory, cache) for step in (2, 3)]
        assert_close(torch.cat(steps, 1), model(source, target)[:, 2:])


def test_compiled_training_ends_as_with_torchs_attention() -> None:
    """A graph saves its inputs itself, and torch refuses these to save; outside training they are taken."""
    _, options = both_ways(OPTIONS["float mask"])
    inputs = torch.randn(2, 4, 6, 8)
    for function in (torch.nn.functional.scaled_dot_product_attention, attention):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager")
        assert_close(compiled(inputs, inputs, inputs, **options), function(inputs, inputs, inputs, **options))
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            compiled(inputs.clone().requires_grad_(), inputs, inputs, **options)
