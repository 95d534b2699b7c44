"""The CUDA kernels on a GPU: every feature against float64, in both dtypes, and against the Triton kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import attention_calls
import pytest
import torch
from attention_calls import CALL, FEATURES, build, calls
from function_calls import (
    DECODE,
    EVERYTHING,
    REPEATED,
    VARLEN,
    check_autograd,
    check_decoding,
    check_only_the_gradients_that_are_asked_for,
    check_packed_sequences,
    check_repeated_call,
)
from hypothesis import HealthCheck, given, settings
from test_cuda_one_pass import why_two_passes

from fused_attention.kernels.attention import attention, attention_qkv_packed
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cuda as cuda_backend
from fused_attention.kernels.problem import Problem
from fused_attention.kernels.triton import backend as triton_backend

DTYPES = (torch.bfloat16, torch.float16)
KERNELS_OF_FEATURES = [
    (feature, kernels)
    for feature, call in FEATURES.items()
    for kernels in ("one pass", "two passes")
    if kernels == "two passes" or not why_two_passes(call)
]


def is_covered(problem: Problem) -> bool:
    return cuda_backend.unsupported_reasons(problem) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_short_sequences(feature: str, dtype: torch.dtype) -> None:
    attention_calls.check_call(cuda_backend, FEATURES[feature] | {"dtype": dtype}, "cuda")


@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "one order"])
@pytest.mark.parametrize(("feature", "kernels"), KERNELS_OF_FEATURES)
def test_features(feature: str, kernels: str, deterministic: bool) -> None:
    call = CALL | FEATURES[feature] | {"dtype": torch.bfloat16, "head_dims": (64, 64), "deterministic": deterministic}
    problem, dout, dlse = build(call, "cuda")
    backend = SimpleNamespace(**vars(cuda_backend) | {"backward": partial(cuda_backend.backward, kernels=kernels)})
    with cuda_backend.single_tile_kernels(False):
        attention_calls.check(backend, problem, dout, dlse, call["memory"], prepare=call["prepare"])


@pytest.mark.parametrize("head_dims", [(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)], ids=str)
@pytest.mark.parametrize("feature", ["causal top-left", "key_mask holes", "float mask", "dropout", "everything"])
def test_long_sequences(feature: str, head_dims: tuple[int, int]) -> None:
    seqlens = {"seqlens": (1111, 1300), "head_dims": head_dims, "dtype": torch.bfloat16}
    lengths = {"key_lengths": (1200, 900), "query_lengths": (1000, 700)} if "key_lengths" in FEATURES.get(feature, {}) else {}
    call = FEATURES.get(feature, {"is_causal": "top_left"}) | seqlens | lengths
    attention_calls.check_call(cuda_backend, call, "cuda")


@pytest.mark.parametrize("feature", FEATURES)
def test_cuda_and_triton_agree(feature: str) -> None:
    """Closer to one another than the accuracy rule allows either: they compute the same sums in another order."""
    problem, dout, dlse = build(CALL | FEATURES[feature] | {"dtype": torch.bfloat16}, "cuda")
    ours, theirs = (attention_calls.run(backend, problem, dout, dlse) for backend in (cuda_backend, triton_backend))
    for name, tensor in ours.items():
        assert torch.equal(tensor.isfinite(), theirs[name].isfinite()), name
        finite = tensor.isfinite()
        largest = theirs[name][finite].abs().max().float() if finite.any() else torch.tensor(0.0)
        assert (tensor[finite].float() - theirs[name][finite].float()).abs().max() <= 0.02 * largest if finite.any() else True, name


@given(call=calls((1, 17, 64, 65, 129, 200), [(32, 32), (64, 64), (40, 40), (128, 128), (96, 64)]))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_call(call: dict[str, Any]) -> None:
    call = call | {"dtype": torch.bfloat16 if call["dtype"] == torch.float32 else call["dtype"]}
    problem, dout, dlse = build(CALL | call, "cuda")
    if is_covered(problem):
        attention_calls.check(cuda_backend, problem, dout, dlse, (CALL | call)["memory"], prepare=call["prepare"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"is_causal": "top_left"}, EVERYTHING | {"attn_mask": None}], ids=["causal", "everything"])
def test_autograd(options: dict, dtype: torch.dtype) -> None:
    check_autograd("cuda", options, dtype, "cuda")


def test_only_the_gradients_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVERYTHING, "dtype", torch.bfloat16)
    check_only_the_gradients_that_are_asked_for("cuda", "cuda")


@pytest.mark.parametrize("case", VARLEN)
def test_packed_sequences(case: str) -> None:
    check_packed_sequences("cuda", case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("case", [case for case, call in DECODE.items() if "unaligned slices" not in call.get("memory", ())])
def test_decoding(case: str) -> None:
    check_decoding("cuda", case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("call", REPEATED)
def test_repeated_calls(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_repeated_call("cuda", REPEATED[call], torch.bfloat16, "cuda", monkeypatch)


def test_two_runs_give_the_same_bits() -> None:
    call = CALL | FEATURES["everything"] | {"dtype": torch.bfloat16, "seqlens": (700, 900), "sizes": (4, 8, 4)}
    problem, dout, dlse = build(call | {"key_lengths": None, "query_lengths": None}, "cuda")
    problem = replace(problem, deterministic=True)
    first, *others = [attention_calls.run(cuda_backend, problem, dout, dlse) for _ in range(3)]
    for other in others:
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name


def test_packed_projections() -> None:
    projection = torch.randn(2, 300, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    separate = [tensor.transpose(1, 2).clone().requires_grad_() for tensor in projection.unbind(2)]
    packed = projection.clone().requires_grad_()
    dout = torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16)
    attention(*separate, is_causal=True, backend="cuda", deterministic=True).backward(dout)
    attention_qkv_packed(packed, is_causal=True, backend="cuda", deterministic=True).backward(dout)
    assert torch.equal(packed.grad, torch.stack([tensor.grad.transpose(1, 2) for tensor in separate], dim=2))


def test_what_is_refused_runs_nothing() -> None:
    query = torch.randn(1, 2, 10, 36, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head_dim 36 is not divisible by 8"):
        attention(query, query, query, backend="cuda")
    assert not is_covered(make_problem("separate", (query, query, query)))
