"""Pairs of feature, head dims, dtype, sequence lengths and memory order that the CUDA forward must all take, in the emulator."""

from __future__ import annotations

import cuda_emulation
import pytest
import torch
from attention_calls import MEMORY
from covering_array import FEATURES, pairwise
from cuda_emulation import SMALL, check_call

pytestmark = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))

# Those of the instances and between them, value head dims below and above those of query and key; docs/support.md says what is not taken.
HEAD_DIMS = [(d, d) for d in (8, 32, 40, 64, 72, 128, 256)] + [(192, 128), (40, 200), (64, 8)]
DTYPES = (torch.bfloat16, torch.float16)
SEQLENS = (1, 31, 65, 129)  # one row, which is decoded; below and above a tile's 64 keys, above 128 rows
ALIGNED = [memory for memory in MEMORY if memory != "unaligned slices"]
CASES = pairwise(list(FEATURES), HEAD_DIMS, list(DTYPES), list(SEQLENS), list(SEQLENS), ALIGNED, ALIGNED)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_pairs_of_feature_head_dim_dtype_size_and_memory(case: tuple) -> None:
    """`check` asserts that unsupported_reasons is empty."""
    feature, head_dims, dtype, seqlen_q, seqlen_k, memory_q, memory_kv = case
    call = {"dtype": dtype, "seqlens": (seqlen_q, seqlen_k), "head_dims": head_dims, "memory": (memory_q, memory_kv, memory_kv, memory_q)}
    check_call(call | FEATURES[feature], schedule=sum(map(ord, str(case))) % 3, gpu=SMALL)
