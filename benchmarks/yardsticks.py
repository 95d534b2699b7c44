"""What a machine can do at best, timed in the same rounds as the cells: a plain product of matrices, and a copy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIDE = 1024  # of the product's matrices
COPIED_BYTES = 2**27  # more than any cache holds
PRODUCT, COPY = "product", "copy"


class Yardstick(NamedTuple):
    run: Callable[[], Any]
    work: float  # of a call: GFLOP, or GB read and written


def product(dtype: torch.dtype) -> Yardstick:
    """With torch's threads: the fastest of torch's own product and oneDNN's, in this dtype and in float32."""
    return _product(dtype, torch.get_num_threads())


@functools.cache
def _product(dtype: torch.dtype, threads: int) -> Yardstick:
    small = {name: _seconds(function) for name, function in _products(dtype, SIDE // 4).items()}
    best = {name for name, seconds in small.items() if seconds < 4 * min(small.values())}
    candidates = {name: function for name, function in _products(dtype, SIDE).items() if name in best}
    fastest = min(candidates.values(), key=_seconds)
    return Yardstick(fastest, 2e-9 * SIDE**3)


def _products(dtype: torch.dtype, side: int) -> dict[str, Callable[[], Tensor]]:
    left, right = torch.randn(side, side), torch.randn(side, side)
    low_left, low_right = left.to(dtype), right.to(dtype)
    functions: dict[str, Callable[[], Tensor]] = {"own": lambda: low_left @ low_right, "float32": lambda: left @ right}
    if torch.backends.mkldnn.is_available():  # MKL has no AVX-512 on AMD's processors, oneDNN has
        onednn: Any = torch._C._nn.mkldnn_linear
        packed = left.to_mkldnn(), right.to_mkldnn()
        functions["oneDNN"] = lambda: onednn(*packed)
    return {name: torch.no_grad()(function) for name, function in functions.items()}


def copy() -> Yardstick:
    source, target = _copied()
    return Yardstick(lambda: target.copy_(source), 2e-9 * COPIED_BYTES)


@functools.cache
def _copied() -> tuple[Tensor, Tensor]:
    source = torch.ones(COPIED_BYTES // 4)
    return source, torch.empty_like(source)


def _seconds(function: Callable[[], Any]) -> float:
    """The least of three."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])
