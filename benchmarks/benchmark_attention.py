"""attention() against torch.nn.functional.scaled_dot_product_attention, forward and forward + backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fused_attention.kernels.attention import attention

SHAPES = [  # batch, heads, seqlen_q, seqlen_k, head_dim: 2,048 tokens of short, medium and long sentences; cross-attention
    (32, 8, 64, 64, 64),
    (8, 8, 128, 128, 64),
    (4, 8, 512, 512, 64),
    (16, 8, 32, 128, 64),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest error relative to the largest element. It catches a wrong kernel; the tests judge the accuracy.
ERROR_LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DROPOUT_P = 0.1


def options(feature: str, dtype: torch.dtype, batch: int, seqlen_q: int, seqlen_k: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same feature as our arguments and as torch's."""
    if feature == "causal":
        return {"is_causal": True}, {"is_causal": True}
    if feature == "key padding":
        lengths = torch.linspace(seqlen_k // 2, seqlen_k, batch).int()
        key_mask = torch.arange(seqlen_k) < lengths[:, None]
        return {"key_mask": key_mask}, {"attn_mask": key_mask[:, None, None, :]}
    if feature == "float bias":
        bias = torch.randn(seqlen_q, seqlen_k)
        return {"attn_mask": bias}, {"attn_mask": bias.to(dtype)}
    if feature == "dropout":
        return {"dropout_p": DROPOUT_P}, {"dropout_p": DROPOUT_P}
    return {}, {}


def forward(function: Any, inputs: tuple[Tensor, ...], dout: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (function(*inputs, **arguments),)


def forward_and_backward(function: Any, inputs: tuple[Tensor, ...], dout: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    out = function(*inputs, **arguments)
    return (out, *torch.autograd.grad(out, inputs, dout))


MEASURES = {"forward": forward, "forward + backward": forward_and_backward}


@pytest.mark.parametrize("feature", ["plain", "causal", "key padding", "float bias", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("measure", MEASURES)
def test_attention(compare, measure, shape, dtype, feature):
    batch, heads, seqlen_q, seqlen_k, head_dim = shape
    torch.manual_seed(0)

    def heads_of_a_projection(seqlen: int) -> Tensor:  # (B, H, L, D) as a view of the (B, L, H * D) that a linear layer makes
        projection = torch.randn(batch, seqlen, heads * head_dim, dtype=DTYPES[dtype])
        return projection.unflatten(-1, (heads, head_dim)).transpose(1, 2)

    inputs = tuple(heads_of_a_projection(seqlen).requires_grad_() for seqlen in (seqlen_q, seqlen_k, seqlen_k))
    dout = heads_of_a_projection(seqlen_q)
    our_options, torch_options = options(feature, DTYPES[dtype], batch, seqlen_q, seqlen_k)
    run = MEASURES[measure]

    def check() -> None:
        exact_inputs = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
        replay = {"rng_state": torch.tensor([1, 2])}
        actual = run(attention, inputs, dout, **our_options, **replay)
        exact = run(attention, exact_inputs, dout.double(), **our_options, **replay, backend="reference")
        for tensor, expected in zip(actual, exact, strict=True):
            assert (tensor - expected).abs().max() <= ERROR_LIMITS[tensor.dtype] * expected.abs().max()

    compare(
        lambda: run(attention, inputs, dout, **our_options),
        lambda: run(scaled_dot_product_attention, inputs, dout, **torch_options),
        check=check,
        group="attention against torch.nn.functional.scaled_dot_product_attention",
        case={"batch, heads, Lq, Lk, D": ", ".join(map(str, shape)), "dtype": dtype, "feature": feature},
        measure=measure,
    )
