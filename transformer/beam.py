"""Beam search over a batch of sentences (Sutskever et al. 2014; the length penalty of Wu et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .search import Constraints, SearchableModel, log_softmax_, remaining, top_k


@dataclass(frozen=True)
class Hypothesis:
    """A translation with its score."""

    tokens: list[int]  # without bos_id; includes eos_id if ended
    log_probability: float  # the sum over tokens under the model, without constraints
    score: float  # log_probability / penalty for len(tokens)
    ended: bool  # False: cut at max_new_tokens


@dataclass
class Beams:
    """The hypotheses of B sentences: K that are still growing, in any order, and the K best that have ended, best first.

    An empty slot has sum -inf.
    """

    tokens: Tensor  # (B, K, T) int64
    sums: Tensor  # (B, K) sums of log-probabilities
    ended_tokens: Tensor  # (B, K, T) int64, padded with pad_id
    ended_sums: Tensor  # (B, K)
    ended_scores: Tensor  # (B, K), sums divided by penalties

    def __getitem__(self, rows: Tensor) -> Beams:
        return Beams(*(value[rows] for value in vars(self).values()))

    def __setitem__(self, rows: Tensor, beams: Beams) -> None:
        for value, new in zip(vars(self).values(), vars(beams).values(), strict=True):
            value[rows] = new

    def clone(self) -> Beams:
        return Beams(*(value.clone() for value in vars(self).values()))


class BeamSearch:
    """Finds translations for a batch. Call `run` under no_grad, with the model in eval mode.

    Each step takes the 2K best continuations of a sentence's K hypotheses. Among the K best, those that are eos_id have ended; the
    K best others continue. A sentence is done, and leaves the batch,
      - with early_stopping, as soon as K hypotheses have ended;
      - without it, as soon as n_best have ended whose scores no other can still exceed: the best sum divided by the largest penalty
        of the lengths still to come is an upper bound, because log-probabilities are never positive;
      - at max_new_tokens, or if no continuation is possible.
    Ended hypotheses rank before cut ones, then by score.
    """

    def __init__(
        self, model: SearchableModel, constraints: Constraints, penalties: list[float], beam: int, n_best: int, early_stopping: bool
    ) -> None:
        """penalties: divisors for the sums of hypotheses of 1, 2, ... max_new_tokens tokens, counting eos_id. constraints: for B * beam
        rows."""
        self.model, self.constraints, self.penalties = model, constraints, penalties
        self.beam, self.n_best, self.early_stopping = beam, n_best, early_stopping

    def run(self, src: Tensor) -> list[list[Hypothesis]]:
        """The n_best best hypotheses for every sentence of src (B, S), best first; fewer if there are not enough."""
        max_length, width = len(self.penalties), self.beam
        memory, cache = self.model.start_decoding(src, max_length)
        batch_size, device = memory.batch_size, memory.device
        sentences = torch.arange(batch_size, device=device)  # the row in src of each sentence still in the batch
        newest = self.constraints.beginning(batch_size * width, max_length - 1, device)
        forced = newest[:, 1:]
        beams: Beams | None = None
        results: Beams | None = None

        for length in range(forced.shape[1], max_length if batch_size > 0 else 0):
            logits = self.model.decode(newest, memory, cache)
            log_probabilities = log_softmax_(logits[:, -1])
            if beams is None:
                beams = self._first(forced.unflatten(0, (batch_size, width)), logits[:, :-1])
                results = beams.clone()
            history = beams.tokens.flatten(0, 1)[:, :length]
            log_probabilities = self.constraints.apply(log_probabilities, length, history)
            parents = self._step(beams, log_probabilities, length)

            done = self._done(beams, length + 1)
            # The only device synchronization: where the new rows come from, and which sentences are done.
            rows, done = torch.cat([parents.flatten(), done]).cpu().split([parents.numel(), done.shape[0]])
            if done.any():
                stay, leave = remaining(done == 0), done.nonzero()[:, 0].to(device)
                assert results is not None
                results[sentences[leave]] = beams[leave]
                if stay.shape[0] == 0:
                    break
                rows, memory = rows.view(-1, width)[stay].flatten(), memory.select(stay)
                stay = stay.to(device)
                beams, sentences = beams[stay], sentences[stay]
            cache.select(rows)
            self.constraints.select(rows)
            newest = beams.tokens[:, :, length].reshape(-1, 1)
        return [] if results is None else self._ranked(results)

    def _first(self, forced: Tensor, logits: Tensor) -> Beams:
        """One hypothesis per sentence, with only the forced tokens (B, K, n); the other slots are empty. logits (B * K, n, V)."""
        scores = log_softmax_(logits).gather(2, forced.flatten(0, 1).unsqueeze(2))
        tokens = forced.new_full((*forced.shape[:2], len(self.penalties)), self.model.pad_id)
        tokens[:, :, : forced.shape[2]] = forced
        nothing = scores.new_full(forced.shape[:2], -torch.inf)
        sums = nothing.clone()
        # A prefix is allowed even if its probability is 0.
        sums[:, 0] = scores.view(*forced.shape).sum(2)[:, 0].clamp(min=torch.finfo(scores.dtype).min)
        return Beams(tokens, sums, tokens.clone(), nothing, nothing.clone())

    def _step(self, beams: Beams, log_probabilities: Tensor, length: int) -> Tensor:
        """Adds one token, by log_probabilities (B * K, V), to all hypotheses of `length` tokens.

        Returns the rows (B, K), numbered over the whole batch, that the hypotheses continue: each keeps its own row if it can.
        """
        width, each = self.beam, min(2 * self.beam, log_probabilities.shape[1])
        best, tokens = top_k(log_probabilities, each)  # of each hypothesis first, so that sums are added to few numbers
        totals = beams.sums.unsqueeze(-1) + best.view(-1, width, each)
        sums, places = totals.flatten(1).topk(2 * width)  # (B, 2K), descending
        parents, tokens = places // each, tokens.view(-1, width * each).gather(1, places)
        is_eos = tokens == self.model.eos_id

        # Ended: only among the K best, or a poor one would end before better ones had their chance.
        candidates = _gather(beams.tokens, parents[:, :width])
        candidates[..., length] = tokens[:, :width]
        ended_sums = sums[:, :width].masked_fill(~is_eos[:, :width], -torch.inf)
        scores = torch.cat([beams.ended_scores, ended_sums / self.penalties[length]], 1)
        beams.ended_scores, best = scores.topk(width)
        beams.ended_sums = torch.cat([beams.ended_sums, ended_sums], 1).gather(1, best)
        beams.ended_tokens = _gather(torch.cat([beams.ended_tokens, candidates], 1), best)

        # Continuing: at most K of the 2K are eos, one per hypothesis, so K others are left.
        sums, best = sums.masked_fill(is_eos, -torch.inf).topk(width)
        parents, tokens = parents.gather(1, best), tokens.gather(1, best)
        places = _places(parents)
        parents = torch.empty_like(parents).scatter_(1, places, parents)
        beams.sums = sums.scatter(1, places, sums)
        beams.tokens = _gather(beams.tokens, parents)
        beams.tokens[..., length] = tokens.scatter(1, places, tokens)
        return parents + width * torch.arange(parents.shape[0], device=parents.device).unsqueeze(1)

    def _done(self, beams: Beams, length: int) -> Tensor:
        """(B,) bool: which sentences are done after `length` tokens."""
        best = beams.sums.amax(1)
        if length == len(self.penalties):
            return torch.ones_like(best, dtype=torch.bool)
        if self.early_stopping:
            return (beams.ended_scores[:, -1] > -torch.inf) | (best == -torch.inf)
        return beams.ended_scores[:, self.n_best - 1] >= best / max(self.penalties[length:])

    def _ranked(self, results: Beams) -> list[list[Hypothesis]]:
        tokens, sums, ended_tokens, ended_sums, ended_scores = (value.tolist() for value in vars(results).values())
        ranked = []
        for sentence in range(len(tokens)):
            hypotheses = []
            ended = zip(ended_tokens[sentence], ended_sums[sentence], ended_scores[sentence], strict=True)
            for row, log_probability, score in ended:
                if score > -torch.inf:
                    hypotheses.append(Hypothesis(row[: row.index(self.model.eos_id) + 1], log_probability, score, True))
            cut = zip(sums[sentence], tokens[sentence], strict=True)
            for log_probability, row in sorted(cut, reverse=True):
                if log_probability > -torch.inf and self.model.pad_id not in row:
                    hypotheses.append(Hypothesis(row, log_probability, log_probability / self.penalties[-1], False))
            ranked.append(hypotheses[: self.n_best])
        return ranked


def _gather(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens (B, N, T), indices (B, K) -> (B, K, T)."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def _places(parents: Tensor) -> Tensor:
    """A row for each of K children, such that the first child of every parent gets the parent's row. parents and result: (B, K)."""
    is_first = ~(parents.unsqueeze(2) == parents.unsqueeze(1)).tril(-1).any(2)
    has_child = torch.zeros_like(parents).scatter_(1, parents, 1)
    # The other children, in order, get the rows of parents without a child.
    others, free = is_first.int().argsort(dim=1, stable=True), has_child.argsort(dim=1, stable=True)
    return torch.where(is_first, parents, torch.empty_like(parents).scatter_(1, others, free))
