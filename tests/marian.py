"""Marian models for tests: random small ones written as .npz and .bin, and any of them evaluated in plain PyTorch, token by token."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

SETTINGS = {
    "type": "transformer", "dim-emb": 16, "dim-vocabs": [24, 24], "enc-depth": 2, "dec-depth": 2, "transformer-heads": 2,
    "transformer-dim-ffn": 32, "transformer-decoder-autoreg": "rnn", "dec-cell": "ssru", "tied-embeddings-all": True,
    "tied-embeddings": False, "tied-embeddings-src": False, "transformer-preprocess": "", "transformer-postprocess": "dan",
    "transformer-ffn-activation": "relu",
}  # fmt: skip


def random_tensors(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    d_model, wide, (source, target) = settings["dim-emb"], settings["transformer-dim-ffn"], settings["dim-vocabs"]
    shapes: dict[str, tuple[int, int]] = {"decoder_ff_logit_out_b": (1, target)}
    if settings["tied-embeddings-all"] or settings["tied-embeddings-src"]:
        shapes["Wemb"] = (target, d_model)
    else:
        shapes |= {"encoder_Wemb": (source, d_model), "decoder_Wemb": (target, d_model)}
    if not settings["tied-embeddings-all"] and not settings["tied-embeddings"]:
        shapes["decoder_ff_logit_out_W"] = (d_model, target)
    for stack, depth in (("encoder", settings["enc-depth"]), ("decoder", settings["dec-depth"])):
        for layer in range(1, depth + 1):
            start = f"{stack}_l{layer}"
            recurrent = stack == "decoder" and settings["transformer-decoder-autoreg"] == "rnn"
            attentions = [*([] if recurrent else ["self"]), *(["context"] if stack == "decoder" else [])]
            norms = [*(["rnn_ffn"] if recurrent else []), *(f"{name}_Wo" for name in attentions), "ffn_ffn"]
            for name in attentions:
                shapes |= {f"{start}_{name}_W{which}": (d_model, d_model) for which in "qkvo"}
                shapes |= {f"{start}_{name}_b{which}": (1, d_model) for which in "qkvo"}
            if recurrent:
                shapes |= {f"{start}_rnn_W": (d_model, d_model), f"{start}_rnn_Wf": (d_model, d_model), f"{start}_rnn_bf": (1, d_model)}
            shapes |= {f"{start}_ffn_W1": (d_model, wide), f"{start}_ffn_b1": (1, wide)}
            shapes |= {f"{start}_ffn_W2": (wide, d_model), f"{start}_ffn_b2": (1, d_model)}
            for name in norms:
                shapes |= {f"{start}_{name}_ln_scale": (1, d_model), f"{start}_{name}_ln_bias": (1, d_model)}
    return {name: generator.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def write_npz(path: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    config = np.frombuffer(yaml.safe_dump(settings).encode() + b"\0", np.int8)
    np.savez(path, **tensors, **{"special:model.yml": config})


def write_bin(path: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Matrices in 8 bits, as Bergamot has them. Returns the tensors that the file stands for."""
    items, stands_for = [], dict(tensors)
    for name, array in tensors.items():
        if array.shape[0] == 1:
            items.append((name, 0x404, array.shape, array.tobytes()))
            continue
        scale = np.float32(127.0 / np.abs(array).max())
        numbers = np.rint(array * scale).astype(np.int8)
        stands_for[name] = numbers.astype(np.float32) / scale
        stored = numbers if name.endswith("Wemb") else numbers.T
        items.append((name, 0x4101, array.shape, stored.tobytes() + scale.tobytes() + bytes(252)))
        items.append((f"{name}_QuantMultA", 0x404, (1, 1), np.float32(1).tobytes() + bytes(252)))
    config = yaml.safe_dump(settings).encode() + b"\0"
    items.append(("special:model.yml", 0x101, (len(config),), config))
    names = [name.encode() + b"\0" for name, *_ in items]
    head = struct.pack("<2Q", 1, len(items))
    for encoded, (_, kind, shape, data) in zip(names, items, strict=True):
        head += struct.pack("<4Q", len(encoded), kind, len(shape), len(data))
    head += b"".join(names) + b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _ in items)
    padding = -(len(head) + 8) % 256
    path.write_bytes(head + struct.pack("<Q", padding) + bytes(padding) + b"".join(data for *_, data in items))
    return stands_for


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
        memory, out = self.encode(tokens), []
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
