"""Translations from an encoder-decoder model: greedy, sampled, by beam search, token by token, and the scores of given ones.

Everything runs without gradients and without dropout, whatever mode the model is in, which it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from .beam import BeamSearch, Hypothesis
from .checks import check_tokens, checked_integer_in
from .sampling import Sampler, checked_number
from .search import Constraints, log_softmax_, remaining

LengthPenalty = float | Callable[[int], float]


class Scores(NamedTuple):
    """Log-probabilities of given translations."""

    tokens: Tensor  # (B, T), 0 for padding
    sentences: Tensor  # (B,), their sums


class Generation(nn.Module):
    """A SearchableModel (search.py), with forward(src, tgt) -> logits, and the translations that it makes.

    Sources are src (B, S) int64, padded with pad_id; or spectrograms, of which S counts the frames (Transformer's src_features). These
    arguments are common to generate, stream and beam_search:

    max_new_tokens: at most and by default max_len, or S + 50 where that is less (the limit of Vaswani et al. 2017).
    min_length: tokens before eos_id.
    no_repeat_ngram: no so many tokens in a row twice in a translation; 0 for no limit.
    prefix: (B, P) int64 without bos_id and eos_id, right-padded with pad_id: what each translation begins with. P <= max_new_tokens.

    A token is never pad_id, nor bos_id unless that is eos_id. Raises ValueError or TypeError, naming the argument.
    """

    pad_id: int
    bos_id: int
    eos_id: int
    max_len: int  # of sources and translations
    tgt_vocab: int
    config: dict[str, Any]  # the arguments that build the same architecture

    def start_decoding(self, src: Tensor, capacity: int) -> tuple[Any, Any]:
        raise NotImplementedError

    def decode(self, tgt: Tensor, memory: Any, cache: Any) -> Tensor:
        raise NotImplementedError

    def check_source(self, src: Tensor) -> None:
        """Raises ValueError or TypeError."""
        check_tokens("src", src, self.max_len)

    def attention_maps(self, src: Tensor, tgt: Tensor) -> dict[str, list[Tensor]]:
        """The attention weights of one forward pass; "cross" holds (B, H, T, S) for each attention to the source."""
        raise NotImplementedError

    def generate(
        self,
        src: Tensor,
        max_new_tokens: int | None = None,
        *,
        beam: int = 1,
        length_penalty: LengthPenalty = 0.6,
        early_stopping: bool = False,
        min_length: int = 0,
        no_repeat_ngram: int = 0,
        prefix: Tensor | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """One translation of each source: (B, T) int64, T <= max_new_tokens.

        Each row starts after bos_id, which is not returned, ends with eos_id if it got that far, and is padded with pad_id. A row
        that is finished leaves the batch.

        beam: 1 takes the most probable token each time (greedy); more returns the best translation of beam_search, which
            says what length_penalty and early_stopping are. Both are deterministic, and a row's tokens do not depend on the
            other rows (up to rounding at equal scores).
        temperature, top_k, top_p, generator: if any is given, tokens are drawn instead: from softmax(logits / temperature), among the
            top_k best and then the fewest that hold at least top_p of their probability. generator: on the model's device; a seed
            gives the same tokens for the same batch.
        """
        beam = checked_integer_in("beam", beam, 1, self.tgt_vocab)
        choose = self._token_choice(temperature, top_k, top_p, generator)
        if beam > 1:
            if choose is not _best_token:
                raise ValueError(f"beam must be 1 where tokens are drawn (temperature, top_k, top_p, generator), got {beam}")
            options = {"min_length": min_length, "no_repeat_ngram": no_repeat_ngram, "prefix": prefix}
            penalty = {"length_penalty": length_penalty, "early_stopping": early_stopping}
            found = self.beam_search(src, max_new_tokens, beam=beam, **penalty, **options)  # type: ignore[arg-type]
            rows = [torch.tensor(best[0].tokens if best else [], dtype=torch.int64, device=src.device) for best in found]
            empty = torch.empty(0, 0, dtype=torch.int64, device=src.device)
            return nn.utils.rnn.pad_sequence(rows, True, self.pad_id) if rows else empty
        max_new_tokens, constraints = self._checked(src, max_new_tokens, min_length, no_repeat_ngram, prefix)
        with evaluating(self), torch.no_grad():
            columns = list(self._token_by_token(src, max_new_tokens, constraints, choose))
        return torch.stack(columns, 1) if columns else torch.empty(src.shape[0], 0, dtype=torch.int64, device=src.device)

    def stream(
        self,
        src: Tensor,
        max_new_tokens: int | None = None,
        *,
        min_length: int = 0,
        no_repeat_ngram: int = 0,
        prefix: Tensor | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generator | None = None,
    ) -> Iterator[Tensor]:
        """The columns of what generate(beam=1) would return, (B,) int64 each, as they come.

        Between two of them gradient mode and the model's mode are the caller's own.
        """
        choose = self._token_choice(temperature, top_k, top_p, generator)
        max_new_tokens, constraints = self._checked(src, max_new_tokens, min_length, no_repeat_ngram, prefix)
        columns = self._token_by_token(src, max_new_tokens, constraints, choose)

        def each() -> Iterator[Tensor]:
            while True:
                with evaluating(self), torch.no_grad():
                    column = next(columns, None)
                if column is None:
                    return
                yield column

        return each()

    def beam_search(
        self,
        src: Tensor,
        max_new_tokens: int | None = None,
        *,
        beam: int = 4,
        n_best: int = 1,
        length_penalty: LengthPenalty = 0.6,
        early_stopping: bool = False,
        min_length: int = 0,
        no_repeat_ngram: int = 0,
        prefix: Tensor | None = None,
    ) -> list[list[Hypothesis]]:
        """The n_best best translations of each source that a search with `beam` hypotheses finds, best first.

        Those that have ended come before those that were cut at max_new_tokens, then the higher score, the log-probability of the
        tokens, eos_id with them, over the length penalty. There are fewer than n_best where the constraints leave no more.

        beam: hypotheses of a sentence, at most tgt_vocab. n_best <= beam.
        length_penalty: alpha in ((5 + length) / 6) ** alpha (Wu et al. 2016; 0.6 as in Vaswani et al. 2017), or a function of the
            length, eos_id counted, with positive values: `lambda length: length` gives a mean over tokens.
        early_stopping: False: a sentence is done as soon as no other hypothesis can come in among the n_best any more, not even at the
            length with the largest penalty and with every further token certain. True: as soon as `beam` of its hypotheses have
            ended, which is sooner, but a better one may have been on its way. With beam = 1 and True the search is greedy.
        """
        beam = checked_integer_in("beam", beam, 1, self.tgt_vocab)
        n_best = checked_integer_in("n_best", n_best, 1)
        if n_best > beam:
            raise ValueError(f"n_best must be at most beam = {beam}, got {n_best}")
        if not isinstance(early_stopping, bool):
            raise TypeError(f"early_stopping must be a bool, got {type(early_stopping).__name__}")
        if prefix is not None and isinstance(prefix, Tensor) and prefix.ndim == 2:
            prefix = prefix.repeat_interleave(beam, 0)
        max_new_tokens, constraints = self._checked(src, max_new_tokens, min_length, no_repeat_ngram, prefix, beam)
        penalties = length_penalties(length_penalty, max_new_tokens)
        with evaluating(self), torch.no_grad():
            return BeamSearch(self, constraints, penalties, beam, n_best, early_stopping).run(src)

    def score(self, src: Tensor, tgt: Tensor) -> Scores:
        """The log-probability of every token of given translations, and of each translation: what beam_search calls log_probability.

        tgt (B, T) int64: without bos_id, with eos_id where that is to count, right-padded with pad_id; what follows eos_id does not count.
        """
        check_tokens("tgt", tgt, self.max_len)
        seen = torch.cat([tgt.new_full((tgt.shape[0], 1), self.bos_id), tgt], 1)[:, :-1]
        with evaluating(self), torch.no_grad():
            log_probabilities = log_softmax_(self(src, seen)).gather(2, tgt.unsqueeze(2)).squeeze(2)
        is_eos = tgt == self.eos_id
        counts = (is_eos.cumsum(1) - is_eos.int() == 0) & (is_eos | (tgt != self.pad_id))
        tokens = log_probabilities.masked_fill(~counts, 0)
        return Scores(tokens, tokens.sum(1))

    def _token_by_token(
        self, src: Tensor, max_new_tokens: int, constraints: Constraints, choose: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """Yields (B,) int64 a step, pad_id in rows that have ended. choose: scores (R, V) -> tokens (R, 1)."""
        memory, cache = self.start_decoding(src, max_new_tokens)
        output = torch.full((memory.batch_size, max_new_tokens), self.pad_id, device=memory.device)
        rows = torch.arange(memory.batch_size, device=memory.device)  # the row of output that each row of the batch writes
        tokens = constraints.beginning(memory.batch_size, max_new_tokens - 1, memory.device)
        num_forced = tokens.shape[1] - 1
        output[:, :num_forced] = tokens[:, 1:]
        yield from output[:, :num_forced].unbind(1)
        for length in range(num_forced, max_new_tokens if memory.batch_size > 0 else 0):
            logits = self.decode(tokens, memory, cache)[:, -1]
            history = output[rows, :length] if constraints.reads_history(length) else None
            tokens = choose(constraints.apply(logits, length, history))
            output[rows, length] = tokens[:, 0]
            yield output[:, length]
            going_on = (tokens[:, 0] != self.eos_id).cpu()
            if not going_on.all():
                stay = remaining(going_on)
                if stay.shape[0] == 0:
                    return
                cache.select(stay)
                memory = memory.select(stay)
                stay = stay.to(memory.device)
                rows, tokens = rows[stay], tokens[stay]
                constraints.select(stay)

    def _token_choice(
        self, temperature: float | None, top_k: int | None, top_p: float | None, generator: Generator | None
    ) -> Callable[[Tensor], Tensor]:
        if temperature is top_k is top_p is generator is None:
            return _best_token
        return Sampler.checked(self.tgt_vocab, temperature, top_k, top_p, generator)

    def _checked(
        self, src: Tensor, max_new_tokens: int | None, min_length: int, no_repeat_ngram: int, prefix: Tensor | None, beam: int = 1
    ) -> tuple[int, Constraints]:
        """max_new_tokens with its default, and the constraints; prefix has `beam` rows for each source."""
        self.check_source(src)
        if max_new_tokens is None:
            max_new_tokens = min(self.max_len, src.shape[-1] + 50)
        max_new_tokens = checked_integer_in("max_new_tokens", max_new_tokens, 1, self.max_len)
        min_length = checked_integer_in("min_length", min_length, 0, max_new_tokens)
        no_repeat_ngram = checked_integer_in("no_repeat_ngram", no_repeat_ngram, 0)
        if prefix is not None:
            check_tokens("prefix", prefix, self.max_len)
            rows = prefix.shape[0] // beam
            if rows != src.shape[0]:
                raise ValueError(f"prefix has {rows} rows, src has {src.shape[0]}; they must be equal")
            if prefix.shape[1] > max_new_tokens:
                raise ValueError(f"prefix has {prefix.shape[1]} tokens a row, more than max_new_tokens = {max_new_tokens}")
            outside = (prefix < 0) | (prefix >= self.tgt_vocab) | (prefix == self.eos_id) & (prefix != self.pad_id)
            if outside.any():
                raise ValueError(f"prefix must hold ids in [0, {self.tgt_vocab - 1}] and not eos_id = {self.eos_id}")
            padding = prefix == self.pad_id
            if (padding[:, :-1] & ~padding[:, 1:]).any():
                raise ValueError(f"prefix must have its padding (pad_id = {self.pad_id}) after its tokens")
        return max_new_tokens, Constraints(self, prefix, min_length, no_repeat_ngram)


def _best_token(scores: Tensor) -> Tensor:
    return scores.max(-1, keepdim=True).indices  # faster than argmax


def length_penalties(length_penalty: LengthPenalty, max_length: int) -> list[float]:
    """What sums of 1, 2, ... max_length tokens are divided by."""
    if callable(length_penalty):
        penalties = [checked_number("length_penalty's value", length_penalty(length)) for length in range(1, max_length + 1)]
    else:
        alpha = checked_number("length_penalty", length_penalty)
        penalties = [((5 + length) / 6) ** alpha for length in range(1, max_length + 1)]
    for length, penalty in enumerate(penalties, 1):
        if not 0 < penalty < math.inf:
            raise ValueError(f"length_penalty must give positive, finite values, got {penalty} for length {length}")
    return penalties


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every submodule into eval mode and afterwards back into the mode that each was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
