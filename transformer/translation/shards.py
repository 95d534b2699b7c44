"""Tensors of a checkpoint in a folder of torch.distributed.checkpoint, in which every process writes what it holds.

Any number of processes can read it, each only what it needs.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .output_files import sync_folder

METADATA_NAME = ".metadata"


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors that may be sharded; every process calls this. All raise OSError if it fails in one."""
    from torch.distributed import checkpoint

    try:
        checkpoint.save(dict(tensors), storage_writer=checkpoint.FileSystemWriter(folder), no_dist=not dist.is_initialized())
    except checkpoint.CheckpointException as error:
        raise OSError(f"{folder}: {_first_failure(error)}") from error
    sync_folder(folder)


def shard_sizes(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the tensors in a folder. Raises ValueError, which names it, where a file is missing or incomplete."""
    metadata = _metadata(folder)
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"its shard {path} is missing")
        if path.stat().st_size < end:
            raise ValueError(f"its shard {path} is cut off: {path.stat().st_size:,} bytes of {end:,}")
    return {name: stored.size for name, stored in metadata.state_dict_metadata.items()}


def load_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, which may be sharded, in place; every process calls this. Raises ValueError."""
    _load(folder, tensors, alone=not dist.is_initialized())


def read_shards(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names start with `prefix`, in this process alone. Raises ValueError."""
    stored = _metadata(folder).state_dict_metadata
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in stored.items() if name.startswith(prefix)}
    _load(folder, tensors, alone=True)
    return tensors


def _load(folder: Path, tensors: dict[str, Tensor], alone: bool) -> None:
    from torch.distributed import checkpoint

    try:
        with warnings.catch_warnings():  # that it is alone
            warnings.simplefilter("ignore", UserWarning)
            checkpoint.load(dict(tensors), storage_reader=checkpoint.FileSystemReader(folder), no_dist=alone)
    except checkpoint.CheckpointException as error:
        raise ValueError(f"its shards in {folder} cannot be read: {_first_failure(error)}") from error


def _metadata(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    try:
        return FileSystemReader(folder).read_metadata()
    except FileNotFoundError as error:
        raise ValueError(f"its shard {folder / METADATA_NAME} is missing") from error
    except (EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise ValueError(f"its shard {folder / METADATA_NAME} is damaged: {error}") from error


def _first_failure(error: Any) -> str:
    """What happened in the first of the processes where something did."""
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {cause}"
