"""Rehearses `make gpu` on a machine without a GPU, as bare as those it is for: a copy of the tree without .git and builds, no git in PATH,
and no network where this user may take it away.

`make gpu` itself must build there, and claim nothing that it cannot. Then every step is run as if there were a GPU: its programs must
start, with the options that they are given, and say that there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = (".git", ".venv*", "build", "demo", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", ".benchmarks")
AS_IF = """
import sys, gpu
import on_gpu.test_cuda, on_gpu.test_cuda_instances, on_gpu.test_cuda_streams, on_gpu.test_smoke
from on_gpu.machine import Machine
gpu.machine = lambda: Machine("as if there were a GPU", (9, 0), "no versions", "")
sys.exit(gpu.main())
"""
SAID = {  # in which file of the results, how often
    "tests.log": ("E   pytest.UsageError: these tests need a GPU", 4),
    "benchmark.md": ("torch sees no GPU", 1),
    "host-cost.txt": ("torch sees no GPU", 1),
    "cuda-backward.txt": ("torch sees no GPU", 1),
    "tiles.txt": ("torch sees no GPU", 1),
}


def main() -> None:
    if torch.cuda.is_available():
        sys.exit("this machine has a GPU: `make gpu` is no rehearsal here")
    with tempfile.TemporaryDirectory(prefix="gpu-rehearsal-") as name:
        folder = Path(name)
        tree, results = folder / "tree", folder / "results"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
        environment = bare_environment(folder)
        make = [*without_network(), "make", "gpu", f"PYTHON={sys.executable}", f"GPU_RESULTS={results}", "MINUTES=9"]
        summary, _ = run(make, tree, environment, results, 0)
        expect("commit unknown (no git)" in summary, "no git", summary)
        expect("| build | build in place | passed |" in summary, "the build passes", summary)
        steps = [line for line in summary.splitlines() if line.startswith("| ")][2:]
        claimed = [line for line in steps if "| not run | torch sees no GPU |" not in line]
        expect(len(claimed) == 1, "everything else is not run", summary)
        extension = list((tree / "src/fused_attention").glob("_native*.so"))
        expect(len(extension) == 1, "the extension is in the copy", str(extension))

        as_if = folder / "as-if"
        environment["PYTHONPATH"] = os.pathsep.join([str(tree / "src"), str(tree / "tests")])
        summary, files = run([*without_network(), sys.executable, "-c", AS_IF, str(as_if)], tree, environment, as_if, 1)
        for file, (text, count) in SAID.items():
            expect(
                files.get(file, "").count(text) == count, f"{file} says {count} times: {text}", files.get(file, f"no such file\n{summary}")
            )


def bare_environment(folder: Path) -> dict[str, str]:
    """Without git, without what the caller's environment adds."""
    programs = folder / "bin"
    programs.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in sorted(Path(place).glob("*")):
            if not program.name.startswith("git") and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)
    compiler = programs / "c++-in-a-hurry"  # nothing is measured
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O1\n')
    compiler.chmod(0o755)
    environment = {"CXX": compiler.name, "PATH": str(programs), "HOME": str(folder), "TMPDIR": str(folder), "FUSED_ATTENTION_CUDA": "0"}
    assert shutil.which("git", path=environment["PATH"]) is None
    return environment


def without_network() -> list[str]:
    words = ["unshare", "--net"]
    try:
        return words if subprocess.run([*words, "true"], capture_output=True).returncode == 0 else []
    except OSError:
        return []


def run(words: list[str], tree: Path, environment: dict[str, str], results: Path, status: int) -> tuple[str, dict[str, str]]:
    """The summary, and the text of every other file of the results."""
    start = time.monotonic()
    program = subprocess.run(words, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(program.stdout, f"{time.monotonic() - start:.0f} s", flush=True)
    # make's own status is 2 whatever that of its program
    expect(bool(program.returncode) == bool(status), f"exit status {status}", str(program.returncode))
    kept = sorted(path.name for path in results.iterdir())
    expect(kept == ["results.tar.gz", "summary.md"], "two files of results", str(kept))
    files = {}
    with tarfile.open(results / "results.tar.gz") as archive:
        for member in archive.getmembers():
            content = archive.extractfile(member)
            files[member.name] = content.read().decode(errors="replace") if content is not None else ""
    return (results / "summary.md").read_text(), files


def expect(holds: bool, what: str, found: str) -> None:
    if not holds:
        sys.exit(f"rehearsal: expected: {what}; found:\n{found}")


if __name__ == "__main__":
    main()
