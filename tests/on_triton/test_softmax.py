"""The online softmax of the Triton kernels: moving maxima, large scores, rounding, and bits that stay the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_calls import DTYPES, build, check, run

from fused_attention.kernels.ops import forward
from fused_attention.kernels.reference import attention_reference
from fused_attention.kernels.triton import backend as triton_backend

KEYS_PER_STEP = 32  # the interpreter's shortest tile
RISES = {
    "rising by 3": 3.0,
    "rising by 7.9": 7.9,
    "rising by 8.1": 8.1,
    "rising by 50": 50.0,
    "falling by 8.1": -8.1,
    "falling by 50": -50.0,
}
MOVED = {"sizes": (1, 1, 1), "seqlens": (20, 200)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("through", ["mask", "keys"])
@pytest.mark.parametrize("rise", RISES)
def test_moving_maxima(rise: str, through: str, dtype: torch.dtype, device: str) -> None:
    """Scores that change by so many log2 units from tile to tile, in the loop with a bias and in the one without."""
    problem, dout, dlse = build(MOVED | {"dtype": dtype}, device)
    steps = torch.arange(200, device=device) // KEYS_PER_STEP * RISES[rise] * 0.6931
    if through == "mask":
        problem.attn_mask = steps.expand(1, 1, 20, 200).contiguous()
    else:
        problem.query[..., 0], problem.key[..., 0] = 1.0, steps.to(dtype)
        problem.scale = 1.0
    check(triton_backend, problem, dout, dlse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["first tiles masked", "first tiles masked by key_mask", "spike in the last key"])
def test_edges(case: str, dtype: torch.dtype, device: str) -> None:
    problem, dout, dlse = build(MOVED | {"dtype": dtype}, device)
    mask = torch.zeros(1, 1, 20, 200, device=device)
    if case == "first tiles masked":
        mask[..., :150] = -torch.inf
        problem.attn_mask = mask
    elif case == "first tiles masked by key_mask":
        problem.key_mask = torch.arange(200, device=device)[None] >= 150
    else:
        mask[..., -1] = 12.0  # 160,000 times the others: they count for half a percent
        problem.attn_mask = mask
    check(triton_backend, problem, dout, dlse)


@pytest.mark.parametrize("num_rows", [40, 2])  # two rows are decoded
def test_nan_scores_give_nan_through_softcap(num_rows: int, device: str) -> None:
    problem, _, _ = build({"softcap": 1.5, "seqlens": (num_rows, 75), "sizes": (1, 1, 1)}, device)
    problem.query[0, 0, 1] = torch.nan
    out, lse = forward(triton_backend, problem)
    for result in (out[0, 0].amax(-1), lse[0, 0]):
        assert result.isnan().nonzero().flatten().tolist() == [1]


def test_float16_scores_beyond_its_range(device: str) -> None:
    problem, dout, dlse = build({"dtype": torch.float16, "scale": 1.0, "sizes": (1, 1, 1)}, device)
    problem.query[:], problem.key[:] = problem.query.sign() * 80, problem.key.sign() * 80  # |scores| up to 102,400
    check(triton_backend, problem, dout, dlse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_beyond_the_exponent_range(dtype: torch.dtype, device: str) -> None:
    """At scores of 1e8 the last place is 16: a multiply-add puts up to half of it into the exponent of the largest weight."""
    problem, _, _ = build({"dtype": dtype, "scale": 1e7}, device)
    out, lse = forward(triton_backend, problem)
    exact = attention_reference(replace(problem, inputs=(), query=problem.query.double(), key=problem.key.double()))
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=0.0)
    decided = (out.double() - exact[0]).abs().amax(-1) < 0.05  # rows whose two largest scores rounding does not exchange
    assert decided.double().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_not_truncated(dtype: torch.dtype, device: str) -> None:
    """Against float32 results from the same values: truncation would lean to zero by half a unit in the last place."""
    problem, dout, _ = build({"dtype": dtype, "seqlens": (64, 64), "head_dims": (64, 64)}, device)
    exact_inputs = tuple(tensor.float() for tensor in problem.inputs)
    exact_problem = replace(problem, inputs=exact_inputs, query=exact_inputs[0], key=exact_inputs[1], value=exact_inputs[2])
    rounded, exact = run(triton_backend, problem, dout, None), run(triton_backend, exact_problem, dout.float(), None)
    for name in ("out", "query", "key", "value"):
        ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(exact[name].abs().clamp(min=1e-3))))
        lean = ((rounded[name].float() - exact[name]) * exact[name].sign() / ulp)[exact[name].abs() > 1e-3].mean().item()
        assert abs(lean) < 0.2, f"{name} leans by {lean:.3f} units in the last place"


REPEATED: dict[str, dict[str, Any]] = {
    "causal, dropout": {"is_causal": "top_left", "dropout_p": 0.25},
    "one mask for all": {"attn_mask": ("float32", "11QK"), "sizes": (2, 2, 1), "alibi_slopes": "H", "sinks": True},
    "one mask value per row": {"attn_mask": ("float16", "1HQ1"), "key_mask": "holes"},
    "one mask value per key": {"attn_mask": ("bfloat16", "111K"), "sizes": (2, 2, 1)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REPEATED)
def test_bit_identical_from_run_to_run(case: str, dtype: torch.dtype, device: str) -> None:
    problem, dout, dlse = build(REPEATED[case] | {"dtype": dtype}, device)
    first, second = (run(triton_backend, problem, dout, dlse) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
