"""Hugging Face folders of encoder-decoder models, config.json with safetensors, in both directions. transformers is not needed.

A Family translates config.json to the arguments of our Transformer and back, and lists where each of our tensors is in their files. A
folder is written in the first family whose translation, there and back, gives the model's own arguments: nothing is lost on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..optional import optional_module
from .find import PretrainedError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_LEN = 4096  # of models whose positions are distances, and so have no limit
# These may differ between a model and the family that it is written in.
NOT_COMPARED = (
    *("max_len", "src_vocab", "dropout", "layer_drop"),
    *("embedding_dropout", "attention_dropout", "feed_forward_dropout", "residual_dropout"),
)
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu"}
THEIR_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}

Config = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where one of our tensors is in their files: in `theirs`, stacked along the first dimension.

    None among them stands for zeros that the files leave out: a bias of keys, which shifts all scores of a query alike. unused: rows at
    the start of their tensor that no token reads. as_row: they hold a vector as (1, n).
    """

    ours: str
    theirs: tuple[str | None, ...]
    unused: int = 0
    as_row: bool = False

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Our tensor as theirs."""
        for name, part in zip(self.theirs, tensor.chunk(len(self.theirs)), strict=True):
            if name is not None:
                padded = torch.cat((part.new_zeros(self.unused, *part.shape[1:]), part))
                yield name, padded[None].contiguous() if self.as_row else padded

    def join(self, take: Callable[[str, tuple[int, ...]], Tensor], shape: torch.Size) -> Tensor:
        """Our tensor of this shape; take(name, shape) gives theirs."""
        rows = shape[0] // len(self.theirs)
        their_shape = (1, rows) if self.as_row else (rows + self.unused, *shape[1:])
        parts = [torch.zeros(rows, *shape[1:]) if name is None else take(name, their_shape) for name in self.theirs]
        parts = [part[0] if self.as_row else part[self.unused :] for part in parts]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Family:
    """Models of one layout. `title` and `written_as` (the model_type of folders that we write) are for people."""

    title: str
    model_types: tuple[str, ...]
    architecture: str
    read: Callable[[Config, set[str]], Config]  # config.json and the names of the tensors -> the arguments of Transformer
    write: Callable[[Config], Config]  # the arguments -> config.json
    places: Callable[[Config], Iterator[Place]]
    ignored: tuple[str, ...] = ()  # names of tensors, or their ends, that say nothing new


def read_folder(folder: Path, shapes_of: Callable[[Config], dict[str, torch.Size]]) -> tuple[Config, dict[str, Tensor]]:
    """The arguments of Transformer and its state_dict in float32. shapes_of: the shapes of the state_dict for such arguments.

    Raises PretrainedError: the architecture is unknown, a setting is not covered, or a tensor is missing, unknown or of another shape.
    """
    theirs = _json(folder / CONFIG)
    model_type = theirs.get("model_type")
    family = next((family for family in FAMILIES if model_type in family.model_types), None)
    if family is None:
        known = ", ".join(name for each in FAMILIES for name in each.model_types)
        raise PretrainedError(f"{folder / CONFIG}: model_type is {model_type!r}, known are {known}")
    tensors = _Tensors(folder)
    try:
        config = family.read(theirs, set(tensors.files))
    except KeyError as error:
        raise PretrainedError(f"{folder / CONFIG}: {error.args[0]} is missing") from error
    except ValueError as error:
        raise PretrainedError(f"{folder / CONFIG}: {error}") from error
    try:
        shapes = shapes_of(config)
    except (TypeError, ValueError) as error:
        raise PretrainedError(f"{folder / CONFIG} describes no model that can be built: {error}") from error
    state = {place.ours: place.join(tensors.take, shapes[place.ours]) for place in family.places(config)}
    tensors.check_nothing_is_left(family.ignored)
    return config, state


def write_folder(folder: Path, config: Config, state: dict[str, Tensor], defaults: Config) -> str:
    """Writes config.json and model.safetensors for a model with these arguments and returns its model_type. defaults: of all arguments.

    Raises ValueError: no family has such models; the message names the arguments in which the nearest one differs.
    """
    differences = {}
    for family in FAMILIES:
        try:
            theirs = family.write(config) | {"architectures": [family.architecture], "is_encoder_decoder": True}
            again = family.read(theirs, {name for place in family.places(config) for name in place.theirs if name})
        except (KeyError, ValueError):
            continue
        as_read = {name: again.get(name, defaults[name]) for name in config if name not in NOT_COMPARED}
        differences[family.title] = [name for name, value in as_read.items() if config[name] != value]
        if not differences[family.title]:
            break
    else:
        nearest = min(differences, key=lambda title: len(differences[title]))
        raise ValueError(f"no Hugging Face model is like this one: {nearest} differs in {', '.join(differences[nearest])}")
    safetensors = optional_module("safetensors.torch", "pretrained")
    tensors = {name: part.detach().cpu().clone() for place in family.places(config) for name, part in place.split(state[place.ours])}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(theirs, indent=2, sort_keys=True) + "\n")
    return theirs["model_type"]


def _json(path: Path) -> Config:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise PretrainedError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise PretrainedError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise PretrainedError(f"{path} holds no settings")
    return value


class _Tensors:
    """The tensors of a folder, each taken once. Names are without the prefix "model.", which some files lack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.safetensors = optional_module("safetensors", "pretrained")
        if (folder / INDEX).is_file():
            names = _json(folder / INDEX).get("weight_map")
            if not isinstance(names, dict):
                raise PretrainedError(f"{folder / INDEX} has no weight_map")
            shards = sorted(set(names.values()))
        else:
            shards = [WEIGHTS]
        self.files: dict[str, tuple[Any, str]] = {}
        for shard in shards:
            file = self._open(folder / shard)
            self.files |= {name.removeprefix("model."): (file, name) for name in file.keys()}  # noqa: SIM118  # not a dict
        self.left = set(self.files)

    def _open(self, path: Path) -> Any:
        if not path.is_file():
            raise PretrainedError(f"{path} is missing: only safetensors are read")
        try:
            return self.safetensors.safe_open(path, "pt")
        except (OSError, self.safetensors.SafetensorError) as error:
            raise PretrainedError(f"{path} is not a safetensors file, or is damaged: {error}") from error

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.files:
            raise PretrainedError(f"{self.folder}: {name} of shape {tuple(shape)} is missing")
        file, full_name = self.files[name]
        found = tuple(file.get_slice(full_name).get_shape())
        if found != tuple(shape):
            raise PretrainedError(f"{self.folder}: {name} has shape {found}, expected {tuple(shape)}")
        self.left.discard(name)
        return file.get_tensor(full_name).float()

    def check_nothing_is_left(self, ignored: tuple[str, ...]) -> None:
        left = sorted(name for name in self.left if not name.endswith(ignored))
        if left:
            raise PretrainedError(f"{self.folder}: {len(left)} tensors are of no known layer: {', '.join(left[:3])}")


