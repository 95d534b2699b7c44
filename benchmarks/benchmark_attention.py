"""attention(): 4,096 tokens of 512 channels in all, from 64 sequences of 64 to one of 4,096, and longer ones alone."""

from __future__ import annotations

from functools import partial

from fused_attention.benchmarks.attention_case import DTYPES, LAYOUTS, PASSES, Case, Shape, gflop, grid, threads_to_measure
from fused_attention.benchmarks.yardsticks import product

TOKENS, CHANNELS = 4096, 512
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)


def is_quick(kind, length, head_dim, layout, threads, dtype, measure):
    """All lengths up to 4,096 in float32 on one thread; a few of everything else."""
    if length > 4096 or head_dim == 256:
        return False
    if (kind, head_dim, layout, threads, dtype) == ("full", 64, "BLHD", 1, "fp32"):
        return True
    changed = [kind != "full", head_dim != 64, layout != "BLHD", threads != 1, dtype != "fp32"]
    return sum(changed) == 1 and length in (128, 512, 2048)


def is_included(kind, length, head_dim, layout, threads, dtype, measure):
    return kind == "full" or layout == "BLHD"


AXES = {
    "kind": ("full", "causal"),
    "length": LENGTHS,
    "head_dim": HEAD_DIMS,
    "layout": LAYOUTS,
    "threads": threads_to_measure(),
    "dtype": tuple(DTYPES),
    "measure": tuple(PASSES),
}


def shape_of(length: int, head_dim: int) -> Shape:
    return Shape(max(1, TOKENS // length), CHANNELS // head_dim, length, length, head_dim)


@grid(AXES, is_quick, is_included)
def test_attention(measure_cell, kind, length, head_dim, layout, threads, dtype, measure):
    shape = shape_of(length, head_dim)
    case = Case(shape, DTYPES[dtype], layout, PASSES[measure], threads, is_causal=kind == "causal")
    measure_cell(
        case.sides(flex=length in (128, 512, 2048)),
        check=case.check,
        suite="attention",
        case={
            "tokens": str(length),
            "head dim": str(head_dim),
            "batch x heads": f"{shape.batch} x {shape.heads}",
            "mask": kind,
            "layout": layout,
            "threads": str(threads),
            "dtype": dtype,
        },
        kind=case.measure,
        work=gflop(shape, case.measure, 0.5 if kind == "causal" else 1.0),
        unit="GFLOP/s",
        traffic=case.traffic(),
        yardstick=partial(product, DTYPES[dtype]),
        threads=threads,
    )
