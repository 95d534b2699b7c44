"""The CUDA decoding kernels in the emulator: few query rows, keys split over warps and blocks, against the accuracy rule."""

from __future__ import annotations

from typing import Any

import cuda_emulation
import pytest
import torch
from cuda_emulation import A100, SMALL, EmulatedGpu, check, check_call

from csrc.cuda.instances.manifest import INSTANCES, Instance
from fused_attention import attention, attention_decode
from fused_attention.kernels.checks import make_problem

pytestmark = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DECODE = [row for row in INSTANCES if row.pass_name == "decode"]
SPLIT, WHOLE = A100, SMALL._replace(multiprocessors=1)  # many processors share the keys of few blocks, one does not

FEATURES: dict[str, dict[str, Any]] = {
    "full": {"is_causal": False},
    "causal": {},
    "causal behind 130 keys": {"is_causal": True, "diagonal": 130},
    "diagonal before the keys, alibi": {"is_causal": False, "diagonal": -5, "alibi_slopes": "H"},
    "key_lengths": {"key_lengths": (700, 3)},
    "key_lengths zero, too long": {"key_lengths": (0, 2000)},
    "key_mask": {"key_mask": "holes"},
    "key_mask nothing in one": {"key_mask": "nothing in one"},
    "window": {"window": (300, 0)},
    "window without a key of its own": {"window": (0, 0), "is_causal": "top_left", "seqlens": (3, 2)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": "BH", "key_lengths": (700, 300)},
    "sinks": {"sinks": True},
    "sinks, a batch element without keys": {"sinks": True, "key_lengths": (0, 700)},
    "everything": {"key_mask": "right", "key_lengths": (690, 500), "window": (400, 5), "softcap": 2.0, "alibi_slopes": "H", "sinks": True},
}
CALL: dict[str, Any] = {"head_dims": (32, 32), "seqlens": (3, 700), "sizes": (2, 4, 2), "is_causal": "bottom_right"}


@pytest.mark.parametrize("gpu", [SPLIT, WHOLE], ids=["split", "whole"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, dtype: str, gpu: cuda_emulation.Gpu) -> None:
    emulated = check_call(CALL | {"dtype": DTYPES[dtype]} | FEATURES[feature], schedule=len(feature + dtype) % 3, gpu=gpu)
    splits = gpu is SPLIT and "seqlens" not in FEATURES[feature]
    assert emulated.launched == [f"sm80_decode_32x32_{dtype}", *([f"combine_{dtype}"] if splits else [])]


@pytest.mark.parametrize("seqlen_k", [1, 15, 65, 131, 600])
@pytest.mark.parametrize("row", DECODE, ids=lambda row: row.name)
def test_every_instance_and_length(row: Instance, seqlen_k: int) -> None:
    call = {"dtype": DTYPES[row.dtype], "head_dims": (row.head_dim_qk, row.head_dim_v), "seqlens": (1, seqlen_k), "sizes": (2, 2, 1)}
    emulated = check_call(CALL | call, schedule=seqlen_k % 3, gpu=SPLIT)
    assert emulated.launched[0] == row.name


# Rows of the group: below, at and above the 16 of a block, the last block partly filled.
@pytest.mark.parametrize(("seqlen_q", "heads"), [(1, 1), (1, 16), (3, 5), (4, 4), (17, 1), (5, 5), (8, 8)])
@pytest.mark.parametrize("head_dims", [(40, 40), (72, 24)], ids=str)
def test_rows_of_a_group_of_heads(seqlen_q: int, heads: int, head_dims: tuple[int, int]) -> None:
    call = CALL | {"dtype": torch.bfloat16, "head_dims": head_dims, "seqlens": (seqlen_q, 200), "sizes": (1, heads, 1), "alibi_slopes": "H"}
    assert "decode" in check_call(call, gpu=SPLIT).launched[0]


def test_what_stands_past_the_lengths_never_matters() -> None:
    query, keys, values = (torch.randn(2, 2, length, 32).half() for length in (1, 300, 300))
    lengths = torch.tensor([17, 300])
    results = []
    for stored in (0.0, torch.nan, torch.inf):
        keys[0, :, 17:], values[0, :, 17:] = stored, stored
        with EmulatedGpu(gpu=SPLIT):
            results.append(attention_decode(query, keys, values, lengths, backend="cuda"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_cache_may_lie_sequence_first() -> None:
    query, keys, values = (torch.randn(length, 2, 4, 32).bfloat16().permute(1, 2, 0, 3) for length in (2, 300, 300))
    check(make_problem("separate", (query, keys, values), is_causal="bottom_right"), gpu=SPLIT)


def test_many_rows_or_dropout_go_to_the_forward_kernel() -> None:
    key = torch.randn(1, 1, 70, 32).bfloat16()
    for rows, options in (
        (65, {}),
        (4, {"dropout_p": 0.5}),
        (4, {"query_lengths": torch.tensor([3])}),
        (4, {"attn_mask": torch.zeros(4, 70)}),
    ):
        with EmulatedGpu(gpu=SPLIT) as gpu:
            attention(torch.randn(1, 1, rows, 32).bfloat16(), key, key, **options, backend="cuda")
        assert "forward" in gpu.launched[-1]
