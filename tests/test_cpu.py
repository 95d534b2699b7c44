"""The CPU kernels against the reference in float64 under the accuracy rule, on every instruction set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_calls import DTYPES, build, calls, check, check_call
from conftest import ALL_INSTRUCTION_SETS
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor

from fused_attention.kernels.attention import attention
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cpu
from fused_attention.kernels.ops import forward
from fused_attention.kernels.problem import Gradients
from fused_attention.kernels.reference import attention_reference

SETS = cpu.instruction_sets()[1] if cpu.status() is None else []
pytestmark = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")


# 1 and 3: less than a vector; 16 and 17, 31 and 32, 64 and 65: around the tile sides; 130: several tiles and a rest.
SEQLENS = (1, 3, 16, 17, 31, 32, 37, 64, 65, 130)
# Below, at and between multiples of 16 and 32; value head dims of their own.
HEAD_DIMS = [(d, d) for d in (1, 5, 8, 16, 24, 40, 59, 64, 72, 96, 128, 200, 256)] + [(192, 128), (40, 256), (256, 8)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("instruction_set", ALL_INSTRUCTION_SETS, indirect=True)
@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(call=calls(SEQLENS, HEAD_DIMS))
def test_any_call(instruction_set: str, call: dict[str, Any]) -> None:
    note(f"reproduce: check_call(cpu, {call}, 'cpu')")
    check_call(cpu, call, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_head_dims(head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    check_call(cpu, {"head_dims": head_dims, "dtype": dtype, "is_causal": "bottom_right", "key_mask": "holes"}, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": "top_left"},
        {"key_mask": "holes", "dropout_p": 0.25},
        {"attn_mask": ("float32", "11QK")},
        {"attn_mask": ("bfloat16", "1HQK")},
    ],
    ids=str,
)
def test_many_key_blocks(options: dict, dtype: torch.dtype, instruction_set: str) -> None:
    """Longer than any block of keys or rows, so that the online softmax rescales and dq adds up over blocks."""
    check_call(cpu, {"sizes": (1, 2, 2), "seqlens": (600, 1100), "head_dims": (32, 32), "dtype": dtype} | options, "cpu")


@pytest.mark.parametrize(("kib", "seqlens"), [(64, (70, 600)), (160, (1800, 200))], ids=["forward", "backward"])
@pytest.mark.parametrize("options", [{}, {"is_causal": "top_left"}, {"key_mask": "holes", "dropout_p": 0.25}], ids=str)
def test_small_caches(options: dict, kib: int, seqlens: tuple[int, int], instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward takes 256 keys at once in place of 512, the backward two blocks of keys for each block of rows."""
    monkeypatch.setenv("FUSED_ATTENTION_CPU_L2_KIB", str(kib))
    check_call(cpu, {"sizes": (1, 1, 1), "seqlens": seqlens} | options, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlens", [(1, 37), (2, 600)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"key_mask": "holes"}, {"attn_mask": ("float32", "11QK")}, {"dropout_p": 0.25}, {"is_causal": "bottom_right", "key_mask": "holes"}],
    ids=str,
)
def test_one_or_two_query_rows(options: dict, seqlens: tuple[int, int], dtype: torch.dtype, instruction_set: str) -> None:
    """Decoding reads keys and values where they lie, absent ones among them."""
    check_call(cpu, {"seqlens": seqlens, "head_dims": (40, 24), "dtype": dtype} | options, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlens", [(130, 129), (130, 131), (129, 160)], ids=str)
def test_a_diagonal_that_crosses_the_corners_of_blocks(seqlens: tuple[int, int], dtype: torch.dtype, instruction_set: str) -> None:
    """One row or key off the multiples of 32 and 64, where a wrong first row or last key of a block shows up."""
    check_call(cpu, {"sizes": (1, 2, 2), "seqlens": seqlens, "head_dims": (16, 16), "dtype": dtype, "is_causal": "bottom_right"}, "cpu")


RISES = {  # log2 units that the scores change by from one key to the next, and by tile of 64 keys
    "rising by 3": 3.0, "rising by 7.9": 7.9, "rising by 8.1": 8.1, "rising by 50": 50.0, "falling by 8.1": -8.1, "falling by 50": -50.0,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rise", RISES)
def test_online_softmax_with_moving_maxima(rise: str, dtype: torch.dtype, instruction_set: str) -> None:
    problem, dout, dlse = build({"sizes": (1, 1, 1), "seqlens": (20, 700), "head_dims": (16, 16), "dtype": dtype}, "cpu")
    steps = torch.arange(700) // 64 * RISES[rise] * 0.6931
    problem.attn_mask = steps.expand(1, 1, 20, 700).contiguous()
    check(cpu, problem, dout, dlse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["first tile masked", "spike in the last key"])
def test_online_softmax_edges(case: str, dtype: torch.dtype, instruction_set: str) -> None:
    problem, dout, dlse = build({"sizes": (1, 1, 1), "seqlens": (20, 700), "head_dims": (16, 16), "dtype": dtype}, "cpu")
    mask = torch.zeros(20, 700)
    if case == "first tile masked":
        mask[:, :600] = -torch.inf
    else:
        mask[:, -1] = 12.0  # 160,000 times the others: they count for half a percent
    problem.attn_mask = mask[None, None]
    check(cpu, problem, dout, dlse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_what_a_float_mask_masks(seqlen_q: int, dtype: torch.dtype, instruction_set: str) -> None:
    """finfo.min masks like -inf, also a whole row; float16's -65504 is an ordinary number."""
    problem, dout, dlse = build({"seqlens": (seqlen_q, 75), "dtype": dtype, "lse_gradient": True}, "cpu")
    for lowest in (torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -2e30):
        mask = torch.randn(seqlen_q, 75)
        mask[:, ::3], mask[0] = lowest, lowest
        problem.attn_mask = mask[None, None]
        assert (forward(cpu, problem)[1][:, :, 0] == -torch.inf).all()
        check(cpu, problem, dout, dlse)
    problem.attn_mask = torch.full((1, 1, seqlen_q, 75), -65504.0, dtype=torch.float16)
    assert forward(cpu, problem)[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_rows_that_attend_to_nothing_is_never_read(dtype: torch.dtype, instruction_set: str) -> None:
    """Rows before the first key of the bottom-right diagonal: their query and output gradient share a tile with rows that count."""
    query, key, value = torch.randn(1, 2, 40, 24).to(dtype), torch.randn(1, 2, 31, 24).to(dtype), torch.randn(1, 2, 31, 24).to(dtype)
    dout, dlse = torch.randn(1, 2, 40, 24).to(dtype), torch.randn(1, 2, 40)

    def gradients(stored: float) -> tuple[Tensor, ...]:
        query[:, :, :9], dout[:, :, :9], dlse[:, :, :9] = stored, stored, stored
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        out, lse = attention(*leaves, is_causal="bottom_right", return_lse=True, backend="cpu")
        assert (lse[:, :, :9] == -torch.inf).all()
        return torch.autograd.grad((out, lse), leaves, (dout, dlse))

    for ours, expected in zip(gradients(torch.nan), gradients(0.0), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.nan, torch.inf])
def test_gradients_of_absent_keys_are_zero_whatever_the_queries_hold(stored: float, dtype: torch.dtype, instruction_set: str) -> None:
    query, key, value, dout = (torch.randn(1, 1, 40, 24).to(dtype) for _ in range(4))
    query[:, :, 3], dout[:, :, 5] = stored, stored
    key_mask = torch.arange(40)[None] % 3 != 1
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    _, dkey, dvalue = torch.autograd.grad(attention(*leaves, key_mask=key_mask, backend="cpu"), leaves, dout)
    for gradient in (dkey, dvalue):
        assert (gradient[:, :, ~key_mask[0]] == 0).all()
        assert gradient[:, :, key_mask[0]].isnan().all()


def test_float16_scores_beyond_its_range(instruction_set: str) -> None:
    problem, dout, dlse = build({"dtype": torch.float16, "scale": 1.0, "head_dims": (16, 16)}, "cpu")
    problem.query[:], problem.key[:] = problem.query.sign() * 80, problem.key.sign() * 80  # |scores| up to 102,400
    check(cpu, problem, dout, dlse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_not_truncated(dtype: torch.dtype, instruction_set: str) -> None:
    """Against float32 results from the same values: truncation would lean to zero by half a unit in the last place."""
    inputs = [torch.randn(2, 2, 64, 64).to(dtype) for _ in range(4)]
    results = []
    for tensors in (inputs, [tensor.float() for tensor in inputs]):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
        out = attention(*leaves, backend="cpu")
        results.append((out.detach(), *torch.autograd.grad(out, leaves, tensors[3])))
    for rounded, exact in zip(*results, strict=True):
        ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-3))))
        lean = ((rounded.float() - exact) * exact.sign() / ulp)[exact.abs() > 1e-3].mean().item()
        assert abs(lean) < 0.1, f"leans by {lean:.3f} units in the last place"


