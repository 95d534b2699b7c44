"""The tests of the AMX kernels where there is no AMX: on an extension whose tiles are emulated in AVX-512."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from emulated_amx import can_emulate, emulation_flags

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-I", str(ROOT / "csrc")]
TESTS = [f"tests/test_{name}.py" for name in ("cpu", "cpu_features", "cpu_functions", "batch_invariance")]


@pytest.mark.skipif(not can_emulate(), reason="the machine has AMX, or lacks AVX-512")
def test_the_amx_kernels_on_emulated_tiles(tmp_path: Path) -> None:
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler: {CXX!r} was not found")
    built = ROOT / "build" / sysconfig.get_config_var("SOABI")
    objects = [path for path in sorted(built.glob("**/*.o")) if path.name != "csrc_cpu_isa_amx.cpp.o"]
    if not objects:
        pytest.skip("the extension was not built in this checkout")
    package = tmp_path / "fused_attention"
    package.mkdir()
    for path in (ROOT / "src/fused_attention").iterdir():
        if not path.name.startswith("_native."):
            (package / path.name).symlink_to(path)
    emulated = tmp_path / "isa_amx.o"
    source = ROOT / "csrc/cpu/isa_amx.cpp"
    subprocess.run([CXX, *FLAGS, *emulation_flags(source), "-c", source, "-o", emulated], check=True)
    target = package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([CXX, "-shared", "-fopenmp", "-Wl,--exclude-libs,ALL", *objects, emulated, "-ldl", "-o", target], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "amx and bfloat16", *TESTS]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout
    assert "no amx" not in run.stdout
