"""MultiHeadAttention against torch.nn.MultiheadAttention in training and evaluation, and torch's encoder around both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.benchmarks.cell import OURS
from fused_attention.transformer.attention import MultiHeadAttention
from fused_attention.transformer.replace import replace_attention

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
def test_training(measure_cell, batch, length, dtype, kind):
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

    def check(side: str, results: list[Tensor]) -> None:
        if dropout and side != OURS:  # which draws a mask of its own
            return
        exact_of = {id(tensor): tensor.detach().double().requires_grad_() for tensor in inputs}
        exact_inputs = tuple(exact_of[id(tensor)] for tensor in inputs)
        if dropout:  # float64 runs the reference on the same draw
            torch.manual_seed(1)
            results = with_gradients(ours, inputs, dout, **masks)
            torch.manual_seed(1)
        exact = with_gradients(copy.deepcopy(ours if dropout else peer).double(), exact_inputs, dout.double(), **masks)
        for tensor, expected in zip(results, exact, strict=True):
            error = (tensor - expected).abs().max() / expected.abs().max()
            assert error <= ERROR_LIMITS[tensor.dtype], f"differs from float64 by {error:.1e} of the largest element"

    measure_cell(
        {
            OURS: lambda: with_gradients(ours, inputs, dout, **masks),
            "torch": lambda: with_gradients(peer, inputs, dout, **masks),
        },
        check=check,
        suite=f"module: MultiHeadAttention in training, {EMBED_DIM} wide, {NUM_HEADS} heads",
        case={"batch": str(batch), "tokens": str(length), "dtype": dtype, "attention": kind},
        kind="forward + backward",
        bars={"torch": BARS[dtype, kind]} if (dtype, kind) in BARS else None,
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

    def run(module: Callable[..., Any]) -> list[Tensor]:
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


@pytest.mark.parametrize("need_weights", [False, True], ids=["out", "weights"])
@pytest.mark.parametrize("length", [64, 128, 256, 512])
def test_evaluation(measure_cell, length, need_weights):
    torch.manual_seed(0)
    peer = torch.nn.MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True).eval()
    ours = MultiHeadAttention(EMBED_DIM, NUM_HEADS, batch_first=True).eval()
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(32, length, EMBED_DIM)

    @torch.no_grad()
    def run(module: torch.nn.Module, x: Tensor = x) -> list[Tensor]:
        found = module(x, x, x, need_weights=need_weights)
        return [tensor for tensor in found if tensor is not None]

    exact = run(copy.deepcopy(peer).double(), x[-1:].double())

    def check(side: str, results: list[Tensor]) -> None:
        check_equal([tensor[-1:] for tensor in results], exact)

    measure_cell(
        {OURS: lambda: run(ours), "torch": lambda: run(peer)},
        check=check,
        suite=f"module: MultiHeadAttention in evaluation, {EMBED_DIM} wide, {NUM_HEADS} heads",
        case={"batch": "32", "tokens": str(length), "returns": "out and weights" if need_weights else "out"},
        kind="forward",
        bars={"torch": 1.2},
    )


PADDING = {"none": 0.0, "30 %": 0.3, "50 %": 0.5}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_encoder_of_torch(compare, mode, padding):
    """torch.nn.TransformerEncoder before and after replace_attention. In evaluation torch's skips the padding: it packs nested tensors."""
    torch.manual_seed(0)
    batch, length = 8, 128
    # gelu: where a ReLU is at its kink, a rounding error decides between two gradients
    layer = torch.nn.TransformerEncoderLayer(EMBED_DIM, NUM_HEADS, 4 * EMBED_DIM, dropout=0.0, batch_first=True, activation="gelu")
    peer = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).train(mode == "training")
    ours = copy.deepcopy(peer)
    replace_attention(ours)
    x, dout = torch.randn(batch, length, EMBED_DIM), torch.randn(batch, length, EMBED_DIM)
    shortest = round(length * (1 - 2 * PADDING[padding]))
    padded = torch.arange(length) >= torch.linspace(max(shortest, 1), length, batch).round()[:, None]
    masks = {"src_key_padding_mask": padded} if padding != "none" else {}

    def run(model: torch.nn.Module) -> list[Tensor]:
        if mode == "evaluation":
            with torch.no_grad():
                return [model(x, **masks)]
        output = model(x, **masks)
        return [output, *torch.autograd.grad(output, list(model.parameters()), dout.masked_fill(padded[..., None], 0.0))]

    def check() -> None:
        (output, *gradients), (expected, *expected_gradients) = run(ours), run(peer)
        check_equal([output[~padded], *gradients], [expected[~padded], *expected_gradients])

    compare(
        lambda: run(ours),
        lambda: run(peer),
        check=check,
        group=f"torch.nn.TransformerEncoder of 2 layers after replace_attention, {EMBED_DIM} wide, {NUM_HEADS} heads",
        case={"batch, length": f"{batch}, {length}", "mode": mode, "padding": padding},
        measure="forward + backward" if mode == "training" else "forward",
        bar=None if mode == "evaluation" and PADDING[padding] > 0.3 else 1.0,
    )


def check_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for tensor, wanted in zip(actual, expected, strict=True):
        error = (tensor - wanted).abs().max() / wanted.abs().max()
        assert error <= ERROR_LIMITS[tensor.dtype], f"differs by {error:.1e} of the largest element"
