"""MultiHeadAttention against torch.nn.MultiheadAttention(need_weights=False), forward + backward with all gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_attention.transformer.attention import MultiHeadAttention

EMBED_DIM, NUM_HEADS = 512, 8
SIZES = [(32, 64), (8, 128), (4, 512)]  # batch, length
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARS = {("fp32", "self"): 1.2, ("bf16", "self"): 2.4, ("fp32", "self, dropout 0.1"): 1.3, ("bf16", "self, dropout 0.1"): 3.0}
# Largest error relative to the largest element. It catches a wrong module; the tests judge the accuracy.
ERROR_LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def with_gradients(module: torch.nn.Module, inputs: tuple[Tensor, ...], dout: Tensor, **masks: Tensor) -> list[Tensor]:
    output, _ = module(*inputs, need_weights=False, **masks)
    leaves = list(dict.fromkeys(inputs))
    return [output, *torch.autograd.grad(output, [*leaves, *module.parameters()], dout)]


@pytest.mark.parametrize("kind", ["self", "self, dropout 0.1", "self, key padding", "cross"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_multi_head_attention(compare, batch, length, dtype, kind):
    torch.manual_seed(0)
    dropout = 0.1 if "dropout" in kind else 0.0
    peer = torch.nn.MultiheadAttention(EMBED_DIM, NUM_HEADS, dropout, batch_first=True, dtype=DTYPES[dtype])
    ours = MultiHeadAttention(EMBED_DIM, NUM_HEADS, dropout, batch_first=True, dtype=DTYPES[dtype])
    ours.load_state_dict(peer.state_dict())
    query, memory, dout = (torch.randn(batch, length, EMBED_DIM, dtype=DTYPES[dtype]) for _ in range(3))
    query.requires_grad_()
    memory.requires_grad_()
    inputs = (query, memory, memory) if kind == "cross" else (query, query, query)
    masks = {}
    if "padding" in kind:
        lengths = torch.linspace(length // 2, length, batch).int()
        masks["key_padding_mask"] = torch.arange(length) >= lengths[:, None]

    def check() -> None:
        exact_of = {id(tensor): tensor.detach().double().requires_grad_() for tensor in inputs}
        exact_inputs = tuple(exact_of[id(tensor)] for tensor in inputs)
        # With dropout, float64 runs the reference on the same draw.
        torch.manual_seed(1)
        actual = with_gradients(ours, inputs, dout, **masks)
        torch.manual_seed(1)
        exact = with_gradients(copy.deepcopy(ours).double(), exact_inputs, dout.double(), **masks)
        for tensor, expected in zip(actual, exact, strict=True):
            assert (tensor - expected).abs().max() <= ERROR_LIMITS[tensor.dtype] * expected.abs().max()

    compare(
        lambda: with_gradients(ours, inputs, dout, **masks),
        lambda: with_gradients(peer, inputs, dout, **masks),
        check=check,
        group=f"MultiHeadAttention against torch.nn.MultiheadAttention, {EMBED_DIM} wide, {NUM_HEADS} heads",
        case={"batch, length": f"{batch}, {length}", "dtype": dtype, "attention": kind},
        measure="forward + backward",
        bar=BARS.get((dtype, kind)),
    )


@pytest.mark.parametrize("kind", ["self", "self, key padding", "cross"])
@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_compiled(compare, batch, length, kind):
    """Through torch.compile, which must find one graph, against the same module without it."""
    torch.manual_seed(0)
    eager = MultiHeadAttention(EMBED_DIM, NUM_HEADS, batch_first=True)
    compiled = torch.compile(eager, fullgraph=True)
    query, memory, dout = (torch.randn(batch, length, EMBED_DIM).requires_grad_() for _ in range(3))
    inputs = (query, memory, memory) if kind == "cross" else (query, query, query)
    lengths = torch.linspace(length // 2, length, batch).int()
    masks = {"key_padding_mask": torch.arange(length) >= lengths[:, None]} if "padding" in kind else {}

    def run(module: Callable[..., tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        output, _ = module(*inputs, need_weights=False, **masks)
        return [output, *torch.autograd.grad(output, [*dict.fromkeys(inputs), *eager.parameters()], dout)]

    def check() -> None:
        for ours, expected in zip(run(compiled), run(eager), strict=True):
            assert (ours - expected).abs().max() <= ERROR_LIMITS[torch.float32] * expected.abs().max()

    compare(
        lambda: run(compiled),
        lambda: run(eager),
        check=check,
        group=f"MultiHeadAttention compiled by torch.compile against itself in eager mode, {EMBED_DIM} wide, {NUM_HEADS} heads",
        case={"batch, length": f"{batch}, {length}", "attention": kind},
        measure="forward + backward",
        peer_name="eager",
        bar=1.0,
    )
