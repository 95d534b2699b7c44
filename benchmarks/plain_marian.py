"""Marian models evaluated in plain PyTorch, one sentence and token at a time: what the fast road is checked against."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class PlainMarian:
    """A model in plain PyTorch, float32, for one sentence at a time: what the importer is held to."""

    def __init__(self, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
        self.tensors = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        self.settings, self.d_model, self.num_heads = settings, settings["dim-emb"], settings["transformer-heads"]
        self.source = self._first("Wemb", "encoder_Wemb")
        self.target = self._first("Wemb", "decoder_Wemb")
        output = self.tensors.get("decoder_ff_logit_out_W")
        self.output = self.target if output is None else output.T

    def _first(self, *names: str) -> Tensor:
        return next(self.tensors[name] for name in names if name in self.tensors)

    def encode(self, tokens: list[int]) -> Tensor:
        """(S, d_model)."""
        x = self.source[tokens] * math.sqrt(self.d_model) + self._positions(0, len(tokens))
        for layer in range(1, self.settings["enc-depth"] + 1):
            x = self._attention_and_norm(x, x, f"encoder_l{layer}_self")
            x = self._feed_forward(x, f"encoder_l{layer}_ffn")
        return x

    def logits(self, tokens: list[int], memory: Tensor) -> Tensor:
        """(len(tokens) + 1, vocab): of the first token, and of the one after each given."""
        states: list[dict[str, Tensor]] = [{} for _ in range(self.settings["dec-depth"])]
        return torch.cat([self._step(place, token, memory, states) for place, token in enumerate([None, *tokens])])

    def greedy(self, tokens: list[int], limit: int) -> list[int]:
        memory = self.encode(tokens)
        out: list[int] = []
        states: list[dict[str, Tensor]] = [{} for _ in range(self.settings["dec-depth"])]
        while len(out) < limit and (not out or out[-1] != 0):
            out.append(int(self._step(len(out), out[-1] if out else None, memory, states).argmax()))
        return out

    def _step(self, place: int, token: int | None, memory: Tensor, states: list[dict[str, Tensor]]) -> Tensor:
        """(1, vocab): of the token after `token`, None before the first. states: what each layer keeps."""
        embedded = torch.zeros(1, self.d_model) if token is None else self.target[[token]] * math.sqrt(self.d_model)
        x = embedded + self._positions(place, 1)
        for layer, state in enumerate(states, 1):
            start = f"decoder_l{layer}"
            if self.settings["transformer-decoder-autoreg"] == "rnn":
                forget = torch.sigmoid(x @ self.tensors[f"{start}_rnn_Wf"] + self.tensors[f"{start}_rnn_bf"])
                fresh = x @ self.tensors[f"{start}_rnn_W"]
                state["cell"] = forget * state.get("cell", torch.zeros_like(x)) + (1 - forget) * fresh
                x = self._norm(x + F.relu(state["cell"]), f"{start}_rnn_ffn")
            else:
                state["seen"] = torch.cat((state.get("seen", x[:0]), x))
                x = self._attention_and_norm(x, state["seen"], f"{start}_self")
            x = self._attention_and_norm(x, memory, f"{start}_context")
            x = self._feed_forward(x, f"{start}_ffn")
        return x @ self.output.T + self.tensors["decoder_ff_logit_out_b"]

    def _positions(self, start: int, length: int) -> Tensor:
        half = self.d_model // 2
        frequency = torch.exp(torch.arange(half) * (-math.log(10000.0) / (half - 1)))
        angle = torch.arange(start, start + length)[:, None] * frequency
        return torch.cat((angle.sin(), angle.cos()), dim=1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}_ln_scale"][0], self.tensors[f"{name}_ln_bias"][0], 1e-9)

    def _attention_and_norm(self, x: Tensor, memory: Tensor, name: str) -> Tensor:
        def heads_of(source: Tensor, which: str) -> Tensor:
            projected = source @ self.tensors[f"{name}_W{which}"] + self.tensors[f"{name}_b{which}"]
            return projected.unflatten(1, (self.num_heads, -1)).transpose(0, 1)

        query, key, value = heads_of(x, "q"), heads_of(memory, "k"), heads_of(memory, "v")
        weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(query.shape[2]), dim=-1)
        heads = (weights @ value).transpose(0, 1).flatten(1)
        return self._norm(x + heads @ self.tensors[f"{name}_Wo"] + self.tensors[f"{name}_bo"], f"{name}_Wo")

    def _feed_forward(self, x: Tensor, name: str) -> Tensor:
        hidden = F.relu(x @ self.tensors[f"{name}_W1"] + self.tensors[f"{name}_b1"])
        return self._norm(x + hidden @ self.tensors[f"{name}_W2"] + self.tensors[f"{name}_b2"], f"{name}_ffn")
