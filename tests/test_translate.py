"""Translation of lines and its scores."""

from __future__ import annotations

import pytest
import torch
from tiny_translation import WORDS, trained_folder

from fused_attention.transformer.translation import translate
from fused_attention.transformer.translation.checkpoint import CHECKPOINT_NAME, read_checkpoint
from fused_attention.transformer.translation.corpora import load_corpus
from fused_attention.transformer.translation.data import ParallelText
from fused_attention.transformer.translation.translate import Translator, score


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator.load(trained_folder())


@pytest.fixture(scope="module")
def known() -> ParallelText:
    """The sentences that the model has learned by heart."""
    return load_corpus(read_checkpoint(trained_folder()).config["data"]).train


def test_order_blank_lines_and_repetitions_are_kept(translator: Translator, known: ParallelText) -> None:
    first, second = known.source[:2]
    lines = ["", second, "  ", first, f"  {second.replace(' ', '   ')} ", second]
    assert translator.translate(lines) == ["", known.target[1], "", known.target[0], known.target[1], known.target[1]]


def test_nothing_to_translate(translator: Translator) -> None:
    assert translator.translate([]) == []
    assert translator.translate(["", ""]) == ["", ""]


def test_batches_do_not_change_translations(translator: Translator, known: ParallelText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "BATCH_TOKENS", 40)
    assert translator.translate(known.source) == known.target


def test_sentences_are_decoded_once_and_with_their_like(translator: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    original = translator.model.generate

    def generate(src: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        shapes.append(tuple(src.shape))
        return original(src, max_new_tokens)

    monkeypatch.setattr(translator.model, "generate", generate)
    long = " ".join(WORDS)
    width = len(translator.source_tokenizer.encode([f"{long} cat"])[0]) + 1
    monkeypatch.setattr(translate, "BATCH_TOKENS", 2 * width)
    translator.translate(["cat", long, "dog", f"{long} cat", "cat", "dog"])
    assert [rows for rows, _ in shapes] == [2, 2]
    assert shapes[0][1] < shapes[1][1] == width


def test_token_batches() -> None:
    lengths = {"a": 5, "b": 2, "c": 30, "d": 5, "e": 1}
    assert list(translate.token_batches(lengths, 10)) == [["e", "b"], ["a", "d"], ["c"]]
    assert list(translate.token_batches({}, 10)) == []


def test_a_line_that_does_not_fit_is_cut_and_named(translator: Translator) -> None:
    done = translator.translations(["red cat", "red cat " * 100])
    assert len(done.lines) == 2
    assert done.cut_sources == [1]


def test_a_translation_that_does_not_end_is_cut_and_named(
    translator: Translator, known: ParallelText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translate, "LENGTH_LIMIT", (0, 3))
    done = translator.translations(["", *known.source])
    whole = [len(translator.target_tokenizer.encode([sentence])[0]) < 3 for sentence in known.target]
    assert 0 < sum(whole) < len(whole)
    assert done.cut_translations == [index + 1 for index, ended in enumerate(whole) if not ended]
    assert done.cut_sources == []


def test_candidates_and_their_scores(translator: Translator, known: ParallelText) -> None:
    lines = ["", *known.source[::-1], known.source[0]]
    done = translator.translations(lines, beam=4, n_best=3)
    assert done.lines == ["", *known.target[::-1], known.target[0]]
    assert [len(found) for found in done.candidates] == [0] + [3] * (len(lines) - 1)
    for line, [best, *others] in zip(done.lines[1:], done.candidates[1:], strict=True):
        assert best.text == line
        assert best.ended
        assert best.score > -0.5
        assert all(other.text != line and other.score < best.score for other in others if other.ended)
    with pytest.raises(ValueError, match="n_best must be at most beam = 1, got 2"):
        translator.translations(["red cat"], n_best=2)
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        translator.translations([""], beam=0)


def test_greedy_with_scores_is_a_beam_of_one(translator: Translator, known: ParallelText) -> None:
    done = translator.translations(known.source, scores=True, length_penalty=0)
    assert done.lines == known.target
    assert translator.translations(known.source).candidates == [[]] * len(known.source)
    expected = translator.log_probabilities(known.source, known.target)
    for [found], log_probability in zip(done.candidates, expected, strict=True):
        assert found.score == found.log_probability == pytest.approx(log_probability, abs=1e-4)


def test_log_probabilities_are_in_order_and_those_of_each_pair(
    translator: Translator, known: ParallelText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translate, "BATCH_TOKENS", 20)
    right = translator.log_probabilities(known.source, known.target)
    wrong = translator.log_probabilities(known.source, known.target[::-1])
    assert all(more > -0.5 > less for more, less in zip(right, wrong, strict=True))
    assert translator.log_probabilities(known.source[::-1], known.target[::-1]) == pytest.approx(right[::-1], abs=1e-4)
    with pytest.raises(ValueError, match=r"translations\[1\] has \d+ tokens, more than max_len - 1 = 31"):
        translator.log_probabilities(["red", "red"], ["rouge", "rouge " * 40])


def test_a_stream_is_the_translation_in_pieces(translator: Translator, known: ParallelText) -> None:
    for source, target in zip(known.source[:5], known.target[:5], strict=True):
        pieces = list(translator.stream(f" {source}"))
        assert "".join(pieces) == target
        assert len(pieces) > 1
        assert all(pieces)
    assert list(translator.stream("  ")) == []


def test_a_score_says_what_it_is_not_of(translator: Translator, known: ParallelText) -> None:
    text = ParallelText([*known.source, "red cat " * 100], [*known.target, "chat rouge"], {"with an empty side": 2})
    scores, _ = translator.score(text)
    assert "on 31 sentences" in str(scores)
    assert "; left out: 2 with an empty side; cut: 1 sources longer than 31 tokens" in str(scores)
    assert translator.score(known)[0].remark == ""


def test_loads_a_file_as_well_as_its_folder(translator: Translator, known: ParallelText) -> None:
    from_file = Translator.load(trained_folder() / CHECKPOINT_NAME)
    assert from_file.translate(known.source[:3]) == translator.translate(known.source[:3])


def test_unknown_device() -> None:
    with pytest.raises(ValueError, match="device 'abacus' cannot be used"):
        Translator.load(trained_folder(), "abacus")


def test_scores_of_equal_and_of_different_text() -> None:
    references = ["the cat sees the big red dog", "a dog eats what the cat sees"]
    perfect = score(references, references)
    assert (perfect.bleu, perfect.chrf, perfect.num_sentences) == (pytest.approx(100), pytest.approx(100), 2)
    assert "tok:13a" in perfect.bleu_signature
    worse = score(["the cat sees the big blue dog", "a dog eats what the cat sees"], references)
    assert 50 < worse.bleu < 100
    assert score(["x", "y"], references).bleu < 1


def test_score_of_a_model_on_what_it_knows(translator: Translator, known: ParallelText) -> None:
    scores, translations = translator.score(known)
    assert translations == known.target
    assert scores.bleu == pytest.approx(100)
