"""attn_mask in every broadcast shape, dtype and memory order, with its gradient, and the values that mask."""

from __future__ import annotations

import pytest
import torch
from attention_calls import DTYPES, build, check, check_call, prepared, run

from fused_attention.kernels.triton import backend as triton_backend
from fused_attention.kernels.triton.mask import tile_lists

SHAPES = ("11QK", "B1QK", "1HQK", "BHQK", "B11K", "1H1K", "BH1K", "11Q1", "BHQ1", "B111", "1111")


@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("dims", SHAPES)
def test_broadcast_shapes(dims: str, kind: str, device: str) -> None:
    check_call(triton_backend, {"attn_mask": (kind, dims), "sizes": (2, 2, 1), "seqlens": (40, 70)}, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_mask_dtypes(kind: str, dtype: torch.dtype, device: str) -> None:
    check_call(triton_backend, {"attn_mask": (kind, "1HQK"), "sizes": (2, 2, 2), "seqlens": (40, 70), "dtype": dtype}, device)


@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("dims", ["11QK", "B1QK", "BH1K"])
def test_broadcast_shapes_of_a_prepared_mask(dims: str, kind: str, device: str) -> None:
    check_call(triton_backend, {"attn_mask": (kind, dims), "sizes": (2, 2, 1), "seqlens": (70, 40), "prepare": True}, device)


@pytest.mark.parametrize(
    "call",
    [
        {"attn_mask": ("bool", "BHQK"), "is_causal": "bottom_right", "key_lengths": (150, 40)},
        {"key_mask": "right", "query_lengths": (100, 7), "window": (70, None)},
        {"attn_mask": ("bool", "1H1K"), "sizes": (2, 2, 2)},
    ],
    ids=str,
)  # fmt: skip
def test_the_lists_that_kernels_make_are_those_of_prepare_mask(call: dict, device: str) -> None:
    problem, _, _ = build({"seqlens": (140, 200)} | call, device)
    made = tile_lists(problem, columns=True)
    ours = prepared(problem)
    for lists, expected in zip(made, (ours.row_tiles, ours.column_tiles), strict=True):
        assert lists.shape == expected.shape
        for line, expected_line in zip(lists.flatten(0, 2).tolist(), expected.flatten(0, 2).tolist(), strict=True):
            full, mixed = line[:2]
            assert line[: 2 + full] == expected_line[: 2 + full]
            assert line[len(line) - mixed :] == expected_line[len(line) - mixed :]


@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("memory", ["transposed", "expanded", "every other element"])
def test_mask_memory(memory: str, kind: str, device: str) -> None:
    problem, dout, dlse = build({"attn_mask": (kind, "BHQK"), "sizes": (2, 2, 2), "seqlens": (40, 70)}, device)
    mask = problem.attn_mask
    if memory == "transposed":
        problem.attn_mask = mask.mT.contiguous().mT
    elif memory == "expanded":
        problem.attn_mask = mask[:1, :, :1].expand(mask.shape)
    else:
        problem.attn_mask = mask.repeat_interleave(2, 3)[..., ::2]
    check(triton_backend, problem, dout, dlse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -2e30])
def test_what_a_float_mask_masks(lowest: float, dtype: torch.dtype, device: str) -> None:
    """finfo.min masks like -inf, also a whole row, with gradient 0."""
    problem, dout, dlse = build({"seqlens": (20, 75), "dtype": dtype, "lse_gradient": True, "sizes": (1, 1, 1)}, device)
    mask = torch.randn(20, 75, device=device)
    mask[:, ::3], mask[0] = lowest, lowest
    problem.attn_mask = mask[None, None]
    results = check(triton_backend, problem, dout, dlse)
    assert (results["lse"][:, :, 0] == -torch.inf).all()
    assert (results["attn_mask"][0, 0, 1:, ::3] == 0).all()
    assert (results["attn_mask"][0, 0, 0] == 0).all()


def test_the_lowest_float16_is_an_ordinary_number(device: str) -> None:
    problem, dout, dlse = build({"seqlens": (20, 75), "sizes": (1, 1, 1)}, device)
    problem.attn_mask = torch.full((1, 1, 20, 75), -65504.0, dtype=torch.float16, device=device)
    assert run(triton_backend, problem, dout, dlse)["lse"].isfinite().all()
    problem.attn_mask[..., 30:40] = -65376.0  # four units in the last place up: the only keys that count
    results = run(triton_backend, problem, dout, dlse)
    torch.testing.assert_close(results["lse"], torch.full_like(results["lse"], -65376.0), atol=10.0, rtol=0.0)
    assert (results["value"][:, :, :30] == 0).all()
    assert (results["value"][:, :, 30:40] != 0).all()


def test_tiles_of_one_kind(device: str) -> None:
    """Row and column blocks that hold full tiles only, mixed ones only, empty ones only, and both."""
    problem, dout, dlse = build({"attn_mask": ("bool", "BHQK"), "sizes": (1, 1, 1), "seqlens": (200, 200)}, device)
    mask = torch.ones(200, 200, dtype=torch.bool, device=device)
    mask[:64, 64:128], mask[64:128, :] = False, False
    mask[128:192, 70], mask[130, 64:128] = False, False
    mask[140, 10] = False  # the only one of its tile
    problem.attn_mask = mask[None, None]
    results = check(triton_backend, problem, dout, dlse)
    assert (results["lse"][0, 0, 64:128] == -torch.inf).all()


@pytest.mark.parametrize("prepare", [False, True])
def test_tiles_of_each_batch_element_and_head(prepare: bool, device: str) -> None:
    """Another one of the four tiles is empty in each."""
    problem, dout, dlse = build({"attn_mask": ("bool", "BHQK"), "sizes": (2, 2, 2), "seqlens": (128, 128)}, device)
    problem.attn_mask = torch.ones(2, 2, 128, 128, dtype=torch.bool, device=device)
    for batch, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        problem.attn_mask[batch, head, 64 * batch : 64 * batch + 64, 64 * head : 64 * head + 64] = False
    check(triton_backend, problem, dout, dlse, prepare=prepare)
