"""A libcuda.so.1 that launches nothing (standin_driver.cpp): the host code of the CUDA kernels runs whole on a machine without a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import NamedTuple

from emulator.build import CXX

SOURCE = Path(__file__).with_suffix(".cpp")
NAME = "libcuda.so.1"


class Calls(NamedTuple):
    """How often the driver was asked for something."""

    launches: int
    loaded: int
    unloaded: int
    pushed: int  # contexts
    popped: int
    initialized: int


def build(folder: Path, *, old: bool = False) -> Path:
    """The library in a folder for LD_LIBRARY_PATH; old: without a function that every driver since CUDA 10.1 has."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{NAME}", *(["-DOLD"] if old else [])]
    subprocess.run([CXX, *options, SOURCE, "-o", folder / NAME], check=True)
    return folder / NAME


def load(library: Path) -> ctypes.CDLL:
    """Into this process, before anything else asks for a driver: the loader then finds it by its name."""
    return ctypes.CDLL(str(library))


def calls(library: ctypes.CDLL) -> Calls:
    numbers = (ctypes.c_int * 6)()
    library.standin_calls(numbers)
    return Calls(*numbers)
