"""Greedy decoding with a key-value cache; a row that has produced eos leaves the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import KVCache

if TYPE_CHECKING:
    from .model import Transformer


def greedy(model: Transformer, src: Tensor, max_new_tokens: int) -> Tensor:
    """The body of Transformer.generate, which describes and checks the arguments; under no_grad, with the model in
    eval mode."""
    memory = model.encode(src)
    cache = KVCache(capacity=max_new_tokens)
    output = src.new_full((src.shape[0], max_new_tokens), model.pad_id)
    never_generated = torch.tensor(sorted({model.pad_id, model.bos_id} - {model.eos_id}), device=src.device)
    rows = torch.arange(src.shape[0], device=src.device)  # the row of output that each row of the batch writes
    tokens = src.new_full((src.shape[0], 1), model.bos_id)

    length = 0
    while length < max_new_tokens and rows.shape[0] > 0:
        logits = model.decode(tokens, memory, cache)[:, -1]
        tokens = logits.index_fill_(1, never_generated, -torch.inf).max(-1, keepdim=True).indices  # faster than argmax
        output[rows, length] = tokens[:, 0]
        length += 1
        unfinished = (tokens[:, 0] != model.eos_id).nonzero()[:, 0]
        if unfinished.shape[0] < rows.shape[0]:
            rows, tokens, memory = rows[unfinished], tokens[unfinished], memory.select(unfinished)
            cache.select(unfinished)
    return output[:, :length]
