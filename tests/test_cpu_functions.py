"""Packed sequences, decoding, prepared masks and masks of any shape on the CPU kernels, on every instruction set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import assert_accurate, assert_lse_accurate, exact_and_eager
from attention_calls import DTYPES, build, check, check_call, prepared
from function_calls import (
    DECODE,
    EVERYTHING,
    STARTS,
    VARLEN,
    WEIGHTS,
    check_autograd,
    check_decoding,
    check_only_the_gradients_that_are_asked_for,
    check_packed_sequences,
    check_packed_sequences_with_everything,
    check_starts,
    check_weights,
)

from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cpu
from fused_attention.kernels.weights import output_and_mean_weights, reference_weights

pytestmark = [
    pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"is_causal": "top_left"}, EVERYTHING], ids=["causal", "everything"])
def test_autograd(options: dict, dtype: torch.dtype, instruction_set: str) -> None:
    check_autograd("cpu", options, dtype, "cpu")


def test_only_the_gradients_that_are_asked_for(instruction_set: str) -> None:
    check_only_the_gradients_that_are_asked_for("cpu", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VARLEN)
def test_packed_sequences(case: str, dtype: torch.dtype, instruction_set: str) -> None:
    check_packed_sequences("cpu", case, dtype, "cpu")


@pytest.mark.parametrize("starts", STARTS, ids=str)
def test_starts_of_packed_sequences_never_lead_out_of_memory(starts: list[int]) -> None:
    check_starts("cpu", starts, "cpu")


def test_packed_sequences_with_everything(instruction_set: str) -> None:
    check_packed_sequences_with_everything("cpu", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DECODE)
def test_decoding(case: str, dtype: torch.dtype, instruction_set: str) -> None:
    check_decoding("cpu", case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average_heads", [False, True])
@pytest.mark.parametrize("options", WEIGHTS, ids=str)
def test_attention_weights(options: dict, average_heads: bool, dtype: torch.dtype, instruction_set: str) -> None:
    check_weights(cpu, options, average_heads, dtype, "cpu")


@pytest.mark.parametrize(
    "seqlens", [(1, 1), (40, 75), (97, 130), (200, 512)], ids=str
)  # one and several blocks of 96 rows, one of 512 keys
@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("options", [*WEIGHTS, {"is_causal": True, "head_dims": (59, 40)}], ids=str)
def test_output_and_weights_together(options: dict, is_prepared: bool, seqlens: tuple[int, int], instruction_set: str) -> None:
    """What forward and attention_weights give one after the other, and as accurate."""
    problem, dout, _ = build({"sizes": (2, 4, 2), "dtype": torch.float32} | options | {"seqlens": seqlens}, "cpu")
    problem = prepared(problem) if is_prepared else problem
    assert cpu.takes_with_weights(problem)
    out, lse, weights = cpu.forward_with_weights(problem)
    exact, eager = exact_and_eager(problem, dout, None)
    assert_accurate("out", "out", out, eager["out"], exact["out"])
    assert_lse_accurate(lse, exact["lse"])
    double = replace(problem, query=problem.query.double(), key=problem.key.double(), value=problem.value.double())
    expected = reference_weights(double, exact["lse"], average_heads=True)
    assert_accurate("weights", "out", weights, reference_weights(problem, lse, average_heads=True), expected)
    assert torch.equal(weights == 0, expected.float() == 0)


def test_what_runs_together() -> None:
    """float32, one block of keys, no gradient, not packed."""
    query, key, value = (torch.randn(2, 4, length, 8) for length in (9, 513, 513))

    def together(*inputs: torch.Tensor, **options: Any) -> bool:
        return output_and_mean_weights(make_problem("separate", inputs, **options), "cpu") is not None

    fits = query, key[:, :, :512], value[:, :, :512]
    assert together(*fits)
    assert not together(query, key, value)
    assert not together(*(tensor.bfloat16() for tensor in fits))
    assert not together(fits[0].clone().requires_grad_(), *fits[1:])
    with torch.no_grad():
        assert together(fits[0].clone().requires_grad_(), *fits[1:])


MASK_SHAPES = ("11QK", "B1QK", "1HQK", "BHQK", "B11K", "1H1K", "BH1K", "11Q1", "BHQ1", "B111", "1111")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("dims", MASK_SHAPES)
def test_broadcast_masks(dims: str, kind: str, dtype: torch.dtype, instruction_set: str) -> None:
    check_call(cpu, {"attn_mask": (kind, dims), "sizes": (2, 2, 1), "seqlens": (40, 70), "dtype": dtype}, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_mask_dtypes(kind: str, dtype: torch.dtype, instruction_set: str) -> None:
    check_call(cpu, {"attn_mask": (kind, "1HQK"), "sizes": (2, 2, 2), "seqlens": (40, 70), "dtype": dtype}, "cpu")


@pytest.mark.parametrize("kind", ["bool", "float32", "float16"])
@pytest.mark.parametrize("memory", ["transposed", "expanded", "every other element"])
def test_mask_memory(memory: str, kind: str, instruction_set: str) -> None:
    problem, dout, dlse = build({"attn_mask": (kind, "BHQK"), "sizes": (2, 2, 2), "seqlens": (40, 70)}, "cpu")
    mask = problem.attn_mask
    if memory == "transposed":
        problem.attn_mask = mask.mT.contiguous().mT
    elif memory == "expanded":
        problem.attn_mask = mask[:1, :, :1].expand(mask.shape)
    else:
        problem.attn_mask = mask.repeat_interleave(2, 3)[..., ::2]
    check(cpu, problem, dout, dlse)


LONG = {"seqlens": (330, 1100), "sizes": (1, 2, 2), "head_dims": (32, 32)}  # several blocks of rows and of keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"window": (100, 60), "is_causal": "bottom_right"},
        {"window": (30, 0)},
        {"attn_mask": ("float32", "1HQK"), "softcap": 2.0},
        {"attn_mask": ("float32", "B11K")},
        {"alibi_slopes": "BH", "sinks": True, "is_causal": "bottom_right", "sizes": (1, 4, 2)},
        {"is_causal": "bottom_right", "window": (200, None), "prepare": True},
        {"attn_mask": ("bool", "1HQK"), "prepare": True, "sinks": True},
    ],
    ids=str,
)
def test_many_blocks(options: dict, dtype: torch.dtype, instruction_set: str) -> None:
    check_call(cpu, LONG | {"dtype": dtype} | options, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_a_prepared_mask_in_any_pattern(dtype: torch.dtype, instruction_set: str) -> None:
    """Empty, full and mixed ones next to each other, whole rows and columns of empty ones among them."""
    problem, dout, dlse = build(LONG | {"dtype": dtype, "lse_gradient": True}, "cpu")
    seqlen_q, seqlen_k = LONG["seqlens"]
    kinds = torch.randint(3, (1, 2, 6, 18))
    kinds[:, :, 2], kinds[:, :, :, 3], kinds[:, :, :, 8:16] = 0, 0, 0
    tiles = kinds.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :seqlen_q, :seqlen_k]
    problem.attn_mask = (tiles == 1) | ((tiles == 2) & (torch.rand(tiles.shape) > 0.5))
    check(cpu, problem, dout, dlse, prepare=True)


@pytest.mark.parametrize("num_threads", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", ["11QK", "11Q1", "1H1K"])
def test_few_heads_on_many_threads(dims: str, dtype: torch.dtype, num_threads: int, instruction_set: str) -> None:
    """The backward pass splits keys, or deals heads to parts of the mask's gradient; bit for bit the same in every run."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        call = {
            "sizes": (1, 2, 1), "seqlens": (70, 600), "attn_mask": ("float32", dims), "alibi_slopes": "H", "sinks": True,
            "is_causal": "bottom_right", "dtype": dtype,
        }  # fmt: skip
        first, second = (check_call(cpu, call, "cpu") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.set_num_threads(before)
