"""What `make gpu` must know of the machine, asked in a process of its own: this one neither holds memory on the GPU nor hangs with it."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
QUESTION = """
import json, platform, sys, torch
there = torch.cuda.is_available()
try:
    import triton
except ImportError:
    triton = None
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if there else "",
    "capability": torch.cuda.get_device_capability() if there else (0, 0),
    "versions": f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
                f"triton {triton.__version__ if triton else 'none'}",
    "why_not": "" if there else "torch sees no GPU",
}))
"""
MEASURED = ("kernels", "csrc", "setup.py")  # what results are about


class Machine(NamedTuple):
    gpu: str  # its name, empty without one
    capability: tuple[int, int]
    versions: str
    why_not: str  # why nothing can run on a GPU, empty where it can


@functools.cache
def machine() -> Machine:
    try:
        run = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return Machine("", (0, 0), "versions unknown", "torch did not say within two minutes whether it sees a GPU")
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        return Machine("", (0, 0), "versions unknown", f"torch does not say whether it sees a GPU: {lines[-1]}")
    answer = json.loads(run.stdout.splitlines()[-1])
    return Machine(answer["gpu"], tuple(answer["capability"]), answer["versions"], answer["why_not"])


def sources() -> str:
    """Names the state of what is measured where there may be no git: a hash over the files, their paths included."""
    digest = hashlib.sha256()
    for top in MEASURED:
        files = [ROOT / top] if (ROOT / top).is_file() else sorted((ROOT / top).rglob("*"))
        for path in files:
            if path.suffix in (".py", ".json", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    print(sources())
