"""Recurrence instead of a decoder's self-attention: the state is as large as one position, no matter how long the sequence is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import LayerCache
from .linear import Linear


class SSRU(nn.Module):
    """The simpler simple recurrent unit (Kim et al. 2019, "From Research to Production and Back: Ludicrously Fast Neural Machine
    Translation", section 3.1).

    f_t = sigmoid(W_f x_t + b_f), c_t = f_t * c_{t-1} + (1 - f_t) * W x_t, and the output is relu(c_t). Both matrix products cover all
    positions at once; the sequential part is elementwise.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.input = Linear(d_model, d_model, bias=False)
        self.forget = Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.input.weight)
        nn.init.xavier_uniform_(self.forget.weight)
        nn.init.zeros_(self.forget.bias)

    def forward(self, x: Tensor, cache: LayerCache | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        """x (B, L, d_model) -> (B, L, d_model). key_mask (B, L) bool: False keeps the state. A cache holds it between calls."""
        forget = torch.sigmoid(self.forget(x))
        gain = (1 - forget) * self.input(x)
        if key_mask is not None:
            forget, gain = forget.masked_fill(~key_mask[..., None], 1.0), gain.masked_fill(~key_mask[..., None], 0.0)
        state = x.new_zeros(x.shape[0], x.shape[2]) if cache is None or cache.state is None else cache.state[:, 0]
        states = []
        for position in range(x.shape[1]):
            state = torch.addcmul(gain[:, position], forget[:, position], state)
            states.append(state)
        if cache is not None:
            cache.state = state[:, None]
        return F.relu(torch.stack(states, dim=1)) if states else gain
