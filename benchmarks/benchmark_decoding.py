"""Decoding with a random model of Marian's base size, against CTranslate2 and Hugging Face with the same weights (both optional); and one
step of attention to long caches of every dtype, against torch's attention to a float32 or bfloat16 cache of the same numbers.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import Transformer, attention_decode, dequantize_kv, quantize_kv
from fused_attention.benchmarks.cell import OURS
from fused_attention.benchmarks.decoding_peers import PEERS
from fused_attention.benchmarks.peers import short_reason

pytestmark = pytest.mark.full
VOCAB, SOURCE_LENGTH, NUM_TOKENS = 32000, 32, 64
CHECKED = 2  # sentences that float64 decodes too
MODEL: dict[str, Any] = {"d_model": 512, "num_heads": 8, "num_encoder_layers": 6, "num_decoder_layers": 6, "dim_feedforward": 2048}
MARIAN: dict[str, Any] = {"tie_weights": True, "output_bias": True, "positions": "halves", "final_norm": False}
BARS = {"CTranslate2": 1.1, "Hugging Face": 1.5}


@functools.cache
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(VOCAB, VOCAB, **MODEL, **MARIAN).eval()
    with torch.no_grad():
        assert model.output_bias is not None
        model.output_bias.normal_()
        model.output_bias[[model.pad_id, model.bos_id, model.eos_id]] = -1e9  # every row runs to the end, in every library
    return model.requires_grad_(False)


@functools.cache
def exact_model() -> Transformer:
    return copy.deepcopy(model()).double()


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_decoding(measure_cell, batch, beam):
    ours = model()
    src = torch.randint(3, VOCAB, (batch, SOURCE_LENGTH), generator=torch.Generator().manual_seed(batch))
    sides: dict[str, Any] = {OURS: lambda: ours.generate(src, NUM_TOKENS, beam=beam, length_penalty=0.0)}
    for name, make in PEERS.items():
        try:
            sides[name] = functools.partial(make(ours, NUM_TOKENS, beam), src)
        except Exception as error:  # whatever another library says
            sides[name] = short_reason(error)
    expected = exact_model().generate(src[:CHECKED], NUM_TOKENS, beam=beam, length_penalty=0.0)

    def check(side: str, tokens: Tensor) -> None:
        """Where two scores are equal but for rounding, either may win."""
        assert tokens.shape == (batch, NUM_TOKENS), "tokens of another shape"
        same = (tokens[:CHECKED] == expected).float().mean()
        assert same >= 0.9, f"{same:.0%} of the tokens are those of float64"

    measure_cell(
        sides,
        check=check,
        suite="model: decoding, the same weights in all: 6 + 6 layers of 512, 32,000 words",
        case={"beam": str(beam), "batch": str(batch), "dtype": "fp32"},
        kind="generate",
        work=batch * NUM_TOKENS,
        unit="tokens/s",
        bars=BARS,
        min_rounds=3 if math.prod((batch, beam)) > 8 else 7,
    )


@pytest.mark.parametrize("shape", [(1, 32, 4096, 128), (8, 8, 4096, 64), (1, 1, 16384, 128)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("peer_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_caches(compare, cache, peer_dtype, shape):
    batch, heads, length, head_dim = shape
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 1, head_dim)
    key, value = (torch.randn(batch, length, heads, head_dim).transpose(1, 2) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32)
    scales: dict[str, Any] = {}
    if cache.itemsize == 1:
        (ours_key, key_scale), (ours_value, value_scale) = quantize_kv(key, cache), quantize_kv(value, cache)
        key, value = dequantize_kv(ours_key, key_scale), dequantize_kv(ours_value, value_scale)
        scales = {"key_scale": key_scale, "value_scale": value_scale}
    else:
        ours_key, ours_value = key.to(cache), value.to(cache)
    ours_query = query.to(cache) if cache is torch.bfloat16 else query
    torchs_query, torchs_key, torchs_value = (tensor.to(peer_dtype) for tensor in (query, key, value))

    def decode() -> torch.Tensor:
        out = attention_decode(ours_query, ours_key, ours_value, lengths, **scales)
        assert isinstance(out, torch.Tensor)
        return out

    def theirs() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(torchs_query, torchs_key, torchs_value)

    def check() -> None:
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        assert (decode() - exact).abs().max() <= (0.03 if cache is torch.bfloat16 else 1e-5) * exact.abs().max()

    compare(
        torch.no_grad()(decode),
        torch.no_grad()(theirs),
        check=check,
        group="one token's attention to a cache, against scaled_dot_product_attention on the same numbers",
        case={"batch, heads, Lk, D": ", ".join(map(str, shape)), "cache": str(cache)[6:], "torch's": str(peer_dtype)[6:]},
        measure="forward",
    )
