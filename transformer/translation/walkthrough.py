"""One sentence on its way through the model: what a decoder that has written some words computes to choose the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..generate import evaluating
from ..layers import SelfAttention
from ..model import Transformer

# Tokens that have been written, begin with them: few enough for the numbers in a matrix to be read.
FEWEST_TOKENS, MOST_TOKENS = 4, 7


@dataclass(frozen=True)
class Walkthrough:
    """T tokens, of which the last one is to be followed by another; all on the CPU."""

    tokens: list[int]  # T, bos_id first
    embedded: Tensor  # (T, d_model), embeddings times sqrt(d_model)
    positions: Tensor  # (T, d_model)
    head: int  # of the first decoder layer's self-attention, which all of the following are of
    scores: Tensor  # (T, T), q . k / sqrt(D)
    weights: Tensor  # (T, T), softmax of the scores, row t over positions <= t
    values: Tensor  # (T, D)
    probabilities: Tensor  # (V,), of the next token

    @property
    def output(self) -> Tensor:
        """What the head makes of the values, (T, D)."""
        return self.weights @ self.values


def walk_through(model: Transformer, src: Tensor, translation: list[int]) -> Walkthrough:
    """src (1, S) int64; translation: the model's, without bos_id. It is cut where the next token is least certain; the head is the one
    whose weights are the most concentrated.

    ValueError if the decoder has no self-attention.
    """
    if model.decoder_cell != "attention":
        raise ValueError(f"decoder_cell must be 'attention', got {model.decoder_cell!r}")
    tgt = torch.tensor([[model.bos_id, *translation][:MOST_TOKENS]], device=src.device)
    inputs: list[Tensor] = []

    def keep_input(module: Any, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    attention = cast(SelfAttention, model.decoder.layers[0].get_submodule("self_attn"))
    with evaluating(model), torch.no_grad():
        hook = attention.register_forward_pre_hook(keep_input)
        try:
            all_probabilities = model(src, tgt)[0].float().softmax(-1).cpu()
        finally:
            hook.remove()
        query, key, value = attention.project(inputs[0])[0].float().cpu().permute(1, 2, 0, 3)  # (H, T, D) each
    # How sure the model is of the next token, where enough has been written.
    first = min(FEWEST_TOKENS, tgt.shape[1]) - 1
    length = first + int(all_probabilities[first:].amax(-1).argmin()) + 1

    scores = (query @ key.transpose(1, 2) * attention.head_dim**-0.5)[:, :length, :length]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    head = int(weights.amax(-1).mean(-1).argmax())
    tokens = tgt[0, :length].cpu()
    embedding = model.tgt_embedding
    return Walkthrough(
        tokens.tolist(),
        (embedding.weight.detach().float().cpu()[tokens] * embedding.scale),
        embedding.positions[:length].float().cpu(),
        head,
        scores[head],
        weights[head],
        value[head, :length],
        all_probabilities[length - 1],
    )
