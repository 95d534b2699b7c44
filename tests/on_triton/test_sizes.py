"""Pairs of feature, head dims, dtype, sequence lengths and memory order that the Triton kernels must all take, and any call at all."""

from __future__ import annotations

from typing import Any

import pytest
from attention_calls import DTYPES, MEMORY, calls, check_call
from covering_array import FEATURES, pairwise
from hypothesis import HealthCheck, Phase, given, note, settings

from fused_attention.kernels.triton import backend as triton_backend

# Below, at and between multiples of 16, powers of two and not; value head dims below and above those of query and key.
HEAD_DIMS = [(d, d) for d in (1, 16, 24, 40, 59, 64, 72, 96, 128, 256)] + [(192, 128), (40, 200), (64, 8)]
# Around the tiles' sides: 32 and 64 in the interpreter, up to 128 on a GPU, where several of them are cheap too.
SEQLENS = (1, 31, 33, 67) if triton_backend.interpreted() else (1, 31, 33, 63, 65, 127, 129, 400, 1030)
CASES = pairwise(list(FEATURES), HEAD_DIMS, list(DTYPES), list(SEQLENS), list(SEQLENS), list(MEMORY), list(MEMORY))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_pairs_of_feature_head_dim_dtype_size_and_memory(case: tuple, device: str) -> None:
    feature, head_dims, dtype, seqlen_q, seqlen_k, memory_q, memory_kv = case
    call = {"dtype": dtype, "seqlens": (seqlen_q, seqlen_k), "head_dims": head_dims, "memory": (memory_q, memory_kv, memory_kv, memory_q)}
    check_call(triton_backend, call | FEATURES[feature], device)


@settings(
    max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate],  # shrinking a failure would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(call=calls(SEQLENS, HEAD_DIMS))
def test_any_call(device: str, call: dict[str, Any]) -> None:
    note(f"reproduce: check_call(triton_backend, {call}, {device!r})")
    check_call(triton_backend, call, device)
