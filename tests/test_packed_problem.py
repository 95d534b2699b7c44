"""A Problem on its way to the compiled extension: what is remembered of it, and what the extension refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import prepare_mask
from fused_attention.kernels import replay
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cpu, packed_problem
from fused_attention.kernels.problem import TENSORS, Problem, empty_output

_native = packed_problem._native
pytestmark = pytest.mark.skipif(_native is None, reason="the compiled extension is not there")

BATCH, HEADS, ROWS, KEYS, HEAD_DIM = 2, 4, 5, 70, 32
MASK = torch.zeros(BATCH, HEADS, ROWS, KEYS)
LENGTHS = torch.tensor([70, 3], dtype=torch.int32)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": "bottom_right"},
    "scale": {"scale": 0.5},
    "window to the left": {"window": (3, None)},
    "window to the right": {"window": (None, 3)},
    "softcap": {"softcap": 20.0},
    "dropout": {"dropout_p": 0.1, "rng_state": torch.zeros(2, dtype=torch.int64)},
    "more dropout": {"dropout_p": 0.2, "rng_state": torch.zeros(2, dtype=torch.int64)},
    "mask": {"attn_mask": MASK},
    "mask, columns first": {"attn_mask": MASK.transpose(2, 3).contiguous().transpose(2, 3)},
    "mask of a head": {"attn_mask": MASK[:, :1]},
    "mask of a row": {"attn_mask": MASK[:, :, :1]},
    "bfloat16 mask": {"attn_mask": MASK.bfloat16()},
    "bool mask": {"attn_mask": MASK == 0},
    "key_mask": {"key_mask": torch.ones(BATCH, KEYS, dtype=torch.bool)},
    "key_mask, columns first": {"key_mask": torch.ones(KEYS, BATCH, dtype=torch.bool).T},
    "slopes": {"alibi_slopes": torch.ones(HEADS)},
    "slopes of batch elements": {"alibi_slopes": torch.ones(BATCH, HEADS)},
    "prepared mask": {"attn_mask": prepare_mask(attn_mask=torch.ones(ROWS, KEYS, dtype=torch.bool))},
    "prepared mask of heads": {"attn_mask": prepare_mask(attn_mask=torch.ones(1, HEADS, ROWS, KEYS, dtype=torch.bool))},
}


def tensors(batch: int = BATCH, rows: int = ROWS, keys: int = KEYS, head_dim_v: int = HEAD_DIM) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((rows, HEAD_DIM), (keys, HEAD_DIM), (keys, head_dim_v))
    return tuple(torch.zeros(batch, HEADS, length, head_dim) for length, head_dim in sizes)  # type: ignore[return-value]


def problems() -> Iterator[Problem]:
    for options in OPTIONS.values():
        yield make_problem("separate", tensors(), **options)
    query, key, value = tensors()
    rows_first = query.transpose(1, 2).contiguous().transpose(1, 2)
    sequence_first = query.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    grouped = key[:, :2], value[:, :2]
    others = (
        (rows_first, key, value), (sequence_first, key, value), (query, *grouped), tensors(batch=3), tensors(rows=6), tensors(keys=71),
        tensors(head_dim_v=64), (query.half(), key.half(), value.half()),
    )  # fmt: skip
    for inputs in others:
        yield make_problem("separate", inputs)
    yield make_problem("qkv", (torch.zeros(BATCH, ROWS, 3, HEADS, HEAD_DIM),))
    yield make_problem("kv", (query, torch.zeros(BATCH, KEYS, 2, HEADS, HEAD_DIM)))
    starts, all_starts = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 1, 2, 5], dtype=torch.int32)
    for cu_seqlens in (starts, all_starts):
        packed = torch.zeros(5, HEADS, HEAD_DIM)
        given = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": 3, "max_seqlen_k": 3}
        yield make_problem("varlen", (packed, packed, packed), **given)


def test_what_is_remembered_is_of_this_kind_of_problem() -> None:
    """Each of the problems differs from another in one thing only."""
    plains = [lambda problem, threshold=threshold: packed_problem.plain(problem, threshold) for threshold in (0, 5)]
    for _ in range(2):
        for problem in problems():
            for threshold, plain in zip((0, 5), plains, strict=True):
                assert replay.prepared(plain, problem) == packed_problem.plain(problem, threshold)
    assert len(replay._prepared) == 2 * len(list(problems()))


def test_addresses_come_in_the_order_of_the_table() -> None:
    optional = [name for name, tensor in TENSORS.items() if tensor.in_extension]
    assert _native.address_names() == ["query", "key", "value", "out", "lse", *optional]
    query, key, value, out, lse, *others = (torch.zeros(1) for _ in range(5 + len(TENSORS)))
    given = packed_problem.addresses(query, key, value, tuple(others), out, lse)
    assert given == tuple(tensor.data_ptr() for tensor in (query, key, value, out, lse, *others[: len(optional)]))


def test_what_the_backward_pass_makes_of_a_problem_is_the_same() -> None:
    for problem in problems():
        again = Problem.from_op_arguments(problem.layout, problem.op_arguments())
        assert packed_problem.plain(again, 0) == packed_problem.plain(problem, 0)


def test_results_are_described_as_they_are_allocated() -> None:
    for problem in problems():
        out, plain = empty_output(problem), packed_problem.plain(problem, 0)
        batch, num_heads, rows, _ = out.shape
        assert (plain.out_shape, plain.out_strides) == (out.shape, out.stride())
        assert (plain.lse_shape, plain.lse_strides) == ((batch, num_heads, rows), (num_heads * rows, rows, 1))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_REMEMBERED", 3)
    for problem in problems():
        replay.prepared(cpu.prepare, problem)
        assert len(replay._prepared) <= 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((b"short", 1, *[0] * 6, [0] * 13), ValueError, "the problem must be what problem returned"),
        (("text", 1, *[0] * 6, [0] * 13), TypeError, "the problem must be what problem returned"),
        ((b"", 1), TypeError, "cpu_forward takes a problem, a number of threads, out_error and the problem's addresses"),
        ((b"", 1, *[0] * 6, [0] * 10), TypeError, "cpu_forward takes a problem"),
        ((b"", 1, *[0] * 6, 0), TypeError, "cpu_forward takes a problem"),
        ((b"", "one", *[0] * 6, (0,) * 13), TypeError, "an integer is required"),
    ],
)
def test_wrong_arguments_of_the_binding(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _native.cpu_forward(*arguments)


def test_a_setting_that_no_instruction_set_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """What C++ throws reaches Python as an exception."""
    monkeypatch.setenv("FUSED_ATTENTION_CPU_ISA", "no such")
    problem = make_problem("separate", tensors())
    out, lse = torch.empty(BATCH, HEADS, ROWS, HEAD_DIM), torch.empty(BATCH, HEADS, ROWS)
    addresses = packed_problem.addresses(*problem.inputs, problem.optional_tensors(), out, lse)
    with pytest.raises(RuntimeError, match="no such is not an instruction set"):
        _native.cpu_forward(packed_problem.plain(problem, 0).numbers, 1, 0, *addresses[:5], addresses[5:])