def _same(theirs: Config, what: str) -> Any:
    """A setting that their encoder and decoder have each, and our model once."""
    both = theirs[f"encoder_{what}"], theirs[f"decoder_{what}"]
    if both[0] != both[1]:
        raise ValueError(f"encoder_{what} is {both[0]} and decoder_{what} is {both[1]}, only equal ones are covered")
    return both[0]


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation is {name!r}, covered are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _token_ids(theirs: Config, first: int | None) -> Config:
    """first: the token that starts a target where config.json names none."""
    bos_id = theirs.get("decoder_start_token_id")
    ids = {"pad_id": theirs.get("pad_token_id"), "bos_id": first if bos_id is None else bos_id, "eos_id": theirs.get("eos_token_id")}
    for name, value in ids.items():
        if not isinstance(value, int):
            raise ValueError(f"{name.replace('bos', 'decoder_start').replace('_id', '_token_id')} must be an integer, got {value!r}")
    return ids


def _their_token_ids(config: Config) -> Config:
    return {"pad_token_id": config["pad_id"], "decoder_start_token_id": config["bos_id"], "eos_token_id": config["eos_id"]}


# Marian, BART, mBART, M2M-100 and Whisper descend from fairseq: the same layers under the same names, with other settings.


def _read_fairseq(theirs: Config) -> Config:
    return {
        "src_vocab": theirs["vocab_size"],
        "tgt_vocab": theirs["vocab_size"],
        "d_model": theirs["d_model"],
        "num_heads": _same(theirs, "attention_heads"),
        "num_encoder_layers": theirs["encoder_layers"],
        "num_decoder_layers": theirs["decoder_layers"],
        "dim_feedforward": _same(theirs, "ffn_dim"),
        "activation": _activation(theirs["activation_function"]),
        "embedding_scale": theirs["scale_embedding"],
        "tie_weights": True,
    }


