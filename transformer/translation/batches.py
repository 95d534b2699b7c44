"""Batches of sentence pairs of similar length, so that little of a batch is padding; a pure function of (seed, epoch)."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import DataError
from .tokenizer import BOS_ID, EOS_ID, PAD_ID

# Batch widths are rounded up to a multiple of this. oneDNN compiles code for every new shape: with a few dozen shapes instead of a new one
# for each batch, a bf16 training step of a small model takes three quarters of the time, for a few percent more padding.
WIDTH_MULTIPLE = 4


@dataclass(frozen=True)
class Batch:
    """src (B, S) ends with EOS; tgt_in (B, T) = BOS + sentence, tgt_out (B, T) = sentence + EOS; int64, right-padded."""

    src: Tensor
    tgt_in: Tensor
    tgt_out: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in (self.src, self.tgt_in, self.tgt_out)))

    def with_rows(self, count: int) -> Batch:
        """The batch and rows of padding, `count` rows in all."""
        return Batch(*(F.pad(side, (0, 0, 0, count - len(side)), value=PAD_ID) for side in (self.src, self.tgt_in, self.tgt_out)))

    def tokens(self) -> int:
        """Source and target tokens, not counting padding."""
        return int((self.src != PAD_ID).sum() + (self.tgt_out != PAD_ID).sum())


@dataclass(frozen=True)
class Share:
    """What one of `count` processes reads of every batch: every count-th pair, in `pieces` micro-batches."""

    index: int = 0
    count: int = 1
    pieces: int = 1


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step learns from: this process's share of a batch, and the tokens that all shares have, not counting padding."""

    micro_batches: list[Batch]
    tokens: int  # source and target
    target_tokens: int

    @classmethod
    def of(cls, batch: Batch) -> StepBatch:
        """The step of one process on one batch."""
        return cls([batch], batch.tokens(), int((batch.tgt_out != PAD_ID).sum()))


@dataclass
class Position:
    """A position in the training data: the next batch to draw."""

    epoch: int = 0
    batch: int = 0


def pad(rows: Sequence[Sequence[int]], width: int | None = None, pad_id: int = PAD_ID) -> Tensor:
    """Right-pad rows of ids into one (len(rows), width) int64 tensor; by default as wide as the longest row."""
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.int64)


def _widths_of_buckets(widths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Widths of both sides of each pair, rounded up to at most `most` different ones, each for as many pairs."""
    ordered = sorted(widths)
    ends = sorted({ordered[len(ordered) * i // most - 1] for i in range(1, most + 1) if len(ordered) * i // most})
    return [(end, end) for end in (ends[bisect.bisect_left(ends, width)] for width in widths)]


class BatchSource:
    """Splits encoded pairs into batches of at most `batch_tokens` source and target tokens, including end tokens and padding.

    Pairs with a side of `max_len` tokens or more are left out (`num_dropped`). Raises DataError if none remain or the
    longest pair exceeds `batch_tokens`.
    """

    def __init__(
        self,
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]],
        *,
        batch_tokens: int,
        max_len: int,
        seed: int = 0,
        fixed_shapes: int = 0,
    ) -> None:
        """fixed_shapes: if not 0, micro-batches have at most so many shapes, with rows of padding where pairs are too few."""
        # The decoder reads BOS + sentence and the encoder sentence + EOS, one token more than the sentence.
        pairs = [(s, t) for s, t in zip(source, target, strict=True) if max(len(s), len(t)) < max_len]
        if not pairs:
            raise DataError(f"no sentence pair has fewer than max_len = {max_len} tokens on both sides")
        self.num_dropped = len(source) - len(pairs)
        self.max_len = max_len
        self._pairs = pairs
        self._sizes = [(self._padded(len(s) + 1), self._padded(len(t) + 1)) for s, t in pairs]
        if fixed_shapes:
            self._sizes = _widths_of_buckets([max(size) for size in self._sizes], fixed_shapes)
        self.fixed_shapes = fixed_shapes
        longest = max(map(sum, self._sizes))
        if longest > batch_tokens:
            raise DataError(f"batch_tokens = {batch_tokens} is less than the longest sentence pair, {longest} tokens")
        self.batch_tokens = batch_tokens
        self.seed = seed

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self._pairs)

    def _padded(self, length: int) -> int:
        return min(-(-length // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.max_len)

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch as pair indices, in training order."""
        shuffle = random.Random(f"{self.seed}/{epoch}")
        # Target length first, because that side costs most (the output layer). Ties are in random order, or every epoch
        # would have the same batches.
        order = sorted(range(len(self._pairs)), key=lambda i: (self._sizes[i][::-1], shuffle.random()))
        batches: list[list[int]] = [[]]
        src_width = tgt_width = 0
        for index in order:
            src_len, tgt_len = self._sizes[index]
            src_width, tgt_width = max(src_width, src_len), max(tgt_width, tgt_len)
            other_shape = self.fixed_shapes and (src_width, tgt_width) != self._sizes[batches[-1][0] if batches[-1] else index]
            if (src_width + tgt_width) * (len(batches[-1]) + 1) > self.batch_tokens or other_shape:
                batches.append([])
                src_width, tgt_width = src_len, tgt_len
            batches[-1].append(index)
        shuffle.shuffle(batches)
        return batches

    def collate(self, indices: Sequence[int]) -> Batch:
        """Pad the pairs with these indices into one batch."""
        source, target = zip(*(self._pairs[index] for index in indices), strict=True)
        src_width, tgt_width = (max(widths) for widths in zip(*(self._sizes[index] for index in indices), strict=True))
        return Batch(
            src=pad([[*ids, EOS_ID] for ids in source], src_width),
            tgt_in=pad([[BOS_ID, *ids] for ids in target], tgt_width),
            tgt_out=pad([[*ids, EOS_ID] for ids in target], tgt_width),
        )

    def step(self, indices: Sequence[int], share: Share) -> StepBatch:
        """A share of the batch of these pairs.

        Shares and micro-batches differ by at most one pair; each is only as wide as its own pairs. One without a pair gets the first,
        all of whose labels are padding, so that every process does the same number of micro-batches.
        """
        mine = indices[share.index :: share.count]
        bounds = [len(mine) * i // share.pieces for i in range(share.pieces + 1)]
        pieces = [mine[start:end] for start, end in itertools.pairwise(bounds)]
        micro_batches = [self.collate(piece) if piece else self._without_labels(indices[0]) for piece in pieces]
        if self.fixed_shapes:
            most = self.batch_tokens // sum(self._sizes[indices[0]])
            micro_batches = [batch.with_rows(-(-most // (share.count * share.pieces))) for batch in micro_batches]
        source, target = (sum(len(self._pairs[index][side]) + 1 for index in indices) for side in (0, 1))
        return StepBatch(micro_batches, source + target, target)

    def _without_labels(self, index: int) -> Batch:
        batch = self.collate([index])
        return replace(batch, tgt_out=torch.full_like(batch.tgt_out, PAD_ID))

    def from_position(self, position: Position, share: Share = Share()) -> Iterator[StepBatch]:
        """Endless batches from `position`, which is advanced before each batch is yielded; of each, the share."""
        while True:
            batches = self.epoch(position.epoch)
            while position.batch < len(batches):
                indices = batches[position.batch]
                position.batch += 1
                yield self.step(indices, share)
            position.epoch, position.batch = position.epoch + 1, 0

    def once(self) -> Iterator[Batch]:
        """Every pair once, for evaluation."""
        return (self.collate(indices) for indices in self.epoch(0))
