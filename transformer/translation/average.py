"""Averages the weights of several moments of one training run (Vaswani et al. 2017, section 6.1, average the last ones)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .checkpoint import CHECKPOINT_NAME, Checkpoint, CheckpointError, kept_files, read_checkpoint, save_checkpoint


def average(folder: Path, output: Path, *, last: int | None = None, best: int | None = None) -> list[int]:
    """Write the mean of the weights that a run in `folder` has kept to a checkpoint in `output`; returns their steps.

    last: so many of the last ones; best: so many of the best, by the measure that the run kept them by. The mean is taken in float64.
    Raises CheckpointError if there are fewer, or they are not of one model.
    """
    count, option = (last, "keep_last") if last is not None else (best, "keep_best")
    if not count or count < 1:
        raise ValueError(f"the number of weights to average must be at least 1, not {count}")
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}")
    kept = [read_checkpoint(path) for path in kept_files(folder).values()]
    if len(kept) < count:
        raise CheckpointError(
            f"{folder} has kept the weights of {len(kept)} validations, not {count}: the setting {option} of a run keeps more"
        )
    chosen = kept[-count:] if last is not None else sorted(kept, key=_quality)[-count:]
    steps = sorted(checkpoint.progress["step"] for checkpoint in chosen)
    tensors = dict(chosen[0].tensors)
    for name, tensor in chosen[0].tensors.items():
        others = [_same(name, tensor, chosen[0], other) for other in chosen[1:]]
        if name.startswith("model."):
            tensors[name] = torch.stack([tensor.double(), *(other.double() for other in others)]).mean(0).to(tensor.dtype)
        elif not all(torch.equal(tensor, other) for other in others):
            raise CheckpointError(f"{name} differs between {chosen[0].path} and others in {folder}: they are not of one run")
    result = replace(chosen[0], progress={"averaged": steps, "corpus": chosen[0].progress.get("corpus")})
    save_checkpoint(output / CHECKPOINT_NAME, tensors, config=result.config, model_config=result.model_config, progress=result.progress)
    return steps


def _quality(checkpoint: Checkpoint) -> float:
    try:
        return float(checkpoint.progress["quality"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path} does not say how good it is") from error


def _same(name: str, tensor: torch.Tensor, first: Checkpoint, other: Checkpoint) -> torch.Tensor:
    """The tensor of this name in another checkpoint, where it must have the same shape."""
    found = other.tensors.get(name)
    if found is None or found.shape != tensor.shape or other.tensors.keys() != first.tensors.keys():
        raise CheckpointError(f"{other.path} and {first.path} are not of one model: {name} differs")
    return found
