"""Translation of lines of text, and its score against reference translations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..model import Transformer
from .batches import pad
from .checkpoint import load_model, load_tokenizers, read_checkpoint
from .data import ParallelText, left_out_text
from .machine import autocast, choose_device, optional_module
from .tokenizer import EOS_ID, Tokenizer

# Sentences decoded together; what is finished leaves the batch, so long ones do not hold up many.
BATCH_SENTENCES = 64
# A translation may be this much longer than its source, in tokens, before it is cut off: factor and constant.
LENGTH_LIMIT = (2, 10)


@dataclass(frozen=True)
class Scores:
    """Corpus scores of sacreBLEU on plain text, 0 to 100, with the signature that makes the BLEU comparable."""

    bleu: float
    chrf: float
    num_sentences: int
    bleu_signature: str
    remark: str = ""  # what was left out and cut

    def __str__(self) -> str:
        return f"BLEU {self.bleu:.1f}, chrF {self.chrf:.1f} on {self.num_sentences} sentences ({self.bleu_signature}){self.remark}"


@dataclass(frozen=True)
class Translations:
    """Translated lines, in order, and the indices of those that are not whole."""

    lines: list[str]
    cut_sources: list[int] = field(default_factory=list)  # did not fit the model
    cut_translations: list[int] = field(default_factory=list)  # had not ended at the length limit


class Translator:
    """A trained model with its tokenizers. Not thread-safe."""

    def __init__(self, model: Transformer, source_tokenizer: Tokenizer, target_tokenizer: Tokenizer) -> None:
        self.model = model
        self.source_tokenizer, self.target_tokenizer = source_tokenizer, target_tokenizer
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Translator:
        """From a checkpoint file or a training run's folder. Raises CheckpointError."""
        checkpoint = read_checkpoint(path)
        return cls(load_model(checkpoint, choose_device(device)), *load_tokenizers(checkpoint))

    def translate(self, lines: Sequence[str]) -> list[str]:
        """Greedy translations, one a line, in order; a blank line stays empty. Equal lines are translated once."""
        return self.translations(lines).lines

    def translations(self, lines: Sequence[str]) -> Translations:
        """As `translate`, and what was cut: a line of more than max_len - 1 tokens, a translation that reached LENGTH_LIMIT or max_len."""
        sentences = sorted({" ".join(line.split()) for line in lines} - {""})
        encoded = dict(zip(sentences, self.source_tokenizer.encode(sentences), strict=True))
        by_length = sorted(sentences, key=lambda sentence: len(encoded[sentence]))
        translations = {"": ("", True)}
        for start in range(0, len(by_length), BATCH_SENTENCES):
            batch = by_length[start : start + BATCH_SENTENCES]
            translations |= zip(batch, self._translate_batch([encoded[sentence] for sentence in batch]), strict=True)
        in_order = [" ".join(line.split()) for line in lines]
        return Translations(
            [translations[sentence][0] for sentence in in_order],
            [i for i, sentence in enumerate(in_order) if len(encoded.get(sentence, ())) >= self.model.max_len],
            [i for i, sentence in enumerate(in_order) if not translations[sentence][1]],
        )

    def source_tokens(self, ids: list[int]) -> list[int]:
        """An encoded sentence as the model reads it: cut at max_len - 1 tokens, with its end."""
        return [*ids[: self.model.max_len - 1], EOS_ID]

    def _translate_batch(self, rows: list[list[int]]) -> list[tuple[str, bool]]:
        """The translation of each row of ids, and whether it ended."""
        src = pad([self.source_tokens(ids) for ids in rows]).to(self.device)
        factor, constant = LENGTH_LIMIT
        with autocast(self.device):
            output = self.model.generate(src, max_new_tokens=min(factor * src.size(1) + constant, self.model.max_len))
        tokens = output.tolist()
        return list(zip(self.target_tokenizer.decode(tokens), (EOS_ID in row for row in tokens), strict=True))

    def score(self, text: ParallelText) -> tuple[Scores, list[str]]:
        """Translate `text.source` and compare with `text.target`; returns the translations too."""
        done = self.translations(text.source)
        remark = left_out_text(text.left_out)
        if done.cut_sources:
            remark += f"; cut: {len(done.cut_sources):,} sources longer than {self.model.max_len - 1} tokens"
        if done.cut_translations:
            remark += f"; cut: {len(done.cut_translations):,} translations that had not ended"
        return replace(score(done.lines, text.target), remark=remark), done.lines


def score(translations: Sequence[str], references: Sequence[str]) -> Scores:
    """sacreBLEU (Post 2018) with its default tokenizer and chrF2 (Popovic 2015); one reference a sentence."""
    metrics = optional_module("sacrebleu.metrics")
    bleu, chrf = metrics.BLEU(), metrics.CHRF()
    hypotheses, reference_sets = list(translations), [list(references)]
    return Scores(
        bleu=bleu.corpus_score(hypotheses, reference_sets).score,
        chrf=chrf.corpus_score(hypotheses, reference_sets).score,
        num_sentences=len(hypotheses),
        bleu_signature=bleu.get_signature().format(short=True),
    )
