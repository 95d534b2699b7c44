"""Decoding with a random model of Marian's base size, against CTranslate2 and Hugging Face with the same weights (both optional)."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from fused_attention import Transformer
from fused_attention.benchmarks.decoding_peers import PEERS

pytestmark = pytest.mark.full
VOCAB, SOURCE_LENGTH, NUM_TOKENS = 32000, 32, 64
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


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("peer", PEERS)
def test_decoding(compare, peer, batch, beam):
    ours = model()
    src = torch.randint(3, VOCAB, (batch, SOURCE_LENGTH), generator=torch.Generator().manual_seed(batch))
    theirs = PEERS[peer](ours, NUM_TOKENS, beam)

    def decode() -> torch.Tensor:
        return ours.generate(src, NUM_TOKENS, beam=beam, length_penalty=0.0)

    def check() -> None:
        tokens, expected = decode(), theirs(src)
        assert tokens.shape == expected.shape == (batch, NUM_TOKENS)
        assert (tokens == expected).all(1).float().mean() >= 0.9, (
            "different tokens"
        )  # where two scores are equal but for rounding, either may win

    compare(
        decode,
        functools.partial(theirs, src),
        check=check,
        group=f"decoding against {peer} with the same weights: 6 + 6 layers of 512, 32,000 words, float32",
        case={"beam": str(beam), "batch": str(batch), "tokens": str(NUM_TOKENS)},
        measure="generate",
        peer_name=peer,
        bar=BARS[peer],
        min_rounds=3 if math.prod((batch, beam)) > 8 else 7,
    )
