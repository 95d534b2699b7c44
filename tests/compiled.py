"""C++ programs and libraries of the tests, compiled through ninja into a folder of build/: only what changed since the last time."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

CXX = os.environ.get("CXX", "g++")


def compiled(target: Path, sources: Mapping[Path, str], flags: str, link_flags: str, cxx: str = CXX) -> Path:
    """The target, made of sources with flags of their own beside the common ones."""
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule compile",
        f"  command = {cxx} {flags} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} {link_flags} $in -o $out",
        *(f"build {source.stem}.o: compile {source}\n  flags = {own}" for source, own in sources.items()),
        f"build {target.name}: link {' '.join(f'{source.stem}.o' for source in sources)}",
    ]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        ninja = subprocess.run([sys.executable, "-m", "ninja", "-C", folder, target.name], capture_output=True, text=True)
    if ninja.returncode != 0:
        raise RuntimeError(f"{target.name} does not compile:\n{ninja.stdout}{ninja.stderr}")
    return target
