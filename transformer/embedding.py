"""What enters the encoder and the decoder: embedded tokens (Vaswani et al. 2017, sections 3.4 and 3.5), or a spectrogram."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import dropout

SINUSOIDS = ("interleaved", "halves", "concatenated", "fairseq")
POSITIONS = (*SINUSOIDS, "learned", "rotary", "none")


def sinusoidal_positions(length: int, d_model: int, layout: str = "interleaved") -> Tensor:
    """The table of positional encodings, (length, d_model), float32, on the CPU.

    "interleaved": column 2i holds sin(position / 10000^(2i / d_model)) and column 2i + 1 the cosine of the same angle (the paper).
    "concatenated": the same angles, first all sines, then all cosines; d_model is even.
    "halves": first all sines, then all cosines, of position / 10000^(i / (d_model / 2 - 1)) (tensor2tensor, Marian); d_model is even.
    Computed in float64, because in float32 the angle of a late position would be off by more than the table's rounding.
    """
    position = torch.arange(length, dtype=torch.float64, device="cpu").unsqueeze(1)
    count, last = (d_model // 2, max(d_model // 2 - 1, 1)) if layout == "halves" else (-(-d_model // 2), d_model / 2)
    angle = position * torch.exp(torch.arange(count, dtype=torch.float64, device="cpu") * (-math.log(10000.0) / last))
    if layout != "interleaved":
        return torch.cat((angle.sin(), angle.cos()), dim=1).float()
    table = angle.new_empty(length, d_model)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle[:, : d_model // 2].cos()
    return table.float()


class TokenEmbedding(nn.Module):
    """weight[token] * scale + positional encoding, then norm and dropout.

    `weight` (vocab_size, d_model) is initialized to N(0, 1 / d_model), so that embeddings scaled by sqrt(d_model) have unit variance
    and the matrix can also serve as the output projection; None if vocab_size is 0: forward is then given one that another module has.
    The row of `pad_id` starts at 0 and gets no gradient here, unless train_padding.

    layout: a layout of sinusoidal_positions; "fairseq": "halves", but only tokens are counted, from pad_id + 1 on, and padding has no
    encoding; "learned": a parameter, `positions` (max_len, d_model); "rotary", "none": no encoding here.
    scale: sqrt(d_model) if None. norm: a module, or None.

    Sinusoids are a buffer outside the state_dict. They are computed from (max_len, d_model), and again when weights are loaded,
    because a model built on the meta device lacks them until then.
    """

    weight: nn.Parameter
    positions: Tensor

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        max_len: int,
        pad_id: int,
        dropout: float,
        layout: str = "interleaved",
        scale: float | None = None,
        norm: nn.Module | None = None,
        train_padding: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.scale = math.sqrt(d_model) if scale is None else scale
        self.pad_id, self.train_padding = pad_id, train_padding
        self.dropout = dropout
        self.norm = norm
        self.register_parameter("weight", nn.Parameter(torch.empty(vocab_size, d_model)) if vocab_size else None)
        if layout == "learned":
            self.positions = nn.Parameter(torch.empty(max_len, d_model))
        else:
            length = max_len + (layout == "fairseq")
            self.register_buffer("positions", torch.empty(length, d_model) if layout in SINUSOIDS else None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
            with torch.no_grad():
                self.weight[self.pad_id].zero_()
        if isinstance(self.positions, nn.Parameter):
            nn.init.normal_(self.positions, std=self.positions.shape[1] ** -0.5)
        self._fill_positions()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._fill_positions()

    def _fill_positions(self) -> None:
        """Computes sinusoids on the weight's device. to_empty() and load_state_dict(assign=True) do not keep their values."""
        if self.positions is None or self.layout == "learned":
            return
        parameter = next(self.parameters())  # the norm's, if the weight is another module's
        with torch.no_grad():
            if not parameter.is_meta:
                place = parameter.device, parameter.dtype
                if (self.positions.device, self.positions.dtype) != place:
                    self.positions = torch.empty_like(self.positions, device=place[0], dtype=place[1])
            if not self.positions.is_meta:
                length, d_model = self.positions.shape
                if self.layout == "fairseq":
                    self.positions.copy_(sinusoidal_positions(self.pad_id + length, d_model, "halves")[self.pad_id :])
                    self.positions[0] = 0
                else:
                    self.positions.copy_(sinusoidal_positions(length, d_model, self.layout))

    def forward(self, tokens: Tensor, start: int = 0, weight: Tensor | None = None) -> Tensor:
        """tokens (B, L) int64 -> (B, L, d_model). The first column is at position `start`; start + L <= max_len.

        weight (vocab_size, d_model): another module's, if this one has none.
        """
        weight = self.weight if weight is None else weight
        embedded = F.embedding(tokens, weight, padding_idx=None if self.train_padding else self.pad_id)
        if self.positions is None:
            x = embedded * self.scale
        else:
            x = torch.add(self._positions_of(tokens, start), embedded, alpha=self.scale)
        return dropout(x if self.norm is None else self.norm(x), self.dropout, self.training)

    def _positions_of(self, tokens: Tensor, start: int) -> Tensor:
        if self.layout != "fairseq":
            return self.positions[start : start + tokens.shape[1]]
        is_token = tokens != self.pad_id
        return F.embedding((start + is_token.cumsum(1)) * is_token, self.positions)

    def extra_repr(self) -> str:
        vocab_size = "shared" if self.weight is None else self.weight.shape[0]
        return f"{vocab_size}, positions={self.layout}, scale={self.scale:.4g}, pad_id={self.pad_id}, dropout={self.dropout}"


class SpectrogramEmbedding(nn.Module):
    """Log-mel spectrograms (B, bands, frames) -> (B, ceil(frames / 2), d_model), the input of Whisper (Radford et al. 2022).

    Two convolutions over three frames, each with a gelu, the second with stride 2; plus `positions` (max_len, d_model), which start as
    sinusoids ("halves") and are not trained; then dropout.
    """

    def __init__(self, bands: int, d_model: int, max_len: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv1 = nn.Conv1d(bands, d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, 3, stride=2, padding=1)
        self.register_buffer("positions", torch.empty(max_len, d_model))
        self.positions: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.positions.is_meta:
            length, d_model = self.positions.shape
            self.positions.copy_(sinusoidal_positions(length, d_model, "halves"))

    def forward(self, spectrogram: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(spectrogram)))).transpose(1, 2)
        return dropout(x + self.positions[: x.shape[1]], self.dropout, self.training)
