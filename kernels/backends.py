"""The backends by name, in the order routing tries them.

Each is a module with

- `status() -> str | None`: why it cannot run on this machine, None if it can,
- `unsupported_reasons(problem) -> list[str]`: why it cannot run this problem here, empty if it can,
- `uncovered(problem) -> list[str]`: what it does not support on any machine,

and, except for the reference,

- `prepare(problem) -> Call`: the forward pass for this problem and any other that differs only in its tensors' memory,
- `KEEPS_OUT_ERROR: tuple[torch.dtype, ...]`: the dtypes in which the forward can return out_error, for the backward,
- `backward(problem, out, lse, dout, dlse, gradients, out_error=None)`: writes every requested gradient,
- `attention_weights(problem, lse, average_heads) -> Tensor`, if it has a kernel for them,
- `takes_with_weights(problem) -> bool` and `forward_with_weights(problem) -> (out, lse, weights averaged over heads)`, if it has a kernel
  for all three.

Importing this module does not need a GPU, Triton or the compiled extension.
"""

from __future__ import annotations

from typing import Any

from . import reference
from .native import cpu, cuda
from .triton import backend as triton

BACKENDS: dict[str, Any] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}
