"""Prepared masks: their bits and tile lists, and calls with them, which give what the arguments give that they were made of."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.kernels import ops
from fused_attention.kernels.attention import attention, attention_kv_packed, attention_qkv_packed, attention_weights
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cpu
from fused_attention.kernels.prepared_mask import pack_bits, prepare_mask
from fused_attention.kernels.problem import PreparedMask, unpack_bits

needs_cpu_kernels = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")

BATCH, NUM_HEADS, SEQLEN_Q, SEQLEN_K = 2, 3, 130, 200  # neither a multiple of 64: tiles hold rows and keys that do not exist


def masks(kind: str) -> dict[str, Any]:
    """Arguments that `prepare_mask` and `attention` share."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.rand(BATCH, NUM_HEADS, 3, 4, generator=generator)[..., None, None].expand(-1, -1, -1, -1, 64, 64)
    blocks = blocks.transpose(3, 4).reshape(BATCH, NUM_HEADS, 192, 256)[:, :, :SEQLEN_Q, :SEQLEN_K]
    noise = torch.rand(BATCH, NUM_HEADS, SEQLEN_Q, SEQLEN_K, generator=generator)
    empty_full_mixed = (blocks > 0.6) | ((blocks > 0.3) & (noise > 0.5))
    bias = torch.randn(SEQLEN_Q, SEQLEN_K, generator=generator)
    return {
        "bool": {"attn_mask": empty_full_mixed},
        "bool for all": {"attn_mask": empty_full_mixed[0, 0]},
        "bool per batch": {"attn_mask": empty_full_mixed[:, :1]},
        "bool per head": {"attn_mask": empty_full_mixed[:1]},
        "float": {"attn_mask": bias.masked_fill(~empty_full_mixed[0, 0], -torch.inf)},
        "finfo.min per head": {"attn_mask": torch.where(empty_full_mixed[:1], 0.5, torch.finfo(torch.float32).min)},
        "key_mask": {"key_mask": empty_full_mixed[:, 0, 0]},
        "lengths": {"key_lengths": torch.tensor([64, 130]), "query_lengths": torch.tensor([128, 7])},
        "causal": {"is_causal": True},
        "bottom right": {"is_causal": "bottom_right", "key_lengths": torch.tensor([150, 20])},
        "window": {"window": (70, 0)},
        "causal behind 30 keys": {"is_causal": True, "diagonal": 30},
        "window before the keys": {"window": (10, 70), "diagonal": -90},
        "all at once": {
            "attn_mask": empty_full_mixed[:1],
            "key_mask": torch.arange(SEQLEN_K).expand(BATCH, -1) % 7 > 0,
            "key_lengths": torch.tensor([190, 64]),
            "query_lengths": torch.tensor([130, 65]),
            "is_causal": "bottom_right",
            "window": (100, 40),
        },
    }[kind]


KINDS = (
    "bool", "bool for all", "bool per batch", "bool per head", "float", "finfo.min per head", "key_mask", "lengths", "causal",
    "bottom right", "window", "causal behind 30 keys", "window before the keys", "all at once",
)  # fmt: skip
SIZES = {"seqlen_q": SEQLEN_Q, "seqlen_k": SEQLEN_K}


def allowed_by(options: dict[str, Any]) -> Tensor:
    """(B, H, Lq, Lk) bool, from weights that no masked key has."""
    query, key = torch.zeros(BATCH, NUM_HEADS, SEQLEN_Q, 4), torch.zeros(BATCH, NUM_HEADS, SEQLEN_K, 4)
    _, lse = attention(query, key, key, **options, return_lse=True, backend="reference")
    return attention_weights(query, key, lse, **options) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_what_may_be_attended_to(kind: str) -> None:
    prepared = prepare_mask(**masks(kind), **SIZES)
    expected = allowed_by(masks(kind))
    assert torch.equal(prepared.unpack().expand_as(expected), expected)
    assert torch.equal(unpack_bits(prepared.mask_bits_transposed, SEQLEN_Q).transpose(2, 3), prepared.unpack())
    assert prepared.mask_bits.shape == (*prepared.shape[:3], 7)
    assert (unpack_bits(prepared.mask_bits, 224)[..., SEQLEN_K:] == 0).all()  # keys that fill up the last word


