"""Reads Marian's model files (Junczys-Dowmunt et al. 2018, https://marian-nmt.github.io): .npz, and the .bin of Bergamot and Firefox.

A .bin file is little-endian: its version, 1, and the number of items, both uint64; for each item four uint64, the length of its name, its
type, its rank and its size in bytes; all names, NUL-terminated; all shapes, int32; the length of the padding, uint64, and the padding; all
data. 8-bit matrices are followed by one float32, a scale: the stored numbers are the weights times it. They are stored transposed, except
for the embedding.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .find import PretrainedError

FLOAT32, INT8, INT8_SCALED = 0x404, 0x101, 0x4101
CONFIG = "special:model.yml"
ACTIVATION_SCALE = "_QuantMultA"  # name suffix of tensors that only 8-bit products need
EMBEDDING = "Wemb"  # name suffix of embeddings
NAMES = {FLOAT32: "float32", INT8: "8-bit", INT8_SCALED: "8-bit with a scale"}


def read_model_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every tensor by name, in float32 with matrices as (in, out), and the configuration stored in the file.

    Raises PretrainedError.
    """
    try:
        tensors = _read_npz(path) if path.suffix == ".npz" else _read_bin(path.read_bytes())
    except OSError as error:
        raise PretrainedError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, struct.error, zipfile.BadZipFile, KeyError, EOFError) as error:
        raise PretrainedError(f"{path} is not a Marian model, or is damaged: {error}") from error
    config = tensors.pop(CONFIG, None)
    if config is None:
        raise PretrainedError(f"{path} is not a Marian model: it has no {CONFIG}")
    return {name: array for name, array in tensors.items() if not name.endswith(ACTIVATION_SCALE)}, _parsed(path, config)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name, array in arrays.items():
        if name != CONFIG and array.dtype != np.float32:
            raise ValueError(f"{name} is {array.dtype}, not float32")
    return arrays


def _read_bin(data: bytes) -> dict[str, np.ndarray]:
    version, count = struct.unpack_from("<2Q", data)
    if version != 1 or 32 * count > len(data):
        raise ValueError(f"it starts with version {version} and {count} items")
    items = [struct.unpack_from("<4Q", data, 16 + 32 * item) for item in range(count)]
    place = 16 + 32 * count
    names, shapes = [], []
    for length, *_ in items:
        names.append(data[place : place + length].rstrip(b"\0").decode())
        place += length
    for _, _, rank, _ in items:
        shapes.append(struct.unpack_from(f"<{rank}i", data, place))
        place += 4 * rank
    (padding,) = struct.unpack_from("<Q", data, place)
    place += 8 + padding
    arrays = {}
    for name, shape, (_, kind, _, num_bytes) in zip(names, shapes, items, strict=True):
        if place + num_bytes > len(data):
            raise ValueError(f"it ends inside {name}")
        arrays[name] = _item(name, shape, kind, data[place : place + num_bytes])
        place += num_bytes
    return arrays


def _item(name: str, shape: tuple[int, ...], kind: int, data: bytes) -> np.ndarray:
    size = math.prod(shape)
    if kind not in NAMES:
        raise ValueError(f"{name} is of type {kind:#x}, not one of {', '.join(NAMES.values())}")
    needed = {FLOAT32: 4 * size, INT8: size, INT8_SCALED: size + 4}[kind]
    if min(shape, default=0) < 1 or needed > len(data):
        raise ValueError(f"{name} of shape {shape} does not fit in its {len(data)} bytes")
    if kind == FLOAT32:
        return np.frombuffer(data, "<f4", size).reshape(shape)
    numbers = np.frombuffer(data, "i1", size)
    if kind == INT8:
        return numbers
    weights = numbers / np.frombuffer(data, "<f4", 1, size)
    return weights.reshape(shape) if name.endswith(EMBEDDING) else weights.reshape(shape[::-1]).T


def _parsed(path: Path, config: np.ndarray) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(config.astype(np.uint8).tobytes().rstrip(b"\0").decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PretrainedError(f"{path}: {CONFIG} is not YAML: {error}") from error
    if not isinstance(parsed, dict):
        raise PretrainedError(f"{path}: {CONFIG} holds no settings")
    return parsed