def _write_fairseq(config: Config) -> Config:
    sizes = {"d_model": config["d_model"], "vocab_size": config["tgt_vocab"]}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_attention_heads": config["num_heads"], f"{side}_ffn_dim": config["dim_feedforward"]}
        sizes |= {f"{side}_layers": config[f"num_{side}_layers"]}
    settings = {"activation_function": THEIR_ACTIVATIONS[config["activation"]], "scale_embedding": config["embedding_scale"]}
    return sizes | settings | _their_token_ids(config)


def _read_marian(theirs: Config, names: set[str]) -> Config:
    config = _read_fairseq(theirs) | {"positions": "concatenated", "final_norm": False, "output_bias": True}
    config |= {"max_len": theirs["max_position_embeddings"], **_token_ids(theirs, theirs.get("pad_token_id"))}
    if theirs.get("share_encoder_decoder_embeddings", True):
        return config
    target = theirs.get("decoder_vocab_size") or theirs["vocab_size"]
    tied = theirs.get("tie_word_embeddings", True)
    return config | {"tgt_vocab": target, "tie_weights": "output" if tied else False, "output_bias": tied}


def _write_marian(config: Config) -> Config:
    shared = config["tie_weights"] is True
    sizes = {"vocab_size": config["src_vocab"], "decoder_vocab_size": config["tgt_vocab"], "share_encoder_decoder_embeddings": shared}
    tied = {"tie_word_embeddings": config["tie_weights"] is not False, "forced_eos_token_id": None}
    return _write_fairseq(config) | sizes | tied | {"model_type": "marian", "max_position_embeddings": config["max_len"]}


def _read_bart(theirs: Config, names: set[str]) -> Config:
    options = {"positions": "learned", "final_norm": False, "embedding_norm": True, "output_bias": True}
    ids = _token_ids(theirs, theirs.get("eos_token_id"))
    return _read_fairseq(theirs) | options | {"max_len": theirs["max_position_embeddings"], **ids}


def _write_bart(config: Config) -> Config:
    learned = {"max_position_embeddings": config["max_len"], "forced_eos_token_id": None}
    return _write_fairseq(config) | learned | {"model_type": "bart"}


def _read_mbart(theirs: Config, names: set[str]) -> Config:
    return _read_bart(theirs, names) | {"norm_first": True, "final_norm": True}


def _write_mbart(config: Config) -> Config:
    return _write_bart(config) | {"model_type": "mbart"}


def _read_m2m_100(theirs: Config, names: set[str]) -> Config:
    options = {"positions": "fairseq", "norm_first": True, "final_norm": True, "max_len": theirs["max_position_embeddings"]}
    return _read_fairseq(theirs) | options | _token_ids(theirs, theirs.get("eos_token_id"))


def _write_m2m_100(config: Config) -> Config:
    return _write_fairseq(config) | {"model_type": "m2m_100", "max_position_embeddings": config["max_len"]}


def _read_whisper(theirs: Config, names: set[str]) -> Config:
    options = {"positions": "learned", "norm_first": True, "final_norm": True, "src_features": theirs["num_mel_bins"]}
    lengths = {"max_len": theirs["max_target_positions"], "max_src_len": theirs["max_source_positions"]}
    return _read_fairseq(theirs) | options | lengths | _token_ids(theirs, None)


def _write_whisper(config: Config) -> Config:
    source = {"num_mel_bins": config["src_features"], "max_source_positions": config["max_src_len"] or config["max_len"]}
    suppressed = {"suppress_tokens": None, "begin_suppress_tokens": None, "bos_token_id": config["bos_id"]}
    return _write_fairseq(config) | source | suppressed | {"model_type": "whisper", "max_target_positions": config["max_len"]}


