"""The single-tile CUDA kernels in the emulator: every feature, instance and size against the accuracy rule, without a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attention_calls
import cuda_emulation
import pytest
import torch
from accuracy import assert_accurate, assert_lse_accurate, exact_and_eager
from attention_calls import CALL, FEATURES, build, run
from cuda_emulation import A100, RTX_4090, SMALL, EmulatedGpu

from csrc.cuda.instances.manifest import INSTANCES, Instance
from fused_attention import attention_varlen
from fused_attention.kernels.attention import attention, attention_kv_packed, attention_qkv_packed
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cuda as cuda_backend
from fused_attention.kernels.ops import forward
from fused_attention.kernels.reference import padded

pytestmark = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST: dict[str, Any] = {"head_dims": (32, 32), "dtype": torch.bfloat16}


def check_call(call: dict[str, Any], *, schedule: int = 0, gpu: cuda_emulation.Gpu = SMALL, stored: float = torch.nan) -> EmulatedGpu:
    """`attention_calls.check` of forward and backward, one launch each."""
    call = CALL | call
    problem, dout, dlse = build(call, "cpu")
    with EmulatedGpu(schedule, gpu) as emulated:
        attention_calls.check(cuda_backend, problem, dout, dlse, call["memory"], stored=stored, prepare=call["prepare"])
    assert ["single_tile_forward" in emulated.launched[0], *("single_tile_backward" in name for name in emulated.launched[1:])] == [
        True,
        True,
    ]
    return emulated


def is_covered(call: dict[str, Any]) -> bool:
    problem, _, _ = build(CALL | call, "cpu")
    mask = problem.attn_mask
    return mask is None or not mask.is_floating_point() or cuda_backend._mask_gradient_kind(problem, mask.shape) in ("stored", "over rows")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", [name for name, call in FEATURES.items() if is_covered(call)])
def test_features(feature: str, dtype: str) -> None:
    check_call(SMALLEST | {"dtype": DTYPES[dtype]} | FEATURES[feature], schedule=sum(feature.encode()) % 3)


@pytest.mark.parametrize("feature", [name for name, call in FEATURES.items() if not is_covered(call)])
def test_the_forward_with_masks_whose_gradients_other_kernels_compute(feature: str) -> None:
    emulated = cuda_emulation.check_call(SMALLEST | FEATURES[feature], gpu=SMALL)
    assert emulated.launched == ["sm80_single_tile_forward_32x32_bf16_bias"]


# Each class with as much of what it can do as fits together, and without any of it.
CLASSES: dict[str, dict[str, Any]] = {
    "masked": {"key_mask": "holes", "query_lengths": (300, 12), "softcap": 2.0, "alibi_slopes": "H", "sinks": True, "lse_gradient": True},
    "bias": {"attn_mask": ("bfloat16", "BHQK"), "key_lengths": (300, 10), "dropout_p": 0.25, "is_causal": "bottom_right"},
}
# Around the sides of a warp's 16 rows or keys, of a word's 32 keys, of a step's 32 rows; the most keys there are, and more rows.
SEQLENS = [(1, 1), (15, 17), (16, 16), (17, 15), (33, 64), (64, 33), (127, 128), (128, 127), (129, 96)]
BACKWARD = [row for row in INSTANCES if row.pass_name == "single_tile_backward"]


@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
@pytest.mark.parametrize("row", BACKWARD, ids=lambda row: row.name.removeprefix("sm80_single_tile_backward_"))
def test_every_instance_at_the_sides_of_what_a_warp_has(row: Instance, seqlens: tuple[int, int]) -> None:
    call = {"dtype": DTYPES[row.dtype], "head_dims": (row.head_dim_qk, row.head_dim_v), "seqlens": seqlens, "sizes": (2, 2, 1)}
    if seqlens[0] == 1:
        call["query_lengths"] = (1, 1)  # not decoded
    emulated = check_call(CLASSES[row.feature_class] | call, schedule=SEQLENS.index(seqlens) % 3)
    assert emulated.launched == [row.name.replace("backward", "forward"), row.name]


@pytest.mark.parametrize("seqlens", [(20, 20), (33, 33), (65, 128), (128, 65)], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_nothing_masked(head_dim: int, seqlens: tuple[int, int]) -> None:
    check_call({"dtype": torch.float16, "head_dims": (head_dim, head_dim), "seqlens": seqlens, "sizes": (2, 2, 2)}, gpu=RTX_4090)


@pytest.mark.parametrize("head_dims", [(8, 8), (40, 40), (72, 72), (64, 32), (72, 40), (120, 8)], ids=str)
@pytest.mark.parametrize("options", CLASSES)
def test_head_dims_between_those_of_the_instances(head_dims: tuple[int, int], options: str) -> None:
    check_call(CLASSES[options] | {"dtype": torch.bfloat16, "head_dims": head_dims, "seqlens": (40, 127), "sizes": (2, 1, 1)})


# (batch, query heads, key heads), (rows, keys): warps, warps of a group, groups of a block of the forward; then of the backward.
GROUPS = {
    "four pieces of one head": ((2, 1, 1), (64, 40), (4, 4, 1), (3, 3, 1)),
    "three": ((2, 1, 1), (40, 20), (3, 3, 1), (2, 2, 1)),
    "five, in two units": ((2, 1, 1), (65, 20), (3, 3, 1), (2, 2, 1)),
    "four problems to a block, the last alone": ((17, 1, 1), (16, 16), (4, 1, 4), (4, 1, 4)),
    "two problems to a block": ((9, 1, 1), (20, 20), (4, 2, 2), (4, 2, 2)),
    "heads that share keys share a group": ((1, 4, 1), (17, 33), (4, 4, 1), (3, 3, 1)),
    "more heads than a group has warps": ((2, 6, 1), (16, 128), (3, 3, 1), (8, 8, 1)),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups_of_warps(case: str) -> None:
    sizes, seqlens, forward, backward = GROUPS[case]
    lengths = tuple((7 * i + 3) % (seqlens[0] + 1) for i in range(sizes[0]))
    call = {"sizes": sizes, "seqlens": seqlens, "query_lengths": lengths, "key_lengths": lengths[::-1], "is_causal": "bottom_right"}
    emulated = check_call(SMALLEST | call, schedule=len(case) % 3)
    for (_, threads, _), (warps, of_group, groups) in zip(emulated.grids, (forward, backward), strict=True):
        assert threads == 32 * warps == 32 * of_group * groups
    units = [sizes[0] * sizes[2], sizes[0] * sizes[2]]
    units[0] *= -(-(sizes[1] // sizes[2] * -(-seqlens[0] // 16)) // forward[1])
    assert [blocks for blocks, _, _ in emulated.grids] == [-(-u // kind[2]) for u, kind in zip(units, (forward, backward), strict=True)]


def test_small_problems_take_little_shared_memory() -> None:
    """Q of two warps, and 32 keys and values; in the backward 32 keys, values and scores, and a tile of rows with its statistics."""
    emulated = check_call(SMALLEST | {"seqlens": (20, 20), "head_dims": (64, 64), "sizes": (1, 1, 1)})
    assert [shared for _, _, shared in emulated.grids] == [
        2 * 64 * (32 + 2 * 32),
        2 * 32 * (2 * 64 + 32) + 2 * 32 * 2 * 64 + 2 * 32 * 4 + 128,
    ]


@pytest.mark.parametrize("dims", ["BHQK", "BH1K", "111K", "1H1K"])
@pytest.mark.parametrize("mask_dtype", ["float32", "bfloat16", "float16", "float64"])
def test_mask_gradients(dims: str, mask_dtype: str) -> None:
    call = {"attn_mask": (mask_dtype, dims), "sizes": (2, 2, 2), "seqlens": (70, 75), "key_mask": "holes", "query_lengths": (70, 20)}
    check_call(SMALLEST | call)


# Words of bits from rows that start at multiples of 16 bytes, and from others.
BOOL_MASKS = {
    "aligned": lambda m, n: torch.rand(2, 2, m, n) > 0.3,
    "one element later": lambda m, n: torch.rand(2, 2, m, n + 3)[..., 1 : n + 1] > 0.3,
    "unaligned view": lambda m, n: (torch.rand(2, 2, m, n + 3) > 0.3)[..., 1 : n + 1],
    "transposed": lambda m, n: (torch.rand(1, 2, n, m) > 0.3).transpose(2, 3),
    "by key": lambda m, n: torch.rand(2, 1, 1, n) > 0.3,
    "by row": lambda m, n: torch.rand(1, 2, m, 1) > 0.3,
    "nothing": lambda m, n: torch.zeros(1, 1, m, n, dtype=torch.bool),
}


@pytest.mark.parametrize("seqlens", [(70, 128), (33, 75)], ids=str)
@pytest.mark.parametrize("mask", BOOL_MASKS)
def test_bool_masks_in_any_memory(mask: str, seqlens: tuple[int, int]) -> None:
    problem, dout, dlse = build(CALL | SMALLEST | {"seqlens": seqlens, "sizes": (2, 2, 2), "query_lengths": (60, 33)}, "cpu")
    problem.attn_mask = BOOL_MASKS[mask](*seqlens)
    with EmulatedGpu(1, SMALL) as emulated:
        attention_calls.check(cuda_backend, problem, dout, dlse)
    assert emulated.launched == ["sm80_single_tile_forward_32x32_bf16_masked", "sm80_single_tile_backward_32x32_bf16_masked"]


@pytest.mark.parametrize("memory", ["heads first", "sequence first", "one batch element expanded"])
def test_memory_orders(memory: str) -> None:
    check_call(SMALLEST | {"memory": ("batch first", memory, memory, memory), "sizes": (2, 2, 2), "is_causal": "top_left"})


@pytest.mark.parametrize("stored", [torch.inf, -torch.inf])
@pytest.mark.parametrize("mask", [None, ("float32", "BHQK")], ids=str)
def test_infinities_in_absent_rows(stored: float, mask: tuple | None) -> None:
    """The other tests store NaN there."""
    call = {"key_mask": "holes", "key_lengths": (60, 0), "query_lengths": (50, 70), "attn_mask": mask, "lse_gradient": True}
    check_call(SMALLEST | call, stored=stored)


@pytest.mark.parametrize("num_rows", [17, 40])
def test_nan_scores_give_nan_in_their_row_alone(num_rows: int) -> None:
    problem, _, _ = build(CALL | SMALLEST | {"softcap": 1.5, "seqlens": (num_rows, 75), "sizes": (1, 1, 1)}, "cpu")
    problem.query[0, 0, 1] = torch.nan
    with EmulatedGpu() as emulated:
        out, lse = forward(cuda_backend, problem)
    assert "single_tile" in emulated.launched[0]
    for result in (out[0, 0].amax(-1), lse[0, 0]):
        assert result.isnan().nonzero().flatten().tolist() == [1]


def test_float16_scores_beyond_its_range() -> None:
    problem, dout, dlse = build(CALL | {"dtype": torch.float16, "scale": 1.0, "sizes": (1, 1, 1)}, "cpu")
    problem.query[:], problem.key[:] = problem.query.sign() * 80, problem.key.sign() * 80  # |scores| up to 102,400
    with EmulatedGpu(gpu=SMALL):
        attention_calls.check(cuda_backend, problem, dout, dlse)


@pytest.mark.parametrize("far", ["batch", "head", "row"])
def test_offsets_beyond_32_bits(far: str, tmp_path: Path) -> None:
    """Inputs whose last batch element, head or row lies beyond 2**31 elements and 2**32 bytes."""
    far_stride = 2**31 + 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far_stride + 2**16, dtype=torch.float16)
    (tmp_path / "sparse").unlink()
    sizes = {"batch": (2, 1, 20), "head": (1, 2, 20), "row": (1, 1, 2)}[far]
    strides = {"batch": (far_stride, 0, 24, 1), "head": (0, far_stride, 24, 1), "row": (0, 0, far_stride, 1)}[far]
    near = [torch.randn(*sizes, 24, dtype=torch.float16) for _ in range(3)]
    distant = [memory[2**12 * i :].as_strided((*sizes, 24), strides) for i in range(3)]
    dout, lengths = torch.randn(*sizes, 24, dtype=torch.float16), torch.full(sizes[:1], sizes[2])
    results = []
    for inputs in (near, distant):
        for tensor, values in zip(inputs, near, strict=True):
            tensor.copy_(values)
        with EmulatedGpu(gpu=SMALL) as gpu:
            results.append(run(cuda_backend, make_problem("separate", tuple(inputs), query_lengths=lengths), dout, None))
        assert all("single_tile" in name for name in gpu.launched)
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


@pytest.mark.parametrize(("sizes", "seqlens"), [((0, 2, 2), (5, 7)), ((2, 2, 1), (0, 7)), ((2, 2, 1), (40, 0))], ids=str)
@pytest.mark.parametrize("options", [{}, {"key_mask": "holes", "sinks": True, "alibi_slopes": "H"}], ids=["plain", "all"])
def test_empty_inputs(options: dict, sizes: tuple[int, int, int], seqlens: tuple[int, int]) -> None:
    call = CALL | options | {"sizes": sizes, "seqlens": seqlens, "lse_gradient": True, "dtype": torch.bfloat16}
    problem, dout, dlse = build(call, "cpu")
    with EmulatedGpu(gpu=SMALL):
        attention_calls.check(cuda_backend, problem, dout, dlse)


def test_bits_stay_the_same_whatever_the_schedule() -> None:
    call = {"key_mask": "holes", "dropout_p": 0.25, "alibi_slopes": "BH", "sizes": (2, 4, 2), "attn_mask": ("float32", "BHQK")}
    problem, dout, dlse = build(CALL | SMALLEST | call, "cpu")
    results = []
    for schedule in range(3):
        with EmulatedGpu(schedule, A100):
            results.append(run(cuda_backend, problem, dout, dlse))
    for result in results[1:]:
        for name, gradient in result.items():
            assert torch.equal(gradient, results[0][name]), name


@pytest.mark.parametrize("layout", ["qkv", "kv"])
def test_autograd_through_packed_projections(layout: str) -> None:
    projection = torch.randn(2, 70, 3, 2, 32).bfloat16()
    dout, options = torch.randn(2, 2, 70, 32).bfloat16(), {"is_causal": True, "key_mask": torch.rand(2, 70) > 0.3, "backend": "cuda"}
    separate = [tensor.transpose(1, 2).clone().requires_grad_() for tensor in projection.unbind(2)]
    with EmulatedGpu(gpu=SMALL) as gpu:
        attention(*separate, **options).backward(dout)
        if layout == "qkv":
            packed = [projection.clone().requires_grad_()]
            attention_qkv_packed(*packed, **options).backward(dout)
        else:
            packed = [separate[0].detach().clone().requires_grad_(), projection[:, :, 1:].clone().requires_grad_()]
            attention_kv_packed(*packed, **options).backward(dout)
    assert all("single_tile" in name for name in gpu.launched)
    query, *keys = (tensor.grad.transpose(1, 2) for tensor in separate)
    expected = [torch.stack([query, *keys], dim=2)] if layout == "qkv" else [query.transpose(1, 2), torch.stack(keys, dim=2)]
    for ours, theirs in zip(packed, expected, strict=True):
        assert torch.equal(ours.grad, theirs)


VARLEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "bottom right, window": {"is_causal": "bottom_right", "window": (20, 3)},
    "softcap, sinks": {"softcap": 2.0, "sinks": torch.linspace(-1, 1, 4)},
    "slopes": {"alibi_slopes": torch.linspace(0.1, 1, 4)},
    "query lengths": {"query_lengths": torch.tensor([2, 100, 9, 0, 1]), "is_causal": "bottom_right"},
    "dropout": {"dropout_p": 0.25, "rng_state": torch.tensor([3, 4])},
}


@pytest.mark.parametrize("feature", VARLEN)
def test_packed_sequences(feature: str) -> None:
    lengths_q, lengths_k, tail = (5, 0, 90, 7, 2), (4, 3, 0, 120, 66), 3
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    shapes = ((sum(lengths_q) + tail, 4), (sum(lengths_k) + tail, 2), (sum(lengths_k) + tail, 2))
    inputs = [torch.randn(*shape, 32).bfloat16() for shape in shapes]
    dout = torch.randn(*shapes[0], 32).bfloat16()
    options = VARLEN[feature]
    packed = make_problem("varlen", tuple(inputs), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=90, max_seqlen_k=120, **options)
    in_batch = padded(packed)
    batch_dout = torch.zeros(5, 4, 90, 32, dtype=torch.bfloat16)
    for index, length in enumerate(lengths_q):
        batch_dout[index, :, :length] = dout[cu_q[index] : cu_q[index + 1]].transpose(0, 1)
    exact, eager = exact_and_eager(in_batch, batch_dout, None)
    for tensor in (*inputs, dout):
        tensor[-tail:] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with EmulatedGpu(len(feature) % 3, SMALL) as gpu:
        out, lse = attention_varlen(*leaves, cu_q, cu_k, 90, 120, **options, return_lse=True, backend="cuda")
        out.backward(dout)
    assert ["single_tile_forward" in gpu.launched[0], "single_tile_backward" in gpu.launched[1], len(gpu.launched)] == [True, True, 2]
    assert (out[-tail:] == 0).all()
    assert (lse[:, -tail:] == -torch.inf).all()
    for name, leaf in zip(("query", "key", "value"), leaves, strict=True):
        assert (leaf.grad[-tail:] == 0).all(), name
    for index, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, keys = slice(cu_q[index], cu_q[index + 1]), slice(cu_k[index], cu_k[index + 1])
        assert_accurate("out", "out", out[rows].transpose(0, 1), eager["out"][index, :, :length_q], exact["out"][index, :, :length_q])
        assert_lse_accurate(lse[:, rows], exact["lse"][index, :, :length_q])
        for name, leaf, tokens, length in zip(
            ("query", "key", "value"), leaves, (rows, keys, keys), (length_q, length_k, length_k), strict=True
        ):
            ours = leaf.grad[tokens].transpose(0, 1)
            assert_accurate(f"gradient of {name}", "gradient", ours, eager[name][index, :, :length], exact[name][index, :, :length])


# Which calls the other kernels take.

LONG_FORWARD = {
    "more than 128 keys": {"seqlens": (40, 129), "query_lengths": (40, 3)},
    "more than 512 rows": {"seqlens": (513, 20), "query_lengths": (40, 3)},
    "head_dim above 128": {"head_dims": (136, 136), "query_lengths": (40, 3)},
}
LONG_BACKWARD = {
    "more than 128 keys": {"seqlens": (40, 129)},
    "a mask's gradient over keys": {"attn_mask": ("float32", "BHQ1"), "sizes": (1, 2, 2)},
    "more than 512 rows of few heads": {"seqlens": (257, 16), "sizes": (1, 2, 1)},
}


@pytest.mark.parametrize("case", LONG_FORWARD)
def test_forwards_of_other_kernels(case: str) -> None:
    assert cuda_emulation.check_call(SMALLEST | LONG_FORWARD[case], gpu=SMALL).launched[0].startswith("sm80_forward")


@pytest.mark.parametrize("case", LONG_BACKWARD)
def test_backwards_of_other_kernels(case: str) -> None:
    problem, dout, dlse = build(CALL | SMALLEST | LONG_BACKWARD[case], "cpu")
    with EmulatedGpu(gpu=SMALL) as emulated:
        attention_calls.check(cuda_backend, problem, dout, dlse)
    assert any("sm80_backward_query" in name for name in emulated.launched)


def test_many_rows_of_many_heads_stay() -> None:
    check_call(SMALLEST | {"seqlens": (257, 16), "sizes": (4, 2, 1), "key_lengths": (16, 3, 0, 9), "query_lengths": (257, 3, 30, 100)})


def test_they_can_be_switched_off() -> None:
    problem, dout, dlse = build(CALL | SMALLEST | {"key_mask": "holes"}, "cpu")
    with cuda_backend.single_tile_kernels(False), EmulatedGpu(gpu=SMALL) as emulated:
        attention_calls.check(cuda_backend, problem, dout, dlse)
    assert not any("single_tile" in name for name in emulated.launched)
    check_call(SMALLEST | {"key_mask": "holes"})
