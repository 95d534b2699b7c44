"""A call like one before skips the checks that it would pass, and none that it would not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import attention, attention_decode
from fused_attention.kernels import cuda_backend
from fused_attention.kernels.repeated import kind_of

pytestmark = pytest.mark.skipif(cuda_backend._native is None, reason="the compiled extension is not there")

WANTED = 512  # bytes of workspace that a call with a key_mask asks for


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The CUDA backend takes CPU tensors; what would have been launched, as the arguments of _run."""
    launched: list[tuple] = []

    def run(problem: bytes, device: int, stream: int, workspace: int, *addresses: int) -> int:
        if addresses[6] and not workspace:
            return WANTED
        launched.append((problem, workspace, *addresses))
        return 0

    monkeypatch.setattr(cuda_backend, "_cached_machine_reason", lambda device: None)
    monkeypatch.setattr(cuda_backend, "_device_and_stream", lambda tensor: (0, 0))
    monkeypatch.setattr(cuda_backend, "_run", run)
    monkeypatch.setattr(cuda_backend, "_remembered", {})
    monkeypatch.setattr(cuda_backend, "_repeatable", {})
    return launched


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every call that goes all the way."""
    made: list[str] = []
    forward = cuda_backend.forward
    monkeypatch.setattr(cuda_backend, "forward", lambda problem: made.append("checked") or forward(problem))
    return made


def tensors(dtype: torch.dtype = torch.bfloat16, seqlen_k: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros(2, 4, length, 32, dtype=dtype) for length in (5, seqlen_k, seqlen_k))  # type: ignore[return-value]


MASK, LENGTHS = torch.ones(2, 70, dtype=torch.bool), torch.tensor([70, 3], dtype=torch.int32)
CALLS: dict[str, Callable[..., Any]] = {
    "plain": lambda *inputs: attention(*inputs, backend="cuda", return_lse=True),
    "routed": lambda *inputs: attention(*inputs, return_lse=True),
    "causal, scale": lambda *inputs: attention(*inputs, is_causal=True, scale=0.5, backend="cuda", return_lse=True),
    "key_mask": lambda *inputs: attention(*inputs, key_mask=MASK, backend="cuda", return_lse=True),
    "key_lengths": lambda *inputs: attention(*inputs, key_lengths=LENGTHS, is_causal="bottom_right", backend="cuda", return_lse=True),
    "decode": lambda *inputs: attention_decode(*inputs, LENGTHS, backend="cuda", return_lse=True),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_second_call_launches_the_same_without_its_checks(call: str, launches: list[tuple], checks: list[str]) -> None:
    first, second = tensors(), tensors()
    results = [CALLS[call](*inputs) for inputs in (first, second)]
    assert checks == ["checked"]
    problems, workspaces, *_ = zip(*launches, strict=True)
    assert problems[0] == problems[1]
    assert [workspace != 0 for workspace in workspaces] == [call == "key_mask"] * 2
    for inputs, (out, lse), launch in zip((first, second), results, launches, strict=True):
        side = [MASK.data_ptr() if call == "key_mask" else 0, LENGTHS.data_ptr() if call in ("key_lengths", "decode") else 0]
        assert list(launch[2:]) == [*(tensor.data_ptr() for tensor in (*inputs, out, lse)), 0, *side, *[0] * 8]
    for a, b in zip(*results, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("key_mask", [None, MASK], ids=["plain", "key_mask"])
def test_a_lse_that_nobody_asked_for_lies_behind_the_workspace(key_mask: Tensor | None, launches: list[tuple]) -> None:
    results = [attention(*tensors(), key_mask=key_mask, backend="cuda") for _ in range(2)]
    assert [out.shape for out in results] == [(2, 4, 5, 32)] * 2
    _, workspace, _, _, _, out, lse, *_ = launches[1]
    assert out == results[1].data_ptr()
    assert lse == (workspace if key_mask is None else workspace + WANTED) != 0


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], type[Exception], str]] = {
    "a number for is_causal": (lambda q, k, v: attention(q, k, v, is_causal=1, backend="cuda"), ValueError, "is_causal must be"),
    "a bool for scale": (lambda q, k, v: attention(q, k, v, scale=True, backend="cuda"), TypeError, "scale must be a number"),
    "a bool for dropout_p": (lambda q, k, v: attention(q, k, v, dropout_p=False, backend="cuda"), TypeError, "dropout_p must be a number"),
    "another dtype": (lambda q, k, v: attention(q, k, v.half(), backend="cuda"), TypeError, "value must have the dtype of query"),
    "another length": (lambda q, k, v: attention(q, k, v[:, :, 1:], backend="cuda"), ValueError, "value must have the batch, heads and"),
    "another device": (lambda q, k, v: attention(q, k, v.to("meta"), backend="cuda"), ValueError, "value must be on the device of query"),
    "no tensor": (lambda q, k, v: attention(q, k, None, backend="cuda"), TypeError, "value must be a torch.Tensor"),
    "a sparse tensor": (lambda q, k, v: attention(q, k, v.to_sparse(), backend="cuda"), TypeError, "value must be a dense tensor"),
    "an unaligned address": (lambda q, k, v: attention(unaligned(q), k, v, backend="cuda"), ValueError, "the address of query is not"),
    "another backend": (lambda q, k, v: attention(q, k, v, backend="nonesuch"), ValueError, "backend must be None or one of"),
    "a list for a backend": (lambda q, k, v: attention(q, k, v, backend=["cuda"]), ValueError, "backend must be None or one of"),
    "a shorter mask": (lambda q, k, v: attention(q, k, v, key_mask=MASK[:, 1:], backend="cuda"), ValueError, "key_mask must have"),
    "a mask of numbers": (lambda q, k, v: attention(q, k, v, key_mask=MASK.float(), backend="cuda"), TypeError, "key_mask must be bool"),
    "fewer lengths": (lambda q, k, v: attention_decode(q, k, v, LENGTHS[:1], backend="cuda"), ValueError, "key_lengths must have"),
    "no lengths": (lambda q, k, v: attention_decode(q, k, v, None, backend="cuda"), TypeError, "key_lengths must be a torch.Tensor"),
}  # fmt: skip


def unaligned(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_after_good_calls(case: str, launches: list[tuple]) -> None:
    for call in CALLS.values():
        call(*tensors())
    launches.clear()
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(*tensors())
    assert launches == []


def test_a_gradient_is_not_forgotten(launches: list[tuple]) -> None:
    query, key, value = tensors()
    for call in CALLS.values():
        call(query, key, value)
    with pytest.raises(RuntimeError, match="attention_decode has no gradient"):
        attention_decode(query.clone().requires_grad_(), key, value, LENGTHS, backend="cuda")
    assert kind_of(query, key.clone().requires_grad_(), value, None, None, True, None, "cuda") is None
    with torch.no_grad():
        assert kind_of(query, key.clone().requires_grad_(), value, None, None, True, None, "cuda") is not None


class Subclass(torch.Tensor):
    pass


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def vmapped(function: Callable[[Tensor], Any], tensor: Tensor) -> None:
    torch.func.vmap(lambda one: function(one) or one)(tensor[None])


def test_what_anything_else_has_a_say_in_is_no_kind() -> None:
    query, key, value = tensors()
    found: list[object] = []

    def look(query: Tensor, context: Any = None) -> None:
        with context or nullcontext():
            found.append(kind_of(query, key, value, None, None, True, None, "cuda"))

    look(query)
    assert found.pop() is not None
    look(query, autocast())
    look(query, torch._subclasses.fake_tensor.FakeTensorMode())
    look(query, torch.autograd.forward_ad.dual_level())
    look(query.as_subclass(Subclass))
    look(torch._neg_view(query))
    look(query[..., ::2])  # the same as any description; the checks copy it
    vmapped(look, query)
    assert found[:5] == [None] * 5
    assert found[6] is None


def test_int64_lengths_go_all_the_way(launches: list[tuple], checks: list[str]) -> None:
    for _ in range(2):
        attention_decode(*tensors(), LENGTHS.long(), backend="cuda")
    assert len(checks) == 2


def test_rows_that_are_copied_go_all_the_way(launches: list[tuple], checks: list[str]) -> None:
    """Their description is not that of what is launched."""
    query, key, value = tensors()
    for _ in range(2):
        attention(query.transpose(2, 3).contiguous().transpose(2, 3), key, value, backend="cuda")
    assert len(checks) == 2


def test_zero_tensors_have_no_memory(launches: list[tuple], checks: list[str]) -> None:
    inputs = tensors()
    attention(*inputs, backend="cuda")
    zeros = torch._efficientzerotensor(inputs[0].shape, dtype=inputs[0].dtype)
    kind = kind_of(zeros, *inputs[1:], None, None, False, None, "cuda")
    assert kind is None or cuda_backend.repeat(kind, zeros, *inputs[1:], None, None, True) is None


def test_what_is_remembered_is_bounded(launches: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "MAX_REMEMBERED", 3)
    for length in range(60, 70):
        attention(*tensors(seqlen_k=length), backend="cuda")
    assert len(cuda_backend._repeatable) <= 3
