"""Restricting every engine to an instruction set, so that a newer processor also measures what an older one runs.

The libraries read these variables when they load: they must be set before torch is imported, in a new process.
"""

from __future__ import annotations

import os

OUR_VARIABLE = "FUSED_ATTENTION_CPU_ISA"
# Of ours -> of torch, of MKL, of oneDNN (torch's and OpenVINO's, whose own generated code asks it too) and of numpy's OpenBLAS.
INSTRUCTION_SETS = {
    "avx2": ("avx2", "AVX2", "AVX2", "Haswell"),
    "avx512": ("avx512", "AVX512", "AVX512_CORE", "SkylakeX"),
    "avx512_bf16": ("avx512", "AVX512", "AVX512_CORE_BF16", "Cooperlake"),
    "amx": ("avx512", "AVX512", "AVX512_CORE_AMX", "SapphireRapids"),
}
UNRESTRICTED = ("onnxruntime",)  # peers that choose by the processor alone


def environment(isa: str) -> dict[str, str]:
    torch, mkl, onednn, openblas = INSTRUCTION_SETS[isa]
    return {
        OUR_VARIABLE: isa,
        "ATEN_CPU_CAPABILITY": torch,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "OPENBLAS_CORETYPE": openblas,
    }


def reason_against(peer: str, available: list[str]) -> str | None:
    """Why a peer cannot be restricted as this process is. available: what ours can run on this processor, best first."""
    isa = os.environ.get(OUR_VARIABLE)
    if isa is None or isa == available[0] or peer not in UNRESTRICTED:
        return None
    return f"chooses its instructions by the processor alone, and cannot be kept to {isa}"
