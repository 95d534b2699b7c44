"""attention() with masks: padding at several densities, bool masks, a float bias of every broadcast shape with and without its gradient,
and dropout, which most engines compute in several passes over memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fused_attention.benchmarks.attention_case import BOTH, DTYPES, LAYOUTS, PASSES, Case, Shape, gflop, grid, threads_to_measure
from fused_attention.benchmarks.yardsticks import product

SHAPES = {64: Shape(32, 8, 64, 64, 64), 512: Shape(4, 8, 512, 512, 64), 2048: Shape(1, 8, 2048, 2048, 64)}
PADDING = {"padding 10 %": 0.1, "padding 50 %": 0.5, "padding 90 %": 0.9}  # the part of the keys that is absent
BROADCAST = {"1,1": (False, False), "B,1": (True, False), "1,H": (False, True), "B,H": (True, True)}  # shapes of a bias before (Lq, Lk)
MASKS = (
    *PADDING,
    "bool 50 %",
    "bool band",
    *(f"bias {shape}" for shape in BROADCAST),
    "bias of keys",
    *(f"bias gradient {shape}" for shape in BROADCAST),
    "dropout",
)
DROPOUT_P = 0.1


def options_of(mask: str, shape: Shape) -> dict[str, Any]:
    """What Case takes."""
    batch, heads, seqlen_q, seqlen_k, _ = shape
    generator = torch.Generator().manual_seed(1)
    if mask in PADDING:  # on average, evenly spread around it
        mean = (1 - PADDING[mask]) * seqlen_k
        reach = min(mean, seqlen_k - mean)
        lengths = torch.linspace(mean - reach, mean + reach, batch) if batch > 1 else torch.tensor([mean])
        return {"key_lengths": lengths.round().clamp(2, seqlen_k).int()}
    if mask == "bool 50 %":
        allowed = torch.rand(1, 1, seqlen_q, seqlen_k, generator=generator) < 0.5
        allowed[..., 0] = True  # every query attends to something: others give NaN
        return {"mask": allowed}
    if mask == "bool band":  # every query sees the keys around it
        distance = (torch.arange(seqlen_q)[:, None] - torch.arange(seqlen_k)).abs()
        return {"mask": (distance <= seqlen_k // 8)[None, None]}
    if mask == "bias of keys":
        return {"bias": torch.randn(batch, 1, 1, seqlen_k, generator=generator)}
    if mask.startswith("bias"):
        of_batch, of_heads = BROADCAST[mask.split()[-1]]
        bias = torch.randn(batch if of_batch else 1, heads if of_heads else 1, seqlen_q, seqlen_k, generator=generator)
        return {"bias": bias, "bias_gradient": "gradient" in mask}
    return {"dropout_p": DROPOUT_P}


def is_quick(mask, length, layout, threads, dtype, measure):
    return (length, layout, threads, dtype) == (512, "BLHD", 1, "fp32") and mask not in ("padding 10 %", "bias 1,H", "bias B,H")


def is_included(mask, measure, length, **_):
    of_gradient = "gradient" in mask
    return (measure == "both" or not of_gradient) and not (mask == "bias of keys" and length == 64)


AXES = {
    "mask": MASKS,
    "length": tuple(SHAPES),
    "layout": LAYOUTS[:1],
    "threads": threads_to_measure(),
    "dtype": tuple(DTYPES),
    "measure": tuple(PASSES),
}


@grid(AXES, is_quick, is_included)
def test_masks(measure_cell, mask, length, layout, threads, dtype, measure):
    shape = SHAPES[length]
    case = Case(shape, DTYPES[dtype], layout, PASSES[measure], threads, **options_of(mask, shape))
    measure_cell(
        case.sides(flex=mask in ("bool band", "bias 1,1", "padding 50 %")),
        check=case.check,
        suite="masks",
        case={
            "mask": mask,
            "tokens": str(length),
            "batch x heads": f"{shape.batch} x {shape.heads}",
            "threads": str(threads),
            "dtype": dtype,
        },
        kind=case.measure,
        work=gflop(shape, case.measure),  # as if nothing were masked
        unit="GFLOP/s",
        yardstick=partial(product, DTYPES[dtype]),
        threads=threads,
        bars={"torch": 3.0} if mask == "dropout" and case.measure == BOTH else None,
    )
