"""What the decoder needs from a source batch: the encoder's states, and where the padding is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.prepared_mask import prepare_mask
from .cache import RowSelection


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a batch are, in the two forms the kernels use. Computed on the device, without
    synchronizing."""

    key_mask: Tensor  # (B, L) bool, True = a token, False = padding
    lengths: Tensor  # (B,) int32, the position of the last token + 1; 0 for a row that is all padding

    @classmethod
    def of(cls, key_mask: Tensor) -> Padding:
        """key_mask (B, L) bool, True = a token."""
        if key_mask.shape[1] == 0:
            return cls(key_mask, key_mask.new_zeros(key_mask.shape[0], dtype=torch.int32))
        ends = torch.arange(1, key_mask.shape[1] + 1, dtype=torch.int32, device=key_mask.device)
        return cls(key_mask, (ends * key_mask).amax(1))

    def as_keys(self) -> dict[str, Tensor]:
        """The options of `attention` that hide the padding from the queries."""
        return {"key_mask": self.key_mask, "key_lengths": self.lengths}

    def seen_by(self, queries: Padding, is_causal: bool = False) -> dict[str, Any]:
        """The options of `attention` from queries to these keys that hide the padding of both, as one mask for every layer.

        An exported program gets the parts of the mask instead, because the number of tiles would be fixed to that of the example.
        """
        if torch.compiler.is_exporting():
            return {**self.as_keys(), "query_lengths": queries.lengths, "is_causal": is_causal}
        prepared = prepare_mask(
            key_mask=self.key_mask,
            key_lengths=self.lengths,
            query_lengths=queries.lengths,
            is_causal=is_causal,
            seqlen_q=queries.key_mask.shape[1],
            gradients=torch.is_grad_enabled(),
        )
        return {"attn_mask": prepared}

    def select(self, rows: Tensor) -> Padding:
        return Padding(self.key_mask[rows], self.lengths[rows])


class Candidates(NamedTuple):
    """The target tokens allowed in a batch's translations, and their part of the output projection."""

    tokens: Tensor  # (n,) int64
    weight: Tensor  # (n, d_model)
    bias: Tensor | None  # (n,)


@dataclass(frozen=True)
class Memory:
    """What the decoder needs from a source batch: the result of Transformer.encode."""

    states: list[Tensor]  # (B, S, d_model): one for all decoder layers ("last"), or one each
    padding: Padding
    # (B, S, 2, H, D), one per decoder layer, instead of states; Transformer.start_decoding makes these for the searches
    keys_values: list[Tensor] | None = None
    candidates: Candidates | None = None  # in the searches, if a shortlist limits the tokens

    @property
    def batch_size(self) -> int:
        return self.padding.lengths.shape[0]

    @property
    def device(self) -> torch.device:
        return self.padding.lengths.device

    def select(self, rows: Tensor) -> Memory:
        """Keeps, drops, repeats or reorders batch rows. rows: (n,) int64; new row i is old row rows[i].

        keys_values move in place, without a copy of the rows that keep their position: if there are any, this memory is used up.
        """
        keys_values = None
        if self.keys_values is not None:
            selection = RowSelection(rows, self.batch_size, self.device)
            keys_values = [selection.of(kv, kv.shape[1]) for kv in self.keys_values]
        return Memory([state[rows] for state in self.states], self.padding.select(rows), keys_values, self.candidates)
