"""A torch that is too old is refused, and one without the private names that this library uses only makes it slower."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import without_torch_internals

from fused_attention.kernels import torch_internals

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("version", ["2.9.1", "2.9.0+cpu", "1.13.1", "2.2.0a0+b4e4ee8"])
def test_an_older_torch_is_refused_in_one_line(version: str) -> None:
    with pytest.raises(ImportError) as refused:
        torch_internals.refuse_older(version)
    assert str(refused.value) == f"fused_attention needs torch 2.10 or newer, this is torch {version}: pip install 'torch>=2.10'"


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+b4e4ee8", "2.15.0+cu130", "2.16.0.dev20261101", "3.0.0", torch.__version__])
def test_any_newer_torch_is_taken(version: str) -> None:
    torch_internals.refuse_older(version)


def test_the_range_is_said_in_one_way() -> None:
    oldest = ".".join(map(str, torch_internals.OLDEST_TORCH))
    assert f'dependencies = ["torch>={oldest}"]' in (ROOT / "pyproject.toml").read_text()
    assert f"torch {oldest}" in (ROOT / "README.md").read_text()
    assert f"torch=={oldest}.*" in (ROOT / "Makefile").read_text()


def test_the_tests_know_every_name() -> None:
    source = (ROOT / "kernels/torch_internals.py").read_text()
    names = {f"torch.{name}" for name in re.findall(r'_found\(\s*"([^"]+)"', source)}
    names |= {f"torch._C._dynamo.guards._empty_strided_{device}" for device in ("cpu", "cuda")}
    names |= {f"torch.{name}" for name in re.findall(r'_found_where_built_for_gpus\(\s*"([^"]+)"', source)}
    assert names == set(without_torch_internals.NAMES)


def test_private_names_of_torch_are_used_in_one_place() -> None:
    # torch._decomp is waited for (when_imported): where it is gone, nothing is registered with it.
    private = re.compile(r"torch(\.\w+)*\._(?!_|decomp\b)\w+|forward_ad\._|\._is_zerotensor|\._has_storage")
    files = [path for folder in ("kernels", "transformer", "integrations") for path in (ROOT / folder).rglob("*.py")]
    files += (ROOT / "src/fused_attention").glob("*.py")
    lines = [
        f"{file.name}: {line.strip()}"
        for file in files
        if file.name != "torch_internals.py"
        for line in file.read_text().splitlines()
        if private.search(line.partition("#")[0])
    ]
    assert lines == []


def test_nothing_is_missing_in_this_torch() -> None:
    """Unless it is newer than the newest that this was tested with."""
    if torch.torch_version.TorchVersion(torch.__version__) < "2.14":
        assert torch_internals.missing == []


def test_results_stay_right_whatever_is_missing() -> None:
    """A process for each name, forked from one that has imported torch alone."""
    run = subprocess.run([sys.executable, without_torch_internals.__file__], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == [*without_torch_internals.NAMES, "everything"]
