"""Any call of any public function, whatever its arguments: results and gradients against float64 under the accuracy rule.

200 calls, always the same ones, or as many random ones as FUSED_ATTENTION_PROPERTY_CASES says (`make test-all`: 2,000). A failure shrinks
to a small call and prints how to run it alone. Inputs lie inside buffers full of NaN in every memory order that modules produce, absent
tokens hold NaN, and fresh memory holds NaN.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import FLOAT_TENSORS, assert_accurate, assert_lse_accurate, exact_and_eager, saved_rounding
from attention_calls import CALL, build, calls, guarded, options_of, poisoned
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attention import attention, attention_decode, attention_varlen, attention_weights, prepare_mask, scaled_dot_product_attention
from fused_attention.kernels import replay
from fused_attention.kernels.attention import attention_kv_packed, attention_qkv_packed
from fused_attention.kernels.native import cpu
from fused_attention.kernels.problem import Problem
from fused_attention.kernels.weights import reference_weights

CASES = int(os.environ.get("FUSED_ATTENTION_PROPERTY_CASES", "200"))
SEQLENS = (1, 2, 15, 16, 17, 33, 64, 65)
HEAD_DIMS = [(d, d) for d in (1, 7, 8, 16, 24, 40, 64, 264)] + [(24, 16), (16, 40)]  # above 256 the reference runs
ENTRIES = ("attention", "attention", "qkv", "kv", "varlen", "decode", "sdpa", "weights")
MASKS = ("attn_mask", "key_mask", "key_lengths", "query_lengths", "window", "diagonal")


@st.composite
def public_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of CALL, which function is called, and which of its tensors require gradients."""
    call = draw(calls(SEQLENS, HEAD_DIMS))
    entry = draw(st.sampled_from(ENTRIES))
    batch, num_heads, _ = call["sizes"]
    without: tuple[str, ...] = ()
    if entry in ("qkv", "kv"):
        call["sizes"], call["head_dims"] = (batch, num_heads, num_heads), call["head_dims"][:1] * 2
        call["seqlens"] = (call["seqlens"][0],) * 2 if entry == "qkv" else call["seqlens"]
    elif entry == "varlen":
        without = ("attn_mask", "key_mask", "prepare")
        call["key_lengths"], call["query_lengths"] = (call[name] or (70, 70, 70) for name in ("key_lengths", "query_lengths"))
    elif entry == "decode":
        without = ("attn_mask", "query_lengths", "dropout_p", "prepare", "lse_gradient")
        call["is_causal"], call["diagonal"], call["key_lengths"] = True, "bottom_right", call["key_lengths"] or (70, 70, 70)
    elif entry == "sdpa":
        without = ("key_mask", "key_lengths", "query_lengths", "window", "diagonal", "softcap", "alibi_slopes", "sinks", "prepare")
        without += ("lse_gradient",)
        call["is_causal"] = call["is_causal"] and call["attn_mask"] is None
        call["dropout_p"] = 1.0 if call["dropout_p"] == 1.0 else 0.0  # it draws its own masks
    elif entry == "weights":
        without = ("lse_gradient",)
    call |= {name: CALL[name] for name in without}
    # Mostly all of them: what no gradient is asked for is not checked.
    wanted = draw(st.sampled_from((None, None, ())))
    wanted = set(FLOAT_TENSORS) if wanted is None else draw(st.sets(st.sampled_from(FLOAT_TENSORS), min_size=1))
    wanted |= {"query"} if entry == "qkv" else set()
    return call | {"entry": entry, "wanted": tuple(name for name in FLOAT_TENSORS if name in wanted)}


def poisoned_in_place(problem: Problem, dout: Tensor, dlse: Tensor | None, lse: Tensor, memory: tuple[str, ...]) -> tuple[Any, ...]:
    """`poisoned`, in the memory orders of the call again. A batch element that stands for all cannot hold what some must not read."""
    absent, absent_dout, dlse = poisoned(problem, dout, dlse, lse, torch.nan)
    pairs = zip((*problem.inputs, dout), (*absent.inputs, absent_dout), memory, strict=True)
    query, key, value, dout = (old if order == "one batch element expanded" else guarded(new, order)[0] for old, new, order in pairs)
    return replace(problem, inputs=(query, key, value), query=query, key=key, value=value), dout, dlse


def options(problem: Problem, prepare: bool) -> dict[str, Any]:
    """The arguments beside query, key and value."""
    given = options_of(problem)
    if prepare:
        masks = {name: given.pop(name) for name in MASKS}
        given["attn_mask"] = prepare_mask(**masks, seqlen_q=problem.query.shape[2], seqlen_k=problem.key.shape[2])
    return given


