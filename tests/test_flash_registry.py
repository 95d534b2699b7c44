"""The kernels behind torch's flash attention operators. torch has no CPU kernels for these, so the tests can put ours there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as registry
from torch.testing import assert_close

from fused_attention import attention_varlen, attention_weights
from fused_attention.integrations.flash_registry import register, replace_kernels

aten = torch.ops.aten


@pytest.fixture
def on_cpu() -> Iterator[None]:
    handle = replace_kernels("CPU")
    yield
    handle.remove()


def inputs(*shape: int, kv_heads: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [shape, *[[kv_heads if i == 1 and kv_heads else n for i, n in enumerate(shape)]] * 2]
    return [torch.randn(*of, dtype=dtype, requires_grad=True) for of in shapes]


@pytest.mark.parametrize("head_dim", [16, 59])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_scaled_dot_product(on_cpu: None, is_causal: bool, kv_heads: int, head_dim: int) -> None:
    qkv = inputs(2, 4, 9, head_dim, kv_heads=kv_heads)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(*qkv, 0.0, is_causal, scale=0.3)
    expected = F.scaled_dot_product_attention(*qkv, is_causal=is_causal, scale=0.3, enable_gqa=True)
    assert out.stride() == qkv[0].stride()
    assert lse.shape == (2, 4, 9)
    assert_close(out, expected)
    gradients = [torch.autograd.grad(result.tanh().sum(), qkv) for result in (out, expected)]
    assert_close(*gradients)


def test_dropout_is_the_same_in_the_backward(on_cpu: None) -> None:
    query, key, value = inputs(1, 2, 40, 16)
    out, lse, *_, rng_state, _, _ = aten._scaled_dot_product_flash_attention(query, key, value, 0.5)
    weights = attention_weights(query, key, lse.detach(), dropout_p=0.5, rng_state=rng_state.view(torch.int64))
    assert (weights == 0).float().mean() > 0.3
    assert_close(out, weights @ value)
    dout = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, value, dout)[0], weights.detach().transpose(2, 3) @ dout)


@pytest.mark.parametrize("window", [(None, None), (3, 0)])
def test_dense_rows_first(on_cpu: None, window: tuple[int | None, int | None]) -> None:
    """(B, L, H, D), more keys than queries, causal from the bottom right."""
    query, key, value = (torch.randn(2, length, 4, 16, requires_grad=True) for length in (5, 9, 9))
    options = {"window_size_left": window[0], "window_size_right": window[1]}
    out, *_ = aten._flash_attention_forward(query, key, value, None, None, 5, 9, 0.0, True, False, **options)
    behind = torch.arange(5)[:, None] + 4 - torch.arange(9)
    mask = (behind >= 0) & (behind <= (9 if window[0] is None else window[0]))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask).transpose(1, 2)
    assert_close(out, expected)
    gradients = [torch.autograd.grad(result.tanh().sum(), (query, key, value)) for result in (out, expected)]
    assert_close(*gradients)


def test_packed(on_cpu: None) -> None:
    query, key, value = inputs(14, 4, 16)
    starts = torch.tensor([0, 9, 14], dtype=torch.int32)
    out, lse, *_ = aten._flash_attention_forward(query, key, value, starts, starts, 9, 9, 0.0, True, False)
    expected, expected_lse = attention_varlen(query, key, value, starts, starts, 9, 9, is_causal=True, return_lse=True)
    assert_close((out, lse), (expected, expected_lse))
    gradients = [torch.autograd.grad(result.tanh().sum(), (query, key, value)) for result in (out, expected)]
    assert_close(*gradients)


def test_into_a_result(on_cpu: None) -> None:
    if not hasattr(aten, "_flash_attention_forward_no_dropout_inplace"):
        pytest.skip("this torch has no such operator")
    query, key, value = (tensor.detach() for tensor in inputs(2, 9, 4, 16))
    out = torch.empty_like(query)
    lse = aten._flash_attention_forward_no_dropout_inplace(out, query, key, value, None, None, 9, 9, 0.0, False, False)
    expected, expected_lse, *_ = aten._flash_attention_forward(query, key, value, None, None, 9, 9, 0.0, False, False)
    assert_close((out, lse), (expected, expected_lse))


def test_refused_by_name(on_cpu: None) -> None:
    query, key, value = inputs(2, 9, 4, 16)
    with pytest.raises(RuntimeError, match="does not take return_debug_mask"):
        aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, True)
    with pytest.raises(RuntimeError, match="(?s)has no kernel for this call: .* head_dim 320 is above 256"):
        aten._scaled_dot_product_flash_attention(*inputs(2, 4, 9, 320))
    with pytest.raises(RuntimeError, match="does not take seqused_k"):
        aten._flash_attention_forward(query, key, value, None, None, 9, 9, 0.0, False, False, seqused_k=torch.tensor([3, 4]))


def test_torchs_registry() -> None:
    """In a process of its own, because the registry is one for all: registered, active, and gone again."""
    if not hasattr(registry, "restore_flash_attention_impl"):
        pytest.skip("this torch never forgets an implementation")
    program = """if True:
        import torch
        from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, restore_flash_attention_impl
        from fused_attention.integrations.flash_registry import register

        def has_kernel():
            return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_dot_product_flash_attention", "CUDA")

        before = has_kernel()
        name = register()
        assert current_flash_attention_impl() is None
        activate_flash_attention_impl(name)
        assert (current_flash_attention_impl(), has_kernel()) == (name, True)
        restore_flash_attention_impl()
        assert (current_flash_attention_impl(), has_kernel()) == (None, before)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_without_the_implementation_the_operator_has_no_cpu_kernel() -> None:
    assert register() in registry.list_flash_attention_impls()
    with pytest.raises(NotImplementedError, match="_scaled_dot_product_flash_attention"):
        aten._scaled_dot_product_flash_attention(*inputs(2, 4, 9, 16))
