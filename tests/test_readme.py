"""Every example in the README runs as printed, and its generated table is up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_translation import write_corpus

from fused_attention.kernels import cpu
from fused_attention.kernels.support import support_table, transforms_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYTHON_EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL_EXAMPLES = [example for example in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "fused-attention " in example]


def test_there_are_examples() -> None:
    assert len(PYTHON_EXAMPLES) >= 3


@pytest.mark.parametrize("example", PYTHON_EXAMPLES, ids=range(len(PYTHON_EXAMPLES)))
def test_python_example(example: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "error::UserWarning:__main__", "-c", example], cwd=tmp_path, check=True)


@pytest.mark.parametrize("example", SHELL_EXAMPLES, ids=range(len(SHELL_EXAMPLES)))
def test_shell_example(example: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", example], cwd=tmp_path, env=environment, check=True)
    lines = (tmp_path / "corpus/test.en").read_text().splitlines()
    assert len((tmp_path / "test.fr").read_text().splitlines()) == len(lines)


@pytest.mark.skipif(cpu.status() is not None, reason=f"no native kernels: {cpu.status()}")
@pytest.mark.parametrize("table", [support_table, transforms_table])
def test_the_support_tables_are_what_the_code_says(table: Callable[[], str]) -> None:
    assert table() in README, "run `python -m fused_attention.kernels.support` and paste its tables into README.md"


def test_the_layout_map_is_true() -> None:
    paths = re.findall(r"^([\w./]+/?) {2,}\S", re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1), re.MULTILINE)
    assert len(paths) >= 8
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)", README) if "://" not in target]
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_measured_lines_are_from_a_recorded_run() -> None:
    """The results shown are lines of a run kept in docs/results."""
    recorded = {line.rstrip() for path in (ROOT / "docs/results").glob("*.txt") for line in path.read_text().splitlines()}
    shown = [line.rstrip() for block in re.findall(r"```results\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    assert len(shown) > 10
    assert [line for line in shown if line not in recorded] == []
