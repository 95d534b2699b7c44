"""The CUDA forward kernels in the emulator: every feature, instance and awkward size, against the accuracy rule, without a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_emulation
import pytest
import torch
from accuracy import assert_accurate, assert_lse_accurate, exact_and_eager
from attention_calls import FEATURES, MEMORY, build, guarded
from cuda_emulation import RTX_4090, SMALL, EmulatedGpu, check, check_call

from csrc.cuda.instances.manifest import INSTANCES, Instance
from fused_attention import attention_varlen
from fused_attention.kernels.attention import attention, attention_kv_packed, attention_qkv_packed
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cuda as cuda_backend
from fused_attention.kernels.ops import forward
from fused_attention.kernels.reference import attention_reference, dropout, padded

pytestmark = [
    pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not())),
    pytest.mark.usefixtures("no_single_tile_kernels"),  # test_cuda_single_tile.py is theirs
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST = {"head_dims": (32, 32), "seqlens": (140, 150)}  # two blocks of rows, three of keys, a rest in both directions


def schedule_of(name: str) -> int:
    """One of the three schedules; over all tests every one has its share."""
    return sum(name.encode()) % 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, dtype: str) -> None:
    check_call(SMALLEST | {"dtype": DTYPES[dtype]} | FEATURES[feature], schedule=schedule_of(feature + dtype), gpu=SMALL)


# What makes the host code choose the instances of a class, with as much of what the class can do as fits together.
CLASSES: dict[tuple[str, bool], dict[str, Any]] = {
    ("plain", False): {"is_causal": "bottom_right"},
    ("plain", True): {"dropout_p": 0.25, "is_causal": "top_left"},
    ("masked", False): {"key_mask": "holes", "query_lengths": (300, 100), "softcap": 2.0, "alibi_slopes": "H", "sinks": True},
    ("bias", False): {"attn_mask": ("bfloat16", "1HQK"), "key_lengths": (300, 100), "dropout_p": 0.25},
}
FORWARD = [row for row in INSTANCES if row.pass_name == "forward"]


def seqlens_of(row: Instance) -> list[tuple[int, int]]:
    """Queries and keys around the sides of the instance's tile."""
    m, n = row.block_m, row.block_n
    return [(1, n + 1), (m - 1, 2 * n + 3), (m + 1, n - 1), (2 * m + 3, 1)]


@pytest.mark.parametrize("seqlens", range(4))
@pytest.mark.parametrize("row", FORWARD, ids=lambda row: row.name)
def test_every_instance_around_the_sides_of_its_tile(row: Instance, seqlens: int) -> None:
    call = {
        "dtype": DTYPES[row.dtype], "head_dims": (row.head_dim_qk, row.head_dim_v), "seqlens": seqlens_of(row)[seqlens], "sizes": (2, 2, 1),
    }  # fmt: skip
    emulated = check_call(call | CLASSES[row.feature_class, row.dropout], schedule=seqlens, gpu=SMALL)
    decodes = call["seqlens"][0] == 1 and row.feature_class == "plain" and not row.dropout
    assert emulated.launched[-1].startswith("sm80_decode" if decodes else row.name)


@pytest.mark.parametrize("head_dims", [(8, 8), (40, 40), (72, 72), (80, 80), (64, 32), (72, 40), (160, 160), (200, 120), (248, 8)], ids=str)
@pytest.mark.parametrize("options", CLASSES.values(), ids=lambda options: "-".join(options))
def test_head_dims_between_those_of_the_instances(head_dims: tuple[int, int], options: dict[str, Any]) -> None:
    check_call({"dtype": torch.bfloat16, "head_dims": head_dims, "seqlens": (40, 127), **options}, gpu=SMALL)


@pytest.mark.parametrize("memory", [memory for memory in MEMORY if memory != "unaligned slices"])
def test_memory_orders(memory: str) -> None:
    order = ("batch first", memory, memory, "batch first") if "expanded" in memory else (memory,) * 4
    check_call(SMALLEST | {"dtype": torch.bfloat16, "memory": order, "sizes": (2, 2, 2), "is_causal": "top_left"}, gpu=SMALL)


