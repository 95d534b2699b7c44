"""The functions of flash-attn against attention written out from their documentation."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from accuracy import assert_accurate, assert_lse_accurate
from torch import Tensor
from torch.testing import assert_close

from fused_attention import flash_attn_interface
from fused_attention.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

COMMON = ("dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs")
PARAMETERS = {
    "flash_attn_func": ("q", "k", "v", *COMMON),
    "flash_attn_kvpacked_func": ("q", "kv", *COMMON),
    "flash_attn_qkvpacked_func": ("qkv", *COMMON),
    "flash_attn_varlen_func": (
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", *COMMON, "block_table"
    ),
    "flash_attn_varlen_qkvpacked_func": ("qkv", "cu_seqlens", "max_seqlen", *COMMON),
    "flash_attn_varlen_kvpacked_func": ("q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", *COMMON),
    "flash_attn_with_kvcache": (
        "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table",
        "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits", "return_softmax_lse",
    ),
}  # fmt: skip
DEFAULTS = {"dropout_p": 0.0, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True, "num_splits": 0,
            "deterministic": False, "return_attn_probs": False, "return_softmax_lse": False}  # fmt: skip


@pytest.mark.parametrize("function", PARAMETERS)
def test_signatures(function: str) -> None:
    parameters = inspect.signature(getattr(flash_attn_interface, function)).parameters
    assert tuple(parameters) == PARAMETERS[function]
    given = {name: parameter.default for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    assert given == {name: DEFAULTS.get(name) for name in given}


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, Lq, Hq, Dv) and lse (B, Hq, Lq)."""
    seqlen_q, seqlen_k, repeats = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)))
    scores = query @ key.transpose(-1, -2) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(seqlen_k) - (torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance.abs()
    left, right = window_size
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance > 0
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    scores = scores.masked_fill(hidden, -torch.inf)
    nothing = hidden.all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    return (weights @ value).transpose(1, 2), torch.logsumexp(scores, -1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "scale and softcap": {"softmax_scale": 0.5, "softcap": 3.0},
    "window": {"window_size": (4, 2)},
    "window to the left": {"window_size": (3, -1)},
    "causal window": {"window_size": (5, 5), "causal": True},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "causal, slopes of each sequence": {"alibi_slopes": torch.rand(2, 4), "causal": True},
}
LENGTHS = {"square": (9, 9), "more keys": (5, 12), "more queries": (12, 5)}  # the last have queries that may attend to nothing


def tensors(seqlen_q: int, seqlen_k: int, heads_k: int = 2, head_dim_v: int = 8) -> list[Tensor]:
    shapes = (2, seqlen_q, 4, 8), (2, seqlen_k, heads_k, 8), (2, seqlen_k, heads_k, head_dim_v)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def with_gradients(function: Any, inputs: list[Tensor], dout: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """out, lse and the gradients."""
    out, lse, *_ = function(*inputs, **options)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("options", OPTIONS)
def test_out_lse_and_gradients(options: str, lengths: str, dtype: torch.dtype) -> None:
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors(*LENGTHS[lengths])]
    dout = torch.randn(inputs[0].shape).to(dtype)
    exact = with_gradients(plain, [tensor.detach().double().requires_grad_() for tensor in inputs], dout, **OPTIONS[options])
    eager = with_gradients(plain, inputs, dout, **OPTIONS[options])
    actual = with_gradients(flash_attn_func, inputs, dout, **OPTIONS[options], return_attn_probs=True)
    assert actual[0].is_contiguous()
    assert_accurate("out", "out", actual[0], eager[0], exact[0])
    assert_lse_accurate(actual[1], exact[1])
    largest = 2 * torch.finfo(dtype).eps  # the saved out and lse are rounded
    for name, ours, other, true in zip("qkv", actual[2:], eager[2:], exact[2:], strict=True):
        assert_accurate(f"gradient of {name}", "gradient", ours, other, true, largest)
    assert torch.equal(flash_attn_func(*inputs, **OPTIONS[options]), actual[0])


@pytest.mark.parametrize("options", OPTIONS)
def test_packed_projections(options: str) -> None:
    qkv = torch.randn(2, 9, 3, 4, 8, requires_grad=True)
    kv = torch.randn(2, 7, 2, 2, 8, requires_grad=True)
    q = torch.randn(2, 9, 4, 8, requires_grad=True)
    for inputs, packed, unpacked in (
        ((qkv,), flash_attn_qkvpacked_func, qkv.unbind(2)),
        ((q, kv), flash_attn_kvpacked_func, (q, *kv.unbind(2))),
    ):
        expected, lse = plain(*unpacked, **OPTIONS[options])
        out = packed(*inputs, **OPTIONS[options])
        assert_close(out, expected)
        gradients = [torch.autograd.grad(result.square().sum(), inputs, retain_graph=True) for result in (out, expected)]
        assert_close(*gradients)
        assert_close(packed(*inputs, **OPTIONS[options], return_attn_probs=True), (expected, lse, None))


@pytest.mark.parametrize("options", OPTIONS)
def test_packed_sequences(options: str) -> None:
    lengths = [(5, 9), (7, 3)]
    q, k, v = torch.randn(12, 4, 8, requires_grad=True), *(torch.randn(12, 2, 8, requires_grad=True) for _ in range(2))
    starts_q, starts_k = torch.tensor([0, 5, 12], dtype=torch.int32), torch.tensor([0, 9, 12], dtype=torch.int32)
    arguments = (q, k, v, starts_q, starts_k, 7, 9)
    out, lse, weights = flash_attn_varlen_func(*arguments, **OPTIONS[options], return_attn_probs=True)
    outs, lses = [], []
    slopes = OPTIONS[options].get("alibi_slopes")
    for i, (own_q, own_k, own_v) in enumerate(zip(*(x.split([a for a, _ in lengths] if x is q else [b for _, b in lengths])
                                                    for x in (q, k, v)), strict=True)):  # fmt: skip
        own = OPTIONS[options] | ({} if slopes is None or slopes.dim() == 1 else {"alibi_slopes": slopes[i]})
        expected = plain(own_q[None], own_k[None], own_v[None], **own)
        outs.append(expected[0][0])
        lses.append(expected[1][0])
    assert weights is None
    assert_close((out, lse), (torch.cat(outs), torch.cat(lses, dim=1)))
    gradients = [torch.autograd.grad(result.square().sum(), (q, k, v), retain_graph=True) for result in (out, torch.cat(outs))]
    assert_close(*gradients)
    assert torch.equal(flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), *arguments[3:], **OPTIONS[options]), out)


