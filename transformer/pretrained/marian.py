"""Converts a Marian transformer to the arguments and state_dict of our Transformer.

Supported: post-norm, relu, sinusoidal positions, a decoder with self-attention or an SSRU (ssru.py), embeddings tied in any way. The two
vocabularies are padded to the same length, then get two more tokens: bos, whose embedding is 0 because Marian's decoder starts from that,
and padding. The output bias of all added tokens is -inf, so that they get no probability.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .find import PretrainedError
from .marian_file import read_model_file

EOS_ID = 0
MAX_LEN = 1024  # Marian has no limit: positions are computed as they come
LAYER_NORM_EPS = 1e-9
REQUIRED = {  # settings with only one supported value
    "type": "transformer",
    "transformer-preprocess": "",
    "transformer-postprocess": "dan",
    "transformer-postprocess-top": "",
    "transformer-ffn-activation": "relu",
    "transformer-ffn-depth": 2,
    "transformer-tied-layers": [],
    "transformer-train-position-embeddings": False,
    "transformer-no-projection": False,
    "transformer-pool": False,
    "transformer-depth-scaling": False,
    "transformer-rnn-projection": False,
    "lemma-dim-emb": 0,
    "output-omit-bias": False,
    "right-left": False,
    "ulr": False,
}


def read_marian(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of Transformer and its state_dict in float32, from a .npz or .bin file.

    Raises PretrainedError, which names the tensor or the setting that does not fit.
    """
    arrays, settings = read_model_file(path)
    config = _config(path, settings)
    tensors = _Tensors(path, arrays, config["d_model"])
    state = dict(_state(tensors, config, settings))
    tensors.check_nothing_is_left()
    return config, state


