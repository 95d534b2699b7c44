"""What a backend prepares from a problem: a function that runs it, or any other that differs only in its tensors' memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .problem import OptionalTensors
from .torch_internals import allocators


class Call(Protocol):
    """Takes only the tensors; everything that depends on sizes, strides, dtypes and options is already worked out."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, optional: OptionalTensors, needs_lse: bool
    ) -> Tensor | tuple[Tensor, ...] | None:
        """Returns out (B, Hq, Lq, Dv), and with needs_lse also lse (B, Hq, Lq) float32. Packed sequences have B = 1; rows outside all
        sequences are 0.

        If the problem keeps_out_error, needs_lse is set, and out_error comes third, in the memory layout of out: what out lost when it was
        rounded to its dtype.

        Returns None if the tensors' memory is not aligned as the kernels need. Their GPU must be the current one.
        """


def empty_strided(like: Tensor) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """torch.empty_strided(shape, strides, dtype) on the device of `like`, in half the time if torch has the function that compiled graphs
    call. A GPU must be the current one.
    """
    fast = allocators.get(like.device.type)
    if fast is not None:
        return fast
    there = like.new_empty(0)
    return lambda shape, strides, dtype: there.new_empty_strided(shape, strides, dtype=dtype)
