"""attention_with_weights(): out and the weights averaged over the heads, which other engines only give from separate products."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_attention.benchmarks.attention_case import DTYPES, ERROR_LIMITS, FORWARD, Shape, gflop, grid, threads_to_measure
from fused_attention.benchmarks.cell import OURS
from fused_attention.benchmarks.yardsticks import product
from fused_attention.kernels.attention import attention_with_weights

HEADS, HEAD_DIM = 8, 64
BATCHES = {64: 32, 128: 32, 256: 16, 512: 8}  # by length


def is_quick(length, threads, dtype):
    return dtype == "fp32" and threads == 1


AXES = {"length": tuple(BATCHES), "threads": threads_to_measure(), "dtype": tuple(DTYPES)}


@grid(AXES, is_quick)
def test_weights(measure_cell, length, threads, dtype):
    torch.manual_seed(0)
    shape = Shape(BATCHES[length], HEADS, length, length, HEAD_DIM)
    qkv = torch.randn(shape.batch, length, 3, HEADS, HEAD_DIM).to(DTYPES[dtype])

    def ours() -> tuple[Tensor, Tensor]:
        out, weights = attention_with_weights("qkv", (qkv,), average_heads=True)
        return out, weights

    def products(packed: Tensor) -> tuple[Tensor, Tensor]:
        """As in torch.nn.functional.multi_head_attention_forward."""
        query, key, value = packed.permute(2, 0, 3, 1, 4).flatten(1, 2)
        weights = torch.softmax(torch.bmm(query * HEAD_DIM**-0.5, key.transpose(1, 2)), -1)
        out = torch.bmm(weights, value).unflatten(0, (-1, HEADS))
        return out, weights.unflatten(0, (-1, HEADS)).mean(1)

    exact = products(qkv[-1:].double())

    def check(side: str, results: Any) -> None:
        for found, wanted in zip(results, exact, strict=True):
            error = (found[-1:].double() - wanted).abs().max() / wanted.abs().max()
            assert error <= ERROR_LIMITS[DTYPES[dtype]], f"differs from float64 by {error:.1e} of the largest element"

    measure_cell(
        {OURS: torch.no_grad()(ours), "torch": torch.no_grad()(partial(products, qkv))},
        check=check,
        suite="weights",
        case={"tokens": str(length), "batch x heads": f"{shape.batch} x {HEADS}", "threads": str(threads), "dtype": dtype},
        kind=FORWARD,
        work=gflop(shape, FORWARD),
        unit="GFLOP/s",
        yardstick=partial(product, DTYPES[dtype]),
        threads=threads,
        bars={"torch": 2.0} if dtype == "fp32" else None,
    )
