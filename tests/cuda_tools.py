"""Where the programs of the CUDA toolkit are: compute-sanitizer, nvdisasm, cuobjdump."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from csrc.cuda.toolkit import USUAL_FOLDER, find_nvcc


def find_cuda_tool(name: str) -> Path | None:
    """The first one that can be run."""
    return next((folder / name for folder in _folders(name) if os.access(folder / name, os.X_OK)), None)


def _folders(name: str) -> Iterator[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield from (Path(home, "bin"), Path(home, "compute-sanitizer"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:  # which brings some of them
        yield Path(triton.origin).parent / "backends/nvidia/bin"
    if found := shutil.which(name):
        yield Path(found).parent
    if nvcc := find_nvcc():
        yield from (Path(nvcc).parent, Path(nvcc).resolve().parent)
    yield from (USUAL_FOLDER / "bin", USUAL_FOLDER / "compute-sanitizer")
