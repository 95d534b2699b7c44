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
    monkeypatch.setattr(translate, "BATCH_SENTENCES", 7)
    assert translator.translate(known.source) == known.target


def test_sentences_are_decoded_once_and_with_their_like(translator: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "BATCH_SENTENCES", 2)
    shapes = []
    original = translator.model.generate

    def generate(src: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        shapes.append(tuple(src.shape))
        return original(src, max_new_tokens)

    monkeypatch.setattr(translator.model, "generate", generate)
    long = " ".join(WORDS)
    translator.translate(["cat", long, "dog", f"{long} cat", "cat", "dog"])
    assert [rows for rows, _ in shapes] == [2, 2]
    assert shapes[0][1] < shapes[1][1]


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
