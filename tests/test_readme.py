"""Every example in the README and in the pages that it leads to runs as printed, and the generated tables are up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_translation import write_corpus

from fused_attention.kernels.native import cpu
from fused_attention.kernels.support import support_table, transforms_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RUN = ("README.md", "docs/install.md", "docs/migrating.md", "docs/support.md", "docs/translation.md", "docs/vision.md")
PAGES = {page: (ROOT / page).read_text() for page in RUN}
DOCS = {"README.md": README} | {f"docs/{path.name}": path.read_text() for path in (ROOT / "docs").glob("*.md")}
FOLDERS = ("kernels", "transformer", "integrations", "benchmarks", "csrc", "tests", "src")
PYTHON_EXAMPLES = [
    text
    for text in re.findall(r"```python\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL)
    if "replace_attention(model)  # torch." not in text  # lines for code that is there already: test_drop_in.py
]
SHELL_EXAMPLES = [text for text in re.findall(r"```sh\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL) if "fused-attention " in text]


OPTIONAL = {"diffusers": None, "transformers": "5.24", "xformers": None}  # and the oldest version that an example runs with


def test_there_are_examples() -> None:
    assert len(PYTHON_EXAMPLES) >= 4
    assert len(SHELL_EXAMPLES) == 1


def test_a_visitor_reads_it_in_a_sitting() -> None:
    assert len(README.splitlines()) <= 145


@pytest.mark.parametrize("example", PYTHON_EXAMPLES, ids=range(len(PYTHON_EXAMPLES)))
def test_python_example(example: str, tmp_path: Path) -> None:
    for library in re.findall(r"^(?:from|import) (\w+)", example, re.MULTILINE):
        if library in OPTIONAL:
            pytest.importorskip(library, minversion=OPTIONAL[library], exc_type=ImportError)
    subprocess.run([sys.executable, "-W", "error::UserWarning:__main__", "-c", example], cwd=tmp_path, check=True)


@pytest.mark.parametrize("example", SHELL_EXAMPLES, ids=range(len(SHELL_EXAMPLES)))
def test_shell_example(example: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", example], cwd=tmp_path, env=environment, check=True)
    lines = (tmp_path / "corpus/test.en").read_text().splitlines()
    assert len((tmp_path / "test.fr").read_text().splitlines()) == len(lines)


@pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
@pytest.mark.parametrize("table", [support_table, transforms_table])
def test_the_support_tables_are_what_the_code_says(table: Callable[[], str]) -> None:
    generated = table()
    assert generated in PAGES["docs/support.md"], (
        "run `python -m fused_attention.kernels.support` and paste its tables into docs/support.md"
    )
    if table is support_table:
        lines = generated.splitlines()
        shown = README[README.index(lines[0]) :].split("\n\n")[0].splitlines()
        assert shown[:2] == lines[:2]
        assert 6 <= len(shown) <= 14
        assert [line for line in shown if line not in lines] == []


def test_the_layout_map_is_true() -> None:
    paths = re.findall(r"^([\w./]+/?) {2,}\S", re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1), re.MULTILINE)
    assert len(paths) >= 8
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", DOCS)
def test_source_files_are_where_pages_say(page: str) -> None:
    """A path is one from the root, or the end of one."""
    there = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    there += [f"/{path.name}" for path in ROOT.iterdir()]
    named = re.findall(r"`([\w./]+\.(?:py|pyi|cpp|cu|cuh|h|json))`", DOCS[page])
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in there)] == []


def test_a_new_argument_takes_as_many_files_as_the_page_says() -> None:
    """The counts of docs/extending.md, without git."""
    sources = [
        path
        for folder in ("kernels", "csrc", "src")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".h", ".cpp", ".cu", ".cuh")
    ]
    # src links to the other folders.
    mention = {path.resolve().relative_to(ROOT) for path in sources if re.search(r"\bd?sinks?\b", path.read_text(), re.IGNORECASE)}
    easy = [path for path in mention if path.parts[0] == "kernels" and path.parts[1] != "native"]
    assert f"\n{len(mention)} for all backends, {len(easy)} for the reference and Triton.\n" in DOCS["docs/extending.md"]
    assert len(mention) <= 22
    assert len(easy) <= 8


@pytest.mark.parametrize("page", DOCS)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)", DOCS[page]) + re.findall(r'(?:src|srcset)="([^"]+)"', DOCS[page])
    assert [target for target in targets if "://" not in target and not (ROOT / page).parent.joinpath(target).exists()] == []


def test_speed_is_that_of_a_recorded_run(tmp_path: Path) -> None:
    recorded = ROOT / re.search(r"\(docs/results/cpu[^)]*\)", README)[0][1:-1]
    done = subprocess.run(
        [sys.executable, "-m", "fused_attention.benchmarks.front_page", recorded, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in README
    described = re.compile(r"<dc:description>(.*?)</dc:description>")
    for picture in ("speed-light.svg", "speed-dark.svg"):
        drawn, kept = ((folder / picture).read_text() for folder in (tmp_path, ROOT / "docs/pictures"))
        assert described.findall(drawn) == described.findall(kept) != []
