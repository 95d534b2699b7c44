"""The AMX kernels on a machine that has AVX-512 only: how to compile them with the tiles of emulated_amx.h."""

from __future__ import annotations

from pathlib import Path

from fused_attention.kernels.native import cpu

HEADER = Path(__file__).with_suffix(".h")


def can_emulate() -> bool:
    """Whether this machine has what the emulation is made of, and not the tiles themselves."""
    if cpu.status() is not None:
        return False
    available = cpu.instruction_sets()[1]
    return "avx512" in available and "amx" not in available


def emulation_flags(source: Path) -> list[str]:
    """Compiler flags for a source file of csrc/cpu."""
    return ["-include", str(HEADER), "-Wno-unused-variable"] if source.stem == "isa_amx" and can_emulate() else []
