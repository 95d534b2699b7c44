"""Builds the emulator's library from the C++ sources of this folder, and PTX from CUDA sources where nvcc is installed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))
from compiled import CXX, compiled  # noqa: E402

from csrc.cuda.toolkit import find_nvcc  # noqa: E402

__all__ = ["compile_ptx", "find_nvcc", "library", "why_not_buildable"]

BUILD = HERE.parents[1] / "build" / "emulator"


def why_not_buildable() -> str | None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator runs on Linux on x86-64, not on {sys.platform} on {platform.machine()}"
    if shutil.which(CXX) is None:
        return f"no C++ compiler: {CXX!r} was not found"
    return None


@cache
def library() -> ctypes.CDLL:
    """The emulator, compiled where it changed since the last time."""
    reason = why_not_buildable()
    if reason is not None:
        raise RuntimeError(reason)
    # Contraction would fuse the kernel's separate multiplications and additions.
    flags = "-std=c++17 -O2 -g1 -march=native -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra"
    sources = dict.fromkeys(sorted(HERE.glob("*.cpp")), "")
    return ctypes.CDLL(str(compiled(BUILD / "emulator.so", sources, flags, "-shared")))


def compile_ptx(source: Path, architecture: str, *, include: Sequence[Path] = (), flags: Sequence[str] = ()) -> str:
    """The PTX of a CUDA source, with line numbers; kept in build/emulator as long as no file of its folders changes."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found (CUDA_HOME, PATH, wheels)")
    command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-ptx", f"-arch=compute_{architecture}", *flags, *(f"-I{path}" for path in include)]
    digest = hashlib.sha256(repr(command).encode())
    for folder in (source.parent, *include):
        for path in sorted((*folder.glob("*.cu"), *folder.glob("*.cuh"), *folder.glob("*.h"))):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = BUILD / "ptx" / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.ptx"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, str(source), "-o", str(partial)], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{result.stderr}")
        partial.replace(target)
    return target.read_text()