def test_packed_sequences_of_one_projection() -> None:
    qkv, starts = torch.randn(12, 3, 4, 8), torch.tensor([0, 5, 12], dtype=torch.int32)
    expected = flash_attn_varlen_func(*qkv.unbind(1), starts, starts, 7, 7, 0.0, 0.3, True)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, starts, 7, 0.0, 0.3, True), expected)


def test_weights_tell_what_was_dropped() -> None:
    q, k, v = tensors(9, 20)
    torch.manual_seed(0)
    out, lse, weights = flash_attn_func(q, k, v, dropout_p=0.25, causal=True, return_attn_probs=True)
    expected, expected_lse = plain(q, k, torch.eye(20)[None, :, None].expand(2, 20, 2, 20), causal=True)  # the weights
    assert_close(weights.abs(), expected.transpose(1, 2))
    assert_close(lse, expected_lse)
    kept = weights.clamp(min=0.0) / 0.75
    assert_close(out, (kept @ v.transpose(1, 2).repeat_interleave(2, 1)).transpose(1, 2))
    assert 0.15 < (weights < 0).sum() / (weights != 0).sum() < 0.35


class TestCache:
    LENGTHS = torch.tensor([3, 7], dtype=torch.int32)

    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("place", ["rows", "cache_batch_idx", "block_table"])
    @pytest.mark.parametrize("new", [0, 1, 3])
    def test_appends_and_attends(self, new: int, place: str, options: str) -> None:
        """Each sequence on its own, with the keys that it should have; NaN where no key is."""
        q, (k, v) = torch.randn(2, max(new, 1), 4, 8), torch.randn(2, 2, new, 2, 8).unbind(0)
        caches = torch.full((2, 3, 12, 2, 8), torch.nan)
        rows = [2, 0] if place == "cache_batch_idx" else [0, 1]
        for row, length in zip(rows, self.LENGTHS.tolist(), strict=True):
            caches[:, row, :length] = torch.randn(2, length, 2, 8)
        held = [[caches[i, row, :length].clone() for i in range(2)] for row, length in zip(rows, self.LENGTHS.tolist(), strict=True)]
        where: dict[str, Any] = {"cache_batch_idx": torch.tensor(rows, dtype=torch.int32)} if place == "cache_batch_idx" else {}
        if place == "block_table":  # blocks of 4, in reverse order
            caches = caches.unflatten(2, (3, 4)).flatten(1, 2).flip(1).contiguous()
            where["block_table"] = torch.tensor([[8, 7, 6], [5, 4, 3]], dtype=torch.int32)
        appended = {"k": k, "v": v} if new else {}
        out, lse = flash_attn_with_kvcache(
            q, *caches, **appended, **where, cache_seqlens=self.LENGTHS, **OPTIONS[options], return_softmax_lse=True
        )
        slopes = OPTIONS[options].get("alibi_slopes")
        for i, (own_k, own_v) in enumerate(held):
            own = OPTIONS[options] | ({} if slopes is None or slopes.dim() == 1 else {"alibi_slopes": slopes[i]})
            expected = plain(q[i : i + 1], torch.cat((own_k, k[i]))[None], torch.cat((own_v, v[i]))[None], **own)
            assert_close((out[i], lse[i]), (expected[0][0], expected[1][0]))
        assert out.is_contiguous()
        assert caches.isfinite().sum() == 2 * 16 * (self.LENGTHS.sum() + 2 * new)

    def test_a_length_for_all_and_left_padding(self) -> None:
        q, k_cache, v_cache = (tensor.detach() for tensor in tensors(2, 9))
        out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7, cache_leftpad=torch.tensor([2, 0]), causal=True)
        assert_close(out[:1], plain(q[:1], k_cache[:1, 2:7], v_cache[:1, 2:7], causal=True)[0])
        assert_close(out[1:], plain(q[1:], k_cache[1:, :7], v_cache[1:, :7], causal=True)[0])
        assert_close(flash_attn_with_kvcache(q, k_cache, v_cache), plain(q, k_cache, v_cache)[0])

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"rotary_cos": torch.ones(9, 4)}, "rotary_cos must be None"),
            ({"k": torch.ones(2, 1, 2, 8), "cache_seqlens": 3}, "k and v must be given together"),
            ({"k": torch.ones(2, 1, 2, 8), "v": torch.ones(2, 1, 2, 8)}, "cache_seqlens must be given"),
            ({"k": torch.ones(2, 3, 2, 8), "v": torch.ones(2, 3, 2, 8), "cache_seqlens": 7}, "k does not fit into the cache of 9 keys"),
            ({"k": torch.ones(2, 1, 4, 8), "v": torch.ones(2, 1, 2, 8), "cache_seqlens": 3}, r"k must be \(2, 1, 2, 8\)"),
            ({"cache_seqlens": torch.ones(3, dtype=torch.int32)}, r"cache_seqlens must have shape \(2,\)"),
            ({"cache_batch_idx": torch.ones(2)}, "cache_batch_idx must be int32 or int64"),
            ({"cache_batch_idx": torch.tensor([0, 1]), "block_table": torch.tensor([[0], [1]])}, "cache_batch_idx must be None"),
            ({"block_table": torch.tensor([0, 1])}, "block_table must have shape"),
            ({"v_cache": torch.ones(2, 8, 2, 8)}, "v_cache must have the sizes of k_cache"),
        ],
    )
    def test_bad_input(self, wrong: dict[str, Any], message: str) -> None:
        q, k_cache, v_cache = (tensor.detach() for tensor in tensors(1, 9))
        before = k_cache.clone()
        with pytest.raises((TypeError, ValueError), match=message):
            flash_attn_with_kvcache(q, k_cache, **{"v_cache": v_cache} | wrong)
        assert torch.equal(k_cache, before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.ones(2, 4, 8)}, r"q must have shape \(batch, seqlen, num_heads, head_dim\), got \(2, 4, 8\)"),
        ({"k": None}, "k must be a torch.Tensor, got NoneType"),
        ({"window_size": 3}, "window_size must be a pair"),
        ({"window_size": (None, 0)}, "window_size must be an int"),
        ({"dropout_p": 1.5}, "dropout_p must be in"),
        ({"softcap": None}, "softcap must be a number"),
        ({"alibi_slopes": torch.ones(3)}, "alibi_slopes must have shape"),
    ],
)
def test_bad_input(wrong: dict[str, Any], message: str) -> None:
    arguments = dict(zip("qkv", tensors(5, 5), strict=True)) | wrong
    with pytest.raises((TypeError, ValueError), match=message):
        flash_attn_func(**arguments)


def test_what_is_refused_for_packed_sequences() -> None:
    tokens, starts = torch.randn(5, 4, 8), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="block_table must be None"):
        flash_attn_varlen_func(tokens, tokens, tokens, starts, starts, 5, 5, block_table=torch.tensor([[0]]))
    with pytest.raises(ValueError, match="return_attn_probs must be False"):
        flash_attn_varlen_func(tokens, tokens, tokens, starts, starts, 5, 5, 0.5, return_attn_probs=True)
    with pytest.raises(ValueError, match="qkv must have shape"):
        flash_attn_qkvpacked_func(torch.ones(2, 5, 2, 4, 8))


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, k, cache_seqlens=lengths, causal=True)
        return out + flash_attn_func(q, k, k, causal=True, window_size=(2, 0))

    arguments = [tensor.detach() for tensor in tensors(2, 9)] + [torch.randn(2, 2, 2, 8), torch.tensor([3, 7])]
    copies = [tensor.clone() for tensor in arguments]
    expected = step(*copies)
    assert_close(torch.compile(step, backend="aot_eager", fullgraph=True)(*arguments), expected)
    assert_close(arguments, copies)
