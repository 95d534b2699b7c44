"""attention() of few queries to many keys, and of many queries to few keys."""

from __future__ import annotations

from functools import partial

from fused_attention.benchmarks.attention_case import DTYPES, LAYOUTS, PASSES, Case, Shape, gflop, grid, threads_to_measure
from fused_attention.benchmarks.yardsticks import product

SIZES = {(32, 128): 16, (32, 512): 8, (128, 1024): 4, (512, 64): 8, (2048, 77): 2}  # (seqlen_q, seqlen_k) -> batch


def is_quick(size, layout, threads, dtype, measure):
    return (threads, dtype) == (1, "fp32") and size != (32, 512)


AXES = {"size": tuple(SIZES), "layout": LAYOUTS[:1], "threads": threads_to_measure(), "dtype": tuple(DTYPES), "measure": tuple(PASSES)}


@grid(AXES, is_quick)
def test_cross(measure_cell, size, layout, threads, dtype, measure):
    shape = Shape(SIZES[size], 8, size[0], size[1], 64)
    case = Case(shape, DTYPES[dtype], layout, PASSES[measure], threads)
    measure_cell(
        case.sides(flex=size == (128, 1024)),
        check=case.check,
        suite="cross",
        case={"queries x keys": f"{size[0]} x {size[1]}", "batch x heads": f"{shape.batch} x 8", "threads": str(threads), "dtype": dtype},
        kind=case.measure,
        work=gflop(shape, case.measure),
        unit="GFLOP/s",
        traffic=case.traffic(),
        yardstick=partial(product, DTYPES[dtype]),
        threads=threads,
    )
