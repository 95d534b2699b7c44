"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a C++ program without Python.

cpu_kernels_driver.cpp runs forward, backward and weights of every instruction set of this machine (AMX emulated where AVX-512 is all
there is) and every dtype on odd shapes with every feature, strided buffers and empty sizes, and compares them with double loops.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulated_amx import emulation_flags

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-I", str(ROOT / "csrc")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler: {CXX!r} was not found")
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}\n")
    if subprocess.run([CXX, *FLAGS, folder / "empty.cpp", "-o", folder / "empty"], capture_output=True).returncode != 0:
        pytest.skip(f"{CXX} cannot link with -fsanitize=address,undefined (the sanitizer libraries are not installed)")
    x86_64 = os.uname().machine == "x86_64"
    sources = [path for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if x86_64 or path.stem in ("dispatch", "isa_base")]
    sources.append(ROOT / "tests/cpu_kernels_driver.cpp")

    def compile_source(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([CXX, *FLAGS, *emulation_flags(source), "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, sources))
    subprocess.run([CXX, *FLAGS, *objects, "-o", folder / "driver"], check=True)
    return folder / "driver"


def test_kernels_are_clean_under_sanitizers(driver: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment.pop("LD_PRELOAD", None)  # ASan must be the first library
    result = subprocess.run([driver], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    finished = [line.split(" ok: ")[0] for line in result.stdout.splitlines() if " ok: " in line]
    assert "base" in finished, result.stdout
