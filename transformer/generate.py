"""Greedy decoding with a key-value cache; a row that has produced eos leaves the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cache import KVCache
from .memory import Memory


def greedy(
    decode: Callable[[Tensor, Memory, KVCache], Tensor],
    memory: Memory,
    max_new_tokens: int,
    *,
    pad_id: int,
    bos_id: int,
    eos_id: int,
) -> Tensor:
    """The loop of Transformer.generate, under no_grad with the model in eval mode; decode is Transformer.decode."""
    cache = KVCache(capacity=max_new_tokens)
    device, batch_size = memory.padding.lengths.device, memory.batch_size
    output = torch.full((batch_size, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    never_generated = torch.tensor(sorted({pad_id, bos_id} - {eos_id}), device=device)
    rows = torch.arange(batch_size, device=device)  # the row of output that each row of the batch writes
    tokens = output.new_full((batch_size, 1), bos_id)

    length = 0
    while length < max_new_tokens and rows.shape[0] > 0:
        logits = decode(tokens, memory, cache)[:, -1]
        tokens = logits.index_fill_(1, never_generated, -torch.inf).max(-1, keepdim=True).indices  # faster than argmax
        output[rows, length] = tokens[:, 0]
        length += 1
        unfinished = (tokens[:, 0] != eos_id).nonzero()[:, 0]
        if unfinished.shape[0] < rows.shape[0]:
            rows, tokens, memory = rows[unfinished], tokens[unfinished], memory.select(unfinished)
            cache.select(unfinished)
    return output[:, :length]
