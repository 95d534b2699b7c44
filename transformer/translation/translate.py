"""Translates lines of text, and scores translations against references."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..checks import checked_integer_in
from ..generate import Generation
from ..model import Transformer
from ..optional import optional_module
from ..pretrained.find import PACKAGES, PretrainedError, model_files
from .batches import pad
from .checkpoint import load_model, load_tokenizers, read_checkpoint
from .data import ParallelText, left_out_text
from .machine import autocast, choose_device
from .tokenizer import SPACE_SIGN, Tokenizer

if TYPE_CHECKING:
    from ..pretrained.vocabulary import Vocabulary

# Source tokens decoded together, counting padding, and once per beam; finished sentences leave the batch.
BATCH_TOKENS = 2048
# A translation is cut off at this length limit, in tokens: factor times the source length, plus constant.
LENGTH_LIMIT = (2, 10)


Key = TypeVar("Key")


@dataclass(frozen=True)
class Scores:
    """sacreBLEU corpus scores on plain text, 0 to 100, with the signature that makes BLEU comparable."""

    bleu: float
    chrf: float
    num_sentences: int
    bleu_signature: str
    remark: str = ""  # what was left out or cut

    def __str__(self) -> str:
        return f"BLEU {self.bleu:.1f}, chrF {self.chrf:.1f} on {self.num_sentences} sentences ({self.bleu_signature}){self.remark}"


@dataclass(frozen=True)
class Candidate:
    """One of the translations beam search found for a sentence."""

    text: str
    log_probability: float  # of its tokens, including the end
    score: float  # log-probability divided by the length penalty; ranks the candidates
    ended: bool  # False: cut at the length limit


@dataclass(frozen=True)
class Translations:
    """Translated lines, in order, and the indices of incomplete ones."""

    lines: list[str]
    cut_sources: list[int] = field(default_factory=list)  # did not fit the model
    cut_translations: list[int] = field(default_factory=list)  # had not ended at the length limit
    # For each line, best first; none for blank lines, or if scores were not requested.
    candidates: list[list[Candidate]] = field(default_factory=list)


@dataclass
class TextStream:
    """A translation in pieces of text, as they are generated."""

    pieces: Iterator[str] = field(default_factory=lambda: iter(()))
    cut_source: bool = False  # the line did not fit the model
    cut_translation: bool = False  # it had not ended at the length limit; known after the last piece

    def __iter__(self) -> Iterator[str]:
        return self.pieces


class Translator:
    """A trained model with its tokenizers. Not thread-safe."""

    def __init__(
        self,
        model: Generation,
        source_tokenizer: Tokenizer | Vocabulary,
        target_tokenizer: Tokenizer | Vocabulary,
        precision: str = "auto",
    ) -> None:
        """precision: a choice of machine.autocast."""
        self.model, self.precision = model, precision
        self.source_tokenizer, self.target_tokenizer = source_tokenizer, target_tokenizer
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Translator:
        """Load from a checkpoint file or a training run's folder. Raises CheckpointError."""
        checkpoint = read_checkpoint(path)
        return cls(load_model(checkpoint, choose_device(device)), *load_tokenizers(checkpoint))

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "auto", shortlist: bool = False) -> Translator:
        """Load from a folder with a Marian model and its vocabularies, or the model file in it (pretrained/find.py).

        shortlist: choose only among the target tokens in the folder's lexical shortlist for the source. Raises PretrainedError.
        """
        for name in PACKAGES:
            optional_module(name, "pretrained")
        from ..pretrained.shortlist import Shortlist
        from ..pretrained.vocabulary import Vocabulary

        files = model_files(Path(path))
        source, target = Vocabulary(files.source_vocab), Vocabulary(files.target_vocab)
        model = Transformer.from_pretrained(files.model)
        if max(len(source), len(target)) > model.bos_id:
            raise PretrainedError(f"{files.model} has {model.bos_id} tokens, its vocabularies {len(source)} and {len(target)}")
        if shortlist:
            if files.shortlist is None:
                raise PretrainedError(f"{files.model.parent} has no shortlist, lex*.bin")
            model.shortlist = Shortlist.read(files.shortlist, len(source), len(target)).candidates
        return cls(model.to(choose_device(device)), source, target, "off")

    def translate(self, lines: Sequence[str], **options: Any) -> list[str]:
        """One translation per line, in order; blank lines stay empty. Duplicate lines are translated once. options: as for
        `translations`."""
        return self.translations(lines, **options).lines

    def translations(self, lines: Sequence[str], *, beam: int = 1, n_best: int = 1, scores: bool = False, **options: Any) -> Translations:
        """Like `translate`, and reports cuts: lines of more than max_len - 1 tokens, translations that reached LENGTH_LIMIT or max_len.

        beam: 1 is greedy. n_best: candidates per line, at most beam; with 1 there are none unless scores is True. options:
        length_penalty, early_stopping, min_length, no_repeat_ngram of Transformer.beam_search; if greedy, those of
        Transformer.generate. Raises ValueError or TypeError, naming the argument.
        """
        beam = checked_integer_in("beam", beam, 1)
        in_order = [" ".join(line.split()) for line in lines]
        encoded = self._encoded(self.source_tokenizer, in_order)
        found: dict[str, list[Candidate]] = {"": []}
        for batch in token_batches({sentence: len(ids) + 1 for sentence, ids in encoded.items()}, BATCH_TOKENS // beam):
            src = self._padded([self.source_tokens(encoded[sentence]) for sentence in batch])
            if beam == n_best == 1 and not scores:
                found |= zip(batch, self._greedy(src, options), strict=True)
            else:
                # A beam of one with early stopping is greedy.
                search = {"beam": beam, "n_best": n_best, "early_stopping": beam == 1} | options
                found |= zip(batch, self._beam_search(src, search), strict=True)
        return Translations(
            [found[sentence][0].text if found[sentence] else "" for sentence in in_order],
            [i for i, sentence in enumerate(in_order) if len(encoded.get(sentence, ())) >= self.model.max_len],
            [i for i, sentence in enumerate(in_order) if found[sentence] and not found[sentence][0].ended],
            [found[sentence] if scores or n_best > 1 else [] for sentence in in_order],
        )

    def stream(self, line: str, **options: Any) -> TextStream:
        """The translation of one line, in pieces of text as they are generated; joined, they are the translation.

        options: those of Transformer.stream, such as temperature. Immediately raises ValueError or TypeError, naming the argument.
        """
        encoded = self._encoded(self.source_tokenizer, [" ".join(line.split())])
        if not encoded:
            return TextStream()
        (ids,) = encoded.values()
        src = self._padded([self.source_tokens(ids)])
        columns = self.model.stream(src, self.length_limit(src), **options)
        stream = TextStream(cut_source=len(ids) >= self.model.max_len)

        def pieces() -> Iterator[str]:
            tokens: list[int] = []
            shown = ""
            while True:
                with autocast(self.device, self.precision):
                    column = next(columns, None)
                if column is None:
                    stream.cut_translation = self.model.eos_id not in tokens
                    return
                tokens.append(int(column))
                [text] = self.target_tokenizer.decode([tokens])
                # The bytes of one character may span several tokens.
                if len(text) > len(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    yield text[len(shown) :]
                    shown = text

        stream.pieces = pieces()
        return stream

    def log_probabilities(self, lines: Sequence[str], translations: Sequence[str]) -> list[float]:
        """The log-probability of each line's given translation, including its end. ValueError if one does not fit the model."""
        sentences = [" ".join(line.split()) for line in lines]
        sources, targets = self._encoded(self.source_tokenizer, sentences), self._encoded(self.target_tokenizer, translations)
        pairs = [(sources.get(s, []), targets.get(t, [])) for s, t in zip(sentences, translations, strict=True)]
        for i, (_, target) in enumerate(pairs):
            if len(target) >= self.model.max_len:
                raise ValueError(f"translations[{i}] has {len(target)} tokens, more than max_len - 1 = {self.model.max_len - 1}")
        found: dict[int, float] = {}
        for batch in token_batches({i: max(len(s), len(t)) + 1 for i, (s, t) in enumerate(pairs)}, BATCH_TOKENS):
            src = self._padded([self.source_tokens(pairs[i][0]) for i in batch])
            tgt = self._padded([[*pairs[i][1], self.model.eos_id] for i in batch])
            with autocast(self.device, self.precision):
                found |= zip(batch, self.model.score(src, tgt).sentences.tolist(), strict=True)
        return [found[i] for i in range(len(pairs))]

    def alignment(self, line: str, translation: str) -> list[tuple[int, int]]:
        """(word of the line, word of its translation) for each word of the translation, in order; words are split at whitespace.

        Each word is aligned with the one that the last layer's heads, at its tokens, attend to the most.
        """
        words = [" ".join(line.split()), " ".join(translation.split())]
        if not all(words):
            return []
        source, target = (
            tokenizer.encode([text])[0] for tokenizer, text in zip((self.source_tokenizer, self.target_tokenizer), words, strict=True)
        )
        source, target = source[: self.model.max_len - 1], target[: self.model.max_len - 1]
        maps = self.model.attention_maps(self._padded([[*source, self.model.eos_id]]), self._padded([[self.model.bos_id, *target]]))
        weights = maps["cross"][-1][0].float().mean(0)[: len(target), : len(source)].cpu()  # row t chooses token t
        from_word, to_word = (
            torch.tensor(word_numbers(tokenizer.pieces(ids)))
            for tokenizer, ids in ((self.source_tokenizer, source), (self.target_tokenizer, target))
        )
        by_source = weights.new_zeros(len(target), int(from_word.max()) + 1).index_add_(1, from_word, weights)
        by_words = by_source.new_zeros(int(to_word.max()) + 1, by_source.shape[1]).index_add_(0, to_word, by_source)
        return [(int(best), word) for word, best in enumerate(by_words.argmax(1))]

    def source_tokens(self, ids: list[int]) -> list[int]:
        """An encoded sentence as the model reads it: cut to max_len - 1 tokens, plus the end token."""
        return [*ids[: self.model.max_len - 1], self.model.eos_id]

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return pad(rows, pad_id=self.model.pad_id).to(self.device)

    def _encoded(self, tokenizer: Tokenizer | Vocabulary, sentences: Sequence[str]) -> dict[str, list[int]]:
        """The token ids of each distinct nonempty sentence."""
        different = sorted(set(sentences) - {""})
        return dict(zip(different, tokenizer.encode(different), strict=True))

    def length_limit(self, src: Tensor) -> int:
        """The most tokens of a translation of src (B, S)."""
        factor, constant = LENGTH_LIMIT
        return min(factor * src.shape[1] + constant, self.model.max_len)

    def _greedy(self, src: Tensor, options: dict[str, Any]) -> list[list[Candidate]]:
        """One candidate per row, with unknown scores."""
        with autocast(self.device, self.precision):
            rows = self.model.generate(src, max_new_tokens=self.length_limit(src), **options).tolist()
        texts = self.target_tokenizer.decode(rows)
        return [[Candidate(text, math.nan, math.nan, self.model.eos_id in row)] for text, row in zip(texts, rows, strict=True)]

    def _beam_search(self, src: Tensor, options: dict[str, Any]) -> list[list[Candidate]]:
        with autocast(self.device, self.precision):
            rows = self.model.beam_search(src, max_new_tokens=self.length_limit(src), **options)
        texts = iter(self.target_tokenizer.decode([found.tokens for row in rows for found in row]))
        return [[Candidate(next(texts), found.log_probability, found.score, found.ended) for found in row] for row in rows]

    def score(self, text: ParallelText) -> tuple[Scores, list[str]]:
        """Translate `text.source` and compare with `text.target`; also returns the translations."""
        done = self.translations(text.source)
        remark = left_out_text(text.left_out)
        if done.cut_sources:
            remark += f"; cut: {len(done.cut_sources):,} sources longer than {self.model.max_len - 1} tokens"
        if done.cut_translations:
            remark += f"; cut: {len(done.cut_translations):,} translations that had not ended"
        return replace(score(done.lines, text.target), remark=remark), done.lines


def word_numbers(pieces: Sequence[str]) -> list[int]:
    """The index of the word each piece is in. A piece that starts with a space starts a new word, unless nothing came before."""
    numbers: list[int] = []
    for piece in pieces:
        starts = piece.startswith(SPACE_SIGN)
        numbers.append(numbers[-1] + starts if numbers else 0)
    return numbers


def token_batches(lengths: Mapping[Key, int], batch_tokens: int) -> Iterator[list[Key]]:
    """Batches of keys of similar length, shortest first, of at most batch_tokens with padding, but at least one key."""
    batch: list[Key] = []
    for key in sorted(lengths, key=lengths.__getitem__):
        if batch and lengths[key] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def score(translations: Sequence[str], references: Sequence[str]) -> Scores:
    """sacreBLEU (Post 2018) with its default tokenizer, and chrF2 (Popovic 2015); one reference per sentence."""
    metrics = optional_module("sacrebleu.metrics")
    bleu, chrf = metrics.BLEU(), metrics.CHRF()
    hypotheses, reference_sets = list(translations), [list(references)]
    return Scores(
        bleu=bleu.corpus_score(hypotheses, reference_sets).score,
        chrf=chrf.corpus_score(hypotheses, reference_sets).score,
        num_sentences=len(hypotheses),
        bleu_signature=bleu.get_signature().format(short=True),
    )
