"""Every header of csrc/cpu includes what it needs: it compiles by itself, for an instruction set that has all of it."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from emulator.build import CXX

CPU = Path(__file__).resolve().parents[1] / "csrc/cpu"
pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets are those of x86-64")

AVX2 = ["-DFA_ISA=avx2", "-DFA_LANES=8", "-mavx2", "-mfma", "-mf16c"]
AMX = ["-DFA_ISA=amx", "-DFA_AVX512", "-march=sapphirerapids"]


@pytest.mark.parametrize("header", sorted(path.name for path in CPU.glob("*.h")))
def test_a_header_includes_what_it_needs(header: str) -> None:
    """What isa_*.cpp include before the target pragma is there: a header could not include it itself."""
    flags = AMX if header.startswith(("amx_", "bf16_", "dot_product_")) else AVX2
    command = [CXX, "-std=c++17", "-fsyntax-only", "-include", "immintrin.h", *flags, "-x", "c++", CPU / header]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
