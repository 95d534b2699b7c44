"""A BERT of base size in transformers, on attn_implementation="fused_attention" against "sdpa": float32, without gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.integrations.transformers import NAME, Masking, fused_attention_forward, register

VOCABULARY = 30522
SIZES = [(8, 128), (1, 512)]  # batch, length
PADDED = {"nothing": 1.0, "half of each row": 0.5}  # the share of tokens
BARS = {"nothing": 1.0, "half of each row": 1.2}


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    transformers = pytest.importorskip("transformers", minversion="5.24")
    register()
    torch.manual_seed(0)
    found = {name: transformers.BertModel(transformers.BertConfig(attn_implementation=name)).eval() for name in (NAME, "sdpa")}
    found[NAME].load_state_dict(found["sdpa"].state_dict())
    return found


@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_bert_base(compare, models, batch, length, padded):
    ids = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) < PADDED[padded] * length).long().expand(batch, -1)

    @torch.no_grad()
    def states(name: str) -> Tensor:
        return models[name](input_ids=ids, attention_mask=mask).last_hidden_state

    def check() -> None:
        torch.testing.assert_close(states(NAME) * mask[..., None], states("sdpa") * mask[..., None], atol=1e-5, rtol=1e-5)

    compare(
        lambda: states(NAME),
        lambda: states("sdpa"),
        check=check,
        group="BERT-base of transformers, fused_attention against sdpa, float32, without gradients",
        case={"batch, length": f"{batch}, {length}", "padded": padded},
        measure="forward",
        peer_name="sdpa",
        bar=BARS[padded],
    )


@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_attention_of_bert_base(compare, batch, length, padded):
    """The 12 attention calls alone, on masks as the mask functions make them: the only part of the model that differs."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    theirs = transformers.AttentionInterface()["sdpa"]
    layer: Any = torch.nn.Identity()
    layer.is_causal = False
    query, key, value = (torch.randn(batch, length, 12, 64).transpose(1, 2) for _ in range(3))
    is_token = (torch.arange(length) < PADDED[padded] * length).expand(batch, -1)
    is_whole = bool(is_token.all())
    our_mask = None if is_whole else Masking(is_token, False, None, None)
    sdpa_mask = None if is_whole else is_token[:, None, None].expand(-1, 1, length, -1)

    @torch.no_grad()
    def ours() -> list[Tensor]:
        return [fused_attention_forward(layer, query, key, value, our_mask)[0] for _ in range(12)]

    @torch.no_grad()
    def peer() -> list[Tensor]:
        return [theirs(layer, query, key, value, sdpa_mask)[0] for _ in range(12)]

    compare(
        ours,
        peer,
        check=lambda: torch.testing.assert_close(ours(), peer()),
        group="the 12 attention calls of a BERT-base of transformers, float32, without gradients",
        case={"batch, length": f"{batch}, {length}", "padded": padded},
        measure="forward",
        peer_name="sdpa",
    )