def _fairseq_places(config: Config) -> Iterator[Place]:
    key_bias = not config.get("src_features")  # Whisper's keys have none
    learned = config.get("positions") == "learned"
    unused = 0 if config.get("src_features") else 2  # as in fairseq, where pad_id = 1 and positions start after it
    if config.get("src_features"):
        yield Place("tgt_embedding.weight", ("decoder.embed_tokens.weight",))
        yield Place("src_embedding.positions", ("encoder.embed_positions.weight",))
        for conv in ("conv1", "conv2"):
            yield from _pair(f"src_embedding.{conv}", f"encoder.{conv}")
    elif config["tie_weights"] is True:
        yield Place("tgt_embedding.weight", ("shared.weight",))
    else:
        yield Place("src_embedding.weight", ("encoder.embed_tokens.weight",))
        yield Place("tgt_embedding.weight", ("decoder.embed_tokens.weight",))
    if config["tie_weights"] is False:
        yield Place("output.weight", ("lm_head.weight",))
        yield Place("output.bias", ("final_logits_bias",), as_row=True)
    if config.get("output_bias"):
        yield Place("output_bias", ("final_logits_bias",), as_row=True)
    for stack, side in (("encoder", "src"), ("decoder", "tgt")):
        if learned and not (config.get("src_features") and side == "src"):
            yield Place(f"{side}_embedding.positions", (f"{stack}.embed_positions.weight",), unused)
        if config.get("embedding_norm"):
            yield from _pair(f"{side}_embedding.norm", f"{stack}.layernorm_embedding")
        for layer in range(config[f"num_{stack}_layers"]):
            name = f"{stack}.layers.{layer}"
            attentions = {"self_attn": ("self_attn", "norm1")}
            if stack == "decoder":
                attentions["multihead_attn"] = ("encoder_attn", "norm2")
            for ours, (theirs, norm) in attentions.items():
                parts = [f"{name}.{theirs}.{which}_proj" for which in "qkv"]
                yield Place(f"{name}.{ours}.in_proj_weight", tuple(f"{part}.weight" for part in parts))
                biases = [f"{part}.bias" if key_bias or not part.endswith("k_proj") else None for part in parts]
                yield Place(f"{name}.{ours}.in_proj_bias", tuple(biases))
                yield from _pair(f"{name}.{ours}.out_proj", f"{name}.{theirs}.out_proj")
                yield from _pair(f"{name}.{norm}", f"{name}.{theirs}_layer_norm")
            yield from _pair(f"{name}.linear1", f"{name}.fc1")
            yield from _pair(f"{name}.linear2", f"{name}.fc2")
            yield from _pair(f"{name}.norm{len(attentions) + 1}", f"{name}.final_layer_norm")
        if config.get("final_norm", True):
            yield from _pair(f"{stack}.norm", f"{stack}.layer_norm")


def _pair(ours: str, theirs: str) -> Iterator[Place]:
    for kind in ("weight", "bias"):
        yield Place(f"{ours}.{kind}", (f"{theirs}.{kind}",))


# T5 and its descendants.


def _read_t5(theirs: Config, names: set[str]) -> Config:
    *gated, activation = theirs["feed_forward_proj"].split("-")
    if gated not in ([], ["gated"]):
        raise ValueError(f"feed_forward_proj is {theirs['feed_forward_proj']!r}, covered are ACTIVATION and gated-ACTIVATION")
    if gated and activation == "gelu":
        activation = "gelu_new"
    scaled = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False)
    return {
        "src_vocab": theirs["vocab_size"],
        "tgt_vocab": theirs["vocab_size"],
        "d_model": theirs["d_model"],
        "num_heads": theirs["num_heads"],
        "head_dim": theirs["d_kv"],
        "num_encoder_layers": theirs["num_layers"],
        "num_decoder_layers": theirs.get("num_decoder_layers") or theirs["num_layers"],
        "dim_feedforward": theirs["d_ff"],
        "activation": _activation(activation),
        "gated": bool(gated),
        "norm": "rms",
        "layer_norm_eps": float(theirs["layer_norm_epsilon"]),
        "norm_first": True,
        "bias": False,
        "positions": "none",
        "relative_bias": "shared",
        "relative_buckets": theirs["relative_attention_num_buckets"],
        "relative_distance": theirs.get("relative_attention_max_distance", 128),
        "attention_scale": 1.0,
        "embedding_scale": False,
        "train_padding": True,
        "output_scale": scaled and theirs["model_type"] != "mt5",
        "tie_weights": "embeddings" if "lm_head.weight" in names else True,
        "max_len": MAX_LEN,
        **_token_ids(theirs, theirs.get("pad_token_id")),
    }


