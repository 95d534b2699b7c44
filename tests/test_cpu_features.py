"""Every feature of the CPU kernels, forward and backward, in every dtype, on every instruction set, under the accuracy rule."""

from __future__ import annotations

import pytest
import torch
from attention_calls import DTYPES, FEATURES, check_call

from fused_attention.kernels.native import cpu

pytestmark = [
    pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, dtype: torch.dtype, instruction_set: str) -> None:
    check_call(cpu, FEATURES[feature] | {"dtype": dtype}, "cpu")


@pytest.mark.parametrize(("seqlens", "heads"), [((1, 600), (4, 4)), ((2, 75), (6, 2))], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature_with_few_rows(feature: str, seqlens: tuple[int, int], heads: tuple[int, int], instruction_set: str) -> None:
    """Several heads share a task then; 600 keys are more than one block."""
    batch = FEATURES[feature].get("sizes", (2,))[0]
    dtype = DTYPES[(batch + heads[0] + len(feature)) % len(DTYPES)]
    check_call(cpu, FEATURES[feature] | {"dtype": dtype, "seqlens": seqlens, "sizes": (batch, *heads)}, "cpu")


@pytest.mark.parametrize(
    "feature",
    ["full", "key_mask holes", "float mask", "prepared bool mask", "dropout and a float mask", "alibi", "softcap", "grouped heads"],
)
def test_backward_of_many_rows(feature: str, instruction_set: str) -> None:
    """Q, dout and dQ take more than a level-2 cache then, and blocks of rows meet three blocks of keys in turn; 230 keys are four."""
    call = FEATURES[feature] | {"is_causal": False, "sizes": (1, 2, 1) if feature == "grouped heads" else (1, 1, 1)}
    dtype = DTYPES[len(feature) % len(DTYPES)]
    check_call(cpu, call | {"dtype": dtype, "seqlens": (2900, 230), "head_dims": (128, 112)}, "cpu")
