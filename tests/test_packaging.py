"""The package as a user installs it: from a downloaded ZIP, which has no symbolic links."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from fused_attention.kernels.native import cpu
from fused_attention.kernels.native import cuda as cuda_backend

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "transformer", "integrations", "benchmarks")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_a_wheel_from_a_zip_download_is_complete(tmp_path: Path) -> None:
    archive = tmp_path / "source.zip"
    subprocess.run(["git", "archive", "--format=zip", f"--output={archive}", "HEAD"], cwd=ROOT, check=True)
    source = tmp_path / "source"
    with zipfile.ZipFile(archive) as content:
        content.extractall(source)  # links become small text files, as on a system without them
    assert (source / "src/fused_attention/kernels").is_file()
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run([*map(str, build)], check=True, env=os.environ | {"FUSED_ATTENTION_CUDA": "0"})
    (wheel,) = tmp_path.glob("fused_attention-*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        content.extractall(tmp_path / "installed")
    expected = {f"fused_attention/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert expected <= names
    assert not any(name.startswith(tuple(f"{folder}/" for folder in FOLDERS)) for name in names)
    script = "import fused_attention as f, torch; print(f.explain(*[torch.zeros(1, 1, 4, 8)] * 3).backend, f.__file__)"
    environment = {"PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    backend, file = run.stdout.split()
    assert backend == "cpu"
    assert file.startswith(str(tmp_path))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_a_source_distribution_has_all_that_the_build_reads(tmp_path: Path) -> None:
    archive = tmp_path / "source.tar"
    subprocess.run(["git", "archive", "--format=tar", f"--output={archive}", "HEAD"], cwd=ROOT, check=True)
    source = tmp_path / "source"
    with tarfile.open(archive) as content:
        content.extractall(source, filter="tar")
    needed = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert "csrc/cuda/instances/manifest.py" in needed
    script = "import setuptools.build_meta as b; b.build_sdist('..')"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("fused_attention-*.tar.gz")
    with tarfile.open(sdist) as content:
        held = {name.partition("/")[2] for name in content.getnames()}
    assert needed | {"setup.py", "pyproject.toml"} <= held
    assert not any(name.endswith(".pyc") for name in held)


def test_a_rebuild_compiles_only_what_changed() -> None:
    """Touching one kernel file recompiles that object alone."""
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    as_built = os.environ | {"FUSED_ATTENTION_CUDA": "1" if cuda_backend.compiled()[0].isdigit() else "0"}
    subprocess.run(build, cwd=ROOT, env=as_built, check=True, capture_output=True)
    (ROOT / "csrc/cpu/isa_base.cpp").touch()
    run = subprocess.run(build, cwd=ROOT, env=as_built, check=True, capture_output=True, text=True)
    assert "[1/2]" in run.stdout
    assert "[2/2]" in run.stdout
    assert "isa_base" in run.stdout
    assert "isa_avx2" not in run.stdout.replace("isa_avx2.cpp.o", "")


@pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is missing")
def test_an_instruction_set_shares_no_function_with_another() -> None:
    """A function that two objects define is linked once, from either: compiled for AVX-512 it would end the program elsewhere."""
    objects = sorted((ROOT / "build" / sysconfig.get_config_var("SOABI")).glob("csrc_cpu_isa_*.o"))
    assert objects
    for path in objects:
        namespace = f"fused_attention::cpu::{path.name.removeprefix('csrc_cpu_isa_').split('.')[0]}::"
        symbols = subprocess.run(["nm", "--demangle", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if line.split()[1] in "WVu" and "__gxx_personality" not in line]
        assert shared
        assert [line for line in shared if namespace not in line] == []


def test_importing_needs_only_torch() -> None:
    """The optional packages are imported where they are used."""
    script = (
        "import sys\n"
        "for name in ('sentencepiece', 'sacrebleu', 'safetensors', 'matplotlib', 'tqdm', 'triton', 'numpy'): sys.modules[name] = None\n"
        "import fused_attention, fused_attention.transformer.model, fused_attention.transformer.replace"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def modules() -> dict[str, Path]:
    """Name -> file of every module of the package."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    named = {".".join(("fused_attention", *path.relative_to(ROOT).with_suffix("").parts)): path for path in files}
    named |= {f"fused_attention.{path.stem}": path for path in (ROOT / "src/fused_attention").glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def imports(name: str, path: Path) -> set[str]:
    """What a module imports, anywhere in its file: modules, and names that may be modules."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            extension = source == "fused_attention" and [alias.name for alias in node.names] == ["_native"]
            found |= set() if extension else {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Nor inside functions, nor for type checkers alone."""
    named = modules()
    assert {"fused_attention", "fused_attention.kernels.native.cpu", "fused_attention.transformer.model"} <= named.keys()
    graph = {name: imports(name, path) & (named.keys() - {name}) for name, path in named.items()}
    assert "fused_attention.transformer.layers" in graph["fused_attention.transformer.model"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
