"""The backends by name, in the order in which routing tries them.

Each is a module with

- `status() -> str | None`: why it cannot run on this machine, None when it can,
- `unsupported_reasons(problem) -> list[str]`: why it cannot run this problem here, empty when it can,
- `uncovered(problem) -> list[str]`: what it does not cover on any machine,

and, all but the reference,

- `prepare(problem) -> Call`: the forward pass of problems that differ from this one in their tensors' memory alone,
- `backward(problem, out, lse, dout, dlse, gradients)`: writes every requested gradient,
- `attention_weights(problem, lse, average_heads) -> Tensor`, if it has a kernel for them.

Importing this needs neither a GPU, nor Triton, nor the compiled extension.
"""

from __future__ import annotations

from typing import Any

from . import reference
from .native import cpu, cuda
from .triton import backend as triton

BACKENDS: dict[str, Any] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}