def test_unaligned_inputs_are_refused_in_words() -> None:
    strides, _, _ = build({"dtype": torch.bfloat16, "memory": ("unaligned slices",) * 4}, "cpu")
    query, key, value = torch.randn(3 * 2 * 5 * 16 + 1, dtype=torch.bfloat16)[1:].view(3, 1, 2, 5, 16)
    address = make_problem("separate", (query, key.clone(), value))
    with EmulatedGpu():
        reasons = [cuda_backend.unsupported_reasons(problem) for problem in (strides, address)]
        with pytest.raises(ValueError, match="the address of query is not a multiple of 16 bytes"):
            attention(*address.inputs, backend="cuda")
    assert [reason.split(",")[0] for reason in reasons[0]] == ["the strides of query", "the strides of key", "the strides of value"]
    assert reasons[1] == [f"the address of {name} is not a multiple of 16 bytes" for name in ("query", "value")]


# Masks whose pairs lie unaligned, whose keys do not follow each other, whose dims are broadcast.
MASKS = {
    "one element later": lambda m, n: torch.randn(1, 2, m, n + 3)[..., 1 : n + 1],
    "transposed": lambda m, n: torch.randn(1, 2, n, m).transpose(2, 3),
    "every other key": lambda m, n: torch.randn(2, 1, m, 2 * n)[..., ::2],
    "by key": lambda m, n: torch.randn(2, 1, 1, n),
    "by row": lambda m, n: torch.randn(1, 2, m, 1),
    "one value": lambda m, n: torch.randn(1, 1, 1, 1),
}


