"""How tests compile the bfloat16 kernels: with emulated_bf16.h for what a machine with AVX-512 lacks, and for problems of any size."""

from __future__ import annotations

from pathlib import Path

from fused_attention.kernels.native import cpu

HEADER = Path(__file__).with_suffix(".h")
AVAILABLE = cpu.instruction_sets()[1] if cpu.status() is None else []


def bf16_sets() -> list[str]:
    """The instruction sets with kernels for bfloat16 alone, which this machine has or can emulate."""
    return ["amx", "avx512_bf16"] if "avx512" in AVAILABLE else []


def bf16_flags(source: Path) -> list[str]:
    """Compiler flags for a source file of csrc/cpu."""
    isa = source.stem.removeprefix("isa_").removesuffix("_bf16x3")
    if isa not in bf16_sets():
        return []
    any_size = ["-DFA_MOST_PADDING=1e9"]  # small and odd problems, too, are not left to other kernels
    return any_size if isa in AVAILABLE else [*any_size, "-include", str(HEADER), "-Wno-unused-variable"]
