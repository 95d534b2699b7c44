"""float32 in two parts of bfloat16, which AMX multiplies where torch.set_float32_matmul_precision allows it: how large the errors are, that
the setting counts when a call runs, and that results do not depend on the rest of the batch.

Machines without AMX run this on emulated instructions (test_emulated_bf16.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import test_batch_invariance as invariance
import torch
from accuracy import exact_and_eager, saved_rounding
from attention_calls import CALL, FEATURES, build, poisoned, prepared, run
from torch import Tensor

from fused_attention import attention
from fused_attention.kernels.native import cpu

pytestmark = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")

on_amx = pytest.mark.parametrize("instruction_set", ["amx"], indirect=True)
HEAD_DIMS = [(1, 1), (8, 8), (16, 16), (40, 24), (64, 64), (72, 96), (128, 128), (192, 128), (256, 255)]
# A product's relative error is 2^-16, bfloat16's is 2^-8. Sums of many add up by chance, and the largest of a few errors is luck.
PART_OF_BFLOAT16 = 2**-6
# Where dP and delta cancel, what dP lost in three products is left, for which `saved_rounding` has what a float32 sum loses, 2 eps.
PRODUCT_ROUNDING = 2**-16 / 2**-22


@contextmanager
def precision(value: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def check_errors(**call: Any) -> dict[str, tuple[float, float, float]]:
    """Holds out, lse and every gradient against float64; returns the largest errors of three products, float32 and bfloat16."""
    problem, dout, dlse = build(call, "cpu")
    exact, eager = exact_and_eager(problem, dout, dlse)
    _, of_bfloat16 = exact_and_eager(*build(call | {"dtype": torch.bfloat16}, "cpu"))
    rounding = saved_rounding(problem, dout, exact, dlse)
    problem, dout, dlse = poisoned(problem, dout, dlse, exact["lse"], torch.nan)
    if call.get("prepare"):
        problem = prepared(problem)
    with precision("high"):
        results = run(cpu, problem, dout, dlse, call.get("memory", CALL["memory"]))
    errors = {}
    for name, wanted in exact.items():
        ours = results[name].double()
        assert torch.equal(ours.isfinite(), wanted.isfinite()), name
        error, of_32, of_16 = (largest(tensor.double() - wanted) for tensor in (ours, eager[name], of_bfloat16[name]))
        saved = rounding[name].max().item() if name in rounding and wanted.numel() else 0.0
        least = 16 * torch.finfo(torch.float32).eps * largest(wanted)
        assert error <= PART_OF_BFLOAT16 * of_16 + 3 * of_32 + PRODUCT_ROUNDING * saved + least, (name, error, of_32, of_16)
        errors[name] = error, of_32, of_16
    return errors


@on_amx
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, instruction_set: str) -> None:
    check_errors(**FEATURES[feature])


@on_amx
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_head_dims(head_dims: tuple[int, int], instruction_set: str) -> None:
    check_errors(head_dims=head_dims, is_causal="bottom_right", key_mask="holes")


@on_amx
@pytest.mark.parametrize("seqlens", [(1, 37), (2, 600), (3, 3), (33, 20), (0, 8), (8, 0), (600, 1100)], ids=str)
def test_lengths(seqlens: tuple[int, int], instruction_set: str) -> None:
    """One or two rows are computed in float32; 1,100 keys are several blocks."""
    errors = check_errors(seqlens=seqlens, head_dims=(32, 32), key_mask="holes", dropout_p=0.25)
    if seqlens == (2, 600):
        assert errors["out"][0] <= 3 * errors["out"][1]


@on_amx
def test_errors_lie_between_those_of_float32_and_bfloat16(instruction_set: str) -> None:
    for name, (error, of_32, of_16) in check_errors(seqlens=(256, 256), head_dims=(64, 64)).items():
        assert of_32 < error < of_16 / 64, name
    with precision("highest"):
        problem, dout, dlse = build({"seqlens": (256, 256), "head_dims": (64, 64)}, "cpu")
        exact, eager = exact_and_eager(problem, dout, dlse)
        out = run(cpu, problem, dout, dlse)["out"]
        assert largest(out.double() - exact["out"]) < 2 * largest(eager["out"].double() - exact["out"])


def inputs() -> list[Tensor]:
    return [torch.randn(1, 2, 40, 16).requires_grad_() for _ in range(3)]


def out_and_gradients(leaves: list[Tensor], forward: str, backward: str, function: Any = attention) -> tuple[Tensor, ...]:
    with precision(forward):
        out = function(*leaves, backend="cpu")
    with precision(backward):
        return out.detach(), *torch.autograd.grad(out.sum(), leaves)


@on_amx
@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_the_setting_counts_when_a_pass_runs(kind: str, instruction_set: str) -> None:
    """In calls that repeat an earlier one and in compiled ones, in the forward and in the backward of one graph."""
    leaves, function = inputs(), attention
    if kind == "compiled":
        function = torch.compile(attention, backend="aot_eager", fullgraph=True)
    exact = out_and_gradients(leaves, "highest", "highest", function)
    split = out_and_gradients(leaves, "high", "high", function)
    for ours, others in zip(split, exact, strict=True):
        assert not torch.equal(ours, others)
        torch.testing.assert_close(ours, others, rtol=1e-3, atol=1e-4)
    assert all(map(torch.equal, out_and_gradients(leaves, "medium", "medium", function), split))
    assert all(map(torch.equal, out_and_gradients(leaves, "highest", "highest", function), exact))
    out, *gradients = out_and_gradients(leaves, "highest", "high", function)
    assert torch.equal(out, exact[0])
    assert not any(map(torch.equal, gradients, exact[1:]))
    out, *gradients = out_and_gradients(leaves, "high", "highest", function)
    assert torch.equal(out, split[0])
    assert not any(map(torch.equal, gradients, split[1:]))


@on_amx
def test_the_setting_of_torchs_backend_counts(instruction_set: str) -> None:
    """After which torch.get_float32_matmul_precision raises."""
    query, key, value = (tensor.detach() for tensor in inputs())
    exact = attention(query, key, value, backend="cpu")
    with precision("high"):
        split = attention(query, key, value, backend="cpu")
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        assert torch.equal(attention(query, key, value, backend="cpu"), split)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert torch.equal(attention(query, key, value, backend="cpu"), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_else_depends_on_the_setting(dtype: torch.dtype, instruction_set: str) -> None:
    """float32 elsewhere than on AMX, and other dtypes."""
    if instruction_set == "amx" and dtype is torch.float32:
        pytest.skip("AMX multiplies parts of float32")
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs()]
    exact = out_and_gradients(leaves, "highest", "highest")
    assert all(map(torch.equal, out_and_gradients(leaves, "medium", "medium"), exact))


@on_amx
@pytest.mark.parametrize("case", invariance.OPTIONS)
def test_batch_sizes_and_thread_counts(case: str, instruction_set: str) -> None:
    with precision("high"):
        invariance.test_batch_sizes_and_thread_counts(case, torch.float32, instruction_set)


@on_amx
@pytest.mark.parametrize("case", invariance.SHARED)
def test_thread_counts_where_sequences_share_a_gradient(case: str, instruction_set: str) -> None:
    with precision("high"):
        invariance.test_thread_counts_where_sequences_share_a_gradient(case, torch.float32, instruction_set)
