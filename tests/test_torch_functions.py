"""torch.nn.functional.multi_head_attention_forward on the fused kernels: torch's results, gradients and errors, on its own arguments."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attention.transformer.torch_functions import fused_sdpa

EMBED, HEADS, BATCH, SEQLEN_Q, SEQLEN_K = 12, 3, 2, 4, 5


def arguments(kind: str = "packed") -> dict[str, Any]:
    """Of a call: query (L, N, E), key and value (S, N, E), and the parameters that torch.nn.MultiheadAttention would pass."""

    def parameter(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    batch = () if kind == "unbatched" else (BATCH,)
    extra_keys = kind == "appended keys"
    call: dict[str, Any] = {
        "query": parameter(SEQLEN_Q, *batch, EMBED),
        "key": parameter(SEQLEN_K, *batch, EMBED),
        "value": parameter(SEQLEN_K, *batch, EMBED),
        "embed_dim_to_check": EMBED,
        "num_heads": HEADS,
        "in_proj_weight": parameter(3 * EMBED, EMBED),
        "in_proj_bias": None if kind == "no bias" else parameter(3 * EMBED),
        "bias_k": parameter(1, 1, EMBED) if extra_keys else None,
        "bias_v": parameter(1, 1, EMBED) if extra_keys else None,
        "add_zero_attn": extra_keys,
        "dropout_p": 0.0,
        "out_proj_weight": parameter(EMBED + 1, EMBED),  # of any width: CLIP's pooling projects to another one
        "out_proj_bias": None if kind == "no bias" else parameter(EMBED + 1),
    }
    if kind == "separate":
        call |= {f"{name}_proj_weight": parameter(EMBED, EMBED) for name in "qkv"}
        call |= {"use_separate_proj_weight": True, "in_proj_weight": torch.empty(0)}  # ignored, as fairseq passes it
    if kind == "self":
        call |= {"key": call["query"], "value": call["query"]}
    return call


def results_and_gradients(call: dict[str, Any]) -> list[Tensor | None]:
    results = F.multi_head_attention_forward(**call)
    leaves = {id(x): x for x in call.values() if isinstance(x, Tensor) and x.requires_grad}
    loss = sum((result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum() for result in results if result is not None)
    return [*results, *torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)]


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", ["no weights", "averaged", "by head"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])
@pytest.mark.parametrize("kind", ["packed", "self", "separate", "appended keys", "no bias", "unbatched"])
def test_results_and_gradients_are_torchs(kind: str, masked: bool, weights: str) -> None:
    call = arguments(kind) | {"need_weights": weights != "no weights", "average_attn_weights": weights == "averaged"}
    if masked:
        seqlen_k, batch = call["key"].shape[0], call["key"].shape[1:-1]
        call["key_padding_mask"] = torch.arange(seqlen_k).expand(*batch, seqlen_k) >= seqlen_k - 1
        call["attn_mask"] = torch.arange(seqlen_k) > torch.arange(SEQLEN_Q)[:, None]
    expected = results_and_gradients(call)
    with fused_sdpa():
        assert_close(results_and_gradients(call), expected)
        with Operators() as operators:
            F.multi_head_attention_forward(**call)
    assert not any("softmax" in name or "scaled_dot_product" in name for name in operators.names)  # torch's function runs one of them


def test_a_query_without_keys_gets_nothing() -> None:
    call = arguments() | {"attn_mask": torch.ones(SEQLEN_Q, SEQLEN_K, dtype=torch.bool)}
    with fused_sdpa():
        output, weights = F.multi_head_attention_forward(**call)
    assert_close(output, call["out_proj_bias"].expand_as(output))
    assert not weights.any()


def test_dropout_only_in_training_and_on_the_weights_that_are_returned() -> None:
    call = arguments("no bias") | {"dropout_p": 0.5, "average_attn_weights": False}
    with fused_sdpa():
        assert_close(F.multi_head_attention_forward(**call, training=False), F.multi_head_attention_forward(**call | {"dropout_p": 0.0}))
        output, weights = F.multi_head_attention_forward(**call, training=True)
    assert (weights == 0).any()
    value = F.linear(call["value"], call["in_proj_weight"][-EMBED:]).view(SEQLEN_K, BATCH, HEADS, -1)
    attended = torch.einsum("bhls,sbhd->lbhd", weights, value).flatten(2)
    assert_close(output, F.linear(attended, call["out_proj_weight"]))


def test_given_keys_and_values() -> None:
    """static_k and static_v stay with torch's function, whose attention is ours where no weights are wanted."""
    static = {name: torch.randn(BATCH * HEADS, 6, EMBED // HEADS, dtype=torch.float64) for name in ("static_k", "static_v")}
    for need_weights in (False, True):
        call = arguments() | static | {"need_weights": need_weights}
        expected = F.multi_head_attention_forward(**call)
        with fused_sdpa():
            assert_close(F.multi_head_attention_forward(**call), expected)


BAD: dict[str, dict[str, Any]] = {
    "embed_dim": {"embed_dim_to_check": EMBED + 1},
    "num_heads": {"num_heads": 5},
    "seqlen of value": {"value": torch.randn(SEQLEN_K + 1, BATCH, EMBED, dtype=torch.float64)},
    "dims of key": {"key": torch.randn(EMBED, dtype=torch.float64)},
    "size of attn_mask": {"attn_mask": torch.zeros(SEQLEN_Q, SEQLEN_K + 1, dtype=torch.bool)},
    "size of key_padding_mask": {"key_padding_mask": torch.zeros(BATCH, SEQLEN_K + 1, dtype=torch.bool)},
    "integer mask": {"attn_mask": torch.zeros(SEQLEN_Q, SEQLEN_K, dtype=torch.int32)},
    "is_causal alone": {"is_causal": True},
    "bias_k alone": {"bias_k": torch.randn(1, 1, EMBED, dtype=torch.float64)},
}


@pytest.mark.parametrize("what", BAD)
def test_what_torch_refuses(what: str) -> None:
    call = arguments() | BAD[what]
    with pytest.raises((AssertionError, RuntimeError)) as theirs:
        F.multi_head_attention_forward(**call)
    with fused_sdpa(), pytest.raises(theirs.type):
        F.multi_head_attention_forward(**call)


def test_traced_programs_keep_torchs_function() -> None:
    call = {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments().items()}
    with warnings.catch_warnings(), fused_sdpa():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(
            lambda query: F.multi_head_attention_forward(**call | {"query": query})[0], call["query"], check_trace=False
        )
    assert_close(traced(call["query"]), F.multi_head_attention_forward(**call)[0])
