"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a C++ program without Python.

cpu_kernels_driver.cpp runs forward, backward and weights of every instruction set of this machine (AMX and AVX512-BF16 emulated where
AVX-512 is all there is) and every dtype on odd shapes with every feature, strided buffers and empty sizes, and compares them with double
loops. Nothing is optimized, which compiles in half the time and leaves every access to the sanitizers.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from compiled import CXX, compiled
from emulated_bf16 import bf16_flags, bf16_sets

from fused_attention.kernels.native import cpu

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/sanitizers"
SANITIZERS = "-fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all"
INSTRUCTION_SETS = cpu.instruction_sets()[1] if cpu.status() is None else None  # None: the driver finds them


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler: {CXX!r} was not found")
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}\n")
    command = [CXX, *SANITIZERS.split(), folder / "empty.cpp", "-o", folder / "empty"]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip(f"{CXX} cannot link with -fsanitize=address,undefined (the sanitizer libraries are not installed)")
    x86_64 = os.uname().machine == "x86_64"
    without_avx512 = x86_64 and INSTRUCTION_SETS is not None and "avx512" not in INSTRUCTION_SETS
    left_out = ("isa_avx512", "isa_avx512_bf16", "isa_amx", "isa_amx_bf16x3") if without_avx512 else ()
    kernels = [path for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if x86_64 or path.stem in ("dispatch", "isa_base")]
    sources = {path: " ".join(["-O0", SANITIZERS, *bf16_flags(path)]) for path in kernels if path.stem not in left_out}
    # Last: of an inline function that both have, the linker takes the kernels' copy, which has the checks.
    sources[ROOT / "tests/cpu_kernels_driver.cpp"] = "-O1 -fopenmp" + " -DWITHOUT_AVX512" * without_avx512
    return compiled(BUILD / "driver", sources, f"-std=c++17 -g1 -I{ROOT / 'csrc'}", SANITIZERS)


def test_kernels_are_clean_under_sanitizers(driver: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment.pop("LD_PRELOAD", None)  # ASan must be the first library
    result = subprocess.run([driver], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    finished = {line.split(" ok: ")[0] for line in result.stdout.splitlines() if " ok: " in line}
    assert finished >= {"base", *(INSTRUCTION_SETS or ()), *bf16_sets()}, result.stdout
