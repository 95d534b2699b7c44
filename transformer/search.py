"""What the translation searches share: their view of the decoder, and the tokens that may come next.

A search knows nothing about attention. It calls decode with the newest token of every row (the first call may add a forced prefix), and
tells memory and cache which rows continue. Whether a cache holds keys and values or the state of a recurrent cell is up to the decoder.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_IN_CACHE = 16  # of logits; 2 MB for 32,000 words
TOP_K_BLOCK = 128


class DecoderMemory(Protocol):
    """What the decoder reads about B sources, one row each, for any number of beams."""

    @property
    def batch_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def select(self, rows: Tensor) -> DecoderMemory:
        """The memory for only these sources; rows (n,) int64, on the CPU. This memory may then be used up."""


class DecoderCache(Protocol):
    """What the decoder carries from token to token, one row per beam of each source."""

    def select(self, rows: Tensor) -> None:
        """Makes old row rows[i] the new row i; rows (n,) int64, on the CPU, n <= the rows held. May move rows in place; rows with
        rows[i] == i need no work."""


class SearchableModel(Protocol):
    """What a search needs from a model."""

    pad_id: int  # fills rows that have ended; may be eos_id
    bos_id: int  # the first token passed to decode; may be outside the vocabulary
    eos_id: int

    def start_decoding(self, src: Tensor, capacity: int) -> tuple[Any, Any]:
        """src (B, S) int64 -> its DecoderMemory, and an empty DecoderCache with room for `capacity` tokens."""

    def decode(self, tgt: Tensor, memory: Any, cache: Any) -> Tensor:
        """The next n tokens of each row, tgt (B * beams, n) int64 -> logits (B * beams, n, V), which the caller may overwrite.

        Row r translates source r // beams. n is 1, or in the first call 1 + the length of a forced prefix.
        """


class Constraints:
    """Which tokens may come next in R rows.

    pad_id is never generated, and neither is bos_id unless it equals eos_id. eos_id needs min_length tokens before it. With
    no_repeat_ngram n > 0, no sequence of n tokens occurs twice (Paulus et al. 2018). If these rules exclude every token, eos_id
    is allowed. prefix (R, P): how rows begin, right-padded with pad_id; the other rules do not apply to its tokens.
    """

    def __init__(self, model: SearchableModel, prefix: Tensor | None = None, min_length: int = 0, no_repeat_ngram: int = 0) -> None:
        self.bos_id, self.eos_id, self.pad_id = model.bos_id, model.eos_id, model.pad_id
        self.never = {model.pad_id, model.bos_id} - {model.eos_id}
        self.prefix, self.min_length, self.no_repeat_ngram = prefix, min_length, no_repeat_ngram

    def beginning(self, num_rows: int, most: int, device: torch.device) -> Tensor:
        """The first input to decode, (R, 1 + n) int64: bos_id, then the n prefix tokens that all rows have, at most `most`."""
        begin = torch.full((num_rows, 1), self.bos_id, device=device)
        if self.prefix is None or num_rows == 0:
            return begin
        shortest = int((self.prefix != self.pad_id).sum(1).min())
        return torch.cat([begin, self.prefix[:, : min(shortest, most)]], 1)

    def reads_history(self, length: int) -> bool:
        """Whether apply needs the history of rows of this length."""
        return 0 < self.no_repeat_ngram <= length

    def apply(self, scores: Tensor, length: int, history: Tensor | None = None) -> Tensor:
        """Sets the scores of tokens that may not come next to -inf, in place. scores (R, V): logits or log-probabilities after `length`
        tokens; history (R, length) int64."""
        forced = None
        if self.prefix is not None and length < self.prefix.shape[1]:
            tokens = self.prefix[:, length, None]  # (R, 1), pad_id where the row is free
            # A prefix is allowed even if its probability is 0, so its score stays finite.
            forced = tokens, scores.gather(1, tokens).clamp(min=torch.finfo(scores.dtype).min)
        for token in self.never:
            if 0 <= token < scores.shape[1]:
                scores[:, token] = -torch.inf
        if length < self.min_length or self.reads_history(length):
            eos_scores = scores[:, self.eos_id].clamp(min=torch.finfo(scores.dtype).min)
            if length < self.min_length:
                scores[:, self.eos_id] = -torch.inf
            if self.reads_history(length):
                assert history is not None
                self._ban_repetitions(scores, history)
            nothing_left = scores.amax(1) == -torch.inf
            scores[:, self.eos_id] = torch.where(nothing_left, eos_scores, scores[:, self.eos_id])
        if forced is None:
            return scores
        tokens, token_scores = forced
        only_forced = torch.full_like(scores, -torch.inf).scatter_(1, tokens, token_scores)
        return torch.where(tokens == self.pad_id, scores, only_forced)

    def _ban_repetitions(self, scores: Tensor, history: Tensor) -> None:
        size = self.no_repeat_ngram
        ngrams = history.unfold(1, size, 1)  # (R, length - size + 1, size)
        begun_again = (ngrams[..., :-1] == history[:, None, history.shape[1] - size + 1 :]).all(-1)
        bans = torch.where(begun_again, -torch.inf, torch.inf).to(scores.dtype)
        scores.scatter_reduce_(1, ngrams[..., -1], bans, "amin")

    def select(self, rows: Tensor) -> None:
        """Continues with these rows, (n,) int64, on any device."""
        if self.prefix is not None:
            self.prefix = self.prefix[rows.to(self.prefix.device)]


def remaining(stays: Tensor) -> Tensor:
    """The rows that stay, (n,) int64, in an order that moves as few of them as possible. stays (B,) bool, on the CPU."""
    rows = torch.arange(int(stays.sum()))
    rows[~stays[: rows.shape[0]]] = stays.nonzero()[:, 0][stays[: rows.shape[0]].sum() :]
    return rows


def log_softmax_(logits: Tensor) -> Tensor:
    """Over the last dimension, in at least float32. May overwrite logits.

    On the CPU a few rows at a time: a second tensor with a number for every row and word costs more in fresh pages than in arithmetic.
    """
    if logits.dtype != torch.float32 or logits.device.type != "cpu":
        return F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    rows = logits.reshape(-1, logits.shape[-1])
    for some in rows.split(ROWS_IN_CACHE):
        some.copy_(F.log_softmax(some, -1))
    return rows.view(logits.shape)


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """scores.topk(k): the k highest of each row of scores (R, V), highest first, and where they are; (R, k) each.

    On the CPU torch.topk takes three times as long over a vocabulary: the k highest scores are in the k blocks with the highest maxima or
    in the columns after the last whole block.
    """
    if scores.device.type != "cpu" or scores.shape[1] < 4 * k * TOP_K_BLOCK:
        values, places = scores.topk(k)
        return values, places
    whole = scores.shape[1] // TOP_K_BLOCK * TOP_K_BLOCK
    blocks = scores[:, :whole].unflatten(1, (-1, TOP_K_BLOCK)).amax(2).topk(k).indices
    in_blocks = (TOP_K_BLOCK * blocks.unsqueeze(2) + torch.arange(TOP_K_BLOCK)).flatten(1)
    after = torch.arange(whole, scores.shape[1]).expand(scores.shape[0], -1)
    candidates = torch.cat([in_blocks, after], 1)
    values, places = scores.gather(1, candidates).topk(k)
    return values, candidates.gather(1, places)
