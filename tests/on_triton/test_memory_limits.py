"""What the Triton kernels may read and write: absent rows, packed buffers, empty inputs, far strides; and the dropout mask they draw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_calls import DTYPES, build, check, run

from fused_attention.kernels.attention import attention
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.ops import forward
from fused_attention.kernels.reference import dropout
from fused_attention.kernels.triton import backend as triton_backend

ABSENT = {"key_mask": "holes", "key_lengths": (60, 0), "query_lengths": (50, 70), "lse_gradient": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.inf, -torch.inf])
def test_infinities_in_absent_rows(stored: float, dtype: torch.dtype, device: str) -> None:
    """The other tests store NaN there."""
    check(triton_backend, *build(ABSENT | {"dtype": dtype, "attn_mask": ("float32", "11QK")}, device), stored=stored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_rows_that_attend_to_nothing_is_never_read(dtype: torch.dtype, device: str) -> None:
    """Rows before the first key of the bottom-right diagonal: their output gradient shares a tile with rows that count."""
    problem, dout, dlse = build({"seqlens": (40, 31), "is_causal": "bottom_right", "lse_gradient": True, "dtype": dtype}, device)
    results = []
    for stored in (torch.nan, 0.0):
        dout[:, :, :9], dlse[:, :, :9] = stored, stored
        results.append(run(triton_backend, problem, dout, dlse))
    assert (results[0]["lse"][:, :, :9] == -torch.inf).all()
    for name, ours in results[0].items():
        assert torch.equal(ours, results[1][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.nan, torch.inf])
def test_gradients_of_absent_keys_are_zero_whatever_the_queries_hold(stored: float, dtype: torch.dtype, device: str) -> None:
    problem, dout, dlse = build({"seqlens": (40, 40), "sizes": (1, 1, 1), "dtype": dtype}, device)
    problem.query[:, :, 3], dout[:, :, 5] = stored, stored
    problem.key_mask = torch.arange(40, device=device)[None] % 3 != 1
    results = run(triton_backend, problem, dout, dlse)
    for name in ("key", "value"):
        assert (results[name][:, :, ~problem.key_mask[0]] == 0).all()
        assert not results[name][:, :, problem.key_mask[0]].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_dims", ["BHQK", "1HQK"])
def test_an_infinite_gradient_of_a_row_stays_with_the_keys_it_attends_to(mask_dims: str, dtype: torch.dtype, device: str) -> None:
    """The gradients of scores that are masked are 0, not 0 times infinity."""
    call = {"seqlens": (40, 40), "is_causal": "top_left", "attn_mask": ("float32", mask_dims), "dtype": dtype}
    problem, dout, dlse = build(call, device)
    problem.attn_mask.nan_to_num_(neginf=0.0)
    dout[:, :, 5] = torch.inf
    results = run(triton_backend, problem, dout, dlse)
    others = torch.arange(40, device=device) != 5
    assert not results["query"][:, :, 5].isfinite().any()
    assert results["query"][:, :, others].isfinite().all()
    assert results["key"][:, :, 6:].isfinite().all()
    assert results["attn_mask"][:, :, others].isfinite().all()
    assert (results["attn_mask"][:, :, 5, 6:] == 0).all()


@pytest.mark.parametrize(("sizes", "seqlens"), [((0, 2, 2), (5, 7)), ((2, 2, 1), (0, 7)), ((2, 2, 1), (5, 0))], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"key_mask": "holes", "attn_mask": ("float32", "1HQK"), "sinks": True, "alibi_slopes": "H"}], ids=["plain", "all"]
)
def test_empty_inputs(options: dict, sizes: tuple[int, int, int], seqlens: tuple[int, int], device: str) -> None:
    check(triton_backend, *build(options | {"sizes": sizes, "seqlens": seqlens, "lse_gradient": True}, device))


@pytest.mark.parametrize("far", ["batch", "head", "row"])
def test_offsets_beyond_32_bits(far: str, device: str, tmp_path: Path) -> None:
    """Inputs and gradients whose last batch element, head or row lies beyond 2**31 elements and 2**32 bytes."""
    far_stride = 2**31 + 64
    if device == "cpu":
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far_stride + 2**16, dtype=torch.float16)
        (tmp_path / "sparse").unlink()
    else:
        memory = torch.zeros(far_stride + 2**16, dtype=torch.float16, device=device)
    shape = {"batch": (2, 1, 5, 24), "head": (1, 2, 5, 24), "row": (1, 1, 2, 24)}[far]
    strides = {"batch": (far_stride, 0, 24, 1), "head": (0, far_stride, 24, 1), "row": (0, 0, far_stride, 1)}[far]
    far_tensors = [memory[2**12 * i :].as_strided(shape, strides) for i in range(7)]
    results = []
    near = [torch.randn(shape).to(device, torch.float16) for _ in range(4)]
    for (query, key, value, dout), gradients in ((near, [torch.empty_like(near[0]) for _ in range(3)]), (far_tensors[:4], far_tensors[4:])):
        for tensor, values in zip((query, key, value, dout), near, strict=True):
            tensor.copy_(values)
        problem = make_problem("separate", (query, key, value))
        out, lse = forward(triton_backend, problem)
        triton_backend.backward(problem, out, lse, dout, None, triton_backend.Gradients(*gradients))
        results.append((out, lse, *gradients))
    for expected, ours in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_more_heads_than_16_bits_count(device: str) -> None:
    """70,000 heads: dropout's counter and the grid go past 65,535."""
    if device == "cpu":
        pytest.skip("takes minutes in the interpreter")
    query = torch.randn(35000, 2, 3, 16, device=device)
    options = {"dropout_p": 0.5, "rng_state": torch.tensor([3, 4], device=device)}
    ours, expected = (attention(query, query, query, **options, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("rng_state", [(0, 0), (2**40 + 3, 5), (-7, 2**35 + 1), (2**63 - 1, -(2**63))], ids=str)
def test_the_dropout_mask_is_the_reference_s(rng_state: tuple[int, int], device: str) -> None:
    """Equal keys give equal weights, and values that are the identity give the weights themselves."""
    query, key = torch.randn(2, 2, 37, 16, device=device), torch.zeros(2, 2, 75, 16, device=device)
    value = torch.eye(75, device=device).expand(2, 2, 75, 75)
    state = torch.tensor(rng_state, device=device)
    problem = make_problem("separate", (query, key, value), dropout_p=0.25, rng_state=state, is_causal="bottom_right")
    out, _ = forward(triton_backend, problem)
    factors = dropout(problem, 0, 2)
    visible = torch.ones(37, 75, dtype=torch.bool, device=device).tril(75 - 37)
    assert torch.equal(out != 0, (factors != 0) & visible)
    kept = out[factors.bool() & visible]
    expected = (factors / visible.sum(-1)[:, None])[factors.bool() & visible]
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=0.0)
