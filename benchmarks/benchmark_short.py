"""attention() on batches of sentences, padded to the longest: the lengths are those of a corpus, and of texts of four such sentences."""

from __future__ import annotations

from functools import partial

import torch

from fused_attention.benchmarks.attention_case import DTYPES, LAYOUTS, PASSES, Case, Shape, gflop, grid, threads_to_measure
from fused_attention.benchmarks.yardsticks import product

# The words of 29,000 French sentences of Multi30k: the middles of 32 equally large classes.
WORDS = (6, 7, 7, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 11, 11, 12, 12, 12, 13, 13, 13, 14, 14, 15, 15, 16, 16, 17, 18, 19, 20, 24)
TEXTS = {"sentences": 1, "texts of 4": 4}


def is_quick(text, batch, layout, threads, dtype, measure):
    return dtype == "fp32" and (threads == 1 or batch == 128)


AXES = {
    "text": tuple(TEXTS),
    "batch": (32, 128),
    "layout": LAYOUTS[:1],
    "threads": threads_to_measure(),
    "dtype": tuple(DTYPES),
    "measure": tuple(PASSES),
}


@grid(AXES, is_quick)
def test_short(measure_cell, text, batch, layout, threads, dtype, measure):
    lengths = TEXTS[text] * torch.tensor(WORDS).repeat(batch // len(WORDS))
    lengths = lengths[torch.randperm(batch, generator=torch.Generator().manual_seed(1))].int()
    longest = int(lengths.max())
    shape = Shape(batch, 8, longest, longest, 64)
    case = Case(shape, DTYPES[dtype], layout, PASSES[measure], threads, key_lengths=lengths)
    measure_cell(
        case.sides(flex=(text, batch) == ("sentences", 32)),
        check=case.check,
        suite="short",
        case={"text": text, "longest": str(longest), "batch x heads": f"{batch} x 8", "threads": str(threads), "dtype": dtype},
        kind=case.measure,
        work=gflop(shape, case.measure),  # as if nothing were padded
        unit="GFLOP/s",
        yardstick=partial(product, DTYPES[dtype]),
        threads=threads,
    )
