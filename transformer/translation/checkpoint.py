"""Checkpoints: one safetensors file that holds everything a training run or a translation needs.

Tensors: `model.*`, `optimizer.<parameter>.*`, `rng.*`, `history.*` and the serialized tokenizers `tokenizer.*`.
Metadata: training configuration, model configuration and progress (step, seconds, data position) as JSON.

Of a sharded checkpoint, the model's and the optimizer's tensors are in a folder beside the file (shards.py), which progress["shards"]
names. The folder is complete before the file names it, and an older one is removed after that.

An int8 checkpoint (progress["int8"], the kind) has a model and tokenizers alone: matrices are int8, with their scales as `scale.*`.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model import Transformer
from ..optional import optional_module
from ..quantize import load_int8
from .output_files import atomic_write
from .shards import read_shards, shard_sizes
from .tokenizer import Tokenizer
from .training_config import TrainingConfig

CHECKPOINT_NAME = "checkpoint.safetensors"
KEPT_NAME = re.compile(r"step-(\d{8,})\.safetensors")
SHARDS_PREFIX = "checkpoint.shards-"
FORMAT = "fused_attention checkpoint 1"
INT8_KINDS = WEIGHTS_ONLY, DYNAMIC = "weights only", "dynamic"  # quantize_int8 says what they are


class CheckpointError(ValueError):
    """The file is missing, damaged, or not one of ours; the message is one line that names it."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file: tensors by name, and the JSON values in the metadata."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    model_config: dict[str, Any]
    progress: dict[str, Any]

    @property
    def shards(self) -> Path | None:
        """The folder of a sharded checkpoint's tensors."""
        return self.path.parent / self.progress["shards"] if "shards" in self.progress else None

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with "prefix.", keyed by the rest of the name. Raises CheckpointError."""
        start = prefix + "."
        tensors = self.tensors
        if self.shards is not None:
            try:
                tensors = tensors | read_shards(self.shards, start)
            except ValueError as error:
                raise CheckpointError(f"corrupt checkpoint {self.path}: {error}") from error
        return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}

    def num_bytes(self) -> tuple[int, int]:
        """Of the model's tensors, and of all the files."""
        tensors = [tensor for prefix in ("model", "scale") for tensor in self.group(prefix).values()]
        files = [self.path, *(self.shards.iterdir() if self.shards is not None else ())]
        return sum(tensor.nbytes for tensor in tensors), sum(file.stat().st_size for file in files)

    def trained_sizes(self) -> dict[str, torch.Size]:
        """The shapes of the model's and the optimizer's tensors, by name."""
        if self.shards is not None:
            return shard_sizes(self.shards)
        return {name: tensor.shape for name, tensor in self.tensors.items() if name.startswith(("model.", "optimizer."))}

    def training_config(self) -> TrainingConfig:
        """The settings of the run that wrote the checkpoint. Raises CheckpointError."""
        try:
            return TrainingConfig.from_dict(self.config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"corrupt checkpoint {self.path}: {error}") from error


def save_checkpoint(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    config: dict[str, Any],
    model_config: dict[str, Any],
    progress: dict[str, Any],
) -> None:
    """Write a checkpoint so that a kill at any moment leaves either the previous one or this one. Raises OSError."""
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config),
        "model_config": json.dumps(model_config),
        "progress": json.dumps(progress),
    }
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, optional_module("safetensors.torch").save(on_cpu, metadata))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file, or the one in a training run's folder. Raises CheckpointError."""
    safetensors = optional_module("safetensors")
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of fused_attention")
        values = {name: json.loads(metadata[name]) for name in ("config", "model_config", "progress")}
    except (safetensors.SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"corrupt checkpoint {path}: {error}") from error
    if wrong := [name for name, value in values.items() if not isinstance(value, dict)]:
        raise CheckpointError(f"corrupt checkpoint {path}: {wrong[0]} is not a JSON object")
    checkpoint = Checkpoint(path, tensors, **values)
    try:
        checkpoint.trained_sizes()
    except ValueError as error:
        raise CheckpointError(f"corrupt checkpoint {path}: {error}") from error
    return checkpoint


