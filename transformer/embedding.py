"""Token embedding plus sinusoidal positions (Vaswani et al. 2017, sections 3.4 and 3.5)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import dropout

POSITION_LAYOUTS = ("interleaved", "halves")


def sinusoidal_positions(length: int, d_model: int, layout: str = "interleaved") -> Tensor:
    """The table of positional encodings, (length, d_model), float32, on the CPU.

    "interleaved": column 2i holds sin(position / 10000^(2i / d_model)) and column 2i + 1 the cosine of the same angle (the paper).
    "halves": first all sines, then all cosines, of position / 10000^(i / (d_model / 2 - 1)) (tensor2tensor, Marian); d_model is even.
    Computed in float64, because in float32 the angle of a late position would be off by more than the table's rounding.
    """
    position = torch.arange(length, dtype=torch.float64, device="cpu").unsqueeze(1)
    count, last = (d_model // 2, max(d_model // 2 - 1, 1)) if layout == "halves" else (-(-d_model // 2), d_model / 2)
    angle = position * torch.exp(torch.arange(count, dtype=torch.float64, device="cpu") * (-math.log(10000.0) / last))
    if layout == "halves":
        return torch.cat((angle.sin(), angle.cos()), dim=1).float()
    table = angle.new_empty(length, d_model)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle[:, : d_model // 2].cos()
    return table.float()


class TokenEmbedding(nn.Module):
    """weight[token] * sqrt(d_model) + positional encoding, then dropout.

    `weight` (vocab_size, d_model) is the only parameter. It is initialized to N(0, 1 / d_model), so that the scaled
    embeddings have unit variance and the matrix can also serve as the output projection. The row of `pad_id` starts at
    0 and gets no gradient here. The positions are a buffer outside the state_dict. They are computed from (max_len,
    d_model), and again when weights are loaded, because a model built on the meta device lacks them until then.
    """

    def __init__(self, vocab_size: int, d_model: int, max_len: int, pad_id: int, dropout: float, layout: str = "interleaved") -> None:
        super().__init__()
        self.layout = layout  # see sinusoidal_positions
        self.scale = math.sqrt(d_model)
        self.pad_id = pad_id
        self.dropout = dropout
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.register_buffer("positions", torch.empty(max_len, d_model), persistent=False)
        self.positions: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / self.scale)
        with torch.no_grad():
            self.weight[self.pad_id].zero_()
        self._fill_positions()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._fill_positions()

    def _fill_positions(self) -> None:
        """Computes the positions on the weight's device. to_empty() and load_state_dict(assign=True) do not keep their values."""
        with torch.no_grad():
            place = self.weight.device, self.weight.dtype
            if not self.weight.is_meta and (self.positions.device, self.positions.dtype) != place:
                self.positions = torch.empty_like(self.positions, device=place[0], dtype=place[1])
            if not self.positions.is_meta:
                length, d_model = self.positions.shape
                self.positions.copy_(sinusoidal_positions(length, d_model, self.layout))

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """tokens (B, L) int64 -> (B, L, d_model). The first column is at position `start`; start + L <= max_len."""
        embedded = F.embedding(tokens, self.weight, padding_idx=self.pad_id)
        positions = self.positions[start : start + tokens.shape[1]]
        return dropout(torch.add(positions, embedded, alpha=self.scale), self.dropout, self.training)

    def extra_repr(self) -> str:
        vocab_size, d_model = self.weight.shape
        return f"{vocab_size}, {d_model}, max_len={self.positions.shape[0]}, pad_id={self.pad_id}, dropout={self.dropout}"
