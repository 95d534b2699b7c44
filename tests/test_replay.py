"""A call like one before skips the checks that it would pass, and none that it would not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from function_calls import REPEATED, check_repeated_call
from torch import Tensor

from fused_attention import attention, attention_decode
from fused_attention.kernels import attention as attention_module
from fused_attention.kernels import replay
from fused_attention.kernels.native import cpu
from fused_attention.kernels.native import cuda as cuda_backend

pytestmark = [
    pytest.mark.skipif(cuda_backend._native is None, reason="the compiled extension is not there"),
    pytest.mark.skipif(replay.tensor_guard is None, reason="this torch has other guards"),
]

WANTED = 512  # bytes of workspace that a call with a key_mask asks for


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The CUDA backend takes CPU tensors; what would have been launched, as the arguments of _run."""
    launched: list[tuple] = []

    def run(problem: bytes, device: int, stream: int, workspace: int, *addresses: Any) -> int:
        addresses = (*addresses[:5], *addresses[5])  # the last holds those of optional tensors
        if addresses[6] and not workspace:
            return WANTED
        launched.append((problem, workspace, *addresses))
        return 0

    monkeypatch.setattr(cuda_backend, "_machine_reason", lambda device: None)
    monkeypatch.setattr(cuda_backend, "_device_and_stream", lambda tensor: (0, 0))
    monkeypatch.setattr(cuda_backend, "_run", run)
    return launched


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every call that goes all the way."""
    made: list[str] = []
    make_problem = attention_module.make_problem
    monkeypatch.setattr(attention_module, "make_problem", lambda *args, **more: made.append("checked") or make_problem(*args, **more))
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
        assert list(launch[2:]) == [*(tensor.data_ptr() for tensor in (*inputs, out, lse)), 0, *side, *[0] * 10]
    for a, b in zip(*results, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("key_mask", [None, MASK], ids=["plain", "key_mask"])
def test_a_lse_that_nobody_asked_for_lies_behind_the_workspace(key_mask: Tensor | None, launches: list[tuple]) -> None:
    results = [attention(*tensors(), key_mask=key_mask, backend="cuda") for _ in range(2)]
    assert [out.shape for out in results] == [(2, 4, 5, 32)] * 2
    _, workspace, _, _, _, out, lse, *_ = launches[1]
    assert out == results[1].data_ptr()
    assert workspace == 0 if key_mask is None else lse == workspace + WANTED
    assert lse != 0


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


def test_a_gradient_is_not_forgotten(launches: list[tuple], checks: list[str]) -> None:
    query, key, value = tensors()
    for call in CALLS.values():
        call(query, key, value)
    with pytest.raises(RuntimeError, match="attention_decode has no gradient"):
        attention_decode(query.clone().requires_grad_(), key, value, LENGTHS, backend="cuda")
    checks.clear()
    for leaf in (0, 1, 2):
        inputs = [tensor.clone().requires_grad_(place == leaf) for place, tensor in enumerate((query, key, value))]
        assert attention(*inputs, is_causal=True, backend="cuda").requires_grad
        with torch.no_grad():
            assert not attention(*inputs, is_causal=True, backend="cuda").requires_grad
        assert attention(*inputs, is_causal=True, backend="cuda").requires_grad
    assert len(checks) == 7  # the first of those with a gradient of query, and all others


class Subclass(torch.Tensor):
    pass


class SeesEverything(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return function(*args, **(kwargs or {}))


def found_by(query: Tensor, context: Any = None) -> Any:
    _, key, value = tensors()
    with context or nullcontext():
        return replay.repeat((query, key, value, None, None, True, None, "cuda", "attention", False))


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return tensors()[0]


def found_by_vmapped() -> Any:
    found = []
    torch.func.vmap(lambda query: found.append(found_by(query)) or query)(tensors()[0][None])
    return found[0]


def found_beside_functorch() -> Any:
    found = []
    torch.func.vmap(lambda number: found.append(found_by(tensors()[0])) or number)(torch.zeros(1))
    return found[0]


def found_by_traced() -> Any:
    found = []
    torch.jit.trace(lambda number: found.append(found_by(tensors()[0])) or number + 1, torch.zeros(1), check_trace=False)
    return found[0]


OTHERS_WITH_A_SAY: dict[str, Callable[[], Any]] = {
    "autocast": lambda: found_by(tensors()[0], torch.autocast("cpu", torch.bfloat16)),
    "fake tensors": lambda: found_by(tensors()[0], torch._subclasses.fake_tensor.FakeTensorMode()),
    "a dispatch mode": lambda: found_by(tensors()[0], SeesEverything()),
    "forward-mode differentiation": lambda: found_by(tensors()[0], torch.autograd.forward_ad.dual_level()),
    "inference mode": lambda: found_by(tensors()[0], torch.inference_mode()),
    "a tensor of inference mode": lambda: found_by(inference_tensor()),
    "a subclass": lambda: found_by(tensors()[0].as_subclass(Subclass)),
    "a parameter": lambda: found_by(torch.nn.Parameter(tensors()[0])),
    "a negated view": lambda: found_by(torch._neg_view(tensors()[0])),
    "a zero tensor without memory": lambda: found_by(torch._efficientzerotensor((2, 4, 5, 32), dtype=torch.bfloat16)),
    "a tensor elsewhere": lambda: found_by(tensors()[0].to("meta")),
    "another memory order": lambda: found_by(tensors()[0].transpose(1, 2).contiguous().transpose(1, 2)),
    "a batched tensor": found_by_vmapped,
    "vmap around": found_beside_functorch,
    "torch.jit.trace": found_by_traced,
}


@pytest.mark.parametrize("other", OTHERS_WITH_A_SAY)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_call_in_which_anything_else_has_a_say_goes_all_the_way(other: str, launches: list[tuple]) -> None:
    attention(*tensors(), is_causal=True, backend="cuda")
    assert found_by(tensors()[0]) is not None
    assert OTHERS_WITH_A_SAY[other]() is None


def test_what_was_cast_is_not_remembered(launches: list[tuple]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        attention(*tensors(torch.float32), backend="cuda")
    assert replay._calls == {}


def test_a_tensor_that_is_two_inputs_goes_all_the_way(launches: list[tuple], checks: list[str]) -> None:
    query, key, _ = tensors()
    for _ in range(2):
        attention(query, key, key, backend="cuda")
    attention(*tensors(), backend="cuda")
    attention(query, key, key, backend="cuda")
    assert len(checks) == 4


def test_another_gpu_than_the_current_one_goes_all_the_way(launches: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    attention(*tensors(), is_causal=True, backend="cuda")
    (alike,) = replay._calls.values()
    alike[0] = alike[0]._replace(device=1)
    for current, is_found in ((0, False), (1, True)):
        monkeypatch.setattr(replay, "current_device", lambda current=current: current)
        assert (found_by(tensors()[0]) is not None) == is_found


def test_a_torch_with_other_guards_remembers_nothing(launches: list[tuple], checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "tensor_guard", None)
    monkeypatch.setattr("fused_attention.kernels.call.allocators", {})
    for _ in range(2):
        attention(*tensors(), backend="cuda")
    assert len(checks) == 2


@pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", REPEATED)
def test_the_cpu_kernels_repeat_calls_too(call: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_repeated_call("cpu", REPEATED[call], dtype, "cpu", monkeypatch)


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


def test_what_is_remembered_is_bounded(launches: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_REMEMBERED", 3)
    for length in range(60, 70):
        attention(*tensors(seqlen_k=length), backend="cuda")
        attention(*tensors(seqlen_k=60)[:2], torch.zeros(2, 4, 60, 8 * (length - 59), dtype=torch.bfloat16), backend="cuda")
    assert len(replay._calls) <= 3
    assert max(map(len, replay._calls.values())) <= replay.MAX_ALIKE
