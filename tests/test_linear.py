"""Linear layers of few rows on the CPU kernel: the same numbers as torch's, and torch's own wherever more than numbers is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fused_attention import Transformer
from fused_attention.kernels.native import cpu
from fused_attention.kernels.native import linear as few_rows
from fused_attention.transformer.linear import Linear, linear

pytestmark = pytest.mark.skipif(cpu.status() is not None, reason="the CPU kernels are not built")

# (rows, in_features, out_features): whole and broken vectors, register tiles and blocks, several depths, more columns than a block has
SIZES = [
    (1, 1, 1),
    (1, 512, 64),
    (2, 33, 17),
    (3, 16, 8),
    (5, 513, 7),
    (6, 40, 30),
    (7, 1030, 12),
    (13, 64, 100),
    (64, 2050, 33),
    (64, 65, 2049),
]


def inputs(rows: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * in_features + out_features)
    shapes = (rows, in_features), (out_features, in_features), (out_features,)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in shapes)
    return x, weight, bias


def assert_accurate(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within what any order of float32 sums gives: a rounding of 2^-24 for each term, relative to the sum of magnitudes."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    assert ((out - exact).abs() <= magnitude * 2**-24 * (4 + x.shape[-1] ** 0.5)).all()


@pytest.mark.parametrize("isa", cpu.instruction_sets()[1] if cpu.status() is None else [])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size: tuple[int, int, int], isa: str) -> None:
    x, weight, bias = inputs(*size)
    with mock.patch.dict(os.environ, FUSED_ATTENTION_CPU_ISA=isa):
        for b in (bias, None):
            assert few_rows.takes(x, weight, b)
            assert_accurate(few_rows.linear(x, weight, b), x, weight, b)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight, bias = inputs(64, 600, 50)
    alone = torch.cat([few_rows.linear(row[None], weight, bias) for row in x])
    for rows in (64, 11, 4):
        assert torch.equal(few_rows.linear(x[:rows], weight, bias), alone[:rows])


def test_fewer_threads_than_were_asked_for() -> None:
    program = (
        "import torch; from fused_attention.kernels.native.linear import linear; torch.manual_seed(0); torch.set_num_threads(4)\n"
        "x, weight = torch.randn(2, 512), torch.randn(4000, 512)\n"
        "torch.testing.assert_close(linear(x, weight, None), x @ weight.T, rtol=1e-4, atol=1e-3)"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"OMP_THREAD_LIMIT": "1"}, check=True)


def test_nothing_beyond_the_tensors_is_read_or_written() -> None:
    x, weight, bias = inputs(5, 37, 21)
    fenced = torch.full((23, 64), torch.nan)
    fenced[1:22, :37] = weight
    padded = F.pad(bias, (1, 1), value=torch.nan)
    out = few_rows.linear(x, fenced[1:22, :37], padded[1:22])
    assert torch.equal(out, few_rows.linear(x, weight, bias))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 2, 8), (8,)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    _, weight, bias = inputs(1, 8, 5)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))


def test_special_values() -> None:
    x, weight, bias = inputs(3, 20, 6)
    x[0, 3], x[1, 4], weight[2, 5] = torch.inf, torch.nan, -torch.inf
    torch.testing.assert_close(few_rows.linear(x, weight, bias), F.linear(x, weight, bias), equal_nan=True)


def refused() -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    x, weight, bias = inputs(4, 8, 5)
    return {
        "many rows": (torch.randn(65, 8), weight, bias),
        "bfloat16": (x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
        "float64": (x.double(), weight.double(), bias.double()),
        "meta": (x.to("meta"), weight.to("meta"), bias.to("meta")),
        "strided x": (torch.randn(8, 4).T, weight, bias),
        "strided weight": (x, torch.randn(8, 5).T, bias),
        "strided bias": (x, weight, torch.randn(10)[::2]),
        "gradient": (x, weight.clone().requires_grad_(), bias),
        "negated view": (torch._neg_view(x), weight, bias),
        "no features": (x[:, :0], weight[:, :0], bias),
        "subclass": (x.as_subclass(type("Mine", (Tensor,), {})), weight, bias),
    }


@pytest.mark.parametrize("case", list(refused()))
def test_torch_takes_the_rest(case: str) -> None:
    arguments = refused()[case]
    assert not few_rows.takes(*arguments)
    torch.testing.assert_close(linear(*arguments), F.linear(*arguments))


@pytest.mark.parametrize("case", list(refused()))
def test_what_was_taken_before_is_no_excuse(case: str) -> None:
    """takes() remembers what it took without gradients; nothing else passes for it."""
    x, weight, bias = inputs(4, 8, 5)
    with torch.no_grad():
        assert few_rows.takes(x, weight, bias)
        assert few_rows.takes(x, weight, bias)
        assert few_rows.takes(*refused()[case]) == (case == "gradient")
    assert not few_rows.takes(x, weight.requires_grad_(), bias)


def test_errors_are_torchs() -> None:
    x, weight, bias = inputs(4, 8, 5)
    for arguments in ((x[:, :7].contiguous(), weight, bias), (x, weight, bias[:3])):
        with pytest.raises(RuntimeError):
            linear(*arguments)


@pytest.mark.parametrize("gradients", [True, False])
def test_whoever_watches_sees_torchs_operator(gradients: bool) -> None:
    x, weight, bias = inputs(4, 8, 5)
    with torch.set_grad_enabled(gradients):  # without them, takes() remembers the first call
        expected = linear(x, weight, bias)
        with FlopCounterMode(display=False) as counter:
            linear(x, weight, bias)
        assert counter.get_total_flops() == 2 * 4 * 8 * 5
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, bias).dtype is torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(linear, (0, None, None))(x, weight, bias), expected)
        torch.testing.assert_close(torch.compile(linear, fullgraph=True, backend="eager")(x, weight, bias), expected)


def test_the_extension_checks_its_arguments() -> None:
    from fused_attention import _native

    with pytest.raises(ValueError, match="64 rows"):
        _native.cpu_linear(1, 0, 8, 0, 8, 0, 0, 65, 8, 8)
    with pytest.raises(TypeError, match="ten integers"):
        _native.cpu_linear(1)  # type: ignore[call-arg]


def test_layer() -> None:
    layer, torchs = Linear(12, 7), torch.nn.Linear(12, 7)
    torchs.load_state_dict(layer.state_dict())
    seen = []
    layer.register_forward_hook(lambda *arguments: seen.append(arguments))
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), torchs(x))  # with a gradient
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torchs(x))
    assert len(seen) == 2


def test_a_decoder_runs_on_it() -> None:
    torch.manual_seed(0)
    model = Transformer(11, 11, d_model=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=32).eval()
    src, calls = torch.randint(3, 11, (2, 5)), []
    with mock.patch.object(few_rows, "linear", side_effect=lambda *a, real=few_rows.linear: calls.append(a[1].shape) or real(*a)):
        tokens = model.generate(src, 4)
    assert {(11, 16), (48, 16), (32, 16)} <= set(calls)  # vocabulary, self-attention, feed-forward network
    with mock.patch.object(few_rows, "takes", return_value=False):
        assert torch.equal(tokens, model.generate(src, 4))
