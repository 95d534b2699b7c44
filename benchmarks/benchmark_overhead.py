"""What a call costs the host: attention of a head of one token, a thousand calls, in which the kernel itself is half a microsecond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fused_attention.benchmarks.attention_case import grid
from fused_attention.benchmarks.cell import OURS
from fused_attention.kernels.attention import attention

CALLS = 1000
CASES = ("plain", "causal", "gradient")


@grid({"case": CASES}, lambda case: True)
def test_overhead(measure_cell, case):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 1, 32).requires_grad_(case == "gradient") for _ in range(3))
    options = {"is_causal": case == "causal"}

    def repeated(function: Callable[..., Any]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for _ in range(CALLS):
                out = function(query, key, value, **options)
            return out

        return run if case == "gradient" else torch.no_grad()(run)

    def check(side: str, out: Tensor) -> None:
        assert torch.allclose(out, value, rtol=1e-6), "the only key's weight is not 1"

    measure_cell(
        {OURS: repeated(attention), "torch": repeated(scaled_dot_product_attention)},
        check=check,
        suite="overhead: milliseconds of 1,000 calls, or microseconds of one",
        case={"call": case},
        kind="forward",
        threads=1,
    )
