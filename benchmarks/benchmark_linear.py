"""Linear layers of few rows, as in decoding, on one thread; the weights are more than a cache holds, as those of a decoder are."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fused_attention.kernels.native.linear import linear

pytestmark = pytest.mark.full
WEIGHT_BYTES = 120e6  # that a call goes through


@pytest.mark.parametrize("rows", [1, 4, 8, 32, 64])
@pytest.mark.parametrize("size", [(512, 32000), (512, 2048), (2048, 512), (512, 512)], ids=str)
def test_linear(compare, size, rows):
    in_features, out_features = size
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(WEIGHT_BYTES / (4 * in_features * out_features)))
    weights = [torch.randn(out_features, in_features, generator=generator) for _ in range(count)]
    x, bias = torch.randn(rows, in_features, generator=generator), torch.randn(out_features, generator=generator)

    def check() -> None:
        torch.testing.assert_close(linear(x, weights[0], bias), F.linear(x, weights[0], bias), rtol=1e-4, atol=1e-3)

    compare(
        lambda: [linear(x, weight, bias) for weight in weights],
        lambda: [F.linear(x, weight, bias) for weight in weights],
        check=check,
        group="linear layers without gradients, float32, 120 MB of weights a round",
        case={"layer": f"{in_features} -> {out_features}", "rows": str(rows)},
        measure="forward",
        threads=1,
    )
