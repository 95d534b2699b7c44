"""What each way into existing code covers, as a table: `PYTHONPATH=src:tests python -m drop_in_table` prints it.

Each "yes" is a call that was made that way, forward and backward where there is a gradient, and that ran on a kernel: none of it on the
reference. "-" means that the interface has no way to ask for the feature.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attention import flash_attn_interface as flash_attn
from fused_attention import replace_attention
from fused_attention.integrations.sdpa import fused_sdpa
from fused_attention.kernels import ops, replay

Probe = Callable[[], Any]
WAYS = ("replace_attention", "transformers", "fused_sdpa", "flash_attn_interface")
BATCH, LENGTH, HEADS, HEAD_DIM = 2, 9, 4, 8
WIDTH = HEADS * HEAD_DIM
PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [5]])  # (B, L), True = padding
MASK = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5


def with_gradient(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def nested(*shape: int) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(5, *shape), torch.randn(3, *shape)], layout=torch.jagged, requires_grad=True)


def module(inputs: Callable[[], Tensor] | None = None, compiled: bool = False, **options: Any) -> Probe:
    """torch.nn.MultiheadAttention after replace_attention."""

    def probe() -> None:
        attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dropout=options.get("dropout_p", 0.0))
        replace_attention(attention)
        run: Callable[..., Any] = torch.compile(attention, fullgraph=True, backend="aot_eager") if compiled else attention
        x = with_gradient(BATCH, LENGTH, WIDTH) if inputs is None else inputs()
        out, weights = run(x, x, x, **{"need_weights": False} | {name: value for name, value in options.items() if name != "dropout_p"})
        total = (out.values() if out.is_nested else out).square().sum()
        (total if weights is None else total + weights.square().sum()).backward()

    return probe


def family(name: str, compiled: bool = False, generate: bool = False, config: dict[str, Any] | None = None, **inputs: Any) -> Probe:
    """A tiny random model of transformers."""

    def probe() -> None:
        import transformers
        from test_transformers_integration import DECODERS, ENCODER_DECODERS, ENCODERS

        from fused_attention.integrations.transformers import register

        config_name, settings = (DECODERS | ENCODERS | ENCODER_DECODERS)[name]
        made = getattr(transformers, config_name)(**settings | (config or {}))
        kind = {"T5Config": transformers.AutoModelForSeq2SeqLM, "LlamaConfig": transformers.AutoModelForCausalLM}
        model = kind.get(config_name, transformers.AutoModel).from_config(made, attn_implementation=register())
        tokens = torch.randint(3, 60, (BATCH, LENGTH))
        if generate:
            model.generate(tokens, max_new_tokens=3, do_sample=False)
            return
        run: Callable[..., Any] = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        extra = {"decoder_input_ids": tokens} if config_name == "T5Config" else {}
        run(input_ids=tokens, **extra, **inputs)[0].square().sum().backward()

    return probe


def sdpa(inputs: Callable[[], Tensor] | None = None, kv_heads: int = HEADS, compiled: bool = False, **options: Any) -> Probe:
    def probe() -> None:
        q, k, v = (
            [inputs().transpose(1, 2) for _ in range(3)]
            if inputs
            else [with_gradient(BATCH, h, LENGTH, HEAD_DIM) for h in (HEADS, kv_heads, kv_heads)]
        )
        call: Callable[..., Tensor] = F.scaled_dot_product_attention
        if compiled:
            call = torch.compile(lambda *qkv: F.scaled_dot_product_attention(*qkv), fullgraph=True, backend="aot_eager")
        with fused_sdpa():
            out = call(q, k, v, **options)
            (out.values() if out.is_nested else out).square().sum().backward()

    return probe


def flash(
    function: Callable[..., Any] = flash_attn.flash_attn_func, kv_heads: int = HEADS, compiled: bool = False, **options: Any
) -> Probe:
    def probe() -> None:
        q, k, v = (with_gradient(BATCH, LENGTH, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads))
        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        results = call(q, k, v, **options)
        (results[0] if isinstance(results, tuple) else results).square().sum().backward()

    return probe


def flash_packed() -> None:
    q, k, v = (with_gradient(14, HEADS, HEAD_DIM) for _ in range(3))
    starts = torch.tensor([0, 9, 14], dtype=torch.int32)
    flash_attn.flash_attn_varlen_func(q, k, v, starts, starts, 9, 9, causal=True).square().sum().backward()


def flash_cache() -> None:
    q, k, v = (torch.randn(BATCH, 1, HEADS, HEAD_DIM) for _ in range(3))
    caches = [torch.zeros(BATCH, 16, HEADS, HEAD_DIM) for _ in range(2)]
    flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=torch.tensor([5, 7], dtype=torch.int32), causal=True)


def autocast(probe: Probe) -> Probe:
    return torch.autocast("cpu", torch.bfloat16)(probe)


ALL_TO_ALL = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(LENGTH)
TABLE: dict[str, tuple[Probe | None, Probe | None, Probe | None, Probe | None]] = {
    "forward and backward": (module(), family("BERT"), sdpa(), flash()),
    "causal": (module(attn_mask=CAUSAL, is_causal=True), family("Llama"), sdpa(is_causal=True), flash(causal=True)),
    "padding": (
        module(key_padding_mask=PADDING),
        family("BERT", attention_mask=(~PADDING).long()),
        sdpa(attn_mask=~PADDING[:, None, None]),
        flash_packed,
    ),
    "a bool mask of any pattern": (
        module(attn_mask=MASK),
        family("BERT", attention_mask=ALL_TO_ALL.masked_fill(MASK, False)),
        sdpa(attn_mask=~MASK),
        None,
    ),
    "an additive bias, with its gradient": (
        module(attn_mask=with_gradient(LENGTH, LENGTH)),
        family("T5"),
        sdpa(attn_mask=with_gradient(LENGTH, LENGTH)),
        None,
    ),
    "dropout": (
        module(dropout_p=0.5),
        family("BERT", config={"attention_probs_dropout_prob": 0.5}),
        sdpa(dropout_p=0.5),
        flash(dropout_p=0.5),
    ),
    "attention weights": (
        module(need_weights=True),
        family("BERT", output_attentions=True),
        None,
        flash(dropout_p=0.5, return_attn_probs=True),
    ),
    "grouped-query heads": (None, family("Llama"), sdpa(kv_heads=2, enable_gqa=True), flash(kv_heads=2)),
    "sliding window": (None, family("Mistral, sliding window"), None, flash(window_size=(3, 0))),
    "softcap": (None, family("Gemma 2, softcap and sliding window"), None, flash(softcap=2.0)),
    "ALiBi": (None, None, None, flash(alibi_slopes=torch.rand(HEADS))),
    "sinks": (None, family("gpt-oss, sinks and sliding window"), None, None),
    "packed or nested sequences": (
        module(partial(nested, WIDTH)),
        None,
        sdpa(partial(nested, HEADS, HEAD_DIM)),
        flash_packed,
    ),
    "key-value cache": (None, family("Llama", generate=True), None, flash_cache),
    "autocast": (autocast(module()), autocast(family("BERT")), autocast(sdpa()), autocast(flash())),
    "torch.compile(fullgraph=True)": (module(compiled=True), family("BERT", compiled=True), sdpa(compiled=True), flash(compiled=True)),
}


@contextmanager
def only_kernels() -> Any:
    """Fails if a call runs on the reference, or if none runs on a kernel."""
    launches = 0

    def counted(*arguments: Any) -> Any:
        nonlocal launches
        launches += 1
        return forward(*arguments)

    def refused(problem: Any) -> None:
        raise AssertionError(f"the reference ran {problem}")

    forward = ops.forward
    replay.forget()  # so that every call comes by
    with mock.patch.object(ops, "forward", counted), mock.patch.object(ops, "attention_reference", refused):
        yield
    assert launches > 0, "no kernel ran"


def answer(probe: Probe | None) -> str:
    """ "yes" or "-"; raises if the probe's call does not run on a kernel."""
    if probe is None:
        return "-"
    with only_kernels():
        probe()
    return "yes"


def header() -> str:
    return "| | " + " | ".join(f"`{way}`" for way in WAYS) + " |\n|---|" + "---|" * len(WAYS)


if __name__ == "__main__":
    print(header(), *[f"| {feature} | " + " | ".join(map(answer, probes)) + " |" for feature, probes in TABLE.items()], sep="\n")
