"""attention() against torch.nn.functional.scaled_dot_product_attention, forward and backward apart.

The quick grid leaves out big cells, single threads and what torch does not fuse; `--grid full` runs everything, for an hour or two.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fused_attention.kernels.attention import attention

GROUP = "attention against torch.nn.functional.scaled_dot_product_attention"
SHAPES = [  # batch, heads, seqlen_q, seqlen_k, head_dim
    (32, 8, 64, 64, 64),
    (8, 8, 128, 128, 64),
    (4, 8, 512, 512, 64),
    (1, 8, 2048, 2048, 64),
    (1, 16, 4096, 4096, 128),
    (16, 8, 32, 128, 64),  # cross-attention
    (8, 8, 1, 512, 64),  # decoding
    (1, 32, 1, 4096, 128),
]
BIG = [(1, 8, 2048, 2048, 64), (1, 16, 4096, 4096, 128)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEATURES = ("none", "causal", "key padding", "float bias")
UNFUSED = ("dropout", "bias gradient", "head_dim_v 32", "3-D inputs")  # by torch
UNFUSED_SHAPES = [(32, 8, 64, 64, 64), (4, 8, 512, 512, 64)]
PASSES = ("forward", "backward")
# Geometric means over shapes, features and numbers of threads; and what torch does not fuse.
GEOMEAN_BARS = {
    ("forward", "fp32"): 1.6, ("forward", "bf16"): 2.0, ("forward", "fp16"): 1.5,
    ("backward", "fp32"): 1.6, ("backward", "bf16"): 5.0, ("backward", "fp16"): 2.5,
}  # fmt: skip
PADDED_SHAPES = [(max(1, 2048 // length), 8, length, length, 64) for length in (16, 32, 64, 128, 256, 512, 1024, 2048)]
UNFUSED_BAR, PADDING_BAR, MATMUL_BAR = 3.0, 1.6, 0.85
# Largest error relative to the largest element. It catches a wrong kernel; the tests judge the accuracy.
ERROR_LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DROPOUT_P = 0.1


def heads_of_a_projection(batch: int, heads: int, seqlen: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """(B, H, L, D) as a view of the (B, L, H * D) that a linear layer makes."""
    return torch.randn(batch, seqlen, heads * head_dim, dtype=dtype).unflatten(-1, (heads, head_dim)).transpose(1, 2)


class Case:
    """The inputs of one cell, and both sides' calls on them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, feature: str) -> None:
        batch, heads, seqlen_q, seqlen_k, head_dim = shape
        torch.manual_seed(0)
        head_dim_v = 32 if feature == "head_dim_v 32" else head_dim
        sizes = ((seqlen_q, head_dim), (seqlen_k, head_dim), (seqlen_k, head_dim_v))
        self.query, self.key, self.value = (heads_of_a_projection(batch, heads, *size, dtype).requires_grad_() for size in sizes)
        self.inputs = self.query, self.key, self.value
        self.dout = heads_of_a_projection(batch, heads, seqlen_q, head_dim_v, dtype)
        self.ours: dict[str, Any] = {}
        self.torchs: dict[str, Any] = {}
        self.flat = feature == "3-D inputs"
        if feature == "causal":
            # torch's diagonal is that of the first key, which a decoded query would see alone.
            self.ours = {"is_causal": "bottom_right" if seqlen_q == 1 else True}
            self.torchs = {"is_causal": seqlen_q != 1}
        elif feature == "key padding":
            lengths = torch.linspace(seqlen_k // 2, seqlen_k, batch).int()
            key_mask = torch.arange(seqlen_k) < lengths[:, None]
            self.ours, self.torchs = {"key_mask": key_mask}, {"attn_mask": key_mask[:, None, None, :]}
        elif feature in ("float bias", "bias gradient"):
            bias = torch.randn(seqlen_q, seqlen_k)
            self.ours, self.torchs = {"attn_mask": bias}, {"attn_mask": bias.to(dtype)}
            if feature == "bias gradient":
                self.ours["attn_mask"].requires_grad_()
                self.torchs["attn_mask"].requires_grad_()
        elif feature == "dropout":
            self.ours = self.torchs = {"dropout_p": DROPOUT_P}

    def run_ours(self) -> Tensor:
        return _out(self.query, self.key, self.value, **self.ours)

    def run_torch(self) -> Tensor:
        if self.flat:
            query, key, value = (tensor.flatten(0, 1) for tensor in self.inputs)
            return scaled_dot_product_attention(query, key, value).unflatten(0, self.dout.shape[:2])
        return scaled_dot_product_attention(self.query, self.key, self.value, **self.torchs)

    def call(self, measure: str, run: Any, options: dict[str, Any]) -> Any:
        if measure == "forward":
            return torch.no_grad()(run)
        out = run()
        bias = options.get("attn_mask")
        leaves = [*self.inputs, *([bias] if bias is not None and bias.requires_grad else [])]
        return lambda: torch.autograd.grad(out, leaves, self.dout, retain_graph=True)

    def check(self) -> None:
        """The last head of the last batch element against the reference in float64."""
        replay = {"rng_state": torch.tensor([1, 2])} if self.ours.get("dropout_p") else {}
        out = _out(self.query, self.key, self.value, **self.ours, **replay)
        gradients = torch.autograd.grad(out, self.inputs, self.dout)
        if replay:  # which weights are dropped depends on the head's number
            last, options = slice(None), self.ours
        else:
            last, options = slice(-1, None), self.ours | ({"key_mask": self.ours["key_mask"][-1:]} if "key_mask" in self.ours else {})
        query, key, value = alone = tuple(tensor[last, last].detach().double().requires_grad_() for tensor in self.inputs)
        exact = _out(query, key, value, **options, **replay, backend="reference")
        exact_gradients = torch.autograd.grad(exact, alone, self.dout[last, last].double())
        for tensor, expected in zip((out, *gradients), (exact, *exact_gradients), strict=True):
            assert (tensor[last, last] - expected).abs().max() <= ERROR_LIMITS[tensor.dtype] * expected.abs().max()


def _out(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    out = attention(query, key, value, **options)
    assert isinstance(out, Tensor)
    return out


def cells() -> list[Any]:
    return [
        pytest.param(shape, feature, marks=[pytest.mark.full] if shape in BIG else [], id=f"{'x'.join(map(str, shape))}-{feature}")
        for shape in SHAPES
        for feature in FEATURES
    ]


@pytest.mark.parametrize(("shape", "feature"), cells())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.full), torch.get_num_threads()])
@pytest.mark.parametrize("measure", PASSES)
def test_attention(compare, measure, shape, dtype, feature, threads):
    _compare(compare, measure, shape, dtype, feature, threads, GROUP, geomean_bar=GEOMEAN_BARS[measure, dtype])


