"""Writes a checkpoint with int8 weights, and compares translations before and after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from ..quantize import int8_tensors, quantize_int8
from .checkpoint import CHECKPOINT_NAME, DYNAMIC, WEIGHTS_ONLY, Checkpoint, CheckpointError, load_model, read_checkpoint, save_checkpoint
from .data import ParallelText
from .machine import choose_device
from .translate import Translator


def quantize_checkpoint(checkpoint: Checkpoint, output: Path, *, dynamic: bool = False) -> None:
    """Write the model of a checkpoint with int8 weights (quantize_int8), and its tokenizers, to a checkpoint in the folder `output`.

    Raises CheckpointError if it is int8 already.
    """
    if "int8" in checkpoint.progress:
        raise CheckpointError(f"{checkpoint.path} has int8 weights already")
    state, scales = int8_tensors(quantize_int8(load_model(checkpoint, choose_device("cpu")), dynamic))
    groups = {"model": state, "scale": scales, "tokenizer": checkpoint.group("tokenizer")}
    tensors = {f"{prefix}.{name}": tensor for prefix, group in groups.items() for name, tensor in group.items()}
    progress = {"int8": DYNAMIC if dynamic else WEIGHTS_ONLY, "corpus": checkpoint.progress.get("corpus")}
    path = output / CHECKPOINT_NAME
    save_checkpoint(path, tensors, config=checkpoint.config, model_config=checkpoint.model_config, progress=progress)


def comparison(before: Path, after: Path, text: ParallelText, device: str) -> Iterator[str]:
    """A line for each of two checkpoints: sizes, the score of its greedy translations of `text`, and how long these took."""
    for path in (before, after):
        weights, files = read_checkpoint(path).num_bytes()
        translator = Translator.load(path, device)
        start = time.perf_counter()
        scores, _ = translator.score(text)
        seconds = time.perf_counter() - start
        yield f"{path}: weights {weights / 1e6:,.1f} of {files / 1e6:,.1f} MB, {seconds:.1f} s, {scores}"
