"""Calls of the public functions and their checks on a backend: autograd, packed sequences, decoding, weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import FLOAT_TENSORS, assert_accurate, assert_lse_accurate, exact_and_eager, saved_rounding
from attention_calls import CALL, build, options_of
from torch import Tensor

from fused_attention import attention_decode, attention_varlen
from fused_attention.kernels import backends, replay
from fused_attention.kernels.attention import attention
from fused_attention.kernels.problem import Problem
from fused_attention.kernels.weights import reference_weights


def leaves_of(problem: Problem) -> dict[str, Tensor]:
    tensors = {name: getattr(problem, name) for name in FLOAT_TENSORS}
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items() if tensor is not None}


EVERYTHING = {
    "sizes": (2, 2, 1), "is_causal": "bottom_right", "attn_mask": ("float32", "1HQK"), "key_mask": "right", "dropout_p": 0.25,
    "softcap": 2.0, "alibi_slopes": "H", "sinks": True, "lse_gradient": True,
}  # fmt: skip


def check_autograd(backend: str, options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    problem, dout, dlse = build(options | {"dtype": dtype, "seqlens": (33, 40)}, device)
    exact, eager = exact_and_eager(problem, dout, dlse)
    rounding = saved_rounding(problem, dout, exact, dlse)
    leaves = leaves_of(problem)
    out, lse = attention(**options_of(problem) | leaves, return_lse=True, backend=backend)
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), (dout, torch.zeros_like(lse) if dlse is None else dlse))
    assert_accurate("out", "out", out, eager["out"], exact["out"])
    assert_lse_accurate(lse, exact["lse"])
    for name, gradient in zip(leaves, gradients, strict=True):
        assert_accurate(f"gradient of {name}", "gradient", gradient, eager[name], exact[name], rounding[name])


def check_only_the_gradients_that_are_asked_for(backend: str, device: str) -> None:
    problem, dout, _ = build(EVERYTHING | {"seqlens": (20, 17), "sizes": (1, 1, 1)}, device)
    leaves = leaves_of(problem)
    out = attention(**options_of(problem) | leaves, backend=backend)
    everything = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))
    for name in leaves:
        alone = {other: tensor.detach().requires_grad_(other == name) for other, tensor in leaves.items()}
        attention(**options_of(problem) | alone, backend=backend).backward(dout)
        assert torch.equal(alone[name].grad, everything[name]), name
        assert all(tensor.grad is None for other, tensor in alone.items() if other != name)


SEQUENCES = [(33, 40), (1, 70), (0, 5), (70, 0), (40, 33)]  # queries and keys of each
VARLEN: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": "top_left"},
    "causal bottom-right, window": {"is_causal": "bottom_right", "window": (20, None)},
    "causal behind 7 keys, alibi": {"is_causal": True, "diagonal": 7, "alibi_slopes": "BH"},
    "window bottom-right": {"window": (20, 3), "diagonal": "bottom_right"},
    "softcap, sinks": {"softcap": 2.0, "sinks": True},
    "alibi, bottom-right": {"alibi_slopes": "BH", "is_causal": "bottom_right"},
    "grouped heads": {"sizes": (1, 4, 2)},
}


def packed_sequences(options: dict, dtype: torch.dtype, device: str) -> tuple[list[tuple], tuple[Tensor, ...], dict[str, Any]]:
    """Problems of single sequences with their output gradients; these packed, NaN before the first and after the last; the sizes."""
    singles = [build({"dtype": dtype, "sizes": (1, 2, 2), "seqlens": lengths, "seed": i, "lse_gradient": True} | options, device)
               for i, lengths in enumerate(SEQUENCES)]  # fmt: skip
    packed = []
    for tensors in zip(*[(*problem.inputs, dout, dlse[..., None]) for problem, dout, dlse in singles], strict=True):
        unused = tensors[0].new_full((3, *tensors[0].shape[1::2]), torch.nan)
        packed.append(torch.cat([unused, *[tensor[0].transpose(0, 1) for tensor in tensors], unused]))
    starts = [torch.tensor([3, *[length[side] for length in SEQUENCES]]).cumsum(0).to(device, torch.int32) for side in range(2)]
    longest = [max(length[side] for length in SEQUENCES) for side in range(2)]
    sizes = dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), (*starts, *longest), strict=True))
    return singles, tuple(packed), sizes


def check_packed_sequences(
    backend: str, case: str, dtype: torch.dtype, device: str, head_dims: tuple[int, int] = CALL["head_dims"]
) -> None:
    """Each sequence as if it were alone; tokens of no sequence get zeros."""
    singles, (query, key, value, dout, dlse), sizes = packed_sequences(VARLEN[case] | {"head_dims": head_dims}, dtype, device)
    first = singles[0][0]
    options = {name: option for name, option in options_of(first).items() if name not in ("attn_mask", "key_mask", "key_lengths")}
    if options["alibi_slopes"] is not None:
        options["alibi_slopes"] = torch.cat([problem.alibi_slopes for problem, _, _ in singles])
    for problem, _, _ in singles:
        problem.sinks = first.sinks
    dlse = dlse[..., 0].transpose(0, 1)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out, lse = attention_varlen(*leaves, **sizes, **options, return_lse=True, backend=backend)
    gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    for tensor in (out, *gradients):
        assert (tensor[:3] == 0).all()
        assert (tensor[-3:] == 0).all()
    assert (lse[:, :3] == -torch.inf).all()
    assert (lse[:, -3:] == -torch.inf).all()
    starts_q, starts_k = sizes["cu_seqlens_q"].tolist(), sizes["cu_seqlens_k"].tolist()
    for index, (problem, single_dout, single_dlse) in enumerate(singles):
        rows, keys = (slice(starts[index], starts[index + 1]) for starts in (starts_q, starts_k))
        exact, eager = exact_and_eager(problem, single_dout, single_dlse)
        rounding = saved_rounding(problem, single_dout, exact, single_dlse)
        assert_accurate("out", "out", out[rows].transpose(0, 1)[None], eager["out"], exact["out"])
        assert_lse_accurate(lse[None, :, rows], exact["lse"])
        for name, gradient, place in zip(("query", "key", "value"), gradients, (rows, keys, keys), strict=True):
            ours = gradient[place].transpose(0, 1)[None]
            assert_accurate(f"gradient of {name}", "gradient", ours, eager[name], exact[name], rounding[name])


STARTS = ([0, 14], [-4, 6], [6, 2], [0, 10, 30])


def check_starts(backend: str, starts: list[int], device: str) -> None:
    """As in the reference they are clamped to the tokens there are; what stands around them is neither read nor written."""
    num_tokens, guard = 10, 6
    memory = torch.full((4, num_tokens + 2 * guard, 2, 16), torch.nan, device=device)
    inside = memory[:, guard:-guard]
    inside.copy_(torch.randn(4, num_tokens, 2, 16))
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    results = []
    for name in (backend, "reference"):
        leaves = [tensor.detach().requires_grad_() for tensor in inside[:3]]
        out = attention_varlen(*leaves, cu_seqlens, cu_seqlens, 40, 40, is_causal=True, backend=name)
        results.append((out, *torch.autograd.grad(out, leaves, inside[3])))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def check_packed_sequences_with_everything(backend: str, device: str) -> None:
    """Against the reference: dropout, whose numbers count within a sequence, lengths, sequences longer than promised, all gradients."""
    _, (query, key, value, dout, dlse), sizes = packed_sequences({"sizes": (1, 2, 1)}, torch.float32, device)
    sizes["max_seqlen_q"], sizes["max_seqlen_k"] = 65, 64
    options = {
        "query_lengths": torch.tensor([30, 1, 0, 70, 90], device=device), "is_causal": "bottom_right", "dropout_p": 0.25,
        "rng_state": torch.tensor([5, 6], device=device), "softcap": 2.0,
    }  # fmt: skip
    results = []
    for name in (backend, "reference"):
        slopes = torch.tensor([[0.1, 0.2]], device=device).repeat(len(SEQUENCES), 1)
        sinks = torch.tensor([0.5, -0.5], device=device)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value, slopes, sinks)]
        out, lse = attention_varlen(*leaves[:3], **sizes, **options, alibi_slopes=leaves[3], sinks=leaves[4], return_lse=True, backend=name)
        gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse[..., 0].transpose(0, 1)))
        results.append((out, lse, *gradients))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


DECODE: dict[str, dict[str, Any]] = {
    "one row": {},
    "several rows": {"seqlens": (5, 300)},
    "grouped heads": {"sizes": (3, 4, 2), "seqlens": (4, 300)},
    "window": {"window": (70, None), "seqlens": (2, 300)},
    "key_mask": {"key_mask": "holes"},
    "softcap, alibi, sinks": {"softcap": 2.0, "alibi_slopes": "BH", "sinks": True, "sizes": (3, 4, 2)},
    "head dims of their own": {"head_dims": (40, 72)},
    "another memory order": {"memory": ("sequence first", "unaligned slices", "heads first", "heads first")},
    "short cache": {"seqlens": (1, 40)},
}


def check_decoding(backend: str, case: str, dtype: torch.dtype, device: str) -> None:
    """Lengths that end within, at and past the end of the cache, and one that is 0; NaN past the lengths."""
    call = {"sizes": (3, 2, 2), "seqlens": (1, 300), "key_lengths": (130, 400, 0), "is_causal": "bottom_right"} | DECODE[case]
    problem, dout, _ = build(call | {"dtype": dtype}, device)
    exact, eager = exact_and_eager(problem, dout, None)
    absent = torch.arange(problem.key.shape[2], device=device) >= problem.key_lengths[:, None]
    key, value = (tensor.masked_fill(absent[:, None, :, None], torch.nan) for tensor in (problem.key, problem.value))
    options = {
        name: option for name, option in options_of(problem).items() if name in ("key_mask", "window", "softcap", "alibi_slopes", "sinks")
    }
    out, lse = attention_decode(problem.query, key, value, problem.key_lengths, **options, return_lse=True, backend=backend)
    assert_accurate("out", "out", out, eager["out"], exact["out"])
    assert_lse_accurate(lse, exact["lse"])


WEIGHTS: list[dict[str, Any]] = [
    {"dropout_p": 0.25, "is_causal": "bottom_right"},
    {"dropout_p": 1.0},
    {"is_causal": True, "diagonal": 20, "window": (30, None), "alibi_slopes": "H"},
    {"attn_mask": ("bool", "1HQK"), "key_lengths": (60, 0), "query_lengths": (40, 30)},
    {"attn_mask": ("float32", "B1QK"), "key_mask": "holes", "softcap": 2.0, "alibi_slopes": "BH", "sinks": True, "window": (40, 9)},
]


def check_weights(backend: Any, options: dict[str, Any], average_heads: bool, dtype: torch.dtype, device: str) -> None:
    """backend: the module, whose kernel computes them."""
    problem, dout, _ = build({"sizes": (2, 2, 1), "seqlens": (40, 75), "dtype": dtype} | options, device)
    exact, _ = exact_and_eager(problem, dout, None)
    lse = exact["lse"].float()
    double = replace(problem, query=problem.query.double(), key=problem.key.double(), value=problem.value.double())
    expected = reference_weights(double, exact["lse"], average_heads)
    weights = backend.attention_weights(problem, lse, average_heads)
    assert weights.dtype == dtype
    assert_accurate("weights", "out", weights, reference_weights(problem, lse, average_heads), expected)
    assert torch.equal(weights == 0, expected.to(dtype) == 0)


REPEATED = {
    "full": lambda device: {},
    "causal, scale": lambda device: {"is_causal": True, "scale": 0.5},
    "key_mask": lambda device: {"key_mask": torch.arange(70, device=device) < torch.tensor([[70], [3]], device=device)},
    "key_lengths": lambda device: {
        "key_lengths": torch.tensor([70, 3], dtype=torch.int32, device=device),
        "is_causal": "bottom_right",
    },
}


def check_repeated_call(backend: str, options: Callable, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call like an earlier one skips what leads to the kernels, and gives what it gave when it did not."""
    arguments = options(device)
    for seqlen_q in (5, 70):
        inputs, others = ([torch.randn(2, 2, n, 32, device=device).to(dtype) for n in (seqlen_q, 70, 70)] for _ in range(2))
        expected = attention(*others, **arguments, return_lse=True, backend=backend)
        replay.forget()
        attention(*inputs, **arguments, return_lse=True, backend=backend)
        with monkeypatch.context() as patches:
            patches.setitem(backends.BACKENDS, backend, None)  # what goes all the way fails
            results = attention(*others, **arguments, return_lse=True, backend=backend)
            out = attention(*others, **arguments, backend=backend)
        assert torch.equal(out, expected[0])
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)
            assert (result.shape, result.stride(), result.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