@pytest.mark.parametrize("mask_dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("mask", MASKS)
def test_float_masks_in_any_memory(mask: str, mask_dtype: str) -> None:
    problem, _, _ = build({"dtype": torch.float16, "head_dims": (32, 32), "seqlens": (70, 131), "sizes": (2, 2, 2)}, "cpu")
    attn_mask = MASKS[mask](70, 131).to(getattr(torch, mask_dtype))
    attn_mask[..., ::3, :] = -65504.0 if mask_dtype == "float16" else -3e38  # the first is an ordinary number, the second masks
    problem.attn_mask = attn_mask
    check(problem, gpu=SMALL)


RISES = {"3": 3.0, "7.9": 7.9, "8.1": 8.1, "50": 50.0, "-8.1": -8.1, "-50": -50.0}
MOVED = {"dtype": torch.bfloat16, "head_dims": (32, 32), "seqlens": (20, 400), "sizes": (1, 1, 1)}


@pytest.mark.parametrize("through", ["mask", "keys"])
@pytest.mark.parametrize("rise", RISES)
def test_moving_maxima(rise: str, through: str) -> None:
    """Scores that change by so many log2 units from tile to tile."""
    problem, _, _ = build(MOVED, "cpu")
    steps = torch.arange(400) // 64 * RISES[rise] * 0.6931
    if through == "mask":
        problem.attn_mask = steps.expand(1, 1, 20, 400).contiguous()
    else:
        problem.query[..., 0], problem.key[..., 0] = 1.0, steps.bfloat16()
        problem.scale = 1.0
    check(problem, gpu=SMALL)


@pytest.mark.parametrize("case", ["first tiles masked", "first tiles masked by key_mask", "spike in the last key"])
def test_edges_of_the_softmax(case: str) -> None:
    problem, _, _ = build(MOVED, "cpu")
    mask = torch.zeros(1, 1, 20, 400)
    if case == "first tiles masked by key_mask":
        problem.key_mask = torch.arange(400)[None] >= 150
    else:
        mask[..., :150] = -torch.inf if case == "first tiles masked" else 0.0
        mask[..., -1] = 12.0
        problem.attn_mask = mask
    check(problem, gpu=SMALL)


@pytest.mark.parametrize("num_rows", [40, 2])  # two rows are decoded
def test_nan_scores_give_nan_in_their_row_alone(num_rows: int) -> None:
    problem, _, _ = build({"dtype": torch.bfloat16, "softcap": 1.5, "seqlens": (num_rows, 75), "sizes": (1, 1, 1)}, "cpu")
    problem.query[0, 0, 1] = torch.nan
    with EmulatedGpu():
        out, lse = forward(cuda_backend, problem)
    for result in (out[0, 0].amax(-1), lse[0, 0]):
        assert result.isnan().nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("num_rows", [40, 2])
def test_float16_scores_beyond_its_range(num_rows: int) -> None:
    problem, _, _ = build({"dtype": torch.float16, "scale": 1.0, "sizes": (1, 1, 1), "seqlens": (num_rows, 75)}, "cpu")
    problem.query[:], problem.key[:] = problem.query.sign() * 80, problem.key.sign() * 80  # |scores| up to 102,400
    check(problem, gpu=SMALL)


@pytest.mark.parametrize("stored", [torch.inf, -torch.inf])
@pytest.mark.parametrize("mask", [None, ("float32", "11QK")], ids=str)
def test_infinities_in_absent_rows(stored: float, mask: tuple | None) -> None:
    """The other tests store NaN there."""
    call = {"key_mask": "holes", "key_lengths": (60, 0), "query_lengths": (50, 70), "attn_mask": mask, "dtype": torch.bfloat16}
    check(build(call, "cpu")[0], stored=stored)


@pytest.mark.parametrize(
    ("sizes", "seqlens"), [((0, 2, 2), (5, 7)), ((2, 2, 1), (0, 7)), ((2, 2, 1), (5, 0)), ((2, 2, 1), (70, 0))], ids=str
)
@pytest.mark.parametrize("options", [{}, {"key_mask": "holes", "attn_mask": ("float32", "1HQK"), "sinks": True}], ids=["plain", "all"])
def test_empty_inputs(options: dict, sizes: tuple[int, int, int], seqlens: tuple[int, int]) -> None:
    check(build(options | {"sizes": sizes, "seqlens": seqlens, "dtype": torch.bfloat16}, "cpu")[0])


@pytest.mark.parametrize("num_rows", [40, 2])
@pytest.mark.parametrize("far", ["batch", "head", "row"])
def test_offsets_beyond_32_bits(far: str, num_rows: int, tmp_path: Path) -> None:
    """Inputs whose last batch element, head or row lies beyond 2**31 elements and 2**32 bytes."""
    far_stride = 2**31 + 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far_stride + 2**16, dtype=torch.float16)
    (tmp_path / "sparse").unlink()
    sizes = {"batch": (2, 1, num_rows), "head": (1, 2, num_rows), "row": (1, 1, 2)}[far]
    strides = {"batch": (far_stride, 0, 24, 1), "head": (0, far_stride, 24, 1), "row": (0, 0, far_stride, 1)}[far]
    near = [torch.randn(*sizes, 24, dtype=torch.float16) for _ in range(3)]
    distant = [memory[2**12 * i :].as_strided((*sizes, 24), strides) for i in range(3)]
    results = []
    for inputs in (near, distant):
        for tensor, values in zip(inputs, near, strict=True):
            tensor.copy_(values)
        with EmulatedGpu(gpu=SMALL._replace(multiprocessors=1)) as gpu:
            results.append(forward(cuda_backend, make_problem("separate", tuple(inputs))))
        assert ("decode" in gpu.launched[0]) == (sizes[2] == 2)
    for expected, ours in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("rng_state", [(0, 0), (2**40 + 3, 5), (-7, 2**35 + 1), (2**63 - 1, -(2**63))], ids=str)
def test_the_dropout_mask_is_the_reference_s(rng_state: tuple[int, int]) -> None:
    """Equal keys give equal weights, and values that are the identity give the weights themselves."""
    query, key = torch.randn(2, 2, 37, 80, dtype=torch.float16), torch.zeros(2, 2, 75, 80, dtype=torch.float16)
    value = torch.nn.functional.pad(torch.eye(75, dtype=torch.float16), (0, 5)).expand(2, 2, 75, 80)
    problem = make_problem("separate", (query, key, value), dropout_p=0.25, rng_state=torch.tensor(rng_state), is_causal="bottom_right")
    with EmulatedGpu():
        out = forward(cuda_backend, problem)[0][..., :75]
    factors = dropout(problem, 0, 2)
    visible = torch.ones(37, 75, dtype=torch.bool).tril(75 - 37)
    assert torch.equal(out != 0, (factors != 0) & visible)
    kept = out[factors.bool() & visible].float()
    torch.testing.assert_close(kept, (factors / visible.sum(-1)[:, None])[factors.bool() & visible], rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("layout", ["qkv", "kv"])
def test_packed_projections(layout: str) -> None:
    projection = torch.randn(2, 70, 3, 2, 32).bfloat16()
    options = {"is_causal": True, "key_mask": torch.rand(2, 70) > 0.3}
    query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in projection.unbind(2))
    with EmulatedGpu(gpu=SMALL):
        expected = attention(query, key, value, **options, backend="cuda")
        if layout == "qkv":
            out = attention_qkv_packed(projection, **options, backend="cuda")
        else:
            out = attention_kv_packed(query, projection[:, :, 1:].contiguous(), **options, backend="cuda")
    assert torch.equal(out, expected)


VARLEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right, window": {"is_causal": "bottom_right", "window": (20, 3)},
    "softcap, slopes and sinks": {"softcap": 2.0, "alibi_slopes": torch.linspace(0.1, 1, 4), "sinks": torch.linspace(-1, 1, 4)},
    "query lengths": {"query_lengths": torch.tensor([2, 100, 9, 0, 1]), "is_causal": "bottom_right"},
    "dropout": {"dropout_p": 0.25, "rng_state": torch.tensor([3, 4])},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", VARLEN)
def test_packed_sequences(feature: str, dtype: str) -> None:
    lengths_q, lengths_k, tail = (5, 0, 140, 7, 2), (4, 3, 0, 150, 66), 3
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    inputs = [
        torch.randn(rows, heads, 32).to(DTYPES[dtype])
        for rows, heads in ((sum(lengths_q) + tail, 4), (sum(lengths_k) + tail, 2), (sum(lengths_k) + tail, 2))
    ]
    options = VARLEN[feature]
    packed = make_problem("varlen", tuple(inputs), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=140, max_seqlen_k=150, **options)
    exact, eager = exact_and_eager(padded(packed), torch.zeros(5, 4, 140, 32, dtype=DTYPES[dtype]), None)
    for tensor in inputs:
        tensor[-tail:] = torch.nan
    with EmulatedGpu(schedule_of(feature), SMALL):
        out, lse = attention_varlen(*inputs, cu_q, cu_k, 140, 150, **options, return_lse=True, backend="cuda")
    assert (out[-tail:] == 0).all()
    assert (lse[:, -tail:] == -torch.inf).all()
    for index, length in enumerate(lengths_q):
        rows = slice(cu_q[index], cu_q[index + 1])
        assert_accurate("out", "out", out[rows].transpose(0, 1), eager["out"][index, :, :length], exact["out"][index, :, :length])
        assert_lse_accurate(lse[:, rows], exact["lse"][index, :, :length])


def test_bits_stay_the_same_whatever_the_schedule() -> None:
    problem, _, _ = build(SMALLEST | {"dtype": torch.bfloat16, "key_mask": "holes", "dropout_p": 0.25}, "cpu")
    results = []
    for schedule in range(4):
        with EmulatedGpu(schedule):
            results.append(forward(cuda_backend, problem))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_large_scores_stay_finite() -> None:
    problem, _, _ = build({"dtype": torch.bfloat16, "scale": 1e7, "seqlens": (70, 75)}, "cpu")
    with EmulatedGpu():
        out, lse = forward(cuda_backend, problem)
    exact = attention_reference(replace(problem, inputs=(), query=problem.query.double(), key=problem.key.double()))
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("head_dim", [32, 128, 256])
def test_a_gpu_with_less_shared_memory_runs_them_too(head_dim: int) -> None:
    check_call({"dtype": torch.bfloat16, "head_dims": (head_dim, head_dim), "seqlens": (40, 70)}, gpu=RTX_4090)


def test_guards_find_what_is_written_outside() -> None:
    """The proof's own proof: a tensor whose neighbour is written is reported."""
    view, buffer = guarded(torch.zeros(1, 1, 4, 8), "heads first")
    assert buffer.isnan().any()
    gpu = EmulatedGpu()
    with pytest.raises(AssertionError, match="written outside"), gpu:  # noqa: PT012
        tensor = view.new_empty(4)
        tensor.as_strided((1,), (1,), tensor.storage_offset() - 1).fill_(1.0)
