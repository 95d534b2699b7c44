"""Pairs of feature, head dims, dtype, sequence lengths and memory order that the Triton kernels must all take, and any call at all."""

from __future__ import annotations

import random
from itertools import combinations, product
from typing import Any

import pytest
from attention_calls import DTYPES, MEMORY, calls, check_call
from hypothesis import HealthCheck, Phase, given, note, settings

from fused_attention.kernels import triton_backend

# Below, at and between multiples of 16, powers of two and not; value head dims below and above those of query and key.
HEAD_DIMS = [(d, d) for d in (1, 16, 24, 40, 59, 64, 72, 96, 128, 256)] + [(192, 128), (40, 200), (64, 8)]
# Around the tiles' sides: 32 and 64 in the interpreter, up to 128 on a GPU, where several of them are cheap too.
SEQLENS = (1, 31, 33, 67) if triton_backend.interpreted() else (1, 31, 33, 63, 65, 127, 129, 400, 1030)
FEATURES: dict[str, dict[str, Any]] = {
    "full": {"lse_gradient": True},
    "causal": {"is_causal": "top_left"},
    "causal bottom-right": {"is_causal": "bottom_right"},
    "window": {"window": (9, 4), "is_causal": "bottom_right"},
    "key_mask": {"key_mask": "holes", "is_causal": "top_left"},
    "lengths": {"key_lengths": (50, 20), "query_lengths": (30, 60)},
    "bool mask": {"attn_mask": ("bool", "B1QK")},
    "float mask": {"attn_mask": ("float32", "1HQK")},
    "float mask per key": {"attn_mask": ("float16", "B11K"), "key_mask": "right"},
    "dropout": {"dropout_p": 0.25, "is_causal": "bottom_right"},
    "softcap": {"softcap": 1.5, "key_mask": "left"},
    "alibi": {"alibi_slopes": "BH"},
    "sinks": {"sinks": True},
    "prepared mask": {"attn_mask": ("bool", "1HQK"), "key_mask": "right", "is_causal": "top_left", "prepare": True},
    "grouped heads": {"sizes": (1, 2, 1), "key_lengths": (50,)},
}


def pairwise(*axes: list) -> list[tuple]:
    """Few rows that hold, for any two axes, every pair of their values: greedily, the best of some random rows at a time."""
    chance = random.Random(0)
    pairs = {(a, x, b, y) for a, b in combinations(range(len(axes)), 2) for x, y in product(range(len(axes[a])), range(len(axes[b])))}
    rows = []
    while pairs:
        a, x, b, y = min(pairs)
        candidates = [[chance.randrange(len(axis)) for axis in axes] for _ in range(30)]
        for row in candidates:
            row[a], row[b] = x, y
        covered = [{(i, row[i], j, row[j]) for i, j in combinations(range(len(axes)), 2)} & pairs for row in candidates]
        best = max(range(len(candidates)), key=lambda index: len(covered[index]))
        pairs -= covered[best]
        rows.append(tuple(axis[index] for axis, index in zip(axes, candidates[best], strict=True)))
    return rows


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