def kept_name(step: int) -> str:
    """The file of weights that are kept of a validation."""
    return f"step-{step:08}.safetensors"


def kept_files(folder: Path) -> dict[int, Path]:
    """Step -> file with its weights, in order."""
    found = {path: KEPT_NAME.fullmatch(path.name) for path in folder.iterdir()}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def remove_kept(folder: Path, wanted: set[int]) -> None:
    """Remove the weights that are kept of other steps than these."""
    for step, path in kept_files(folder).items():
        if step not in wanted:
            path.unlink()


def new_shards(folder: Path, step: int) -> str:
    """A name for a folder of shards that is not there yet."""
    names = (f"{SHARDS_PREFIX}{step}{suffix}" for suffix in itertools.chain([""], map(".{}".format, itertools.count(2))))
    return next(name for name in names if not (folder / name).exists())


def remove_other_shards(folder: Path, name: str | None) -> None:
    """Remove the shards of older checkpoints, and those that a killed process left."""
    for path in folder.glob(f"{SHARDS_PREFIX}*"):
        if path.name != name:
            shutil.rmtree(path, ignore_errors=True)


def check_sizes(path: Path, expected: dict[str, torch.Size], saved: dict[str, torch.Size]) -> None:
    """Raises CheckpointError unless names and shapes match."""
    if saved.keys() != expected.keys():
        difference = sorted(saved.keys() ^ expected.keys())
        raise CheckpointError(f"{path} does not fit the model it describes: {', '.join(difference[:3])}")
    for name, size in expected.items():
        if size != saved[name]:
            raise CheckpointError(f"{path}: {name} has shape {tuple(saved[name])}, not {tuple(size)}")


def load_model_tensors(model: nn.Module, saved: dict[str, Tensor], path: Path) -> None:
    """Copy saved tensors into the model in place. Raises CheckpointError unless names and shapes match."""
    expected = model.state_dict()
    check_sizes(path, *({name: tensor.shape for name, tensor in tensors.items()} for tensors in (expected, saved)))
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(saved[name])


def load_model(checkpoint: Checkpoint, device: torch.device) -> Transformer:
    """Build the model the checkpoint describes, with its weights, in evaluation mode."""
    try:
        model = Transformer(**checkpoint.model_config).to(device)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path} describes a model that cannot be built: {error}") from error
    tensors, scales = checkpoint.group("model"), checkpoint.group("scale")
    load_model_tensors(model, tensors, checkpoint.path)
    kind = checkpoint.progress.get("int8")
    if kind is not None or scales or any(tensor.dtype is torch.int8 for tensor in tensors.values()):
        try:
            if kind not in INT8_KINDS:
                raise ValueError(f"the kind of int8 must be one of {', '.join(INT8_KINDS)}, got {kind!r}")
            load_int8(model, tensors, scales, dynamic=kind == DYNAMIC)
        except ValueError as error:
            raise CheckpointError(f"corrupt checkpoint {checkpoint.path}: {error}") from error
    return model.eval()


def load_tokenizers(checkpoint: Checkpoint) -> tuple[Tokenizer, Tokenizer]:
    """Source and target tokenizer; the same object if the vocabulary is joint."""
    saved = checkpoint.group("tokenizer")
    try:
        source = Tokenizer(saved["source"].numpy().tobytes())
        target = Tokenizer(saved["target"].numpy().tobytes()) if "target" in saved else source
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"corrupt checkpoint {checkpoint.path}: no usable tokenizer ({error})") from error
    return source, target


def tokenizer_tensors(source: Tokenizer, target: Tokenizer) -> dict[str, Tensor]:
    """The serialized tokenizers as uint8 tensors; a joint one is saved once."""
    tokenizers = {"source": source} if target is source else {"source": source, "target": target}
    return {f"tokenizer.{side}": torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8) for side, tokenizer in tokenizers.items()}
