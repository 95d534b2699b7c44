"""Pairs of feature, head dims, dtype, sequence lengths and memory order that the Triton kernels must all take, and any call at all."""

from __future__ import annotations

from typing import Any

import pytest
from attention_calls import DTYPES, MEMORY, check_call
from covering_array import FEATURES, pairwise
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from fused_attention.kernels import triton_backend

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


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Any fields of attention_calls.CALL."""
    batch, heads_per_group, num_heads_kv = draw(st.sampled_from(((0, 1, 1), (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 1, 1))))
    lengths = st.none() | st.tuples(*[st.integers(-1, 70)] * 3)
    side = st.none() | st.integers(0, 70)
    mask_kinds = st.tuples(
        st.sampled_from(("bool", "float32", "bfloat16", "float16", "float64")),
        st.tuples(*[st.sampled_from(("1", name)) for name in "BHQK"]).map("".join),
    )
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "sizes": (batch, heads_per_group * num_heads_kv, num_heads_kv),
        "seqlens": (draw(st.sampled_from((0, *SEQLENS))), draw(st.sampled_from((0, *SEQLENS)))),
        "head_dims": draw(st.sampled_from(HEAD_DIMS)),
        "memory": draw(st.tuples(*[st.sampled_from(MEMORY)] * 4)),
        "is_causal": draw(st.sampled_from((False, "top_left", "bottom_right"))),
        "window": draw(st.none() | st.tuples(side, side)),
        "attn_mask": draw(st.none() | mask_kinds),
        "key_mask": draw(st.sampled_from((None, None, "right", "left", "holes", "nothing in one"))),
        "key_lengths": draw(lengths),
        "query_lengths": draw(lengths),
        "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.25, 1.0))),
        "scale": draw(st.sampled_from((None, 0.05, 0.3))),
        "softcap": draw(st.sampled_from((None, None, 0.5, 20.0))),
        "alibi_slopes": draw(st.sampled_from((None, None, "H", "BH"))),
        "sinks": draw(st.booleans()),
        "lse_gradient": draw(st.booleans()),
        "prepare": draw(st.sampled_from((False, False, True))),
        "seed": draw(st.integers(0, 2**20)),
    }


@settings(
    max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate],  # shrinking a failure would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(call=calls())
def test_any_call(device: str, call: dict[str, Any]) -> None:
    note(f"reproduce: check_call(triton_backend, {call}, {device!r})")
    check_call(triton_backend, call, device)
