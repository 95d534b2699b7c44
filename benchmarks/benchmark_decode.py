"""attention_decode(): one query for each sequence against a long cache, which is read once. Peers get the cache as keys and values."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fused_attention.benchmarks.attention_case import DTYPES, FORWARD, LAYOUTS, Case, Shape, grid, threads_to_measure
from fused_attention.benchmarks.cell import OURS
from fused_attention.benchmarks.yardsticks import copy
from fused_attention.kernels.attention import attention_decode

HEADS, HEAD_DIM = 8, 64


def is_quick(batch, length, layout, threads, dtype):
    return dtype == "fp32" and (length == 4096 or batch == 8) and (threads == 1 or batch in (1, 64)) and (layout == "BHLD" or batch == 8)


AXES = {
    "batch": (1, 8, 64),
    "length": (512, 4096, 16384),
    "layout": LAYOUTS,
    "threads": threads_to_measure(),
    "dtype": tuple(DTYPES),
}


@grid(AXES, is_quick, lambda batch, length, **_: batch * length <= 2**18)
def test_decode(measure_cell, batch, length, layout, threads, dtype):
    case = Case(Shape(batch, HEADS, 1, length, HEAD_DIM), DTYPES[dtype], layout, FORWARD, threads)
    lengths = torch.full((batch,), length, dtype=torch.int32)
    sides = case.sides(flex=False)

    def decode(place: int) -> Tensor:
        query, key, value, *_ = case.calls.inputs[place]
        out = attention_decode(query, key, value, lengths)
        assert isinstance(out, Tensor)
        return out

    sides[OURS] = case.through_all([partial(decode, place) for place in range(len(case.calls.inputs))])
    gigabytes = 2e-9 * batch * HEADS * length * HEAD_DIM * DTYPES[dtype].itemsize
    measure_cell(
        sides,
        check=case.check,
        suite="decode",
        case={"batch": str(batch), "cache": str(length), "heads": str(HEADS), "layout": layout, "threads": str(threads), "dtype": dtype},
        kind=FORWARD,
        work=gigabytes,
        unit="GB/s",
        traffic=gigabytes,
        gflop=4e-9 * batch * HEADS * length * HEAD_DIM,
        yardstick=copy,
        threads=threads,
    )