@pytest.mark.full
@pytest.mark.parametrize("shape", UNFUSED_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("feature", UNFUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("measure", PASSES)
def test_what_torch_does_not_fuse(compare, measure, shape, dtype, feature):
    group = f"{GROUP} where it runs unfused"
    _compare(compare, measure, shape, dtype, feature, torch.get_num_threads(), group, bar=UNFUSED_BAR)


def _compare(compare, measure, shape, dtype, feature, threads, group, **bars):
    case = Case(shape, DTYPES[dtype], feature)
    compare(
        case.call(measure, case.run_ours, case.ours),
        case.call(measure, case.run_torch, case.torchs),
        check=case.check,
        group=group,
        case={"batch, heads, Lq, Lk, D": ", ".join(map(str, shape)), "dtype": dtype, "feature": feature, "threads": str(threads)},
        measure=measure,
        threads=threads,
        min_rounds=3 if shape in BIG else 7,
        **bars,
    )


@pytest.mark.full
@pytest.mark.parametrize("shape", PADDED_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("measure", PASSES)
def test_half_of_the_keys_padded(compare, measure, shape, dtype):
    """Against our own call without padding: never slower, and from 512 keys on half the work shows."""
    whole, padded = Case(shape, DTYPES[dtype], "none"), Case(shape, DTYPES[dtype], "none")
    padded.ours = {"key_mask": (torch.arange(shape[3]) < shape[3] // 2).expand(shape[0], -1)}
    compare(
        padded.call(measure, padded.run_ours, padded.ours),
        whole.call(measure, whole.run_ours, whole.ours),
        check=padded.check,
        group="half of the keys padded, against our own time without padding",
        case={"batch, heads, Lq, Lk, D": ", ".join(map(str, shape)), "dtype": dtype},
        measure=measure,
        peer_name="unpadded",
        bar=PADDING_BAR if shape[3] >= 512 else 1.0,
    )


@pytest.mark.full
@pytest.mark.parametrize("shape", [(4, 8, 512, 512, 64), *BIG], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("measure", PASSES)
def test_share_of_the_rate_of_matrix_products(compare, measure, shape):
    """Against torch's product of large matrices with as many multiplications: 2 of scores' size, or 5 in the backward."""
    case = Case(shape, torch.float32, "none")
    batch, heads, seqlen_q, seqlen_k, head_dim = shape
    multiplications = (2 if measure == "forward" else 5) * batch * heads * seqlen_q * seqlen_k * head_dim
    side = 1024
    left, right = torch.randn(round(multiplications / side**2), side), torch.randn(side, side)
    compare(
        case.call(measure, case.run_ours, case.ours),
        torch.no_grad()(lambda: left @ right),
        check=case.check,
        group="fp32 attention against a matrix product with as many multiplications",
        case={"batch, heads, Lq, Lk, D": ", ".join(map(str, shape))},
        measure=measure,
        peer_name="product",
        bar=MATMUL_BAR,
        min_rounds=3,
    )


@pytest.mark.full
@pytest.mark.parametrize(("batch", "length"), [(32, 64), (8, 128), (4, 512)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_averaged_weights(compare, batch, length, dtype):
    """MultiHeadAttention(need_weights=True), as a user calls it, in evaluation."""
    from fused_attention.transformer.attention import MultiHeadAttention

    torch.manual_seed(0)
    peer = torch.nn.MultiheadAttention(512, 8, batch_first=True, dtype=DTYPES[dtype])
    ours = MultiHeadAttention(512, 8, batch_first=True, dtype=DTYPES[dtype])
    ours.load_state_dict(peer.state_dict())
    inputs = torch.randn(batch, length, 512, dtype=DTYPES[dtype])

    def run(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return module(inputs, inputs, inputs, need_weights=True)

    def check() -> None:
        exact = MultiHeadAttention(512, 8, batch_first=True, dtype=torch.float64)
        exact.load_state_dict(peer.state_dict())
        with torch.no_grad():
            expected = exact(inputs.double(), inputs.double(), inputs.double(), need_weights=True)
        for tensor, wanted in zip(run(ours), expected, strict=True):
            assert (tensor - wanted).abs().max() <= ERROR_LIMITS[tensor.dtype] * wanted.abs().max() * math.sqrt(2)

    compare(
        lambda: run(ours),
        lambda: run(peer),
        check=check,
        group="MultiHeadAttention(need_weights=True) against torch.nn.MultiheadAttention, 512 wide, 8 heads",
        case={"batch, length": f"{batch}, {length}", "dtype": dtype},
        measure="forward",
    )
