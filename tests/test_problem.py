"""Bad input gets one clear error that names the argument."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from fused_attention.kernels.attention import (
    attention,
    attention_kv_packed,
    attention_qkv_packed,
    attention_weights,
)
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.prepared_mask import prepare_mask
from fused_attention.kernels.scaled_dot_product_attention import scaled_dot_product_attention

QUERY = torch.zeros(2, 4, 5, 8)
KEY = torch.zeros(2, 4, 6, 8)

BAD_CALLS = {
    "query is no tensor": ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    "integer query": ({"query": QUERY.long()}, TypeError, "query must be float32.*int64"),
    "sparse query": ({"query": QUERY.to_sparse()}, TypeError, "query must be a dense tensor, got layout torch.sparse_coo"),
    "mixed dtypes": ({"key": KEY.half()}, TypeError, "key must have the dtype of query, torch.float32, got torch.float16"),
    "3-D query": ({"query": QUERY[0]}, ValueError, r"query must have shape \(batch, num_heads, seqlen, head_dim\), got \(4, 5, 8\)"),
    "other device": ({"value": KEY.to("meta")}, ValueError, "value must be on the device of query, cpu, got meta"),
    "head_dim 0": ({"query": QUERY[..., :0], "key": KEY[..., :0]}, ValueError, "head_dim must be at least 1"),
    "other head_dim": ({"key": KEY[..., :4]}, ValueError, "key must have the head_dim of query, 8, got 4"),
    "other batch": ({"key": KEY[:1], "value": KEY[:1]}, ValueError, "key must have the batch size of query, 2, got 1"),
    "value length": ({"value": KEY[:, :, :3]}, ValueError, "value must have the batch, heads and length of key"),
    "heads do not divide": ({"key": KEY[:, :3], "value": KEY[:, :3]}, ValueError, "the 4 heads of query must be a multiple of the 3"),
    "ambiguous mask": ({"attn_mask": torch.zeros(2, 5, 6)}, ValueError, r"attn_mask with 3 dims.*attn_mask\[:, None\]"),
    "mask shape": ({"attn_mask": torch.zeros(5, 7)}, ValueError, "attn_mask must have shape.*got .1, 1, 5, 7."),
    "sparse mask": ({"attn_mask": torch.zeros(5, 6).to_sparse()}, TypeError, "attn_mask must be a dense tensor, got layout torch.sparse"),
    "integer mask": ({"attn_mask": torch.zeros(5, 6, dtype=torch.uint8)}, TypeError, "attn_mask must be bool .* got torch.uint8"),
    "key_mask dtype": ({"key_mask": torch.zeros(2, 6)}, TypeError, "key_mask must be bool, got torch.float32"),
    "key_mask shape": (
        {"key_mask": torch.ones(2, 5, dtype=torch.bool)},
        ValueError,
        r"key_mask must have shape .* = \(2, 6\), got \(2, 5\)",
    ),
    "float lengths": ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths must be int32 or int64"),
    "lengths shape": ({"query_lengths": torch.ones(3, dtype=torch.int32)}, ValueError, r"query_lengths must have shape \(batch,\)"),
    "dropout above 1": ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    "dropout below 0": ({"dropout_p": -0.1}, ValueError, "dropout_p"),
    "dropout nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be finite"),
    "scale": ({"scale": float("inf")}, ValueError, "scale must be finite"),
    "scale above float32": ({"scale": 1e300}, ValueError, "the size of scale must be in"),
    "scale below float32": ({"scale": -1e39}, ValueError, "the size of scale must be in"),
    "softcap above float32": ({"softcap": 1e39}, ValueError, "the size of softcap must be in"),
    "softcap below float32": ({"softcap": 1e-46}, ValueError, "the size of softcap must be in"),
    "scale type": ({"scale": "big"}, TypeError, "scale must be a number, got str"),
    "scale with a gradient": ({"scale": torch.tensor(0.5, requires_grad=True)}, TypeError, "scale has no gradient"),
    "several scales": ({"scale": torch.ones(2)}, TypeError, r"scale must be a number, got a tensor of shape \(2,\)"),
    "boolean scale": ({"scale": numpy.bool_(True)}, TypeError, "scale must be a number, got bool"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be > 0"),
    "causal": ({"is_causal": "left"}, ValueError, "is_causal must be False, True, 'top_left' or 'bottom_right', got 'left'"),
    "diagonal": ({"diagonal": "middle"}, ValueError, "diagonal must be None, 'top_left', 'bottom_right' or an int, got 'middle'"),
    "diagonal type": ({"diagonal": 1.5}, TypeError, "diagonal must be an int, got float"),
    "boolean diagonal": ({"diagonal": True}, TypeError, "diagonal must be an int, got bool"),
    "diagonal too far": ({"diagonal": -(2**29) - 1}, ValueError, r"diagonal must be in \[-2\^29, 2\^29\], got -536870913"),
    "two diagonals": ({"is_causal": "bottom_right", "diagonal": 3}, ValueError, "diagonal must be None beside is_causal='bottom_right'"),
    "window": ({"window": (1, -1)}, ValueError, "window right must be None .* got -1"),
    "window type": ({"window": 3}, TypeError, "window must be a pair"),
    "slopes": ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes must have shape"),
    "sinks": ({"sinks": torch.ones(4, dtype=torch.int64)}, TypeError, "sinks must be"),
    "rng_state": ({"rng_state": torch.ones(3, dtype=torch.int64), "dropout_p": 0.1}, ValueError, "rng_state must have shape"),
    "backend": ({"backend": "cudnn"}, ValueError, "backend must be None or one of .* got 'cudnn'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    changes, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        attention(**({"query": QUERY, "key": KEY, "value": KEY} | changes))


@pytest.mark.parametrize("number", [numpy.float32, numpy.float64, numpy.float16, torch.tensor])
def test_numbers_that_are_not_pythons(number: Any) -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8)
    options = {"scale": 0.25, "softcap": 1.5, "dropout_p": 0.5}
    state = torch.tensor([3, 4])
    expected = attention(query, key, key, **options, rng_state=state)
    given = {name: number(value) for name, value in options.items()}
    torch.testing.assert_close(attention(query, key, key, **given, rng_state=state), expected)
    torch.testing.assert_close(
        scaled_dot_product_attention(query, key, key, scale=number(0.25), dropout_p=number(0.0)), attention(query, key, key, scale=0.25)
    )
    assert attention(query, key, key, scale=numpy.int64(1)).equal(attention(query, key, key, scale=1))


@pytest.mark.parametrize("integer", [numpy.int64, numpy.int32, numpy.uint8, torch.tensor])
def test_integers_that_are_not_pythons(integer: Any) -> None:
    query = torch.randn(2, 4, 5, 8)
    expected = attention(query, query, query, window=(2, 1))
    assert attention(query, query, query, window=(integer(2), integer(1))).equal(expected)
    prepared = prepare_mask(window=(integer(2), integer(1)), seqlen_q=integer(5), seqlen_k=integer(5))
    assert prepared.shape == (1, 1, 5, 5)
    assert prepared.window == (2, 1)
    assert [type(number) for number in (*prepared.window, *prepared.shape)] == [int] * 6
    torch.testing.assert_close(attention(query, query, query, attn_mask=prepared), expected)


@pytest.mark.parametrize("side", [True, numpy.bool_(True), 1.0, numpy.float32(1), torch.tensor(1.0), torch.tensor([1, 1]), "1"])
def test_window_sides_that_are_no_integers(side: Any) -> None:
    with pytest.raises(ValueError, match="window left must be None"):
        attention(QUERY, KEY, KEY, window=(side, None))
    with pytest.raises(TypeError, match="seqlen_q must be an int"):
        prepare_mask(is_causal=True, seqlen_q=side, seqlen_k=4)


def test_bad_packed_input() -> None:
    with pytest.raises(ValueError, match="qkv must have shape .*3, num_heads"):
        attention_qkv_packed(torch.zeros(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match="kv must have shape .*2, num_heads"):
        attention_kv_packed(QUERY, torch.zeros(2, 5, 3, 4, 8))


def test_weights_under_dropout_need_the_rng_state() -> None:
    with pytest.raises(ValueError, match="rng_state"):
        attention_weights(QUERY, KEY, torch.zeros(2, 4, 5), dropout_p=0.1)


def test_lse_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="lse must have shape"):
        attention_weights(QUERY, KEY, torch.zeros(2, 4, 6))


def test_lse_that_is_no_floating_point_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="lse must be a floating-point torch.Tensor, got NoneType"):
        attention_weights(QUERY, KEY, None)
    with pytest.raises(TypeError, match="lse must be a floating-point torch.Tensor, got torch.int64"):
        attention_weights(QUERY, KEY, torch.zeros(2, 4, 5, dtype=torch.int64))


def test_lse_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="lse must be on the device of query, cpu, got meta"):
        attention_weights(QUERY, KEY, torch.zeros(2, 4, 5, device="meta"))


def test_scaled_dot_product_attention_names_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="key must be a torch.Tensor, got NoneType"):
        scaled_dot_product_attention(QUERY, None, KEY)
    with pytest.raises(TypeError, match="attn_mask must be a torch.Tensor or a PreparedMask, got list"):
        scaled_dot_product_attention(QUERY, KEY, KEY, attn_mask=[[True]])


def test_a_key_that_is_no_tensor_is_named_under_autocast_too() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="key must be a torch.Tensor, got NoneType"):
        attention(QUERY, None, KEY)


def test_vectors_that_kernels_read_without_a_stride_are_contiguous() -> None:
    every_other = {
        "key_lengths": torch.ones(4, dtype=torch.int32)[::2],
        "query_lengths": torch.ones(4, dtype=torch.int64)[::2],
        "sinks": torch.zeros(8)[::2],
        "rng_state": torch.zeros(4, dtype=torch.int64)[::2],
    }
    problem = make_problem("separate", (QUERY, KEY, KEY), **every_other, dropout_p=0.5)
    assert all(getattr(problem, name).is_contiguous() for name in every_other)


@pytest.mark.parametrize("length", [2**31, 2**32, 2**63 - 1, -(2**32) + 2])
def test_int64_lengths_beyond_int32_are_clamped_not_wrapped(length: int) -> None:
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
    expected = attention(query, key, key, key_lengths=torch.tensor([6 if length > 0 else 0]))
    assert torch.equal(attention(query, key, key, key_lengths=torch.tensor([length])), expected)


@pytest.mark.parametrize("average_heads", [False, True])
def test_meta_tensors_give_shapes(average_heads: bool) -> None:
    query, key = QUERY.to("meta"), KEY.to("meta")
    out, lse = attention(query, key, key, is_causal=True, dropout_p=0.1, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", (2, 4, 5, 8), (2, 4, 5))
    weights = attention_weights(query, key, lse, average_heads=average_heads)
    assert weights.shape == ((2, 5, 6) if average_heads else (2, 4, 5, 6))
