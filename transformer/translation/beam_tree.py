"""What a beam search for one sentence has looked at, as a tree."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..beam import Beams, BeamSearch, Hypothesis
from ..generate import Generation, evaluating, length_penalties
from ..search import Constraints


@dataclass
class Node:
    """A token of one or more hypotheses; the root is bos_id."""

    token: int
    log_probability: float  # of all tokens up to this one
    score: float | None = None  # where a hypothesis has ended: what it is ranked by
    best: bool = False  # part of the translation that the search returns
    children: list[Node] = field(default_factory=list)  # first the best one's, then the more probable


class RecordedSearch(BeamSearch):
    """A search for one sentence that keeps every hypothesis it has had: tokens -> (log-probability, score or None)."""

    found: dict[tuple[int, ...], tuple[float, float | None]]

    def run(self, src: Tensor) -> list[list[Hypothesis]]:
        self.found = {}
        return super().run(src)

    def _step(self, beams: Beams, log_probabilities: Tensor, length: int) -> Tensor:
        rows = super()._step(beams, log_probabilities, length)
        for tokens, total in zip(beams.tokens[0, :, : length + 1].tolist(), beams.sums[0].tolist(), strict=True):
            if total > -torch.inf:
                self.found[tuple(tokens)] = total, None
        ended = zip(beams.ended_tokens[0].tolist(), beams.ended_sums[0].tolist(), beams.ended_scores[0].tolist(), strict=True)
        for tokens, total, score in ended:
            if total > -torch.inf:
                self.found[tuple(tokens[: tokens.index(self.model.eos_id) + 1])] = total, score
        return rows


def beam_tree(model: Generation, src: Tensor, max_new_tokens: int, beam: int) -> Node:
    """The root of the hypotheses that beam_search(src, max_new_tokens, beam=beam) goes through; src (1, S) int64."""
    search = RecordedSearch(model, Constraints(model), length_penalties(0.6, max_new_tokens), beam, n_best=1, early_stopping=False)
    with evaluating(model), torch.no_grad():
        [[best]] = search.run(src)
    root = Node(model.bos_id, 0.0, best=True)
    nodes: dict[tuple[int, ...], Node] = {(): root}
    for tokens, (total, score) in sorted(search.found.items(), key=lambda item: len(item[0])):
        node = Node(tokens[-1], total, score, best.tokens[: len(tokens)] == list(tokens))
        nodes[tokens] = node
        nodes[tokens[:-1]].children.append(node)
    for node in nodes.values():
        node.children.sort(key=lambda child: (not child.best, -child.log_probability))
    return root
