"""Calls of attention as plain values, the problems they make, and the check of a kernel backend on them under the accuracy rule.

Inputs lie inside buffers full of NaN, gradients are written inside buffers full of a sentinel, and whatever may not matter holds NaN.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accuracy import FLOAT_TENSORS, assert_accurate, assert_lse_accurate, exact_and_eager, saved_rounding
from torch import Tensor

from fused_attention.kernels.prepared_mask import prepare_mask
from fused_attention.kernels.problem import Gradients, Problem, empty_output, make_problem
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
    "prepare": False,  # hand the masks over as a PreparedMask
    "seed": 0,
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
        **{name: call[name] for name in ("is_causal", "window", "dropout_p", "scale", "softcap")},
    )
    dlse = torch.randn(batch, num_heads, seqlen_q).to(device) if call["lse_gradient"] else None
    return problem, dout, dlse


def prepared(problem: Problem, gradients: bool = True) -> Problem:
    """The same problem with everything that masks in a PreparedMask."""
    attn_mask = prepare_mask(
        problem.attn_mask,
        problem.key_mask,
        key_lengths=problem.key_lengths,
        query_lengths=problem.query_lengths,
        is_causal=problem.causal if problem.causal != "none" else False,
        window=(problem.window_left, problem.window_right),
        seqlen_q=problem.query.shape[2],
        seqlen_k=problem.key.shape[2],
        gradients=gradients,
    )
    same = {name: getattr(problem, name) for name in ("scale", "dropout_p", "rng_state", "softcap", "alibi_slopes", "sinks")}
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


def run(backend: Any, problem: Problem, dout: Tensor, dlse: Tensor | None, memory: tuple[str, ...] = CALL["memory"]) -> dict[str, Tensor]:
    """out, lse and every gradient, by name, computed by a backend; the gradients of query, key and value in these memory orders."""
    out, lse = backend.forward(problem)
    assert out.stride() == empty_output(problem.query, problem.value.shape[3]).stride()
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
    backend.backward(problem, out, lse, dout, dlse, Gradients(**gradients))
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
    prepare: the backend gets a PreparedMask, the formula the problem as it is.
    """
    assert backend.unsupported_reasons(problem) == []
    exact, eager = exact_and_eager(problem, dout, dlse)
    rounding = saved_rounding(problem, dout, exact, dlse)
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
