"""A case of attention: inputs that no cache holds, every side's function on them, and what they must return."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from . import peers
from .exact import Inputs, all_finite, largest_error
from .peers import FLEX, MAKERS, Calls

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("BLHD", "BHLD")
FORWARD, BOTH = "forward", "forward + backward"
PASSES = {"forward": FORWARD, "both": BOTH}  # in a benchmark's name -> in the table
CACHE_BYTES = 2**26  # that the inputs of a round and of the next ones together exceed
MOST_INPUTS = 16
# Largest error relative to the largest element. It catches a wrong kernel; the tests judge the accuracy.
ERROR_LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Shape(NamedTuple):
    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int


class Case:
    """The functions of all sides for one cell; `options` may hold a mask, a bias, is_causal, key_lengths, dropout_p."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        layout: str,
        measure: str,
        threads: int,
        *,
        is_causal: bool = False,
        key_lengths: Tensor | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        bias_gradient: bool = False,
        dropout_p: float = 0.0,
    ) -> None:
        torch.manual_seed(0)
        self.dtype, self.measure, self.dropout_p = dtype, measure, dropout_p
        if key_lengths is not None:
            mask = (torch.arange(shape.seqlen_k) < key_lengths[:, None])[:, None, None, :]
        elements = shape.batch * shape.heads * (shape.seqlen_q + shape.seqlen_k) * shape.head_dim
        count = max(2, min(math.ceil(CACHE_BYTES / (2 * elements * dtype.itemsize)), MOST_INPUTS))

        def random(length: int) -> Tensor:
            if layout == "BLHD":  # as a linear layer writes it
                return torch.randn(shape.batch, length, shape.heads, shape.head_dim).to(dtype).transpose(1, 2)
            return torch.randn(shape.batch, shape.heads, length, shape.head_dim).to(dtype)

        inputs = []
        for _ in range(count):
            tensors = [random(length) for length in (shape.seqlen_q, shape.seqlen_k, shape.seqlen_k)]
            query, key, value = (tensor.requires_grad_(measure == BOTH) for tensor in tensors)
            own_bias = None if bias is None else bias.clone().requires_grad_(bias_gradient and measure == BOTH)
            inputs.append(Inputs(query, key, value, random(shape.seqlen_q), own_bias, mask, is_causal))
        self.calls = Calls(inputs, threads, key_lengths, dropout_p)

    def sides(self, *, flex: bool = True) -> dict[str, Callable[[], Any] | str]:
        """Each one's function, whose calls go through the inputs, or the reason why it has none. flex: with FlexAttention, which is
        compiled for every size, some seconds each.
        """
        sides: dict[str, Callable[[], Any] | str] = {}
        for name in MAKERS:
            if name == FLEX and not flex:
                continue
            with torch.no_grad():
                found = peers.make(self.calls, name, backward=self.measure == BOTH)
            sides[name] = found if isinstance(found, str) else self.through_all(found)
        return sides

    def through_all(self, runs: list[peers.Run]) -> Callable[[], tuple[Tensor, ...]]:
        upcoming = itertools.cycle(zip(runs, self.calls.inputs, strict=True))

        def forward() -> tuple[Tensor, ...]:
            run, _ = next(upcoming)
            return (run(),)

        def both() -> tuple[Tensor, ...]:
            run, inputs = next(upcoming)
            out = run()
            leaves = [leaf for leaf in (*inputs[:3], inputs.bias) if leaf is not None and leaf.requires_grad]
            return (out, *torch.autograd.grad(out, leaves, inputs.dout))

        return both if self.measure == BOTH else torch.no_grad()(forward)

    def traffic(self) -> float:
        """GB that the first call must read and write at least: query, key, value and out, and in the backward these and dout again, and
        three gradients.
        """
        query, key, value, dout, *_ = self.calls.inputs[0]
        forward = query.nbytes + key.nbytes + value.nbytes + dout.nbytes
        return 1e-9 * (forward if self.measure == FORWARD else 3 * forward)

    def check(self, side: str, results: tuple[Tensor, ...]) -> None:
        """Against float64, the first and the last head; with dropout, where every side draws its own mask, that it is finite."""
        assert all_finite(results), "not finite everywhere"
        if self.dropout_p:
            return
        error = largest_error(self.calls.inputs[0], results)
        assert error <= ERROR_LIMITS[self.dtype], f"differs from float64 by {error:.1e} of the largest element"


def gflop(shape: Shape, measure: str, part: float = 1.0) -> float:
    """Of two products in the forward and five in the backward; part: of the scores that are needed, a half where causal."""
    products = 7 if measure == BOTH else 2
    return 2e-9 * products * part * math.prod(shape)


def grid(axes: Mapping[str, Iterable[Any]], quick: Callable[..., bool], include: Callable[..., bool] = lambda **_: True) -> Any:
    """A benchmark's parameters: every combination of the axes that is included; those that are not `quick` are marked `full`."""
    found = []
    for values in itertools.product(*axes.values()):
        named = dict(zip(axes, values, strict=True))
        if include(**named):
            marks = [] if quick(**named) else [pytest.mark.full]
            found.append(pytest.param(*values, marks=marks, id="-".join(map(str, values))))
    return pytest.mark.parametrize(tuple(axes), found)


def threads_to_measure() -> list[int]:
    """One, and all."""
    return sorted({1, torch.get_num_threads()})