def test_the_bits_stand_where_the_format_says() -> None:
    allowed = torch.zeros(1, 1, 3, 70, dtype=torch.bool)
    allowed[0, 0, 1, 37] = allowed[0, 0, 1, 31] = allowed[0, 0, 2, 69] = True
    prepared = prepare_mask(allowed)
    assert prepared.mask_bits.dtype == torch.int32
    assert prepared.mask_bits.tolist() == [[[[0, 0, 0], [-(2**31), 1 << 5, 0], [0, 0, 1 << 5]]]]
    assert prepared.mask_bits_transposed[0, 0, 37].tolist() == [1 << 1]
    assert prepared.mask_bits_transposed[0, 0, 69].tolist() == [1 << 2]


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64, 100])
def test_packing_and_unpacking(length: int) -> None:
    allowed = torch.rand(2, 3, length) > 0.5
    bits = pack_bits(allowed)
    assert bits.shape == (2, 3, -(-length // 32))
    assert torch.equal(unpack_bits(bits, length), allowed)


@pytest.mark.parametrize("shape", [(64, 1), (1, 64), (64, 64), (33, 1)])
def test_packing_whatever_the_strides_of_dims_of_size_1(shape: tuple[int, int]) -> None:
    allowed = (torch.arange(shape[0] * shape[1]) % 3 > 0).view(1, 1, *shape)
    for mask in (allowed, allowed.transpose(2, 3), allowed.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(unpack_bits(pack_bits(mask), mask.shape[3]), mask)


@pytest.mark.parametrize("kind", KINDS)
def test_tile_lists(kind: str) -> None:
    prepared = prepare_mask(**masks(kind), **SIZES)
    allowed = prepared.unpack()
    for lists, transposed in ((prepared.row_tiles, False), (prepared.column_tiles, True)):
        lines, others = (4, 3) if transposed else (3, 4)
        assert lists.shape == (*allowed.shape[:2], lines, 2 + others)
        assert lists.dtype == torch.int32
        for batch, head, line in torch.cartesian_prod(*(torch.arange(n) for n in lists.shape[:3])).tolist():
            full, mixed = [], []
            for other in range(others):
                row, column = (other, line) if transposed else (line, other)
                tile = allowed[batch, head, 64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
                if tile.all() and tile.shape[1] == 64:
                    full.append(other)
                elif tile.any():
                    mixed.append(other)
            num_full, num_mixed, *tiles = lists[batch, head, line].tolist()
            assert (num_full, num_mixed) == (len(full), len(mixed))
            assert tiles[:num_full] == full
            assert tiles[::-1][:num_mixed] == mixed


def test_a_row_block_with_rows_that_do_not_exist_can_be_full_but_not_a_key_block() -> None:
    prepared = prepare_mask(torch.ones(70, 70, dtype=torch.bool))
    assert prepared.row_tiles[0, 0].tolist() == [[1, 1, 0, 1], [1, 1, 0, 1]]
    assert prepared.column_tiles[0, 0, :, :2].tolist() == [[2, 0], [0, 2]]


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(BATCH, NUM_HEADS, length, 8, dtype=dtype, requires_grad=True) for length in (SEQLEN_Q, SEQLEN_K, SEQLEN_K)]


def outcome(call: Any, leaves: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    out, lse = call(*leaves, **options, return_lse=True)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
    return (out, lse, *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu_kernels)])
def test_a_call_with_it_equals_the_call_with_its_parts(backend: str, kind: str) -> None:
    leaves = inputs()
    ours = outcome(attention, leaves, attn_mask=prepare_mask(**masks(kind), **SIZES), backend=backend)
    expected = outcome(attention, leaves, **masks(kind), backend="reference")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_packed_entry_points_and_weights_take_it() -> None:
    options = {"key_mask": torch.rand(BATCH, 40) > 0.3, "is_causal": True}
    prepared = prepare_mask(**options, seqlen_q=40)
    assert prepared.shape == (BATCH, 1, 40, 40)
    qkv = [torch.randn(BATCH, 40, 3, 2, 8, requires_grad=True)]
    torch.testing.assert_close(outcome(attention_qkv_packed, qkv, attn_mask=prepared), outcome(attention_qkv_packed, qkv, **options))
    query_kv = [torch.randn(BATCH, 2, 40, 8, requires_grad=True), torch.randn(BATCH, 40, 2, 2, 8, requires_grad=True)]
    torch.testing.assert_close(
        outcome(attention_kv_packed, query_kv, attn_mask=prepared), outcome(attention_kv_packed, query_kv, **options)
    )
    query, key = torch.randn(BATCH, 2, 40, 8), torch.randn(BATCH, 2, 40, 8)
    _, lse = attention(query, key, key, **options, return_lse=True)
    for average_heads in (False, True):
        ours, expected = (
            attention_weights(query, key, lse, average_heads=average_heads, **given) for given in ({"attn_mask": prepared}, options)
        )
        assert torch.equal(ours, expected)


def test_absent_keys_do_not_leak_through_it() -> None:
    query, key, value = (tensor.detach() for tensor in inputs())
    key_mask = torch.arange(SEQLEN_K).expand(BATCH, -1) % 3 > 0
    prepared = prepare_mask(key_mask=key_mask, seqlen_q=SEQLEN_Q)
    expected = attention(query, key, value, attn_mask=prepared)
    key[:, :, ::3], value[:, :, ::3] = torch.nan, torch.inf
    assert torch.equal(attention(query, key, value, attn_mask=prepared), expected)


def test_the_bias_keeps_its_gradient() -> None:
    leaves = [tensor.detach() for tensor in inputs(torch.float64)]
    bias = torch.randn(1, NUM_HEADS, SEQLEN_Q, SEQLEN_K, dtype=torch.float64).masked_fill_(torch.rand(SEQLEN_Q, SEQLEN_K) > 0.8, -torch.inf)
    bias.requires_grad_()
    (ours,) = torch.autograd.grad(attention(*leaves, attn_mask=prepare_mask(bias, is_causal=True)).square().sum(), bias)
    (expected,) = torch.autograd.grad(attention(*leaves, attn_mask=bias, is_causal=True).square().sum(), bias)
    torch.testing.assert_close(ours, expected)


@pytest.mark.usefixtures("kernels_by_reference", "poisoned_memory")
@pytest.mark.parametrize("path", ["cheap", "operator", "argument of a compiled function", "made in a compiled function"])
@pytest.mark.parametrize("kind", ["float", "all at once"])
def test_gradients_through_kernels(kind: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "operator":
        monkeypatch.setattr(ops, "_takes_cheap_path", lambda problem: False)
    options, leaves = masks(kind), inputs()
    if kind == "float":
        options["attn_mask"].requires_grad_()
        leaves.append(options.pop("attn_mask"))

    def compiled(function: Any) -> Any:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    attend = compiled(attention) if path == "argument of a compiled function" else attention

    def with_parts(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor, **more: Any) -> Any:
        return attention(query, key, value, **options, **({"attn_mask": bias[0]} if bias else {}), backend="reference", **more)

    def with_prepared(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor, **more: Any) -> Any:
        prepared = prepare_mask(**options, **({"attn_mask": bias[0]} if bias else {}), **SIZES)
        return attend(query, key, value, attn_mask=prepared, backend="triton", **more)

    function = compiled(with_prepared) if path == "made in a compiled function" else with_prepared
    ours, expected = outcome(function, leaves), outcome(with_parts, leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels_by_reference")
def test_opcheck() -> None:
    problem = make_problem("separate", tuple(inputs()), attn_mask=prepare_mask(**masks("all at once"), **SIZES))
    torch.library.opcheck(torch.ops.fused_attention.attention_separate.default, (*problem.op_arguments(), "triton"))


def test_prepared_without_gradients() -> None:
    prepared = prepare_mask(**masks("bool"), gradients=False)
    assert prepared.mask_bits_transposed is None
    assert prepared.column_tiles is None
    leaves = inputs()
    with torch.no_grad():
        expected = attention(*leaves, **masks("bool"))
        torch.testing.assert_close(attention(*leaves, attn_mask=prepared), expected)
    with pytest.raises(ValueError, match="attn_mask was prepared with gradients=False"):
        attention(*leaves, attn_mask=prepared)


def test_sizes_are_taken_from_what_is_given() -> None:
    assert prepare_mask(torch.ones(4, 6, dtype=torch.bool)).shape == (1, 1, 4, 6)
    assert prepare_mask(torch.ones(1, 3, 1, 6, dtype=torch.bool), seqlen_q=4).shape == (1, 3, 4, 6)
    assert prepare_mask(torch.ones(4, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)).shape == (2, 1, 4, 6)
    assert prepare_mask(key_lengths=torch.ones(2).int(), seqlen_q=4, seqlen_k=6).shape == (2, 1, 4, 6)
    assert prepare_mask(is_causal=True, seqlen_q=4, seqlen_k=6).shape == (1, 1, 4, 6)
    with pytest.raises(ValueError, match="seqlen_q must be given"):
        prepare_mask(key_mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="seqlen_k must be given"):
        prepare_mask(is_causal=True, seqlen_q=4)


@pytest.mark.parametrize("seqlens", [(0, 5), (5, 0), (0, 0)])
def test_empty_sizes(seqlens: tuple[int, int]) -> None:
    prepared = prepare_mask(torch.ones(2, 1, *seqlens, dtype=torch.bool))
    assert prepared.unpack().shape == (2, 1, *seqlens)
    query, key = torch.randn(2, 3, seqlens[0], 4), torch.randn(2, 3, seqlens[1], 4)
    assert (attention(query, key, key, attn_mask=prepared) == 0).all()


BAD_MASKS = {
    "no tensor": ({"attn_mask": [[True]]}, TypeError, "attn_mask must be a torch.Tensor, got list"),
    "3-D": ({"attn_mask": torch.ones(2, 4, 6)}, ValueError, "attn_mask with 3 dims"),
    "1-D": ({"attn_mask": torch.ones(6), "seqlen_q": 4}, ValueError, "attn_mask must have shape"),
    "integer": ({"attn_mask": torch.ones(4, 6).int()}, TypeError, "attn_mask must be bool .* got torch.int32"),
    "other size": ({"attn_mask": torch.ones(4, 6), "seqlen_q": 5}, ValueError, "attn_mask must have shape"),
    "key_mask dtype": ({"key_mask": torch.ones(2, 6), "seqlen_q": 4}, TypeError, "key_mask must be bool"),
    "key_mask size": ({"attn_mask": torch.ones(4, 6), "key_mask": torch.ones(2, 5) > 0}, ValueError, "attn_mask must have shape"),
    "batches": ({"attn_mask": torch.ones(3, 1, 4, 6), "key_mask": torch.ones(2, 6) > 0}, ValueError, "attn_mask must have shape"),
    "lengths": ({"key_mask": torch.ones(2, 6) > 0, "key_lengths": torch.ones(3).int(), "seqlen_q": 4}, ValueError, "key_lengths must have"),
    "causal": ({"is_causal": "left", "seqlen_q": 4, "seqlen_k": 6}, ValueError, "is_causal must be False, True"),
    "window": ({"window": (-1, 0), "seqlen_q": 4, "seqlen_k": 6}, ValueError, "window left must be None"),
    "seqlen": ({"is_causal": True, "seqlen_q": 4.0, "seqlen_k": 6}, TypeError, "seqlen_q must be an int, got float"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_masks(case: str) -> None:
    arguments, error, message = BAD_MASKS[case]
    with pytest.raises(error, match=message):
        prepare_mask(**arguments)


BESIDE = {
    "key_mask": torch.ones(BATCH, SEQLEN_K) > 0, "key_lengths": torch.ones(BATCH).int(), "query_lengths": torch.ones(BATCH).int(),
    "is_causal": True, "window": (None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_what_it_holds_is_refused_beside_it(name: str) -> None:
    prepared = prepare_mask(**masks("bool"))
    with pytest.raises(ValueError, match=f"{name} must not be given beside a PreparedMask: give it to prepare_mask"):
        attention(*inputs(), attn_mask=prepared, **{name: BESIDE[name]})


def test_calls_that_it_does_not_fit() -> None:
    query, key, value = inputs()
    for kind, message in (
        ("bool", "attn_mask must have been prepared for .*(2, 3, 129, 200), it is for"),
        ("key_mask", "(2, 3, 129, 200)"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            attention(query[:, :, 1:], key, value, attn_mask=prepare_mask(**masks(kind), **SIZES))
    with pytest.raises(ValueError, match="attn_mask must have been prepared for"):
        attention(query[:1], key[:1], value[:1], attn_mask=prepare_mask(**masks("bool")))
    one_sequence = prepare_mask(key_lengths=torch.tensor([5]), **SIZES)
    with pytest.raises(ValueError, match="key_lengths must have shape"):
        attention(query, key, value, attn_mask=one_sequence)
    with pytest.raises(ValueError, match="attn_mask must be on the device of query, cpu, got meta: PreparedMask.to moves it"):
        attention(query, key, value, attn_mask=prepare_mask(**masks("bool")).to("meta"))
    with pytest.raises(TypeError, match="attn_mask must be a torch.Tensor or a PreparedMask, got list"):
        attention(query, key, value, attn_mask=[[True]])
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="attn_mask must be None for packed sequences"):
        make_problem(
            "varlen",
            (torch.zeros(4, 1, 8),) * 3,
            attn_mask=one_sequence,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=4,
            max_seqlen_k=4,
        )


def test_it_moves_and_reads_well() -> None:
    prepared = prepare_mask(**masks("all at once"))
    moved = prepared.to("meta")
    assert isinstance(moved, PreparedMask)
    assert {
        getattr(moved, name).device.type for name in ("mask_bits", "mask_bits_transposed", "row_tiles", "column_tiles", "key_mask")
    } == {"meta"}
    assert moved.shape == prepared.shape
    assert str(prepared) == "PreparedMask(shape=(2, 3, 130, 200), bias=False, gradients=True, device='cpu')"


def test_a_diagonal_survives_pickling() -> None:
    mask = pickle.loads(pickle.dumps(prepare_mask(is_causal=True, diagonal=3, seqlen_q=4, seqlen_k=7)))
    query, key, slopes = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 7, 16), torch.rand(2)
    expected = attention(query, key, key, is_causal=True, diagonal=3, alibi_slopes=slopes)
    torch.testing.assert_close(attention(query, key, key, attn_mask=mask, alibi_slopes=slopes), expected)
    with pytest.raises(ValueError, match="diagonal must not be given beside a PreparedMask"):
        attention(query, key, key, attn_mask=mask, diagonal=3)