def as_qkv(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
    return attention_qkv_packed(torch.stack([tensor.transpose(1, 2) for tensor in (query, key, value)], 2), **given)


def as_kv(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
    return attention_kv_packed(query, torch.stack([key.transpose(1, 2), value.transpose(1, 2)], 2), **given)


def as_varlen(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
    """The tokens within the lengths packed one after another, and the results put back where they would be in a padded batch."""
    rows, starts = [], []
    for tensor, name in ((query, "query_lengths"), (key, "key_lengths")):
        lengths = given.pop(name).clamp(0, tensor.shape[2])
        rows.append(torch.arange(tensor.shape[2]) < lengths[:, None])
        starts.append(torch.cat((torch.zeros(1), lengths.cumsum(0))).int())
    tokens = [tensor.transpose(1, 2)[row] for tensor, row in ((query, rows[0]), (key, rows[1]), (value, rows[1]))]
    for name in ("attn_mask", "key_mask", "return_lse"):
        given.pop(name)
    out, lse = attention_varlen(*tokens, *starts, query.shape[2], key.shape[2], return_lse=True, **given)
    padded_out = out.new_zeros(query.shape[0], query.shape[2], *out.shape[1:]).index_put((rows[0],), out)
    padded_lse = lse.new_full((query.shape[0], query.shape[2], lse.shape[0]), -torch.inf).index_put((rows[0],), lse.transpose(0, 1))
    return padded_out.transpose(1, 2), padded_lse.transpose(1, 2)


def as_sdpa(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, None]:
    names = ("attn_mask", "dropout_p", "scale")
    given = {name: given[name] for name in names} | {"is_causal": given["window"] == (None, 0)}
    return scaled_dot_product_attention(query, key, value, **given, enable_gqa=True), None


def as_decode(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    names = ("key_mask", "window", "scale", "softcap", "alibi_slopes", "sinks", "return_lse")
    with torch.no_grad():
        return attention_decode(query, key, value, given["key_lengths"], **{name: given[name] for name in names})


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "qkv": as_qkv,
    "kv": as_kv,
    "varlen": as_varlen,
    "sdpa": as_sdpa,
    "decode": as_decode,
}


def check_public_call(call: dict[str, Any]) -> None:
    call = CALL | call
    problem, dout, dlse = build(call, "cpu")
    if call["entry"] == "weights":
        return check_weights(call, problem)
    exact, eager = exact_and_eager(problem, dout, dlse)
    rounding = saved_rounding(problem, dout, exact, dlse)
    problem, dout, dlse = poisoned_in_place(problem, dout, dlse, exact["lse"], call["memory"])
    tensors = {name: getattr(problem, name) for name in FLOAT_TENSORS}
    leaves = {
        name: tensor.detach().requires_grad_(name in call["wanted"] and tensor.is_floating_point())
        for name, tensor in tensors.items()
        if tensor is not None
    }
    problem = replace(problem, inputs=(), **leaves)
    given = options(problem, call["prepare"])
    out, lse = FUNCTIONS[call["entry"]](leaves["query"], leaves["key"], leaves["value"], **given, return_lse=True)
    assert_accurate("out", "out", out, eager["out"], exact["out"])
    if lse is not None:
        assert_lse_accurate(lse, exact["lse"])
    differentiable = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad and name in rounding}
    if not out.requires_grad:
        assert call["entry"] == "decode" or not differentiable
        return None
    pairs = [(out, dout), *([] if dlse is None or not lse.requires_grad else [(lse, dlse)])]  # the values alone do not move lse
    outputs, gradients = zip(*pairs, strict=True)
    results = torch.autograd.grad(outputs, list(differentiable.values()), gradients, allow_unused=True, materialize_grads=True)
    for (name, leaf), gradient in zip(differentiable.items(), results, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_accurate(f"gradient of {name}", "gradient", gradient, eager[name], exact[name], rounding[name])
    return None


def check_weights(call: dict[str, Any], problem: Problem) -> None:
    given = options(problem, call["prepare"])
    _, lse = attention(*problem.inputs, **given, return_lse=True)
    given.pop("sinks")  # they are in lse
    average_heads = call["seed"] % 2 == 1
    weights = attention_weights(problem.query, problem.key, lse, average_heads=average_heads, **given)
    double = replace(problem, query=problem.query.double(), key=problem.key.double(), value=problem.value.double())
    expected = reference_weights(double, lse.double(), average_heads)
    assert_accurate("weights", "out", weights, reference_weights(problem, lse, average_heads), expected)


def property_of(max_examples: int, **more: Any) -> Callable[[Callable], Callable]:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=max_examples, deadline=None, derandomize=max_examples <= 200, suppress_health_check=checks, **more)


def holds(call: dict[str, Any]) -> None:
    note(f"reproduce: check_public_call({call})")
    check_public_call(call)


@pytest.mark.usefixtures("poisoned_memory")
@property_of(CASES)
@given(call=public_calls())
def test_any_public_call(call: dict[str, Any]) -> None:
    holds(call)


def scaled(factor: float, prepare: Callable) -> Callable:
    def faulty(problem: Problem) -> Any:
        return prepare(replace(problem, scale=problem.scale * factor))

    return faulty


@pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
def test_a_fault_is_found_shrunk_and_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass with a scale that is 1 % off."""
    monkeypatch.setattr(cpu, "prepare", scaled(1.01, cpu.prepare))
    quick = partial(property_of, phases=[Phase.generate, Phase.shrink], database=None, report_multiple_bugs=False)
    with pytest.raises(AssertionError) as failure:
        quick(50)(given(call=public_calls())(holds))()
    (reproduce,) = [text for text in failure.value.__notes__ if text.startswith("reproduce: ")]
    call = eval(reproduce.removeprefix("reproduce: check_public_call(").removesuffix(")"), {"torch": torch})
    with pytest.raises(AssertionError, match="error"):
        check_public_call(call)
    monkeypatch.undo()
    replay.forget()
    check_public_call(call)
