"""Translation of lines of text, and its score against reference translations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_attention.transformer.batches import pad
from fused_attention.transformer.checkpoint import load_model, load_tokenizers, read_checkpoint
from fused_attention.transformer.data import ParallelText
from fused_attention.transformer.model import Transformer
from fused_attention.transformer.optional_modules import optional_module
from fused_attention.transformer.precision import autocast, choose_device
from fused_attention.transformer.tokenizer import EOS_ID, Tokenizer

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

    def __str__(self) -> str:
        return f"BLEU {self.bleu:.1f}, chrF {self.chrf:.1f} on {self.num_sentences} sentences ({self.bleu_signature})"


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
        """Greedy translations, one a line, in order; a blank line stays empty. Equal lines are translated once.

        A line of more than max_len - 1 tokens is cut there; `too_long` tells which ones are.
        """
        sentences = sorted({" ".join(line.split()) for line in lines} - {""})
        encoded = dict(zip(sentences, self.source_tokenizer.encode(sentences), strict=True))
        by_length = sorted(sentences, key=lambda sentence: len(encoded[sentence]))
        translations = {"": ""}
        for start in range(0, len(by_length), BATCH_SENTENCES):
            batch = by_length[start : start + BATCH_SENTENCES]
            translations |= zip(batch, self._translate_batch([encoded[sentence] for sentence in batch]), strict=True)
        return [translations[" ".join(line.split())] for line in lines]

    def too_long(self, lines: Sequence[str]) -> list[int]:
        """Indices of the lines that do not fit the model and would be cut."""
        return [i for i, ids in enumerate(self.source_tokenizer.encode(lines)) if len(ids) >= self.model.max_len]

    def source_tokens(self, ids: list[int]) -> list[int]:
        """An encoded sentence as the model reads it: cut at max_len - 1 tokens, with its end."""
        return [*ids[: self.model.max_len - 1], EOS_ID]

    def _translate_batch(self, rows: list[list[int]]) -> list[str]:
        src = pad([self.source_tokens(ids) for ids in rows]).to(self.device)
        factor, constant = LENGTH_LIMIT
        with autocast(self.device):
            output = self.model.generate(src, max_new_tokens=min(factor * src.size(1) + constant, self.model.max_len))
        return self.target_tokenizer.decode(output.tolist())

    def score(self, text: ParallelText) -> tuple[Scores, list[str]]:
        """Translate `text.source` and compare with `text.target`; returns the translations too."""
        translations = self.translate(text.source)
        return score(translations, text.target), translations


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