def _write_t5(config: Config) -> Config:
    activation = THEIR_ACTIVATIONS[config["activation"]]
    if config["gated"]:
        activation = "gated-gelu" if activation == "gelu_new" else f"gated-{activation}"
    scaled = config["output_scale"]
    return {
        "model_type": "t5",
        "vocab_size": config["tgt_vocab"],
        "d_model": config["d_model"],
        "num_heads": config["num_heads"],
        "d_kv": config["head_dim"],
        "num_layers": config["num_encoder_layers"],
        "num_decoder_layers": config["num_decoder_layers"],
        "d_ff": config["dim_feedforward"],
        "feed_forward_proj": activation,
        "layer_norm_epsilon": config["layer_norm_eps"],
        "relative_attention_num_buckets": config["relative_buckets"],
        "relative_attention_max_distance": config["relative_distance"],
        "scale_decoder_outputs": scaled,
        "tie_word_embeddings": scaled,  # where transformers keeps whether the outputs are scaled
        **_their_token_ids(config),
    }


def _read_umt5(theirs: Config, names: set[str]) -> Config:
    return _read_t5(theirs, names) | {"relative_bias": "each"}


def _write_umt5(config: Config) -> Config:
    return _write_t5(config) | {"model_type": "umt5"}


def _t5_places(config: Config) -> Iterator[Place]:
    yield Place("tgt_embedding.weight", ("shared.weight",))
    if config["tie_weights"] == "embeddings":
        yield Place("output.weight", ("lm_head.weight",))
    for stack in ("encoder", "decoder"):
        depth = config[f"num_{stack}_layers"]
        for layer in range(depth if config["relative_bias"] == "each" else 1):
            table = f"{stack}.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight"
            yield Place(f"{stack}.relative_bias.{layer}.weight", (table,))
        for layer in range(depth):
            name, block = f"{stack}.layers.{layer}", f"{stack}.block.{layer}.layer"
            attentions = {"self_attn": "SelfAttention"}
            if stack == "decoder":
                attentions["multihead_attn"] = "EncDecAttention"
            for place, (ours, theirs) in enumerate(attentions.items()):
                parts = tuple(f"{block}.{place}.{theirs}.{which}.weight" for which in "qkv")
                yield Place(f"{name}.{ours}.in_proj_weight", parts)
                yield Place(f"{name}.{ours}.out_proj.weight", (f"{block}.{place}.{theirs}.o.weight",))
                yield Place(f"{name}.norm{place + 1}.weight", (f"{block}.{place}.layer_norm.weight",))
            place = len(attentions)
            dense = f"{block}.{place}.DenseReluDense"
            inner = (f"{dense}.wi_0.weight", f"{dense}.wi_1.weight") if config["gated"] else (f"{dense}.wi.weight",)
            yield Place(f"{name}.linear1.weight", inner)
            yield Place(f"{name}.linear2.weight", (f"{dense}.wo.weight",))
            yield Place(f"{name}.norm{place + 1}.weight", (f"{block}.{place}.layer_norm.weight",))
        yield Place(f"{stack}.norm.weight", (f"{stack}.final_layer_norm.weight",))


# Copies of a matrix that is tied, sinusoids, and a table that T5's first files have but no version of T5 reads.
TIED = ("embed_tokens.weight", "lm_head.weight", "proj_out.weight")
SINUSOIDS = ("embed_positions.weight", "embed_positions.weights")

FAMILIES = (
    Family("Marian, OPUS-MT", ("marian",), "MarianMTModel", _read_marian, _write_marian, _fairseq_places, (*TIED, *SINUSOIDS)),
    Family("BART", ("bart",), "BartForConditionalGeneration", _read_bart, _write_bart, _fairseq_places, TIED),
    Family("mBART", ("mbart",), "MBartForConditionalGeneration", _read_mbart, _write_mbart, _fairseq_places, TIED),
    Family(
        *("M2M-100, NLLB", ("m2m_100",), "M2M100ForConditionalGeneration", _read_m2m_100, _write_m2m_100, _fairseq_places),
        (*TIED, *SINUSOIDS, "final_logits_bias"),
    ),
    Family(
        *("T5, mT5", ("t5", "mt5"), "T5ForConditionalGeneration", _read_t5, _write_t5, _t5_places),
        ("embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight"),
    ),
    Family(
        *("UMT5", ("umt5",), "UMT5ForConditionalGeneration", _read_umt5, _write_umt5, _t5_places),
        ("embed_tokens.weight",),
    ),
    Family("Whisper", ("whisper",), "WhisperForConditionalGeneration", _read_whisper, _write_whisper, _fairseq_places, TIED),
)
