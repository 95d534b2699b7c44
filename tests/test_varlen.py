"""Packed sequences: what each one gets is what it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_attention.kernels import ops
from fused_attention.kernels.attention import attention, attention_varlen
from fused_attention.kernels.checks import make_problem

NUM_HEADS, HEAD_DIM, HEAD_DIM_V = 4, 6, 5
LENGTHS_Q, LENGTHS_K = (5, 0, 3, 7, 2), (4, 3, 0, 9, 2)  # empty ones, and as many queries as keys, fewer and more
TAIL = 3  # tokens past the last sequence

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": "bottom_right"},
    "window": {"window": (2, 1)},
    "softcap and scale": {"softcap": 1.5, "scale": 0.8},
    "slopes": {"alibi_slopes": torch.linspace(0.1, 1, NUM_HEADS), "is_causal": "bottom_right"},
    "slopes per sequence": {"alibi_slopes": torch.linspace(0, 1, len(LENGTHS_Q) * NUM_HEADS).view(-1, NUM_HEADS)},
    "sinks": {"sinks": torch.linspace(-1, 1, NUM_HEADS)},
    "query lengths": {"query_lengths": torch.tensor([2, 1, 9, 0, 1]), "is_causal": "bottom_right"},
}


def cu_seqlens(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tensors(dtype: torch.dtype = torch.float64, num_heads_kv: int = NUM_HEADS, requires_grad: bool = False) -> tuple[Tensor, ...]:
    shapes = (
        (sum(LENGTHS_Q) + TAIL, NUM_HEADS, HEAD_DIM),
        (sum(LENGTHS_K) + TAIL, num_heads_kv, HEAD_DIM),
        (sum(LENGTHS_K) + TAIL, num_heads_kv, HEAD_DIM_V),
    )
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes)


def packed(*inputs: Tensor, **options: Any) -> Any:
    sequences = (cu_seqlens(LENGTHS_Q), cu_seqlens(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))
    return attention_varlen(*inputs, *sequences, **options)


def one_by_one(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The same by a call of `attention` for each sequence."""
    outs, lses = [], []
    starts_q, starts_k = cu_seqlens(LENGTHS_Q).tolist(), cu_seqlens(LENGTHS_K).tolist()
    for index in range(len(LENGTHS_Q)):
        rows, keys = slice(*starts_q[index : index + 2]), slice(*starts_k[index : index + 2])
        parts = (inputs[0][rows], inputs[1][keys], inputs[2][keys])
        own = dict(options)
        if "query_lengths" in own:
            own["query_lengths"] = own["query_lengths"][index : index + 1]
        if own.get("alibi_slopes") is not None and own["alibi_slopes"].dim() == 2:
            own["alibi_slopes"] = own["alibi_slopes"][index]
        out, lse = attention(*(part.transpose(0, 1)[None] for part in parts), **own, return_lse=True)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    outs.append(inputs[0].new_zeros(TAIL, NUM_HEADS, HEAD_DIM_V))
    lses.append(inputs[0].new_full((NUM_HEADS, TAIL), -torch.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("num_heads_kv", [NUM_HEADS, 2])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_sequence_is_alone(feature: str, num_heads_kv: int) -> None:
    inputs = tensors(num_heads_kv=num_heads_kv, requires_grad=True)
    results = []
    for function in (packed, one_by_one):
        options = FEATURES[feature] | ({"return_lse": True} if function is packed else {})
        out, lse = function(*inputs, **options)
        seen = lse.isfinite()
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + torch.where(seen, lse, 0.0).square().sum()
        results.append((out, lse, *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*results)


def test_tokens_of_no_sequence() -> None:
    """What stands there is never read, and what comes out is 0."""
    clean = tensors()
    expected, expected_lse = packed(*clean, return_lse=True)
    inputs = tuple(tensor.clone() for tensor in clean)
    for tensor in inputs:
        tensor[-TAIL:] = torch.nan
        tensor.requires_grad_()
    out, lse = packed(*inputs, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert (out[-TAIL:] == 0).all()
    assert (lse[:, -TAIL:] == -torch.inf).all()
    out.sum().backward()
    for tensor in inputs:
        assert (tensor.grad[-TAIL:] == 0).all()
        assert tensor.grad.isfinite().all()


def test_tokens_before_the_first_sequence_and_ends_beyond_the_last_token() -> None:
    query, key, value = (tensor[:5] for tensor in tensors())
    out, lse = attention_varlen(query, key, value, torch.tensor([2, 9]), torch.tensor([1, 2**40]), 3, 9, return_lse=True)
    expected = attention(*(tensor.transpose(0, 1)[None] for tensor in (query[2:], key[1:], value[1:])))
    torch.testing.assert_close(out[2:], expected[0].transpose(0, 1))
    assert (out[:2] == 0).all()
    assert (lse[:, :2] == -torch.inf).all()


def test_dropout_counts_within_the_sequence_whatever_the_maximum() -> None:
    inputs, state = tensors(), torch.tensor([3, 4])
    starts_q, starts_k = cu_seqlens(LENGTHS_Q), cu_seqlens(LENGTHS_K)
    out = packed(*inputs, dropout_p=0.4, rng_state=state)
    longer = attention_varlen(*inputs, starts_q, starts_k, 20, 31, dropout_p=0.4, rng_state=state)
    torch.testing.assert_close(out, longer)
    padded = [torch.zeros(len(LENGTHS_Q), NUM_HEADS, length, tensor.shape[2]) for tensor, length in zip(inputs, (7, 9, 9), strict=True)]
    for tensor, batch, starts in zip(inputs, padded, (starts_q, starts_k, starts_k), strict=True):
        for index, (start, end) in enumerate(pairwise(starts)):
            batch[index, :, : end - start] = tensor[start:end].transpose(0, 1)
    expected = attention(*(batch.double() for batch in padded), key_lengths=starts_k.diff(), dropout_p=0.4, rng_state=state)
    for index, (start, end) in enumerate(pairwise(starts_q)):
        torch.testing.assert_close(out[start:end], expected[index, :, : end - start].transpose(0, 1), rtol=1e-5, atol=1e-5)


SHORT = 40  # sequences, whose tokens together are far more than the longest one has


@pytest.mark.parametrize("bound", [None, 10**6, 2**31 - 1, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "reference"])
def test_costs_follow_the_tokens_not_the_bound(dtype: torch.dtype, bound: int | None) -> None:
    lengths = [0, 3, *[2] * SHORT]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    inputs = tuple(torch.randn(int(starts[-1]), 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    problem = make_problem("varlen", inputs, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=bound, max_seqlen_k=bound)
    assert (problem.max_seqlen_q, problem.max_seqlen_k) == (3, 3)
    results = []
    for longest in (3, bound):
        out = attention_varlen(*inputs, starts, starts, longest, longest, is_causal=True)
        first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        results.append((out, *first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)))
    torch.testing.assert_close(*results)


def test_a_bound_that_is_not_read_is_at_most_the_tokens() -> None:
    inputs, starts = [tensor.to("meta") for tensor in tensors()], cu_seqlens(LENGTHS_Q).to("meta")
    for bound in (None, 10**6):
        problem = make_problem("varlen", tuple(inputs), cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=bound, max_seqlen_k=9)
        assert (problem.max_seqlen_q, problem.max_seqlen_k) == (sum(LENGTHS_Q) + TAIL, 9)


@pytest.mark.parametrize("number", [numpy.int64, numpy.int32, torch.tensor], ids=["int64", "int32", "0-dim tensor"])
def test_integers_that_are_not_pythons(number: Callable[[int], Any]) -> None:
    inputs, starts = tensors(), (cu_seqlens(LENGTHS_Q), cu_seqlens(LENGTHS_K))
    torch.testing.assert_close(attention_varlen(*inputs, *starts, number(7), number(9)), packed(*inputs))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives(check) -> None:
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    inputs = [torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    slopes = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        options = {"alibi_slopes": slopes, "sinks": sinks, "is_causal": True}
        out, lse = attention_varlen(query, key, value, starts, starts, 3, 3, **options, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert check(function, (*inputs, slopes, sinks))


@pytest.mark.parametrize(("batch", "tokens", "max_seqlen"), [(0, 0, 0), (0, 4, 5), (3, 0, 0), (3, 0, 5), (2, 4, 0)])
def test_empty_sizes(batch: int, tokens: int, max_seqlen: int) -> None:
    inputs = [torch.randn(tokens, 2, 8, requires_grad=True) for _ in range(3)]
    starts = torch.zeros(batch + 1, dtype=torch.int32)
    out, lse = attention_varlen(*inputs, starts, starts, max_seqlen, max_seqlen, return_lse=True)
    assert out.shape == (tokens, 2, 8)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    out.sum().backward()
    assert all((tensor.grad == 0).all() for tensor in inputs)


def test_memory_and_dtypes() -> None:
    out, lse = packed(*tensors(torch.bfloat16), return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert out.is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(*tensors(torch.float32)).dtype == torch.bfloat16
    meta = [tensor.to("meta") for tensor in tensors()]
    starts = cu_seqlens(LENGTHS_Q).to("meta")
    assert attention_varlen(*meta, starts, starts, 7, 9).shape == (sum(LENGTHS_Q) + TAIL, NUM_HEADS, HEAD_DIM_V)


def arguments(**changes: Any) -> dict[str, Any]:
    query, key, value = tensors(torch.float32)
    starts = {"cu_seqlens_q": cu_seqlens(LENGTHS_Q), "cu_seqlens_k": cu_seqlens(LENGTHS_K), "max_seqlen_q": 7, "max_seqlen_k": 9}
    return {"query": query, "key": key, "value": value} | starts | changes


BAD_CALLS = {
    "4-D query": ({"query": torch.zeros(1, 4, 5, 6)}, ValueError, r"query must have shape \(num_tokens, num_heads, head_dim\), got"),
    "value length": ({"value": torch.zeros(2, 4, 5)}, ValueError, "value must have the batch, heads and length of key"),
    "no starts": ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q must be a torch.Tensor, got NoneType"),
    "float starts": ({"cu_seqlens_k": torch.zeros(6)}, TypeError, "cu_seqlens_k must be int32 or int64, got torch.float32"),
    "empty starts": ({"cu_seqlens_q": torch.zeros(0).int()}, ValueError, r"cu_seqlens_q must have shape \(batch \+ 1,\), got \(0,\)"),
    "2-D starts": ({"cu_seqlens_q": torch.zeros(1, 6).int()}, ValueError, r"cu_seqlens_q must have shape \(batch \+ 1,\), got \(1, 6\)"),
    "other batch": ({"cu_seqlens_k": torch.zeros(5).int()}, ValueError, r"cu_seqlens_k must have shape .* = \(6,\), got \(5,\)"),
    "other device": ({"cu_seqlens_q": torch.zeros(6, device="meta").int()}, ValueError, "cu_seqlens_q must be on the device of query, cpu"),
    "float maximum": ({"max_seqlen_q": 7.0}, TypeError, "max_seqlen_q must be an int, got float"),
    "boolean maximum": ({"max_seqlen_q": True}, TypeError, "max_seqlen_q must be an int, got bool"),
    "maxima in a tensor": ({"max_seqlen_q": torch.ones(2).int()}, TypeError, r"max_seqlen_q must be an int, got a tensor of shape \(2,\)"),
    "maximum in a float tensor": ({"max_seqlen_k": torch.tensor(9.0)}, TypeError, "max_seqlen_k must be an int, got .*float32"),
    "negative maximum": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be >= 0, got -1"),
    "lengths": ({"query_lengths": torch.zeros(4).int()}, ValueError, r"query_lengths must have shape .*\(5,\), got \(4,\)"),
    "slopes": ({"alibi_slopes": torch.zeros(4, 4)}, ValueError, r"alibi_slopes must have shape .*\(5, 4\), got \(4, 4\)"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(case: str) -> None:
    changes, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        attention_varlen(**arguments(**changes))


def test_padding_has_no_place_here() -> None:
    call = arguments()
    inputs = tuple(call.pop(name) for name in ("query", "key", "value"))
    with pytest.raises(ValueError, match="key_lengths must be None for packed sequences"):
        make_problem("varlen", inputs, key_lengths=torch.zeros(5).int(), **call)
    with pytest.raises(TypeError, match="cu_seqlens_q, .* are arguments of attention_varlen only"):
        make_problem("separate", tuple(tensor.transpose(0, 1)[None] for tensor in inputs), **call)


@pytest.mark.usefixtures("kernels_by_reference", "poisoned_memory")
class TestThroughKernels:
    """Everything between the public function and a kernel that takes packed sequences."""

    @pytest.mark.parametrize("path", ["cheap", "operator", "compiled"])
    @pytest.mark.parametrize("feature", ["bottom right", "query lengths"])
    def test_gradients(self, feature: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if path == "operator":
            monkeypatch.setattr(ops, "_takes_cheap_path", lambda problem: False)
        inputs = tensors(torch.float32, num_heads_kv=2, requires_grad=True)
        sinks = torch.randn(NUM_HEADS, requires_grad=True)

        def gradients(function, backend: str) -> tuple[Tensor, ...]:
            out, lse = function(*inputs, **FEATURES[feature], sinks=sinks, return_lse=True, backend=backend)
            outputs, given = (out, lse), (torch.linspace(-1, 1, out.numel()).view_as(out), torch.ones_like(lse))
            return (*outputs, *torch.autograd.grad(outputs, [*inputs, sinks], given))

        function = torch.compile(packed, fullgraph=True, backend="aot_eager") if path == "compiled" else packed
        torch.testing.assert_close(gradients(function, "triton"), gradients(packed, "reference"))

    def test_opcheck(self) -> None:
        call = arguments()
        inputs = tuple(call.pop(name).requires_grad_() for name in ("query", "key", "value"))
        problem = make_problem("varlen", inputs, **call, sinks=torch.zeros(NUM_HEADS, requires_grad=True))
        torch.library.opcheck(torch.ops.fused_attention.attention_varlen.default, (*problem.op_arguments(), "triton"))

    def test_compiled_with_dynamic_shapes(self) -> None:
        compiled = torch.compile(attention_varlen, fullgraph=True, dynamic=True, backend="aot_eager")
        for length in (4, 6, 9):
            inputs = [torch.randn(3 * length, 2, 8) for _ in range(3)]
            starts = torch.arange(4) * length
            torch.testing.assert_close(
                compiled(*inputs, starts, starts, length, length), attention_varlen(*inputs, starts, starts, length, length)
            )
