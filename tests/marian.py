"""Marian models for tests: random small ones written as .npz and .bin."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import yaml

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
