"""Calls of attention as plain values, the problems they make, and the check of a kernel backend on them under the accuracy rule.

Inputs lie inside buffers full of NaN, gradients are written inside buffers full of a sentinel, and whatever may not matter holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accuracy import FLOAT_TENSORS, assert_accurate, assert_lse_accurate, exact_and_eager, saved_rounding
from hypothesis import strategies as st
from torch import Tensor

from fused_attention.kernels.call import Call
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.ops import forward
from fused_attention.kernels.prepared_mask import prepare_mask
from fused_attention.kernels.problem import Gradients, Problem, empty_output
from fused_attention.kernels.reference import present

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEMORY = ("heads first", "batch first", "sequence first", "one batch element expanded", "unaligned slices")
SENTINEL = 7.0

# What a call is made of. 70 x 75 are several tiles of 32 and 64 with a rest in both directions.
CALL: dict[str, Any] = {
    "dtype": torch.float32,
    "sizes": (2, 1, 1),  # batch, query heads, key heads
    "seqlens": (70, 75),
    "head_dims": (16, 16),
    "memory": ("batch first",) * 4,  # of query, key, value and the output's gradient
    "is_causal": False,
    "window": None,
    "diagonal": None,
    "attn_mask": None,  # a dtype and which dims it has: ("bool" | "float32" | "bfloat16" | "float16", "BHQK" with 1 for a dim of size 1)
    "key_mask": None,  # right, left, holes or "nothing in one"
    "key_lengths": None,  # values, cut to the batch
    "query_lengths": None,
    "dropout_p": 0.0,
    "scale": None,
    "softcap": None,
    "alibi_slopes": None,  # "H" or "BH"
    "sinks": False,
    "lse_gradient": False,
    "deterministic": False,
    "prepare": False,  # hand the masks over as a PreparedMask
    "seed": 0,
}

FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, gradient of lse": {"lse_gradient": True},
    "causal": {"is_causal": "top_left"},
    "causal, more queries than keys": {"is_causal": "top_left", "seqlens": (75, 40)},
    "causal bottom-right, more keys": {"is_causal": "bottom_right", "seqlens": (40, 75)},
    "causal bottom-right, more queries": {"is_causal": "bottom_right", "seqlens": (75, 40), "lse_gradient": True},
    "window": {"window": (9, 4)},
    "window left": {"window": (9, None)},
    "window right": {"window": (None, 4)},
    "window and causal bottom-right": {"window": (20, 3), "is_causal": "bottom_right", "seqlens": (70, 40)},
    "window without a key of its own": {"window": (0, 0), "seqlens": (70, 40)},
    "causal behind 30 keys": {"is_causal": True, "diagonal": 30, "lse_gradient": True},
    "causal, the first 40 queries without keys": {"is_causal": True, "diagonal": -40, "lse_gradient": True},
    "causal, far before all keys": {"is_causal": True, "diagonal": -(2**29), "lse_gradient": True},
    "causal, far past all keys": {"is_causal": True, "diagonal": 2**29, "window": (2**29 + 20, None)},
    "window bottom-right": {"window": (20, 3), "diagonal": "bottom_right", "seqlens": (40, 75)},
    "window past some keys": {"window": (9, 4), "diagonal": 50, "key_mask": "holes"},
    "key_mask right": {"key_mask": "right"},
    "key_mask left": {"key_mask": "left", "is_causal": "top_left"},
    "key_mask holes": {"key_mask": "holes", "lse_gradient": True},
    "key_mask nothing in one": {"key_mask": "nothing in one"},
    "key_lengths": {"key_lengths": (40, 75)},
    "key_lengths zero, too long, negative": {"key_lengths": (0, 90, -3), "sizes": (3, 1, 1)},
    "query_lengths": {"query_lengths": (40, 70), "lse_gradient": True},
    "query_lengths zero, too long, negative": {"query_lengths": (0, 90, -3), "sizes": (3, 1, 1)},
    "all lengths, key_mask and causal bottom-right": {
        "key_lengths": (40, 75), "query_lengths": (65, 9), "key_mask": "holes", "is_causal": "bottom_right",
    },
    "bool mask": {"attn_mask": ("bool", "BHQK"), "sizes": (1, 2, 2)},
    "bool mask, key_mask and causal": {"attn_mask": ("bool", "11QK"), "key_mask": "right", "is_causal": "top_left"},
    "float mask": {"attn_mask": ("float32", "BHQK"), "sizes": (1, 2, 2)},
    "float mask and key_mask": {"attn_mask": ("float32", "1HQK"), "key_mask": "holes"},
    "float mask and causal": {"attn_mask": ("float32", "11QK"), "is_causal": "bottom_right"},
    "bfloat16 mask": {"attn_mask": ("bfloat16", "1HQK"), "sizes": (1, 2, 2)},
    "float16 mask and key_mask": {"attn_mask": ("float16", "1HQK"), "key_mask": "holes"},
    "bool mask, the same for all keys": {"attn_mask": ("bool", "1HQ1"), "sizes": (1, 2, 2)},
    "prepared causal": {"is_causal": "top_left", "prepare": True},
    "prepared causal behind 30 keys": {"is_causal": True, "diagonal": 30, "alibi_slopes": "H", "prepare": True},
    "prepared bool mask": {"attn_mask": ("bool", "1HQK"), "sizes": (2, 2, 1), "prepare": True},
    "prepared bfloat16 mask and key_mask": {"attn_mask": ("bfloat16", "11QK"), "key_mask": "holes", "prepare": True},
    "prepared float mask, key_mask, window, bottom-right": {
        "attn_mask": ("float32", "BHQK"), "key_mask": "holes", "window": (30, 5), "is_causal": "bottom_right", "prepare": True,
    },
    "prepared, with everything else": {
        "key_mask": "right", "key_lengths": (60, 70), "query_lengths": (70, 40), "is_causal": "bottom_right", "sizes": (2, 2, 1),
        "dropout_p": 0.25, "softcap": 2.0, "alibi_slopes": "BH", "sinks": True, "lse_gradient": True, "prepare": True,
    },
    "dropout": {"dropout_p": 0.25, "sizes": (1, 2, 2)},
    "dropout with masks": {"dropout_p": 0.25, "key_mask": "holes", "is_causal": "top_left", "lse_gradient": True},
    "dropout and a float mask": {"dropout_p": 0.25, "attn_mask": ("float32", "11QK")},
    "dropout of everything": {"dropout_p": 1.0, "lse_gradient": True},
    "softcap": {"softcap": 1.5},
    "softcap far above the scores": {"softcap": 500.0},
    "softcap, causal, lse": {"softcap": 1.5, "is_causal": "top_left", "lse_gradient": True},
    "alibi": {"alibi_slopes": "H", "sizes": (1, 2, 2)},
    "alibi by batch, bottom-right": {"alibi_slopes": "BH", "is_causal": "bottom_right", "key_lengths": (40, 75), "sizes": (2, 2, 2)},
    "alibi bottom-right": {"alibi_slopes": "H", "diagonal": "bottom_right", "query_lengths": (70, 40)},
    "alibi and causal behind 30 keys": {"alibi_slopes": "H", "is_causal": True, "diagonal": 30, "sizes": (1, 2, 2), "lse_gradient": True},
    "sinks": {"sinks": True, "lse_gradient": True, "sizes": (1, 2, 2)},
    "sinks, a batch element without keys": {"sinks": True, "key_mask": "nothing in one", "query_lengths": (70, 30)},
    "grouped heads": {"sizes": (2, 4, 2), "is_causal": "top_left"},
    "one key head": {"sizes": (1, 4, 1), "key_mask": "holes", "dropout_p": 0.25},
    "everything": {
        "sizes": (2, 4, 2), "is_causal": "bottom_right", "window": (50, 10), "attn_mask": ("float32", "BHQK"), "key_mask": "holes",
        "key_lengths": (60, 75), "query_lengths": (70, 50), "dropout_p": 0.25, "scale": 0.4, "softcap": 2.0, "alibi_slopes": "BH",
        "sinks": True, "lse_gradient": True,
    },
}  # fmt: skip


@st.composite
def calls(draw: st.DrawFn, seqlens: tuple[int, ...], head_dims: list[tuple[int, int]]) -> dict[str, Any]:
    """Any fields of CALL, in plain values, so that a failing case prints as a call; lengths and head dims are some of these."""
    batch, heads_per_group, num_heads_kv = draw(st.sampled_from(((0, 1, 1), (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 1, 1))))
    lengths = st.none() | st.tuples(*[st.integers(-1, 70)] * 3)
    side = st.none() | st.integers(0, 70)
    diagonal = draw(st.sampled_from((None, None, "top_left", "bottom_right", 2**29, -(2**29))) | st.integers(-80, 80))
    is_far = isinstance(diagonal, int) and abs(diagonal) > 80  # slopes times that leave no digits for the scores
    mask_kinds = st.tuples(
        st.sampled_from(("bool", "float32", "bfloat16", "float16", "float64")),
        st.tuples(*[st.sampled_from(("1", name)) for name in "BHQK"]).map("".join),
    )
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "sizes": (batch, heads_per_group * num_heads_kv, num_heads_kv),
        "seqlens": (draw(st.sampled_from((0, *seqlens))), draw(st.sampled_from((0, *seqlens)))),
        "head_dims": draw(st.sampled_from(head_dims)),
        "memory": draw(st.tuples(*[st.sampled_from(MEMORY)] * 4)),
        "is_causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(side, side)),
        "diagonal": diagonal,
        "attn_mask": draw(st.none() | mask_kinds),
        "key_mask": draw(st.sampled_from((None, None, "right", "left", "holes", "nothing in one"))),
        "key_lengths": draw(lengths),
        "query_lengths": draw(lengths),
        "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.25, 1.0))),
        "scale": draw(st.sampled_from((None, 0.05, 0.3))),
        "softcap": draw(st.sampled_from((None, None, 0.5, 20.0))),
        "alibi_slopes": draw(st.sampled_from((None, None, None if is_far else "H", None if is_far else "BH"))),
        "sinks": draw(st.booleans()),
        "lse_gradient": draw(st.booleans()),
        "prepare": draw(st.sampled_from((False, False, True))),
        "seed": draw(st.integers(0, 2**20)),
    }


def guarded(tensor: Tensor, memory: str, guard: float = torch.nan) -> tuple[Tensor, Tensor]:
    """The (B, H, L, D) values in one of the memory orders that modules produce, inside a larger buffer full of `guard`; view and buffer."""
    if memory == "one batch element expanded":
        view, buffer = guarded(tensor[:1], "heads first", guard)
        return view.expand(tensor.shape), buffer
    order = {"batch first": (0, 2, 1, 3), "sequence first": (2, 0, 1, 3)}.get(memory, (0, 1, 2, 3))
    inner = [tensor.shape[dim] for dim in order]
    # Rows stay aligned to 16 bytes where their length allows it, or start one element after.
    before, after = (1, 2) if memory == "unaligned slices" else (0, 8)
    buffer = tensor.new_full((*[size + 2 for size in inner[:3]], before + inner[3] + after), guard)
    view = buffer[1:-1, 1:-1, 1:-1, before : before + inner[3]].permute(*[order.index(dim) for dim in range(4)])
    return view.copy_(tensor), buffer


def build(call: dict[str, Any], device: str) -> tuple[Problem, Tensor, Tensor | None]:
    """The problem of a call (fields that it leaves out are CALL's) and its output gradients."""
    call = CALL | call
    torch.manual_seed(call["seed"])
    batch, num_heads, num_heads_kv = call["sizes"]
    seqlen_q, seqlen_k = call["seqlens"]
    head_dim, head_dim_v = call["head_dims"]
    shapes = (
        (batch, num_heads, seqlen_q, head_dim),
        (batch, num_heads_kv, seqlen_k, head_dim),
        (batch, num_heads_kv, seqlen_k, head_dim_v),
        (batch, num_heads, seqlen_q, head_dim_v),
    )
    tensors = (torch.randn(shape).to(device, call["dtype"]) for shape in shapes)
    query, key, value, dout = (guarded(tensor, memory)[0] for tensor, memory in zip(tensors, call["memory"], strict=True))
    slopes = {None: None, "H": (num_heads,), "BH": (batch, num_heads)}[call["alibi_slopes"]]
    options = {
        "attn_mask": None if call["attn_mask"] is None else mask(*call["attn_mask"], (batch, num_heads, seqlen_q, seqlen_k)),
        "key_mask": None if call["key_mask"] is None else key_mask(call["key_mask"], batch, seqlen_k),
        "key_lengths": None if call["key_lengths"] is None else torch.tensor(call["key_lengths"])[:batch],
        "query_lengths": None if call["query_lengths"] is None else torch.tensor(call["query_lengths"])[:batch],
        "alibi_slopes": None if slopes is None else torch.rand(slopes) * 0.2,
        "sinks": torch.randn(num_heads) if call["sinks"] else None,
        "rng_state": torch.randint(2**62, (2,)) if 0.0 < call["dropout_p"] < 1.0 else None,
    }
    problem = make_problem(
        "separate",
        (query, key, value),
        **{name: None if tensor is None else tensor.to(device) for name, tensor in options.items()},
        **{name: call[name] for name in ("is_causal", "window", "diagonal", "dropout_p", "scale", "softcap", "deterministic")},
    )
    dlse = torch.randn(batch, num_heads, seqlen_q).to(device) if call["lse_gradient"] else None
    return problem, dout, dlse


def options_of(problem: Problem) -> dict[str, Any]:
    """The arguments of `attention` that make this problem."""
    same = ("attn_mask", "key_mask", "key_lengths", "query_lengths", "scale", "dropout_p", "rng_state", "softcap", "alibi_slopes", "sinks")
    return {name: getattr(problem, name) for name in same} | by_position(problem)


def by_position(problem: Problem) -> dict[str, Any]:
    """The arguments that mask by position."""
    diagonal = "bottom_right" if problem.bottom_right else problem.diagonal
    return {"window": (problem.window_left, problem.window_right), "diagonal": diagonal}


def prepared(problem: Problem, gradients: bool = True) -> Problem:
    """The same problem with everything that masks in a PreparedMask."""
    attn_mask = prepare_mask(
        problem.attn_mask,
        problem.key_mask,
        key_lengths=problem.key_lengths,
        query_lengths=problem.query_lengths,
        **by_position(problem),
        seqlen_q=problem.query.shape[2],
        seqlen_k=problem.key.shape[2],
        gradients=gradients,
    )
    same = {
        name: getattr(problem, name) for name in ("scale", "dropout_p", "rng_state", "softcap", "alibi_slopes", "sinks", "deterministic")
    }
    return make_problem("separate", problem.inputs, attn_mask=attn_mask.to(problem.query.device), **same)


def mask(kind: str, dims: str, full_shape: tuple[int, ...]) -> Tensor:
    """Random, with some rows and keys that may not attend; `dims` like "B1QK" says which dims are not 1."""
    shape = tuple(1 if name == "1" else size for name, size in zip(dims, full_shape, strict=True))
    allowed = torch.rand(shape) > 0.3
    if shape[3] > 1:
        allowed[..., : shape[3] // 2, : shape[3] // 3] = True  # whole tiles of both kinds
    if shape[2] > 1:
        allowed[:, :, 1] = False
    if kind == "bool":
        return allowed
    return torch.randn(shape).masked_fill(~allowed, -torch.inf).to(getattr(torch, kind))


def key_mask(kind: str, batch: int, seqlen_k: int) -> Tensor:
    keys = torch.arange(seqlen_k).expand(batch, seqlen_k)
    lengths = seqlen_k - torch.arange(batch)[:, None] * 7 - 5
    if kind == "right":
        return keys < lengths
    if kind == "left":
        return keys >= seqlen_k - lengths
    exists = torch.rand(batch, seqlen_k) > 0.3
    if kind == "nothing in one":
        exists[:1] = False
    return exists


def poisoned(problem: Problem, dout: Tensor, dlse: Tensor | None, lse: Tensor, stored: float) -> tuple[Problem, Tensor, Tensor | None]:
    """The same problem with `stored` in every absent key, value and query row, and in the gradients of rows that attend to nothing."""
    queries, keys = present(problem)
    query, key, value = (
        tensor.masked_fill(~rows[:, None, :, None], stored)
        for tensor, rows in ((problem.query, queries), (problem.key, keys), (problem.value, keys))
    )
    empty = lse == -torch.inf
    dout = dout.masked_fill(empty[..., None], stored)
    dlse = None if dlse is None else dlse.masked_fill(empty, stored)
    return replace(problem, layout="separate", inputs=(query, key, value), query=query, key=key, value=value), dout, dlse


def watched(prepare: Callable[[Problem], Call], see: Callable[[], object]) -> Callable[[Problem], Call]:
    """A backend's `prepare`; the calls that it makes tell when they run."""

    def watched_prepare(problem: Problem) -> Call:
        call = prepare(problem)
        return lambda *arguments: (see(), call(*arguments))[1]

    return watched_prepare


def run(backend: Any, problem: Problem, dout: Tensor, dlse: Tensor | None, memory: tuple[str, ...] = CALL["memory"]) -> dict[str, Tensor]:
    """out, lse and every gradient, by name, computed by a backend; the gradients of query, key and value in these memory orders."""
    problem = replace(problem, keeps_out_error=problem.query.dtype in backend.KEEPS_OUT_ERROR)
    out, lse, *out_error = forward(backend, problem)
    assert out.stride() == empty_output(problem).stride()
    buffers, gradients = [], {}
    for name in FLOAT_TENSORS:
        tensor = getattr(problem, name)
        if tensor is None or not tensor.is_floating_point():
            continue
        if name in ("query", "key", "value"):
            order = memory[FLOAT_TENSORS.index(name)]
            order = "heads first" if order == "one batch element expanded" else order  # gradients do not overlap
            gradients[name], buffer = guarded(torch.full(tensor.shape, torch.nan).to(tensor), order, SENTINEL)
            buffers.append((name, buffer, gradients[name]))
        else:  # contiguous
            buffer = torch.full((tensor.numel() + 32,), SENTINEL).to(tensor.device, tensor.dtype)
            gradients[name] = buffer[16:-16].fill_(torch.nan).view(tensor.shape)
            buffers.append((name, buffer, gradients[name]))
    backend.backward(problem, out, lse, dout, dlse, Gradients(**gradients), *out_error)
    results = {"out": out, "lse": lse} | {name: gradient.clone() for name, gradient in gradients.items()}
    for name, buffer, gradient in buffers:
        gradient.fill_(SENTINEL)
        assert (buffer == SENTINEL).all(), f"gradient of {name}: written past its end"
    return results


def check(
    backend: Any,
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    memory: tuple[str, ...] = CALL["memory"],
    stored: float = torch.nan,
    prepare: bool = False,
) -> dict[str, Tensor]:
    """Runs the backend forward and backward and holds every result against the accuracy rule; returns the results.

    stored: what absent keys, values and queries hold, and the output gradients of rows that attend to nothing.
    prepare: the backend gets a PreparedMask, the reference the problem as it is.
    """
    assert backend.unsupported_reasons(problem) == []
    exact, eager = exact_and_eager(problem, dout, dlse)
    rounding = saved_rounding(problem, dout, exact, dlse, dout.dtype in backend.KEEPS_OUT_ERROR)
    problem, dout, dlse = poisoned(problem, dout, dlse, exact["lse"], stored)
    results = run(backend, prepared(problem) if prepare else problem, dout, dlse, memory)
    assert_accurate("out", "out", results["out"], eager["out"], exact["out"])
    assert_lse_accurate(results["lse"], exact["lse"])
    for name in rounding:
        assert_accurate(f"gradient of {name}", "gradient", results[name], eager[name], exact[name], rounding[name])
    return results


def check_call(backend: Any, call: dict[str, Any], device: str) -> dict[str, Tensor]:
    call = CALL | call
    problem, dout, dlse = build(call, device)
    return check(backend, problem, dout, dlse, call["memory"], prepare=call["prepare"])
