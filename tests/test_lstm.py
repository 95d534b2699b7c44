"""The LSTM encoder-decoder: against the formulas of Luong et al. 2015 in plain PyTorch, its padding, its searches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_generate import sources
from torch import Tensor

from fused_attention.transformer.lstm import LSTMEncoderDecoder

SRC = torch.tensor([[5, 6, 7, 8, 9, 10, 2], [5, 6, 7, 2, 0, 0, 0], [12, 2, 0, 0, 0, 0, 0]])
TGT = torch.tensor([[1, 4, 5, 6, 7], [1, 8, 9, 3, 0], [1, 10, 0, 0, 0]])


def build(**options: Any) -> LSTMEncoderDecoder:
    sizes = {"src_vocab": 20, "tgt_vocab": 20, "d_model": 16, "num_layers": 2, "max_len": 24}
    return LSTMEncoderDecoder(**{**sizes, **options}).double().eval()


def spread(model: LSTMEncoderDecoder) -> LSTMEncoderDecoder:
    """With weights so large that translations differ, in their length too."""
    assert model.src_embedding is not None
    assert model.output is not None
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.decoder.parameters()):
            parameter.mul_(2)
        for matrix, factor in ((model.tgt_embedding, 5), (model.src_embedding, 5), (model.output, 10)):
            matrix.weight.mul_(factor)
        model.output.bias[model.eos_id] = 2.0
    return model


def by_the_formulas(model: LSTMEncoderDecoder, src: Tensor, tgt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and attention (T, S) for one pair without padding, token by token, direction by direction."""

    def cell(lstm: torch.nn.LSTM, layer: str, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        weights = [getattr(lstm, f"{name}_{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        gates = F.linear(x, weights[0], weights[2]) + F.linear(state[0], weights[1], weights[3])
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def run(lstm: torch.nn.LSTM, layer: str, inputs: list[Tensor], state: tuple[Tensor, Tensor]) -> tuple[list[Tensor], Any]:
        outputs = []
        for x in inputs:
            state = cell(lstm, layer, x, state)
            outputs.append(state[0])
        return outputs, state

    source_embedding = model.tgt_embedding if model.src_embedding is None else model.src_embedding
    encoded = [source_embedding.weight[token] * model.d_model**0.5 for token in src]
    zeros = torch.zeros(model.d_model // 2, dtype=torch.float64)
    last = []
    for layer in range(model.num_layers):
        forward, (h_f, c_f) = run(model.encoder, f"l{layer}", encoded, (zeros, zeros))
        backward, (h_b, c_b) = run(model.encoder, f"l{layer}_reverse", encoded[::-1], (zeros, zeros))
        encoded = [torch.cat(pair) for pair in zip(forward, backward[::-1], strict=True)]
        last.append((torch.cat([h_f, h_b]), torch.cat([c_f, c_b])))
    states = [model.tgt_embedding.weight[token] * model.d_model**0.5 for token in tgt]
    for layer in range(model.num_layers):
        states, _ = run(model.decoder, f"l{layer}", states, last[layer])
    e, h = torch.stack(encoded), torch.stack(states)
    weights = (h @ model.attention_score.weight.T @ e.T).softmax(-1)
    attentional = torch.tanh(torch.cat([weights @ e, h], -1) @ model.combine.weight.T)
    projection = (model.tgt_embedding.weight, None) if model.output is None else (model.output.weight, model.output.bias)
    return F.linear(attentional, *projection), weights


class TestForward:
    @pytest.mark.parametrize("tie_weights", [False, True])
    def test_the_formulas(self, tie_weights: bool) -> None:
        """For a padded row, those of the row alone."""
        model = build(tie_weights=tie_weights)
        with torch.no_grad():
            model.tgt_embedding.weight.mul_(3)
            logits, maps = model(SRC, TGT), model.attention_maps(SRC, TGT)["cross"][0][:, 0]
            for row in range(3):
                src, tgt = SRC[row][SRC[row] != 0], TGT[row][TGT[row] != 0]
                expected, weights = by_the_formulas(model, src, tgt)
                torch.testing.assert_close(logits[row, : len(tgt)], expected)
                torch.testing.assert_close(maps[row, : len(tgt), : len(src)], weights)
                assert (maps[row, :, len(src) :] == 0).all()

    def test_gradients_reach_every_parameter(self) -> None:
        model = build(dropout=0.3).train()
        model(SRC, TGT).square().sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []
        assert model.src_embedding is not None
        assert (model.src_embedding.weight.grad[0] == 0).all()

    def test_dropout_is_for_training(self) -> None:
        model = build(dropout=0.5)
        assert torch.equal(model(SRC, TGT), model(SRC, TGT))
        model.train()
        assert not torch.equal(model(SRC, TGT), model(SRC, TGT))

    def test_bfloat16_autocast(self) -> None:
        model = build().float()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(SRC, TGT)
        torch.testing.assert_close(logits.float(), model(SRC, TGT), rtol=0.1, atol=0.05)

    def test_sources_of_nothing(self) -> None:
        model = build()
        assert torch.isfinite(model(torch.zeros(2, 3, dtype=torch.int64), TGT[:2])).all()
        assert torch.isfinite(model(torch.zeros(2, 0, dtype=torch.int64), TGT[:2])).all()
        assert model(SRC, TGT[:, :0]).shape == (3, 0, 20)

    def test_config_builds_the_same(self) -> None:
        model = build(tie_weights=True, num_layers=1)
        again = LSTMEncoderDecoder(**model.config)
        assert {name: p.shape for name, p in again.named_parameters()} == {name: p.shape for name, p in model.named_parameters()}


class TestSearches:
    def test_greedy_is_a_beam_of_one_and_does_not_depend_on_the_batch(self) -> None:
        torch.manual_seed(7)
        model, src = spread(build()), sources(8)
        greedy = model.generate(src, 10).tolist()
        assert len({tuple(row) for row in greedy}) > 4
        for source, row, [best] in zip(src, greedy, model.beam_search(src, 10, beam=1, early_stopping=True), strict=True):
            tokens = [token for token in row if token != 0]
            assert best.tokens == tokens
            [alone] = model.generate(source[None, : max(1, int((source != 0).sum()))], 10).tolist()
            assert alone == tokens

    @pytest.mark.parametrize("prefix", [None, torch.tensor([[7, 8]] * 8)], ids=["free", "prefix"])
    def test_sums_of_a_beam_search_are_those_of_a_teacher_forced_pass(self, prefix: Tensor | None) -> None:
        """Rows of memory or state that were moved wrongly would give other sums."""
        torch.manual_seed(7)
        model, src = spread(build()), sources(8)
        found = model.beam_search(src, 10, beam=4, n_best=4, prefix=prefix)
        assert len({len(h.tokens) for hypotheses in found for h in hypotheses}) > 2
        for source, hypotheses in zip(src, found, strict=True):
            for hypothesis in hypotheses:
                assert prefix is None or hypothesis.tokens[:2] == [7, 8]
                scored = model.score(source[None], torch.tensor([hypothesis.tokens])).sentences.item()
                assert scored == pytest.approx(hypothesis.log_probability, rel=1e-6)

    def test_no_sentences(self) -> None:
        assert build().generate(SRC[:0], 4).shape[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15}, "d_model must be even"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"dropout": 1.5}, "dropout must lie in"),
        ({"eos_id": 20}, "eos_id must be in"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_sources_and_translations_of_different_number() -> None:
    with pytest.raises(ValueError, match="tgt has 2 rows, src has 3"):
        build()(SRC, TGT[:2])
