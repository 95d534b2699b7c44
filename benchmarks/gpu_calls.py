"""The calls that gpu_attention.py compares: every fused attention of torch, other libraries' and ours, on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.attention import attention
from .exact import Inputs
from .gpu_libraries import LIBRARIES
from .gpu_timing import reason
from .peers import Missing

TOKENS, CHANNELS = 16384, 2048
FEATURES = ("full", "causal", "bias gradient", "short, padded", "bias", "bool mask", "key padding", "dropout", "deterministic")
PADDED = ("key padding", "short, padded")  # keys of every length from half of the longest to all
DROPOUT_P = 0.1
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
OURS = ("cuda", "triton")  # backends of attention()
NOT_IN_FLEX = ("dropout", "deterministic")
PROVIDERS = (*OURS, *SDPA, "flex", *LIBRARIES)


class Cell(NamedTuple):
    feature: str
    length: int
    head_dim: int

    @property
    def heads(self) -> int:
        return CHANNELS // self.head_dim

    def flops(self, measured_pass: str) -> float:
        """Two products in the forward, five in the backward; causal needs half of them. Masks and padding count as full."""
        forward = 4.0 * TOKENS * self.length * CHANNELS * (0.5 if self.feature == "causal" else 1.0)
        return forward * (2.5 if measured_pass == "backward" else 1.0)


class Call(NamedTuple):
    """One provider's forward on tensors that are its own leaves."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]

    def backward(self, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [leaf for leaf in self.leaves if leaf.requires_grad], dout, retain_graph=True)


def make_inputs(cell: Cell, device: str, tokens: int = TOKENS) -> Inputs:
    torch.manual_seed(0)
    batch, length = tokens // cell.length, cell.length
    shape = (batch, length, cell.heads, cell.head_dim)
    query, key, value, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    bias = mask = None
    if cell.feature in ("bias", "bias gradient"):
        bias = torch.randn(1, cell.heads, length, length, device=device, dtype=torch.bfloat16)
    if cell.feature == "bool mask":
        mask = torch.rand(1, 1, length, length, device=device) < 0.5
        mask[..., 0] = True  # every query attends to something: torch gives NaN otherwise
    if cell.feature in PADDED:
        lengths = torch.linspace(length // 2, length, batch, device=device).int()
        mask = (torch.arange(length, device=device) < lengths[:, None])[:, None, None, :]
    return Inputs(query, key, value, dout, bias, mask, cell.feature == "causal")


def make_calls(cell: Cell, inputs: Inputs, providers: Iterable[str]) -> dict[str, Call | str]:
    """Each of these providers' call, or the reason why it has none."""
    makers: dict[str, Callable[[], Call]] = {backend: partial(_ours, cell, inputs, backend) for backend in OURS}
    makers |= {name: partial(_sdpa, cell, inputs, backend) for name, backend in SDPA.items()}
    makers["flex"] = partial(_flex, cell, inputs)
    makers |= {name: partial(_library, cell, inputs, name) for name in LIBRARIES}
    calls: dict[str, Call | str] = {}
    for name in providers:
        try:
            calls[name] = makers[name]()
        except Missing as error:
            calls[name] = str(error)
        except Exception as error:
            calls[name] = reason(error)
    return calls


def _leaves(cell: Cell, inputs: Inputs) -> tuple[Tensor, ...]:
    """query, key, value and the bias if there is one."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]
    if inputs.bias is not None:
        leaves.append(inputs.bias.detach().clone().requires_grad_(cell.feature == "bias gradient"))
    return tuple(leaves)


def _dropout_p(cell: Cell) -> float:
    return DROPOUT_P if cell.feature == "dropout" else 0.0


def _ours(cell: Cell, inputs: Inputs, backend: str) -> Call:
    leaves, mask = _leaves(cell, inputs), inputs.mask
    options: dict[str, Any] = {
        "is_causal": inputs.is_causal,
        "dropout_p": _dropout_p(cell),
        "deterministic": cell.feature == "deterministic",
    }
    if inputs.bias is not None:
        options["attn_mask"] = leaves[3]
    elif mask is not None and cell.feature in PADDED:
        options["key_mask"] = mask[:, 0, 0]
    elif mask is not None:
        options["attn_mask"] = mask

    def run() -> Tensor:
        out = attention(*leaves[:3], **options, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return Call(run, leaves)


def _sdpa(cell: Cell, inputs: Inputs, backend: SDPBackend) -> Call:
    leaves = _leaves(cell, inputs)
    attn_mask = leaves[3] if inputs.bias is not None else inputs.mask

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                leaves[0], leaves[1], leaves[2], attn_mask=attn_mask, is_causal=inputs.is_causal, dropout_p=_dropout_p(cell)
            )

    return Call(run, leaves)


def _library(cell: Cell, inputs: Inputs, name: str) -> Call:
    attend, leaves = LIBRARIES[name](inputs, _dropout_p(cell), cell.feature == "deterministic"), _leaves(cell, inputs)
    mask = leaves[3] if inputs.bias is not None else inputs.mask
    return Call(lambda: attend(leaves[0], leaves[1], leaves[2], mask), leaves)


def _flex(cell: Cell, inputs: Inputs) -> Call:
    if cell.feature in NOT_IN_FLEX:
        raise NotImplementedError(f"{cell.feature}: not compared")
    leaves, mask = _leaves(cell, inputs), inputs.mask
    batch, _, length, _ = inputs.query.shape
    device = str(inputs.query.device)
    score_mod = block_mask = None
    if inputs.bias is not None:
        bias = leaves[3]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[0, h, i, j]

    if inputs.is_causal:
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
    elif mask is not None and cell.feature in PADDED:
        lengths = mask[:, 0, 0].sum(-1)
        block_mask = create_block_mask(lambda b, h, i, j: j < lengths[b], batch, None, length, length, device=device)
    elif mask is not None:
        block_mask = create_block_mask(lambda b, h, i, j: mask[0, 0, i, j], None, None, length, length, device=device)
    torch.compiler.reset()  # after 8 kinds of calls torch runs it uncompiled, and compiles for changing sizes before
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return Call(lambda: compiled(leaves[0], leaves[1], leaves[2], score_mod=score_mod, block_mask=block_mask), leaves)
