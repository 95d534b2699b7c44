"""The specification against torch's own functions, finite differences, and its written semantics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_attention.kernels.attention import attention, attention_weights


def qkv(batch=2, num_heads=2, num_heads_kv=2, seqlen_q=5, seqlen_k=6, head_dim=4, head_dim_v=3, requires_grad=False) -> list[Tensor]:
    shapes = (
        (batch, num_heads, seqlen_q, head_dim),
        (batch, num_heads_kv, seqlen_k, head_dim),
        (batch, num_heads_kv, seqlen_k, head_dim_v),
    )
    return [torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes]


FEATURES = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": "bottom_right", "query_lengths": torch.tensor([5, 3]), "key_lengths": torch.tensor([6, 4])},
    "window": {"window": (2, 1)},
    "key_mask with an empty row": {"key_mask": torch.tensor([[True, False, True, True, False, True], [False] * 6])},
    "softcap": {"softcap": 1.5},
    "dropout": {"dropout_p": 0.4, "rng_state": torch.tensor([7, 11])},
    "bool mask": {"attn_mask": torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.4},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives(feature: str, check) -> None:
    inputs = qkv(requires_grad=True)

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(*inputs, **FEATURES[feature], return_lse=True, backend="reference")
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert check(function, inputs)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_of_bias_slopes_and_sinks_with_grouped_queries(check) -> None:
    inputs = qkv(num_heads=4, requires_grad=True)
    bias = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, bias, slopes, sinks):
        return attention(query, key, value, attn_mask=bias[None], alibi_slopes=slopes, sinks=sinks, return_lse=True)

    assert check(function, (*inputs, bias, slopes, sinks))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
def test_equals_torch(options: dict) -> None:
    query, key, value = qkv(num_heads=4, num_heads_kv=2 if "enable_gqa" in options else 4)
    ours = attention(query, key, value, is_causal=options.get("is_causal", False))
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value, **options))


def test_formula_by_hand() -> None:
    """Every term at once, written as loops over one query."""
    query, key, value = qkv(batch=1, num_heads=1, num_heads_kv=1)
    bias = torch.randn(5, 6, dtype=torch.float64)
    out, lse = attention(
        query, key, value, attn_mask=bias, window=(3, 2), softcap=0.8, scale=0.7, return_lse=True,
        alibi_slopes=torch.tensor([0.3], dtype=torch.float64), sinks=torch.tensor([0.2], dtype=torch.float64),
    )  # fmt: skip
    for i in range(5):
        visible = [j for j in range(6) if i - 3 <= j <= i + 2]
        scores = [0.8 * torch.tanh(0.7 * query[0, 0, i] @ key[0, 0, j] / 0.8) + bias[i, j] - 0.3 * abs(j - i) for j in visible]
        denominator = torch.stack([*scores, torch.tensor(0.2, dtype=torch.float64)]).exp().sum()
        expected = sum(score.exp() / denominator * value[0, 0, j] for score, j in zip(scores, visible, strict=True))
        torch.testing.assert_close(out[0, 0, i], expected)
        torch.testing.assert_close(lse[0, 0, i], denominator.log())


def test_empty_rows_and_absent_tokens_never_leak() -> None:
    query, key, value = qkv()
    lengths_k, lengths_q = torch.tensor([4, 0]), torch.tensor([5, 2])
    options = {"key_lengths": lengths_k, "query_lengths": lengths_q, "return_lse": True}
    clean = attention(query, key, value, **options)
    key[0, :, 4:], value[0, :, 4:], key[1], value[1], query[1, :, 2:] = torch.nan, torch.inf, torch.nan, torch.nan, torch.nan
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out, lse = attention(*leaves, **options)
    assert torch.equal(out, clean[0])
    assert torch.equal(lse, clean[1])
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    gradients = torch.autograd.grad(out.sum() + lse[0].sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][1] == 0).all()
    assert (gradients[1][0, :, 4:] == 0).all()


def test_the_gradient_of_rows_that_attend_to_nothing_is_never_read() -> None:
    """Rows past query_lengths, and rows before the first key of the bottom-right diagonal."""
    leaves = qkv(seqlen_q=5, seqlen_k=3, requires_grad=True)
    for options, nothing in (({"query_lengths": torch.tensor([3, 3])}, slice(3, 5)), ({"is_causal": "bottom_right"}, slice(0, 2))):
        out, lse = attention(*leaves, **options, return_lse=True)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        dout[:, :, nothing], dlse[:, :, nothing] = 0.0, 0.0
        expected = torch.autograd.grad((out, lse), leaves, (dout, dlse), retain_graph=True)
        dout[:, :, nothing], dlse[:, :, nothing] = torch.nan, torch.nan
        gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))


def test_a_float_mask_masks_below_minus_1e30() -> None:
    query, key, value = qkv()
    mask = torch.zeros(5, 6, dtype=torch.float64)
    mask[:, 3] = torch.finfo(torch.float32).min
    mask.requires_grad_()
    out = attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(out, attention(query, key, value, attn_mask=mask > -1))
    out.sum().backward()
    assert (mask.grad[:, 3] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 2, 5, 6), (2, 2, 0, 6), (2, 2, 5, 0)], ids=["B = 0", "Lq = 0", "Lk = 0"])
def test_empty_sizes(sizes: tuple[int, int, int, int]) -> None:
    batch, num_heads, seqlen_q, seqlen_k = sizes
    leaves = qkv(batch, num_heads, num_heads, seqlen_q, seqlen_k, requires_grad=True)
    out, lse = attention(*leaves, return_lse=True)
    assert out.shape == (batch, num_heads, seqlen_q, 3)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    out.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("average_heads", [False, True])
def test_weights_reproduce_the_output(average_heads: bool) -> None:
    query, key, value = qkv(num_heads=4, seqlen_q=20, seqlen_k=21)
    options = {"dropout_p": 0.3, "rng_state": torch.tensor([1, 2]), "is_causal": True}
    out, lse = attention(query, key, value, return_lse=True, **options)
    weights = attention_weights(query, key, lse, average_heads=average_heads, **options)
    if average_heads:
        torch.testing.assert_close(weights, attention_weights(query, key, lse, **options).mean(1))
    else:
        torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), out)


def test_output_memory_follows_the_query() -> None:
    query, key, value = qkv()
    assert attention(query, key, value).transpose(1, 2).is_contiguous()
    sequence_first = query.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert attention(sequence_first, key, value).permute(2, 0, 1, 3).is_contiguous()
