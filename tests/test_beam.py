"""Beam search: against greedy and exhaustive search, teacher forcing and Hugging Face; what its options do."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_generate import SRC, build, ending_model, sources
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fused_attention.transformer import layers
from fused_attention.transformer.beam import Hypothesis
from fused_attention.transformer.cache import KVCache
from fused_attention.transformer.generate import Generation
from fused_attention.transformer.model import Transformer
from fused_attention.transformer.search import log_softmax_, top_k


@torch.no_grad()
def log_probabilities(model: Transformer, source: Tensor, translations: list[list[int]]) -> list[float]:
    """Of the tokens of translations of one source, by a forward pass over all of them."""
    tgt = pad_sequence([torch.tensor(tokens) for tokens in translations], batch_first=True)
    logits = model(source.expand(len(tgt), -1), F.pad(tgt[:, :-1], (1, 0), value=model.bos_id))
    tokens = logits.log_softmax(-1).gather(2, tgt[..., None])[..., 0]
    return tokens.masked_fill(tgt == model.pad_id, 0).sum(1).tolist()


class TestAgainstOtherSearches:
    @pytest.mark.parametrize("memory_layers", ["last", "each", "mixed"])
    def test_a_beam_of_one_is_greedy(self, memory_layers: str) -> None:
        model, src = ending_model(memory_layers=memory_layers), sources(8)
        greedy = model.generate(src, 12)
        assert len({row.count(0) for row in greedy.tolist()}) > 1, "rows of equal length would not test leaving the batch"
        for hypotheses, row in zip(model.beam_search(src, 12, beam=1, early_stopping=True), greedy.tolist(), strict=True):
            assert hypotheses[0].tokens == [token for token in row if token != model.pad_id]

    @pytest.mark.parametrize("early_stopping", [False, True])
    @pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
    def test_a_full_beam_is_exhaustive_search(self, alpha: float, early_stopping: bool) -> None:
        """Three words in translations of up to 3 tokens: 1 + 3 + 9 that end and 27 that are cut, as many as beams."""
        model = build(tgt_vocab=50)
        assert model.output is not None
        with torch.no_grad():
            model.output.bias[6:] = -torch.inf
        beam_search = model.beam_search(SRC, 3, beam=40, n_best=40, length_penalty=alpha, early_stopping=early_stopping)
        for source, found in zip(SRC, beam_search, strict=True):
            ended = [[*words, 2] for length in range(3) for words in product((3, 4, 5), repeat=length)]
            cut = [list(words) for words in product((3, 4, 5), repeat=3)]
            expected = []
            for translations in (ended, cut):
                sums = log_probabilities(model, source, translations)
                scores = [total / ((5 + len(tokens)) / 6) ** alpha for total, tokens in zip(sums, translations, strict=True)]
                best_first = sorted(zip(scores, sums, translations, strict=True), reverse=True)
                expected += [Hypothesis(tokens, total, score, tokens[-1] == 2) for score, total, tokens in best_first]
            assert [(h.tokens, h.ended) for h in found] == [(h.tokens, h.ended) for h in expected]
            torch.testing.assert_close([h.score for h in found], [h.score for h in expected])
            torch.testing.assert_close([h.log_probability for h in found], [h.log_probability for h in expected])

    @pytest.mark.parametrize("memory_layers", ["last", "mixed"])
    def test_sums_are_those_of_a_teacher_forced_pass(self, memory_layers: str) -> None:
        """Rows of a cache that were moved wrongly would give other sums."""
        model, src = ending_model(memory_layers=memory_layers), sources(8)
        found = model.beam_search(src, 10, beam=5, n_best=5, no_repeat_ngram=2, min_length=2)
        assert len({len(h.tokens) for hypotheses in found for h in hypotheses}) > 3
        assert all(h.score >= other.score for hypotheses in found for h, other in pairwise(hypotheses) if h.ended == other.ended)
        for source, hypotheses in zip(src, found, strict=True):
            assert len({tuple(h.tokens) for h in hypotheses}) == 5
            sums = log_probabilities(model, source, [h.tokens for h in hypotheses])
            for hypothesis, expected in zip(hypotheses, sums, strict=True):
                assert hypothesis.log_probability == pytest.approx(expected)
                assert hypothesis.score == pytest.approx(expected / ((5 + len(hypothesis.tokens)) / 6) ** 0.6)

    @pytest.mark.parametrize("early_stopping", [False, True])
    @pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("beam", [2, 5])
    def test_hugging_face(self, beam: int, penalty: float, early_stopping: bool) -> None:
        """Token for token on shared weights, by its own length penalty, length ** penalty."""
        pytest.importorskip("transformers")
        model, src = ending_model(), sources(12)
        model.output.bias.data[2] = 1.8  # everything ends; what is cut is ranked otherwise there
        model.encoder.norm, model.decoder.norm = nn.Identity(), nn.Identity()  # Marian has none
        theirs = as_marian(model).generate(
            src,
            attention_mask=src != 0,
            max_new_tokens=23,
            num_beams=beam,
            num_return_sequences=beam,
            length_penalty=penalty,
            early_stopping=early_stopping or "never",
            no_repeat_ngram_size=3,
            suppress_tokens=[0, 1],
            return_dict_in_generate=True,
            output_scores=True,
        )
        options = {"length_penalty": lambda length: length**penalty, "early_stopping": early_stopping, "no_repeat_ngram": 3}
        ours = [found for hypotheses in model.beam_search(src, 23, beam=beam, n_best=beam, **options) for found in hypotheses]
        assert all(hypothesis.ended for hypothesis in ours)
        assert len({len(hypothesis.tokens) for hypothesis in ours}) > 5
        assert [h.tokens for h in ours] == [row[: row.index(2) + 1] for row in theirs.sequences[:, 1:].tolist()]
        torch.testing.assert_close(torch.tensor([h.score for h in ours]), theirs.sequences_scores, rtol=1e-5, atol=1e-5)


class TestOptions:
    def test_n_best_are_the_first_of_more(self) -> None:
        model, src = ending_model(), sources(6)
        more = model.beam_search(src, 10, beam=4, n_best=4)
        assert model.beam_search(src, 10, beam=4, n_best=2) == [found[:2] for found in more]
        best = model.generate(src, 10, beam=4)
        assert [[token for token in row if token] for row in best.tolist()] == [found[0].tokens for found in more]

    def test_a_longer_search_finds_no_worse(self) -> None:
        """With early_stopping=False a sentence goes on while anything better can come, and here something does."""
        model, src = ending_model(), sources(12)
        early, late = (model.beam_search(src, 20, beam=3, length_penalty=3, early_stopping=early) for early in (True, False))
        gains = [longer.score - shorter.score for [longer], [shorter] in zip(late, early, strict=True)]
        assert min(gains) >= 0
        assert max(gains) > 0

    def test_a_sentence_does_not_depend_on_its_batch(self) -> None:
        model, src = ending_model(), sources(6)
        together = model.beam_search(src, 10, n_best=4)
        for row, found in enumerate(together):
            [alone] = model.beam_search(src[row : row + 1, : row + 1], 10, n_best=4)
            assert [h.tokens for h in alone] == [h.tokens for h in found]

    def test_no_sentences(self) -> None:
        assert build().beam_search(SRC[:0]) == []
        assert build().generate(SRC[:0], beam=3).shape == (0, 0)

    def test_n_best_above_beam(self) -> None:
        with pytest.raises(ValueError, match="n_best must be at most beam = 2, got 3"):
            build().beam_search(SRC, beam=2, n_best=3)


class TestNumbers:
    @pytest.mark.parametrize("columns", [100, 128, 4 * 8 * 128, 4 * 8 * 128 + 77])
    def test_top_k(self, columns: int) -> None:
        """Also where the highest are in one block, or in the columns after the last whole one."""
        scores = torch.randperm(6 * columns, generator=torch.Generator().manual_seed(0)).float().view(6, columns)
        scores[1, 10:18] += 1e6
        scores[2, -8:] += 1e6
        scores[3] = -torch.inf
        scores[3, [0, columns - 1]] = torch.tensor([1.0, 2.0])
        values, places = top_k(scores, 8)
        expected = scores.topk(8)
        assert torch.equal(values, expected.values)
        assert torch.equal(places[[0, 1, 2, 4, 5]], expected.indices[[0, 1, 2, 4, 5]])
        assert places[3, :2].tolist() == [columns - 1, 0]
        assert torch.equal(scores.gather(1, places), values)
        assert all(len(set(row)) == 8 for row in places.tolist())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_log_softmax(self, dtype: torch.dtype) -> None:
        logits = torch.randn(35, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
        for rows in (slice(None), slice(0, 0)):
            for positions in (slice(None), slice(-1), -1):  # the second has no view as a matrix
                part = logits.clone()[rows, positions]
                expected = part.log_softmax(-1, dtype=torch.promote_types(dtype, torch.float32))
                torch.testing.assert_close(log_softmax_(part), expected)


class TestWork:
    def test_keys_and_values_of_a_source_stand_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The encoder runs once; cross-attention gets all beams of a sentence as queries of one row."""
        model, src = ending_model(), sources(5)
        calls: list[tuple[Any, ...]] = []
        operation = layers.attend_to_cache

        def spy(query: Tensor, kv: Tensor, **options: Any) -> Any:
            calls.append((query.shape[0], query.shape[2], kv.shape[0], kv.shape[1]))
            return operation(query, kv, **options)

        monkeypatch.setattr(layers, "attend_to_cache", spy)
        encoded = []
        encode = model.encode
        monkeypatch.setattr(model, "encode", lambda src: encoded.append(1) or encode(src))
        model.beam_search(src, 10, beam=4)
        assert encoded == [1]
        cross = calls[1::2]
        assert {queries for _, queries, _, _ in cross} == {4}
        assert all(rows == kv_rows and length == 7 for rows, _, kv_rows, length in cross)
        assert len({rows for rows, *_ in cross}) > 1, "finished sentences leave the batch"

    def test_sentences_that_leave_free_their_place(self) -> None:
        """The keys and values of the source stay where they are, but for those that move to a place that is free."""
        model = build()
        memory, _ = model.start_decoding(sources(5), 4)
        before = [kv.clone() for kv in memory.keys_values]
        rows = torch.tensor([0, 4, 2])
        after = memory.select(rows)
        assert [kv.data_ptr() for kv in after.keys_values] == [kv.data_ptr() for kv in memory.keys_values]
        for kv, old in zip(after.keys_values, before, strict=True):
            assert torch.equal(kv, old[rows])
        assert torch.equal(after.padding.lengths, memory.padding.lengths[rows])

    def test_only_rows_that_move_are_copied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A hypothesis takes the place of its parent; only the second, third, ... child of a parent is copied elsewhere."""
        model, src = build(), sources(5)
        model.output.bias.data[2] = -100.0  # no sentence leaves
        addresses, moved = set(), []
        select = KVCache.select

        def spy(cache: KVCache, rows: Tensor) -> None:
            moved.append((rows != torch.arange(20)).sum().item())
            assert rows.device.type == "cpu"
            assert moved[-1] == 20 - len(set(rows.tolist()))
            select(cache, rows)
            addresses.add(tuple(layer.self_kv.data_ptr() for layer in cache.layers))

        monkeypatch.setattr(KVCache, "select", spy)
        model.beam_search(src, 12, beam=4)
        assert len(addresses) == 1
        assert 0 < sum(moved[1:]) < 0.7 * 20 * len(moved[1:])


class RecurrentTranslator(Generation):
    """A decoder of another kind: a state (R, d) a row, a first input of zeros, eos_id 0, which pads as well, and a start sign
    outside the vocabulary."""

    pad_id, bos_id, eos_id, max_len, tgt_vocab = 0, 11, 0, 16, 11

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(11, 8), nn.Linear(8, 11)

    def start_decoding(self, src: Tensor, capacity: int) -> tuple[RowMemory, RowState]:
        return RowMemory(self.embedding(src).mean(1)), RowState()

    def decode(self, tgt: Tensor, memory: RowMemory, cache: RowState) -> Tensor:
        first = tgt == self.bos_id
        inputs = self.embedding(tgt.masked_fill(first, 0)).masked_fill(first[..., None], 0)
        sources = memory.states.repeat_interleave(tgt.shape[0] // memory.batch_size, 0)
        state = torch.zeros_like(sources) if cache.state is None else cache.state
        states = []
        for place in inputs.unbind(1):
            state = 0.6 * state + torch.tanh(place + sources)
            states.append(state)
        cache.state = state
        return self.output(3 * torch.stack(states, 1))

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        return self.decode(tgt, *self.start_decoding(src, 0))


@dataclass
class RowMemory:
    states: Tensor  # (B, d)

    @property
    def batch_size(self) -> int:
        return self.states.shape[0]

    @property
    def device(self) -> torch.device:
        return self.states.device

    def select(self, rows: Tensor) -> RowMemory:
        return RowMemory(self.states[rows])


@dataclass
class RowState:
    state: Tensor | None = None  # (R, d)

    def select(self, rows: Tensor) -> None:
        assert self.state is not None
        self.state = self.state[rows]


class TestRecurrentDecoder:
    def test_beam_search(self) -> None:
        model = RecurrentTranslator()
        src = torch.randint(1, 11, (6, 5))
        found = model.beam_search(src, 12, beam=4, n_best=4, no_repeat_ngram=2)
        assert len({len(h.tokens) for hypotheses in found for h in hypotheses}) > 2
        for source, hypotheses in zip(src, found, strict=True):
            for hypothesis in hypotheses:
                tokens = torch.tensor([hypothesis.tokens])
                assert model.score(source[None], tokens).sentences.item() == pytest.approx(hypothesis.log_probability, rel=1e-5)

    def test_greedy_is_a_beam_of_one(self) -> None:
        model = RecurrentTranslator()
        src = torch.randint(1, 11, (6, 5))
        greedy = model.generate(src, 12).tolist()
        for row, [hypothesis] in zip(greedy, model.beam_search(src, 12, beam=1, early_stopping=True), strict=True):
            assert hypothesis.tokens == row[: row.index(0) + 1 if 0 in row else None]


def as_marian(model: Transformer) -> Any:
    """Hugging Face's MarianMTModel with the weights of a model without final norms."""
    from transformers import MarianConfig, MarianMTModel

    sizes = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 20, "max_position_embeddings": 24}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    options = {"activation_function": "relu", "scale_embedding": True, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 20}
    marian = MarianMTModel(MarianConfig(**sizes, **heads, **ids, **options, tie_word_embeddings=False)).double().eval()
    names = {"self_attn": "self_attn", "multihead_attn": "encoder_attn"}
    state: dict[str, Tensor] = {"lm_head.weight": model.output.weight, "final_logits_bias": model.output.bias[None]}
    for side, embedding in (("encoder", model.src_embedding), ("decoder", model.tgt_embedding)):
        state[f"model.{side}.embed_tokens.weight"] = embedding.weight
        state[f"model.{side}.embed_positions.weight"] = embedding.positions
        norms = {"encoder": ("self_attn", "final"), "decoder": ("self_attn", "encoder_attn", "final")}[side]
        for i, layer in enumerate(model.get_submodule(side).layers):
            theirs = f"model.{side}.layers.{i}."
            for ours, name in names.items():
                if attention := getattr(layer, ours, None):
                    for kind in ("weight", "bias"):
                        parts = getattr(attention, f"in_proj_{kind}").chunk(3)
                        state |= {f"{theirs}{name}.{p}_proj.{kind}": part for p, part in zip("qkv", parts, strict=True)}
                        state[f"{theirs}{name}.out_proj.{kind}"] = getattr(attention.out_proj, kind)
            for kind in ("weight", "bias"):
                state |= {f"{theirs}fc{n}.{kind}": getattr(getattr(layer, f"linear{n}"), kind) for n in (1, 2)}
                for n, norm in enumerate(norms, 1):
                    state[f"{theirs}{norm}_layer_norm.{kind}"] = getattr(getattr(layer, f"norm{n}"), kind)
    missing, unexpected = marian.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([], [])
    return marian
