"""The tests of the bfloat16 kernels in an extension that emulates what this machine lacks, and leaves no size to other kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from emulated_bf16 import AVAILABLE, bf16_flags, bf16_sets

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-I", str(ROOT / "csrc")]
TESTS = [f"tests/test_{name}.py" for name in ("cpu", "cpu_features", "cpu_functions", "batch_invariance", "bf16x3")]


@pytest.mark.skipif(not bf16_sets(), reason="the machine lacks AVX-512")
@pytest.mark.parametrize("isa", bf16_sets())
def test_bfloat16_kernels(isa: str, tmp_path: Path) -> None:
    if isa == "amx" and "amx" in AVAILABLE:
        pytest.skip("the machine has AMX, whose kernels take any size")
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler: {CXX!r} was not found")
    built = ROOT / "build" / sysconfig.get_config_var("SOABI")
    sources = [path for path in (ROOT / "csrc/cpu").glob("isa_*.cpp") if path.stem in (f"isa_{isa}", f"isa_{isa}_bf16x3")]
    built_without = {f"csrc_cpu_{source.name}.o" for source in sources}
    objects = [path for path in sorted(built.glob("**/*.o")) if path.name not in built_without]
    if not objects:
        pytest.skip("the extension was not built in this checkout")
    package = tmp_path / "fused_attention"
    package.mkdir()
    for path in (ROOT / "src/fused_attention").iterdir():
        if not path.name.startswith("_native."):
            (package / path.name).symlink_to(path)
    for source in sources:
        objects.append(tmp_path / f"{source.stem}.o")
        subprocess.run([CXX, *FLAGS, *bf16_flags(source), "-c", source, "-o", objects[-1]], check=True)
    target = package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([CXX, "-shared", "-fopenmp", "-Wl,--exclude-libs,ALL", *objects, "-ldl", "-o", target], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"{isa} and (bfloat16 or bf16x3)", *TESTS]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout
    assert f"no {isa}" not in run.stdout
