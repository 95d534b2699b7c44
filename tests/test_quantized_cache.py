"""attention_decode on caches of 8-bit numbers with scales: the numbers they stand for, whatever reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_attention import KVCache, Transformer, attention, attention_decode, dequantize_kv, explain, quantize_kv
from fused_attention.kernels.native import cpu

needs_kernels = pytest.mark.skipif(cpu.status() is not None, reason=f"no kernels: {cpu.status()}")
CACHES = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
BATCH, NUM_HEADS, KEY_HEADS, CAPACITY, HEAD_DIM, HEAD_DIM_V = 3, 4, 2, 1040, 40, 24
LENGTHS = torch.tensor([1040, 515, 3])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window and softcap": {"window": (600, 0), "softcap": 2.0},
    "key_mask": {"key_mask": torch.arange(CAPACITY).expand(BATCH, -1) % 3 > 0},
    "slopes and sinks": {"alibi_slopes": torch.rand(BATCH, NUM_HEADS), "sinks": torch.randn(NUM_HEADS)},
}


def call(
    cache: torch.dtype, seqlen_q: int = 1, dtype: torch.dtype = torch.float32, block_sizes: tuple[int, int] = (1, 16)
) -> dict[str, Any]:
    """Keys in (B, L, H, D) memory, values in (B, H, L, D) memory."""
    key, value = torch.randn(BATCH, CAPACITY, KEY_HEADS, HEAD_DIM).transpose(1, 2), torch.randn(BATCH, KEY_HEADS, CAPACITY, HEAD_DIM_V)
    key_cache, key_scale = quantize_kv(key, cache, block_size=block_sizes[0])
    value_cache, value_scale = quantize_kv(value, cache, block_size=block_sizes[1])
    query = torch.randn(BATCH, NUM_HEADS, seqlen_q, HEAD_DIM).to(dtype)
    caches = {"key_cache": key_cache, "value_cache": value_cache, "key_scale": key_scale, "value_scale": value_scale}
    return {"query": query, "key_lengths": LENGTHS, **caches}


def as_floats(given: dict[str, Any]) -> dict[str, Any]:
    """The same call, in float32 on a cache of float32."""
    caches = {f"{name}_cache": dequantize_kv(given[f"{name}_cache"], given[f"{name}_scale"]) for name in ("key", "value")}
    return {"query": given["query"].float(), "key_lengths": given["key_lengths"], **caches}


@needs_kernels
@pytest.mark.parametrize("seqlen_q", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_kernel_reads_the_numbers_exactly(
    options: str, cache: torch.dtype, dtype: torch.dtype, seqlen_q: int, instruction_set: str
) -> None:
    given = call(cache, seqlen_q, dtype)
    scales = {name: given[name] for name in ("key_scale", "value_scale")}
    assert explain(given["query"], given["key_cache"], given["value_cache"], **scales).backend == "cpu"
    out, lse = attention_decode(**given, **OPTIONS[options], return_lse=True, backend="cpu")
    expected, expected_lse = attention_decode(**as_floats(given), **OPTIONS[options], return_lse=True, backend="cpu")
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(out, expected.to(dtype))  # the same float32 arithmetic, rounded once


@needs_kernels
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_every_code_is_the_number_torch_says(cache: torch.dtype, instruction_set: str) -> None:
    """One key has all the weight, so what it reads is what comes out; 255 dims end in part of a vector."""
    codes = torch.arange(256, dtype=torch.uint8).view(cache)[None, None, None]
    ones = torch.ones(1, 1, 1)
    for first, last in ((0, 255), (1, 256)):
        value = codes[..., first:last]
        out = attention_decode(
            torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8).to(cache), value, torch.tensor([1]), key_scale=ones, value_scale=2 * ones
        )
        torch.testing.assert_close(out, 2 * value.float(), rtol=3e-7, atol=0, equal_nan=True)  # exp2(0) is not exactly 1


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("block_size", [1, 5])
def test_quantization_keeps_its_error(cache: torch.dtype, block_size: int) -> None:
    numbers = torch.randn(2, 3, 20, 16).transpose(1, 2).contiguous().transpose(1, 2) * torch.logspace(-3, 3, 20)[:, None]
    numbers[0, 0, :5] = 0.0
    quantized, scale = quantize_kv(numbers, cache, block_size=block_size)
    assert quantized.stride() == numbers.stride()
    assert (quantized.dtype, scale.dtype, scale.shape) == (cache, torch.float32, (2, 3, 20 // block_size))
    restored = dequantize_kv(quantized, scale)
    assert torch.equal(restored[0, 0, :5], numbers[0, 0, :5])
    largest = numbers.unflatten(2, (-1, block_size)).abs().amax((3, 4)).repeat_interleave(block_size, 2)[..., None]
    relative = {torch.int8: 0.0, torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}[cache]
    step = {torch.int8: largest / 254, torch.float8_e4m3fn: largest * 2.0**-10 / 448, torch.float8_e5m2: largest * 2.0**-17 / 57344}[cache]
    assert ((restored - numbers).abs() <= torch.maximum(relative * numbers.abs(), step) * 1.0001).all()


def test_the_error_of_attention_is_what_the_docs_say() -> None:
    """Of keys and values from a normal distribution; docs/cpu-kernels.md, 8-bit caches."""
    limits = {torch.int8: 0.02, torch.float8_e4m3fn: 0.05, torch.float8_e5m2: 0.1}
    key, value = torch.randn(1, 4, 1024, 64), torch.randn(1, 4, 1024, 64)
    query, length = torch.randn(1, 4, 1, 64), torch.tensor([1024])
    exact = attention_decode(query, key, value, length)
    for cache, limit in limits.items():
        (key_cache, key_scale), (value_cache, value_scale) = quantize_kv(key, cache), quantize_kv(value, cache)
        out = attention_decode(query, key_cache, value_cache, length, key_scale=key_scale, value_scale=value_scale)
        assert 0 < (out - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_any_backend_and_longer_queries(backend: str, seqlen_q: int) -> None:
    given = call(torch.int8, seqlen_q)
    expected = attention_decode(**as_floats(given), backend="reference")
    torch.testing.assert_close(attention_decode(**given, backend=backend), expected)
    torch.testing.assert_close(attention_decode(**given), expected)


@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_an_empty_cache(seqlen_q: int) -> None:
    empty, scale = quantize_kv(torch.zeros(2, 1, 0, 8))
    arguments = torch.randn(2, 2, seqlen_q, 8), empty, empty, torch.tensor([0, 0])
    out, lse = attention_decode(*arguments, key_scale=scale, value_scale=scale, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -torch.inf).all()


@needs_kernels
def test_what_stands_past_the_lengths_never_matters() -> None:
    given = call(torch.float8_e5m2, block_sizes=(1, 1))
    masks = {"key_mask": torch.rand(BATCH, CAPACITY) > 0.3}
    expected = attention_decode(**given, **masks)
    absent = ~masks["key_mask"] | (torch.arange(CAPACITY) >= LENGTHS[:, None])
    for name in ("key", "value"):
        given[f"{name}_scale"].masked_fill_(absent[:, None], torch.nan)
        given[f"{name}_cache"].view(torch.uint8).masked_fill_(absent[:, None, :, None], 0x7F)  # NaN
    assert torch.equal(attention_decode(**given, **masks), expected)


@pytest.mark.usefixtures("kernels_by_reference")
def test_compiled_without_a_graph_break() -> None:
    given = call(torch.int8)
    compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), attention_decode(**given, backend="reference"))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no scale of values": ({"value_scale": None}, TypeError, "value_scale must be a torch.Tensor, got NoneType"),
    "no scales": ({"key_scale": None, "value_scale": None}, TypeError, "key must be float32.*got torch.int8: 8-bit.*key_scale"),
    "a float cache": ({"key_cache": torch.zeros(BATCH, KEY_HEADS, CAPACITY, HEAD_DIM)}, TypeError, "key must be int8.*got torch.float32"),
    "two dtypes": (
        {"value_cache": torch.zeros(BATCH, KEY_HEADS, CAPACITY, HEAD_DIM_V).to(torch.float8_e5m2)},
        TypeError,
        "value must have the dtype of key, torch.int8",
    ),
    "scales of float16": ({"key_scale": torch.ones(BATCH, KEY_HEADS, 1).half()}, TypeError, "key_scale must be float32, got torch.float16"),
    "blocks of different sizes": ({"value_scale": torch.ones(BATCH, KEY_HEADS, 3)}, ValueError, "value_scale.*1040 tokens"),
    "scales of query heads": ({"key_scale": torch.ones(BATCH, NUM_HEADS, 1)}, ValueError, r"key_scale must have shape.*\(3, 2, 1\)"),
    "a gradient": ({"key_scale": torch.ones(BATCH, KEY_HEADS, 1, requires_grad=True)}, RuntimeError, "attention_decode has no gradient"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        attention_decode(**call(torch.int8) | changes)


def test_bad_input_of_quantize_kv() -> None:
    tensor = torch.zeros(1, 1, 6, 8)
    for arguments, error, message in (
        ((tensor.int(),), TypeError, "tensor must be"),
        ((tensor[0],), ValueError, "tensor must have shape"),
        ((tensor, torch.int16), ValueError, "dtype must be one of"),
    ):
        with pytest.raises(error, match=message):
            quantize_kv(*arguments)
    with pytest.raises(ValueError, match="block_size must be an int >= 1 that divides the 6 tokens"):
        quantize_kv(tensor, block_size=4)
    with pytest.raises(TypeError, match="key must be float32"):
        attention(tensor, tensor.to(torch.int8), tensor.to(torch.int8))


def tiny_model(**options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(50, 50, d_model=32, num_heads=4, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=32, **options).eval()


@pytest.mark.parametrize(("cache", "limit"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.05), (torch.float8_e5m2, 0.1)], ids=str)
def test_decoding_with_a_quantized_cache(cache: torch.dtype, limit: float) -> None:
    """Token by token, after a prefix of three, with padding, a buffer that grows and rows that move: logits within the stated error."""
    model, src = tiny_model(), torch.randint(3, 50, (3, 5))
    tgt = torch.randint(3, 50, (3, 8))
    tgt[1, :2] = model.pad_id
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        memory = model.encode(src)
        kv_cache = KVCache(2, cache)
        logits = [model.decode(tgt[:, :3], memory, kv_cache)[rows]]
        kv_cache.select(rows)
        memory = model.encode(src[rows])
        logits += [model.decode(tgt[rows, step : step + 1], memory, kv_cache) for step in range(3, 8)]
        expected = model.decode(tgt[rows], memory)
    assert kv_cache.layers[0].self_kv.dtype == cache
    difference = (torch.cat(logits, 1) - expected).abs().max()
    assert 0 < difference <= limit * expected.abs().max()


def test_generation_with_a_quantized_cache() -> None:
    model, src = tiny_model(), torch.randint(3, 50, (8, 6))
    expected = {beam: model.generate(src, 12, beam=beam) for beam in (1, 3)}
    model.cache_dtype = torch.int8
    for beam, tokens in expected.items():
        found = model.generate(src, 12, beam=beam)
        assert found.shape == tokens.shape
        assert (found == tokens).float().mean() > 0.9


def test_caches_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="dtype must be None or one of torch.int8"):
        KVCache(dtype=torch.int16)
    model = tiny_model(decoder_cell="ssru")
    model.cache_dtype = torch.int8
    with pytest.raises(ValueError, match="cache_dtype must be None: an SSRU keeps no keys"):
        model.generate(torch.tensor([[5]]))
