"""Every feature of the Triton kernels, forward and backward, in every dtype, under the accuracy rule."""

from __future__ import annotations

import pytest
import torch
from attention_calls import DTYPES, FEATURES, check_call

from fused_attention.kernels.triton import backend as triton_backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, dtype: torch.dtype, device: str) -> None:
    check_call(triton_backend, FEATURES[feature] | {"dtype": dtype}, device)
