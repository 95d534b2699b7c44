"""Everything that holds state can be copied, pickled and moved; calls on tensors without memory give what real ones would."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_calls import MEMORY, guarded
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close

from fused_attention import (
    KVCache,
    MultiHeadAttention,
    PreparedMask,
    Transformer,
    attention,
    attention_decode,
    attention_varlen,
    attention_weights,
    explain,
    prepare_mask,
)
from fused_attention.kernels.attention import attention_kv_packed, attention_qkv_packed
from fused_attention.kernels.native import cpu
from fused_attention.transformer.embedding import TokenEmbedding
from fused_attention.transformer.memory import Memory, Padding

needs_cpu_kernels = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]


def through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch_save,
}


def model() -> Transformer:
    torch.manual_seed(1)
    return Transformer(20, 20, 16, 2, 2, 2, 32, memory_layers="mixed")


def filled_cache() -> KVCache:
    transformer = model().eval()
    cache = KVCache(4)
    with torch.no_grad():
        transformer.decode(torch.randint(3, 20, (2, 3)), transformer.encode(torch.randint(3, 20, (2, 5))), cache)
    return cache


def use_model(transformer: Transformer) -> Tensor:
    torch.manual_seed(2)
    return transformer(torch.randint(20, (2, 7)), torch.randint(20, (2, 5)))


def use_cache(cache: KVCache) -> Tensor:
    transformer = model().eval()
    torch.manual_seed(2)
    src, tgt = torch.randint(3, 20, (2, 5)), torch.randint(3, 20, (2, 2))
    with torch.no_grad():
        return transformer.decode(tgt, transformer.encode(src), cache)


def use_memory(memory: Memory) -> Tensor:
    torch.manual_seed(2)
    return model().eval().decode(torch.randint(3, 20, (2, 4)), memory)


def made_memory() -> Memory:
    with torch.no_grad():
        return model().eval().encode(torch.tensor([[3, 4, 5, 0], [3, 4, 0, 0]]))


def use_module(module: nn.Module) -> Tensor:
    torch.manual_seed(2)
    x = torch.randn(2, 5, 8)
    return module(x, x, x, need_weights=False)[0]


def use_mask(mask: PreparedMask) -> Tensor:
    torch.manual_seed(2)
    query, key = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 7, 8)
    out = attention(query, key, key, attn_mask=mask)
    return torch.cat((out, torch.autograd.grad(out.square().sum(), query)[0]))


def made_mask() -> PreparedMask:
    torch.manual_seed(1)
    return prepare_mask(torch.randn(5, 7), torch.rand(2, 7) > 0.3, query_lengths=torch.tensor([5, 2]), is_causal="bottom_right")


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "MultiHeadAttention": (lambda: MultiHeadAttention(8, 2, dropout=0.5, batch_first=True), use_module),
    "Transformer": (lambda: model().train(), use_model),
    "PreparedMask": (made_mask, use_mask),
    "KVCache": (filled_cache, use_cache),
    "empty KVCache": (KVCache, use_cache),
    "Memory": (made_memory, use_memory),
    "Padding": (lambda: Padding.of(torch.tensor([[True, False], [True, True]])), lambda padding: (padding.key_mask, padding.lengths)),
    "Explanation": (lambda: explain(*[torch.zeros(1, 1, 2, 4)] * 3), str),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_copy_does_what_the_original_does(holder: str, how: str) -> None:
    make, use = HOLDERS[holder]
    original = make()
    copied = COPIES[how](original)
    assert type(copied) is type(original)
    if holder == "KVCache" and how == "copy":  # shares its layers
        return
    expected = use(copied)
    if isinstance(expected, str):
        assert use(original) == expected
    else:
        assert_close(use(original), expected, rtol=0, atol=0)


@pytest.mark.parametrize("holder", ["MultiHeadAttention", "Transformer", "PreparedMask", "KVCache"])
def test_a_deep_copy_shares_no_memory(holder: str) -> None:
    original = HOLDERS[holder][0]()
    copied = copy.deepcopy(original)
    addresses = [{tensor.data_ptr() for tensor in tensors_of(value) if tensor.numel()} for value in (original, copied)]
    assert addresses[0]
    assert not addresses[0] & addresses[1]


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return [tensor for item in vars(value).values() for tensor in tensors_of(item)] if hasattr(value, "__dict__") else []


def test_modules_are_made_on_the_meta_device_and_filled_later() -> None:
    with torch.device("meta"):
        empty = Transformer(20, 20, 16, 2, 2, 2, 32)
        module = MultiHeadAttention(8, 2, batch_first=True)
    assert all(parameter.is_meta for parameter in [*empty.parameters(), *module.parameters()])
    x = torch.empty(2, 5, 8, device="meta")
    out, weights = module(x, x, x)
    assert (out.shape, weights.shape, out.device.type) == ((2, 5, 8), (2, 5, 5), "meta")
    tokens = torch.empty(2, 5, dtype=torch.int64, device="meta")
    assert empty(tokens, tokens).shape == (2, 5, 20)
    torch.manual_seed(1)
    full = Transformer(20, 20, 16, 2, 2, 2, 32)
    empty.to_empty(device="cpu")
    for part in empty.modules():
        if isinstance(part, TokenEmbedding):  # its positions are in no state_dict
            part.reset_parameters()
    empty.load_state_dict(full.state_dict())
    assert_close(use_model(empty.eval()), use_model(full.eval()))


def layouts(memory: tuple[str, str, str]) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    query, key, value = (
        guarded(torch.randn(3, 4, length, width), order)[0].requires_grad_()
        for length, width, order in zip((5, 7, 7), (8, 8, 6), memory, strict=True)
    )
    tokens = [torch.randn(length, 4, 8, requires_grad=True) for length in (9, 11, 11)]
    starts = {"cu_seqlens_q": torch.tensor([0, 4, 9]), "cu_seqlens_k": torch.tensor([0, 5, 11]), "max_seqlen_q": 5, "max_seqlen_k": 6}
    mask = torch.randn(1, 4, 1, 7, requires_grad=True)
    return {
        "attention": (lambda q, k, v, **more: attention(q, k, v, **more), [query, key, value]),
        "bias": (lambda q, k, v, m, **more: attention(q, k, v, attn_mask=m, dropout_p=0.5, **more), [query, key, value, mask]),
        "qkv": (attention_qkv_packed, [torch.randn(2, 5, 3, 4, 8, requires_grad=True)]),
        "kv": (attention_kv_packed, [query, torch.randn(3, 7, 2, 4, 8, requires_grad=True)]),
        "varlen": (lambda *inputs, **more: attention_varlen(*inputs, **moved(starts, inputs[0]), **more), tokens),
    }


def moved(arguments: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """With tensors of the kind of `like`: real, fake or on its device."""
    move = like.fake_mode.from_tensor if isinstance(like, FakeTensor) else lambda tensor: tensor.to(like.device)
    return {name: move(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", [("batch first",) * 3, ("sequence first",) * 3, MEMORY[2:5], ("heads first",) * 3], ids=str)
@pytest.mark.parametrize("layout", ["attention", "bias", "qkv", "kv", "varlen"])
def test_results_without_memory_look_like_real_ones(layout: str, memory: tuple[str, str, str], backend: str) -> None:
    """Shapes, strides and dtypes of out, lse and gradients: of fake tensors, in their mode and outside, and on the meta device."""
    call, inputs = layouts(memory)[layout]

    def outcome(inputs: list[Tensor], backend: str | None) -> list[tuple]:
        out, lse = call(*inputs, return_lse=True, backend=backend)
        gradients = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
        return [(result.shape, result.stride(), result.dtype) for result in (out, lse, *gradients)]

    expected = outcome(inputs, backend)
    with FakeTensorMode() as mode:
        assert outcome([mode.from_tensor(tensor) for tensor in inputs], backend) == expected
    if layout in ("attention", "qkv", "kv") and backend == "cpu":  # nothing but the operator makes tensors, which would be real ones
        assert outcome([mode.from_tensor(tensor) for tensor in inputs], backend) == expected
    meta = [torch.empty_strided(t.shape, t.stride(), device="meta", requires_grad=True) for t in inputs]
    assert outcome(meta, None) == outcome(inputs, "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_and_weights_without_memory(backend: str) -> None:
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8)
    lengths = torch.tensor([9, 4])

    def outcome(query: Tensor, key: Tensor, lengths: Tensor, backend: str | None) -> list[tuple]:
        out, lse = attention_decode(query, key, key, lengths, return_lse=True, backend=backend)
        weights = [attention_weights(query, key, lse, key_lengths=lengths, average_heads=average) for average in (False, True)]
        return [(result.shape, result.stride(), result.dtype) for result in (out, lse, *weights)]

    expected = outcome(query, key, lengths, backend)
    with FakeTensorMode() as mode:
        assert outcome(*map(mode.from_tensor, (query, key, lengths)), backend) == expected
    assert outcome(query.to("meta"), key.to("meta"), lengths.to("meta"), None) == outcome(query, key, lengths, "reference")
