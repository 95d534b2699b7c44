"""The first calls on a GPU that nothing ran on before: 20 of both backends, small enough for a minute, each kind of kernel among them."""

from __future__ import annotations

import attention_calls
import pytest
import torch
from attention_calls import CALL, FEATURES
from torch.profiler import ProfilerActivity, profile

from fused_attention.integrations.flash_registry import register
from fused_attention.kernels.native import cuda as cuda_backend
from fused_attention.kernels.triton import backend as triton_backend

BACKENDS = {"cuda": cuda_backend, "triton": triton_backend}
OF_OTHER_TILES = {"seqlens": (300, 333), "key_lengths": None, "query_lengths": None}
KINDS = {
    "full": FEATURES["full"] | OF_OTHER_TILES,
    "causal": FEATURES["causal"] | OF_OTHER_TILES,
    "causal, 2048": FEATURES["causal"] | {"seqlens": (2048, 2048)},
    "key_mask": FEATURES["key_mask holes"] | OF_OTHER_TILES,
    "bool mask": FEATURES["bool mask"] | OF_OTHER_TILES,
    "float mask": FEATURES["bfloat16 mask"] | OF_OTHER_TILES,
    "dropout": FEATURES["dropout"] | OF_OTHER_TILES,
    "short": FEATURES["everything"],
    "decode": {"seqlens": (1, 1500), "is_causal": "bottom_right", "key_lengths": (1500, 70), "sizes": (2, 4, 2)},
    "head_dim 128": FEATURES["causal"] | OF_OTHER_TILES | {"head_dims": (128, 128)},
}
CELLS = [(backend, kind) for kind in KINDS for backend in BACKENDS]  # in the order of a reader's interest


def call_of(kind: str) -> dict:
    return CALL | {"dtype": torch.bfloat16, "head_dims": (64, 64)} | KINDS[kind]


@pytest.mark.parametrize(("backend", "kind"), CELLS)
def test_cell(backend: str, kind: str) -> None:
    attention_calls.check_call(BACKENDS[backend], call_of(kind), "cuda")


def test_torchs_flash_attention_is_ours_where_it_was_activated() -> None:
    if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        pytest.skip("this torch never forgets an implementation")
    qkv = [torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def results() -> list[torch.Tensor]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
        return [out, *torch.autograd.grad(out.float().square().sum(), qkv)]

    expected = results()
    torch.nn.attention.activate_flash_attention_impl(register())
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as kernels:
            ours = results()
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)
    assert not any("flash_fwd" in event.key for event in kernels.key_averages()), "torch's own kernel ran"
