"""Decoding with a cache equals decoding without one; what generate() returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attention.transformer.cache import KVCache
from fused_attention.transformer.memory import Memory
from fused_attention.transformer.model import Transformer
from fused_attention.transformer.search import remaining

SRC = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 0, 0, 0], [0, 0, 12, 0, 13, 14, 0], [15, 0, 0, 0, 0, 0, 0]])
TGT = torch.tensor([[1, 4, 5, 6, 7, 8], [1, 8, 9, 3, 4, 5], [1, 10, 10, 11, 12, 13], [1, 4, 4, 4, 9, 9]])


def build(**options: Any) -> Transformer:
    sizes = {"d_model": 24, "num_heads": 3, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 40}
    return Transformer(**{"src_vocab": 20, "tgt_vocab": 20, **sizes, "max_len": 24, **options}).double().eval()


def ending_model(**options: Any) -> Transformer:
    """A model whose rows end at different lengths: its embeddings outweigh the positions, and eos is made likely."""
    model = build(**options)
    assert model.src_embedding is not None
    assert model.output is not None
    with torch.no_grad():
        model.src_embedding.weight.mul_(3)
        model.tgt_embedding.weight.mul_(3)
        model.output.bias[model.eos_id] = 1.5
    return model


def sources(count: int) -> Tensor:
    """Rows of 1, 2, ... 7 tokens."""
    return torch.randint(3, 20, (count, 7)).masked_fill(torch.arange(7) > torch.arange(count)[:, None], 0)


@torch.no_grad()
def greedy_by_recomputing(model: Transformer, src: Tensor, max_new_tokens: int) -> list[list[int]]:
    """Row by row, everything anew for each token: the definition of greedy decoding."""
    results = []
    for row in src:
        tgt = [model.bos_id]
        while len(tgt) <= max_new_tokens and model.eos_id not in tgt:
            logits = model(row[None], torch.tensor([tgt]))[0, -1]
            logits[[model.pad_id, model.bos_id]] = -torch.inf
            tgt.append(int(logits.argmax()))
        results.append(tgt[1:])
    return results


class TestCachedDecode:
    @pytest.mark.parametrize("memory_layers", ["last", "each", "mixed"])
    @pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
    @torch.no_grad()
    def test_token_by_token_equals_the_whole_target_at_once(self, memory_layers: str, norm_first: bool) -> None:
        model = build(memory_layers=memory_layers, norm_first=norm_first)
        memory, cache = model.encode(SRC), KVCache(capacity=4)
        expected = model(SRC, TGT)
        for step in range(TGT.shape[1]):
            logits = model.decode(TGT[:, step : step + 1], memory, cache)
            torch.testing.assert_close(logits[:, 0], expected[:, step])
        assert cache.length == TGT.shape[1]

    @torch.no_grad()
    def test_several_tokens_at_a_time(self) -> None:
        model = build()
        memory, cache = model.encode(SRC), KVCache()
        pieces = [model.decode(TGT[:, start:end], memory, cache) for start, end in ((0, 3), (3, 4), (4, 6))]
        torch.testing.assert_close(torch.cat(pieces, 1), model(SRC, TGT))

    @torch.no_grad()
    def test_padding_in_the_target(self) -> None:
        model = build()
        tgt = TGT.clone()
        tgt[1, 2], tgt[2, 4:] = 0, 0
        memory, cache = model.encode(SRC), KVCache()
        pieces = [model.decode(tgt[:, start:end], memory, cache) for start, end in ((0, 3), (3, 6))]
        seen = tgt != 0
        torch.testing.assert_close(torch.cat(pieces, 1)[seen], model(SRC, tgt)[seen])

    @torch.no_grad()
    def test_selected_rows_go_on_as_if_alone(self) -> None:
        model = build(memory_layers="each")
        rows = torch.tensor([3, 1, 1])
        memory, cache = model.encode(SRC), KVCache()
        model.decode(TGT[:, :3], memory, cache)
        cache.select(rows)
        logits = model.decode(TGT[rows, 3:], memory.select(rows), cache)
        torch.testing.assert_close(logits, model(SRC[rows], TGT[rows])[:, 3:])

    @torch.no_grad()
    def test_autocast_caches_keys_and_values_in_the_autocast_dtype(self) -> None:
        model, cache = build().float(), KVCache()
        with torch.autocast("cpu", torch.bfloat16):
            memory = model.encode(SRC)
            steps = [model.decode(TGT[:, i : i + 1], memory, cache) for i in range(3)]
            expected = model(SRC, TGT[:, :3])
        for layer in cache.layers:
            assert layer.self_kv is not None
            assert layer.self_kv.dtype == torch.bfloat16
        # The same roundings to bfloat16 in both, but sums in another order: a few units in the last of 8 bits.
        assert (torch.cat(steps, 1) - expected).abs().max() < 0.03 * expected.abs().max()

    def test_refuses_to_lose_gradients(self) -> None:
        model = build()
        with pytest.raises(RuntimeError, match=r"a cache while gradients are recorded; call it under torch.no_grad\(\)"):
            model.decode(TGT, model.encode(SRC), KVCache())

    @torch.no_grad()
    def test_length_and_batch_are_checked(self) -> None:
        model, cache = build(), KVCache()
        memory = model.encode(SRC)
        model.decode(TGT, memory, cache)
        with pytest.raises(ValueError, match="tgt has 19 tokens a row after 6 cached ones, more than max_len = 24"):
            model.decode(torch.ones(4, 19, dtype=torch.int64), memory, cache)
        rows = torch.tensor([0, 1])
        with pytest.raises(ValueError, match="tgt has 2 rows but cache has 4; they must be equal"):
            model.decode(TGT[rows], memory.select(rows), cache)


class TestGenerate:
    @pytest.mark.parametrize("memory_layers", ["last", "each", "mixed"])
    def test_equals_recomputing_everything_for_each_row(self, memory_layers: str) -> None:
        model = ending_model(memory_layers=memory_layers)
        src = torch.randint(3, 20, (8, 9)).masked_fill(torch.arange(9) > torch.arange(8)[:, None], 0)
        expected = greedy_by_recomputing(model, src, 10)
        width = max(len(row) for row in expected)
        assert len({len(row) for row in expected}) > 2, "rows of equal length would not test the early exit"
        padded = torch.tensor([row + [model.pad_id] * (width - len(row)) for row in expected])
        assert torch.equal(model.generate(src, max_new_tokens=10), padded)

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        model = ending_model()
        together = model.generate(SRC, max_new_tokens=10)
        for row in range(4):
            alone = model.generate(SRC[row : row + 1, : SRC[row].nonzero().max() + 1], max_new_tokens=10)
            assert torch.equal(F.pad(alone[0], (0, together.shape[1] - alone.shape[1])), together[row])

    def test_finished_rows_leave_the_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stand-in for decode ends row r (known by its source) after r + 1 tokens and counts the rows it is given."""
        model = build()
        rows_seen = []

        def decode(tgt: Tensor, memory: Memory, cache: KVCache) -> Tensor:
            cache.append(tgt != 0, 0)
            row_numbers = memory.states[0]
            rows_seen.append(tgt.shape[0])
            assert tgt.shape[0] == row_numbers.shape[0] == cache.batch_size
            token = torch.where(row_numbers + 1 <= cache.length, model.eos_id, 5 + row_numbers)
            return F.one_hot(token, 20).double()[:, None]

        padding = model.encode(SRC).padding
        monkeypatch.setattr(model, "start_decoding", lambda src, capacity: (Memory([torch.arange(4)], padding), KVCache(capacity)))
        monkeypatch.setattr(model, "decode", decode)
        tokens = model.generate(SRC, max_new_tokens=20)
        assert rows_seen == [4, 3, 2, 1]
        assert tokens.tolist() == [[2, 0, 0, 0], [6, 2, 0, 0], [7, 7, 2, 0], [8, 8, 8, 2]]

    def test_few_of_the_rows_that_stay_change_their_place(self) -> None:
        assert remaining(torch.tensor([True, False, True, True, False, True])).tolist() == [0, 5, 2, 3]
        assert remaining(torch.tensor([True, True, False])).tolist() == [0, 1]
        assert remaining(torch.tensor([False, False])).tolist() == []

    def test_never_generates_pad_or_bos(self) -> None:
        model = build()
        assert model.output is not None
        with torch.no_grad():
            model.output.bias[[0, 1]] = 100.0
        assert (model.generate(SRC, max_new_tokens=5)[:, 0] > 1).all()

    def test_bos_may_be_eos(self) -> None:
        model = build(bos_id=2, eos_id=2)
        assert model.output is not None
        with torch.no_grad():
            model.output.bias[2] = 100.0
        assert model.generate(SRC).tolist() == [[2]] * 4

    def test_is_deterministic_and_leaves_every_mode_as_it_was(self) -> None:
        model = build(dropout=0.5).train()
        model.decoder.layers[1].eval()
        before = [module.training for module in model.modules()]
        assert torch.equal(model.generate(SRC, max_new_tokens=8), model.generate(SRC, max_new_tokens=8))
        assert [module.training for module in model.modules()] == before

    def test_the_tokens_can_be_trained_on(self) -> None:
        model = build()
        tokens = model.generate(SRC, max_new_tokens=4)
        model(SRC, tokens).sum().backward()

    def test_limits(self) -> None:
        model = build()
        assert model.output is not None
        with torch.no_grad():
            model.output.bias[2] = -100.0  # never ends
        assert model.generate(SRC, max_new_tokens=3).shape == (4, 3)
        assert model.generate(SRC).shape == (4, 24)  # max_len, which is less than 7 + 50
        assert model.generate(SRC[:0]).shape == (0, 0)
        assert model.generate(torch.zeros_like(SRC), max_new_tokens=3).shape == (4, 3)

    def test_min_length_holds_the_end_back(self) -> None:
        model = build()
        assert model.output is not None
        with torch.no_grad():
            model.output.bias[2] = 100.0
        assert model.generate(SRC).tolist() == [[2]] * 4
        tokens = model.generate(SRC, min_length=3)
        assert (tokens[:, :3] > 2).all()
        assert tokens[:, 3:].tolist() == [[2]] * 4

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_no_ngram_occurs_twice(self, size: int) -> None:
        model = build()
        assert model.output is not None
        with torch.no_grad():
            model.output.bias[2] = -100.0
        free, blocked = (model.generate(sources(6), 17, no_repeat_ngram=n).tolist() for n in (0, size))
        assert all(repeats(row, size) for row in free)
        assert not any(repeats(row, size) for row in blocked)

    def test_where_every_word_is_banned_the_sentence_ends(self) -> None:
        model = build(tgt_vocab=6)
        assert model.output is not None
        with torch.no_grad():
            model.output.bias[2] = -torch.inf
        options = {"no_repeat_ngram": 1, "min_length": 5}
        for beam in (1, 3):
            tokens = model.generate(SRC, 8, beam=beam, **options)
            assert tokens.sort(1).values.tolist() == [[2, 3, 4, 5]] * 4
            assert tokens[:, 3].tolist() == [2] * 4

    @pytest.mark.parametrize("beam", [1, 3])
    def test_a_prefix_is_gone_on_from(self, beam: int) -> None:
        """Each row as if it had been alone with its prefix, and the rules for other tokens do not hold for it."""
        model = ending_model()
        prefix = torch.tensor([[7, 7, 7], [9, 0, 0], [0, 0, 0], [5, 1, 0]])
        tokens = model.generate(SRC, 10, beam=beam, prefix=prefix, no_repeat_ngram=2)
        kept = prefix != 0
        assert torch.equal(tokens[:, :3][kept], prefix[kept])
        assert (tokens[:, 3:] > 2).any()
        for row in range(4):
            alone = model.generate(SRC[[row]], 10, beam=beam, prefix=prefix[[row], : kept[row].sum()], no_repeat_ngram=2)
            assert tokens[row, : alone.shape[1]].tolist() == alone[0].tolist()
        assert torch.equal(model.generate(SRC, 3, beam=beam, prefix=prefix[:1].expand(4, 3)), prefix[:1].expand(4, 3))

    @pytest.mark.parametrize("beam", [1, 3])
    @pytest.mark.parametrize("cell", ["attention", "ssru"])
    def test_what_every_row_begins_with_is_decoded_in_one_pass(self, cell: str, beam: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model = ending_model(decoder_cell=cell)
        prefix = torch.tensor([[7, 7, 7, 0], [9, 8, 3, 0], [4, 5, 6, 0], [5, 1, 9, 9]])
        seen = []
        decode = model.decode
        monkeypatch.setattr(model, "decode", lambda tgt, *others: seen.append(tgt.tolist()) or decode(tgt, *others))
        tokens = model.generate(SRC, 10, beam=beam, prefix=prefix)
        assert seen[0] == [[1, *row[:3]] for row in prefix.tolist() for _ in range(beam)]
        assert {len(row) for rows in seen[1:] for row in rows} == {1}
        monkeypatch.undo()
        for [best], row, src in zip(model.beam_search(SRC, 10, beam=beam, prefix=prefix, early_stopping=True), tokens, SRC, strict=True):
            if beam == 1:
                assert best.tokens == row[: len(best.tokens)].tolist()
            expected = model.score(src[None], torch.tensor([best.tokens])).sentences.item()
            assert best.log_probability == pytest.approx(expected, rel=1e-9)
        model.output.bias.data[7] = -torch.inf
        assert model.generate(SRC, 10, beam=beam, prefix=prefix)[0, :3].tolist() == [7, 7, 7]

    @pytest.mark.parametrize("options", [{}, {"beam": 3}, {"beam": 3, "early_stopping": True}], ids=str)
    def test_float32_and_bfloat16_run(self, options: dict[str, Any]) -> None:
        model = ending_model().float()
        expected = model.generate(SRC, 8, **options)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.generate(SRC, 8, **options).dtype == expected.dtype == torch.int64

    @pytest.mark.parametrize(
        ("src", "max_new_tokens", "error", "message"),
        [
            (SRC, 0, ValueError, r"max_new_tokens must be in \[1, 24\], got 0"),
            (SRC, 25, ValueError, r"max_new_tokens must be in \[1, 24\], got 25"),
            (SRC, 2.0, TypeError, "max_new_tokens must be an int, got float"),
            (SRC.float(), 5, TypeError, "src must be a tensor of int64 token ids, got dtype torch.float32"),
            (SRC[0], 5, ValueError, "src must have 2 dimensions"),
        ],
    )
    def test_bad_input(self, src: Tensor, max_new_tokens: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            build().generate(src, max_new_tokens)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"beam": 21}, ValueError, r"beam must be in \[1, 20\], got 21"),
            ({"beam": 0}, ValueError, r"beam must be in \[1, 20\], got 0"),
            ({"beam": 2, "top_k": 3}, ValueError, r"beam must be 1 where tokens are drawn \(.*\), got 2"),
            ({"beam": 2, "length_penalty": "1"}, TypeError, "length_penalty must be a number, got str"),
            (
                {"beam": 2, "length_penalty": lambda length: 3 - length},
                ValueError,
                "length_penalty must give positive.* got 0.0 for length 3",
            ),
            ({"beam": 2, "early_stopping": 1}, TypeError, "early_stopping must be a bool, got int"),
            ({"min_length": 11}, ValueError, r"min_length must be in \[0, 10\], got 11"),
            ({"no_repeat_ngram": -1}, ValueError, "no_repeat_ngram must be at least 0, got -1"),
            ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
            ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1"),
            ({"temperature": True}, TypeError, "temperature must be a number, got bool"),
            ({"top_k": 0}, ValueError, r"top_k must be in \[1, 20\], got 0"),
            ({"top_k": 21}, ValueError, r"top_k must be in \[1, 20\], got 21"),
            ({"top_p": 0}, ValueError, r"top_p must lie in \(0, 1\], got 0"),
            ({"top_p": 1.1}, ValueError, r"top_p must lie in \(0, 1\], got 1.1"),
            ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
            ({"prefix": torch.full((4, 11), 5)}, ValueError, "prefix has 11 tokens a row, more than max_new_tokens = 10"),
            ({"prefix": torch.full((4, 25), 5)}, ValueError, "prefix has 25 tokens a row, more than max_len = 24"),
            ({"prefix": torch.full((3, 2), 5)}, ValueError, "prefix has 3 rows, src has 4; they must be equal"),
            ({"prefix": torch.full((3, 2), 5), "beam": 2}, ValueError, "prefix has 3 rows, src has 4; they must be equal"),
            ({"prefix": torch.full((4, 2), 20)}, ValueError, r"prefix must hold ids in \[0, 19\] and not eos_id = 2"),
            ({"prefix": torch.full((4, 2), 2)}, ValueError, r"prefix must hold ids in \[0, 19\] and not eos_id = 2"),
            ({"prefix": torch.tensor([[0, 5]] * 4)}, ValueError, r"prefix must have its padding \(pad_id = 0\) after its tokens"),
            ({"prefix": [[5]]}, TypeError, "prefix must be a tensor of int64 token ids, got list"),
        ],
        ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
    )
    def test_bad_options(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            build().generate(SRC, 10, **options)


def repeats(row: list[int], size: int) -> bool:
    ngrams = [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]
    return len(set(ngrams)) < len(ngrams)


class TestStream:
    def test_columns_are_those_of_generate(self) -> None:
        model, src = ending_model(), sources(6)
        expected = model.generate(src, 10, no_repeat_ngram=2)
        assert torch.equal(torch.stack(list(model.stream(src, 10, no_repeat_ngram=2)), 1), expected)

    def test_a_token_comes_before_the_next_is_worked_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build(dropout=0.5).train()
        calls = []
        decode = model.decode
        monkeypatch.setattr(model, "decode", lambda *inputs: calls.append(1) or decode(*inputs))
        stream = model.stream(SRC, 10)
        assert calls == []
        for count in (1, 2, 3):
            assert next(stream).shape == (4,)
            assert len(calls) == count
            assert model.training
            assert torch.is_grad_enabled()

    def test_bad_input_is_refused_at_once(self) -> None:
        with pytest.raises(ValueError, match="max_new_tokens must be in"):
            build().stream(SRC, 0)


class TestScore:
    def test_each_token_and_sentence(self) -> None:
        model = build()
        tgt = torch.tensor([[5, 6, 2, 0], [7, 2, 9, 9], [4, 4, 4, 4], [0, 0, 0, 0]])
        counted = [[5, 6, 2], [7, 2], [4, 4, 4, 4], []]
        scores = model.score(SRC, tgt)
        for row, tokens in enumerate(counted):
            with torch.no_grad():
                logits = model(SRC[[row]], torch.tensor([[1, *tokens]]))[0, : len(tokens)]
            expected = F.cross_entropy(logits, torch.tensor(tokens, dtype=torch.int64), reduction="none").neg()
            torch.testing.assert_close(scores.tokens[row, : len(tokens)], expected)
            assert (scores.tokens[row, len(tokens) :] == 0).all()
            torch.testing.assert_close(scores.sentences[row], expected.sum())

    def test_is_what_beam_search_says(self) -> None:
        model, src = ending_model(), sources(6)
        best = [found[0] for found in model.beam_search(src, 10)]
        tgt = torch.nn.utils.rnn.pad_sequence([torch.tensor(hypothesis.tokens) for hypothesis in best], True)
        expected = torch.tensor([hypothesis.log_probability for hypothesis in best], dtype=torch.float64)
        torch.testing.assert_close(model.score(src, tgt).sentences, expected)

    def test_dropout_is_off(self) -> None:
        model = build(dropout=0.5).train()
        assert torch.equal(model.score(SRC, TGT).tokens, model.score(SRC, TGT).tokens)
        assert model.training