def test_a_large_float_mask_costs_no_precision(instruction_set: str) -> None:
    """Scores of 300 are rounded once, as in torch, and not again in units of log2: that would leave an error of 5e-6."""
    if instruction_set == "base":
        pytest.skip("a product and a sum are rounded one by one where no instruction does both")
    query, key, value = torch.zeros(1, 2, 40, 64), torch.randn(1, 2, 70, 64), torch.randn(1, 2, 70, 64)
    mask = 300 + torch.randn(1, 2, 40, 70)
    expected = mask.double().softmax(-1) @ value.double()
    out = attention(query, key, value, attn_mask=mask, backend="cpu")
    assert (out - expected).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_whose_rounding_exceeds_the_exponent_range(dtype: torch.dtype, instruction_set: str) -> None:
    """At scores of 1e10 one unit in the last place is 1,024: the largest score still counts as exactly the maximum."""
    problem, _, _ = build({"dtype": dtype, "scale": 1e9, "head_dims": (16, 16)}, "cpu")
    out, lse = forward(cpu, problem)
    exact = attention_reference(replace(problem, inputs=(), query=problem.query.double(), key=problem.key.double()))
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=0.0)
    decided = (out.double() - exact[0]).abs().amax(-1) < 0.05  # rows whose two largest scores rounding does not exchange
    assert decided.double().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_identical_from_run_to_run(dtype: torch.dtype, instruction_set: str) -> None:
    problem, dout, _ = build({"dtype": dtype, "seqlens": (200, 300), "is_causal": "top_left", "dropout_p": 0.25}, "cpu")
    runs = []
    for _ in range(3):
        out, lse = forward(cpu, problem)
        gradients = tuple(torch.empty_like(tensor) for tensor in problem.inputs)
        cpu.backward(problem, out, lse, dout, None, Gradients(*gradients))
        runs.append((out, lse, *gradients))
    for first, second, third in zip(*runs, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_any_thread_count(num_threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        check_call(cpu, {"sizes": (3, 3, 3), "key_lengths": (40, 75, 90), "is_causal": "top_left"}, "cpu")
    finally:
        torch.set_num_threads(before)


def test_gradients_stay_inside_packed_buffers() -> None:
    """Views of one guarded buffer: what lies between the rows is not touched."""
    problem, dout, _ = build({"sizes": (2, 2, 2), "seqlens": (33, 33), "head_dims": (40, 40)}, "cpu")
    buffer = torch.full((2, 33, 3, 2, 48), 7.0)
    views = tuple(buffer[:, :, index, :, :40].transpose(1, 2) for index in range(3))
    out, lse = forward(cpu, problem)
    cpu.backward(problem, out, lse, dout, None, Gradients(*views))
    assert (buffer[..., 40:] == 7.0).all()
    expected = tuple(torch.empty_like(tensor) for tensor in problem.inputs)
    cpu.backward(problem, out, lse, dout, None, Gradients(*expected))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(views, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("far", ["batch", "head", "row"])
def test_offsets_beyond_32_bits(far: str, dtype: torch.dtype, instruction_set: str, tmp_path: Path) -> None:
    """Inputs and gradients in a sparse file, the last batch element, head or row beyond 2**31 elements and 2**32 bytes."""
    far_stride = 2**31 + 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far_stride + 2**16, dtype=dtype)
    (tmp_path / "sparse").unlink()
    shape = {"batch": (2, 1, 5, 24), "head": (1, 2, 5, 24), "row": (1, 1, 2, 24)}[far]
    strides = {"batch": (far_stride, 0, 24, 1), "head": (0, far_stride, 24, 1), "row": (0, 0, far_stride, 1)}[far]
    query, key, value, dquery, dkey, dvalue, dout = (memory[2**12 * i :].as_strided(shape, strides) for i in range(7))
    near = []
    for tensor in (query, key, value, dout):
        near.append(torch.randn(shape).to(dtype))
        tensor.copy_(near[-1])
    results = []
    near_gradients = tuple(torch.empty(shape, dtype=dtype) for _ in range(3))
    for inputs, gradients in (((query, key, value, dout), (dquery, dkey, dvalue)), (near, near_gradients)):
        problem = make_problem("separate", tuple(inputs[:3]))
        out, lse = forward(cpu, problem)
        cpu.backward(problem, out, lse, inputs[3], None, Gradients(*gradients))
        results.append((out, lse, *gradients))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_more_heads_than_16_bits_count(instruction_set: str) -> None:
    """70,000 heads: dropout's counter and the split into tasks go past 65,535."""
    query = torch.randn(35000, 2, 3, 4)
    options = {"dropout_p": 0.5, "rng_state": torch.tensor([3, 4])}
    ours, expected = (attention(query, query, query, **options, backend=backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(ours, expected)


@pytest.mark.skipif("avx512_bf16" not in SETS, reason="this machine has no avx512_bf16")
def test_dot_products_of_bfloat16_are_preferred_where_they_are_fast() -> None:
    is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    assert (SETS.index("avx512_bf16") < SETS.index("avx512")) == is_amd


@pytest.mark.skipif("avx512_bf16" not in SETS, reason="this machine has no avx512_bf16")
@pytest.mark.parametrize(("seqlen", "head_dim", "widened"), [(60, 64, ""), (33, 64, "backward"), (60, 40, "forward backward")])
def test_sizes_that_tiles_would_pad_are_widened(seqlen: int, head_dim: int, widened: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They give what AVX-512 gives, bit for bit; on tiles, P is rounded to bfloat16."""
    call = {"dtype": torch.bfloat16, "seqlens": (seqlen, seqlen), "head_dims": (head_dim, head_dim)}
    problem, dout, _ = build(call, "cpu")
    out, lse = forward(cpu, problem)
    results = []
    for isa in ("avx512", "avx512_bf16"):
        monkeypatch.setenv("FUSED_ATTENTION_CPU_ISA", isa)
        gradients = tuple(torch.empty_like(tensor) for tensor in problem.inputs)
        cpu.backward(problem, out, lse, dout, None, Gradients(*gradients))
        results.append((forward(cpu, problem)[0], *gradients))
    same = [torch.equal(*pair) for pair in zip(*results, strict=True)]
    assert same == ["forward" in widened, *["backward" in widened] * 3]


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="FUSED_ATTENTION_CPU_ISA.*sse9"):
        attention(*[torch.randn(1, 1, 4, 8)] * 3)