def _config(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    for name, covered in REQUIRED.items():
        if settings.get(name, covered) != covered:
            raise PretrainedError(f"{path}: {name} is {settings[name]!r}, only {covered!r} is covered")
    autoregressive, cell = settings.get("transformer-decoder-autoreg", "self-attention"), settings.get("dec-cell")
    if autoregressive != "self-attention" and (autoregressive, cell) != ("rnn", "ssru"):
        raise PretrainedError(
            f"{path}: the decoder is {autoregressive!r} with cells {cell!r}, only self-attention and 'rnn' of 'ssru' are covered"
        )
    try:
        tied_all, _ = settings["tied-embeddings-all"], settings["tied-embeddings"]
        source_vocab, target_vocab = (int(size) for size in settings["dim-vocabs"])
        size = max(source_vocab, target_vocab) + 2
        config = {
            "src_vocab": size,
            "tgt_vocab": size,
            "d_model": int(settings["dim-emb"]),
            "num_heads": int(settings["transformer-heads"]),
            "num_encoder_layers": int(settings["enc-depth"]),
            "num_decoder_layers": int(settings["dec-depth"]),
            "dim_feedforward": int(settings["transformer-dim-ffn"]),
            "tie_weights": tied_all,  # if only the output is tied to the target embedding, it gets a copy
        }
    except (KeyError, TypeError, ValueError) as error:
        raise PretrainedError(f"{path}: a setting is missing or is no number: {error}") from error
    if (tied_all or settings.get("tied-embeddings-src", False)) and source_vocab != target_vocab:
        raise PretrainedError(f"{path}: tied embeddings of {source_vocab} and {target_vocab} tokens")
    return config | {
        "decoder_cell": "attention" if autoregressive == "self-attention" else "ssru",
        "output_bias": tied_all,
        "final_norm": False,
        "layer_norm_eps": LAYER_NORM_EPS,
        "positions": "halves",
        "bos_id": size - 2,
        "eos_id": EOS_ID,
        "pad_id": size - 1,
        "max_len": MAX_LEN,
    }


class _Tensors:
    """The tensors of a file, each taken once."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray], d_model: int) -> None:
        self.path, self.arrays, self.d_model, self.left = path, arrays, d_model, set(arrays)

    def take(self, name: str, *shape: int) -> Tensor:
        array = self.arrays.get(name)
        if array is None:
            raise PretrainedError(f"{self.path}: {name} of shape {shape} is missing")
        if array.shape != shape:
            raise PretrainedError(f"{self.path}: {name} has shape {array.shape}, expected {shape}")
        self.left.discard(name)
        return torch.from_numpy(np.array(array, dtype=np.float32))

    def vector(self, name: str, size: int | None = None) -> Tensor:
        return self.take(name, 1, self.d_model if size is None else size)[0]

    def linear(self, name: str, inputs: int | None = None, outputs: int | None = None) -> Tensor:
        """The weight for a torch.nn.Linear, the transpose of Marian's."""
        return self.take(name, inputs or self.d_model, outputs or self.d_model).T.contiguous()

    def check_nothing_is_left(self) -> None:
        if self.left:
            raise PretrainedError(f"{self.path}: {len(self.left)} tensors are of no known layer: {', '.join(sorted(self.left)[:3])}")


def _state(tensors: _Tensors, config: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    yield from _embeddings(tensors, config, settings)
    for stack, depth in (("encoder", config["num_encoder_layers"]), ("decoder", config["num_decoder_layers"])):
        for layer in range(depth):
            theirs, ours = f"{stack}_l{layer + 1}", f"{stack}.layers.{layer}"
            last_norm = "norm2"
            if stack == "decoder" and config["decoder_cell"] == "ssru":
                yield f"{ours}.self_attn.input.weight", tensors.linear(f"{theirs}_rnn_W")
                yield f"{ours}.self_attn.forget.weight", tensors.linear(f"{theirs}_rnn_Wf")
                yield f"{ours}.self_attn.forget.bias", tensors.vector(f"{theirs}_rnn_bf")
                yield from _norm(tensors, f"{theirs}_rnn_ffn", f"{ours}.norm1")
            else:
                yield from _attention(tensors, f"{theirs}_self", f"{ours}.self_attn")
                yield from _norm(tensors, f"{theirs}_self_Wo", f"{ours}.norm1")
            if stack == "decoder":
                yield from _attention(tensors, f"{theirs}_context", f"{ours}.multihead_attn")
                yield from _norm(tensors, f"{theirs}_context_Wo", f"{ours}.norm2")
                last_norm = "norm3"
            wide = config["dim_feedforward"]
            yield f"{ours}.linear1.weight", tensors.linear(f"{theirs}_ffn_W1", outputs=wide)
            yield f"{ours}.linear1.bias", tensors.vector(f"{theirs}_ffn_b1", wide)
            yield f"{ours}.linear2.weight", tensors.linear(f"{theirs}_ffn_W2", inputs=wide)
            yield f"{ours}.linear2.bias", tensors.vector(f"{theirs}_ffn_b2")
            yield from _norm(tensors, f"{theirs}_ffn_ffn", f"{ours}.{last_norm}")


def _embeddings(tensors: _Tensors, config: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    (source_vocab, target_vocab), d_model = settings["dim-vocabs"], config["d_model"]
    tied_source = config["tie_weights"] or settings.get("tied-embeddings-src", False)
    target = tensors.take("Wemb" if tied_source else "decoder_Wemb", target_vocab, d_model)
    bias = _longer(tensors.vector("decoder_ff_logit_out_b", target_vocab), config["tgt_vocab"], -torch.inf)
    yield "tgt_embedding.weight", _longer(target, config["tgt_vocab"], 0.0)
    if config["tie_weights"]:
        yield "output_bias", bias
        return
    source = target.clone() if tied_source else tensors.take("encoder_Wemb", source_vocab, d_model)
    output = target.clone() if settings["tied-embeddings"] else tensors.linear("decoder_ff_logit_out_W", outputs=target_vocab)
    yield "src_embedding.weight", _longer(source, config["tgt_vocab"], 0.0)
    yield "output.weight", _longer(output, config["tgt_vocab"], 0.0)
    yield "output.bias", bias


def _longer(rows: Tensor, length: int, value: float) -> Tensor:
    """Appends rows of `value`, for the tokens added to the vocabulary."""
    return torch.cat((rows, rows.new_full((length - rows.shape[0], *rows.shape[1:]), value)))


def _attention(tensors: _Tensors, theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{ours}.in_proj_weight", torch.cat([tensors.linear(f"{theirs}_W{which}") for which in "qkv"])
    yield f"{ours}.in_proj_bias", torch.cat([tensors.vector(f"{theirs}_b{which}") for which in "qkv"])
    yield f"{ours}.out_proj.weight", tensors.linear(f"{theirs}_Wo")
    yield f"{ours}.out_proj.bias", tensors.vector(f"{theirs}_bo")


def _norm(tensors: _Tensors, theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{ours}.weight", tensors.vector(f"{theirs}_ln_scale")
    yield f"{ours}.bias", tensors.vector(f"{theirs}_ln_bias")
