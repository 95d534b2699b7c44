"""Options of the Transformer's layers: cached and exported decoding, gradients and formulas that no pretrained family tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import KVCache, Transformer
from fused_attention.transformer import memory
from fused_attention.transformer.export import export_programs
from fused_attention.transformer.relative_positions import RelativeBias, rotate

OPTIONS: dict[str, dict[str, Any]] = {
    "rotary": {"positions": "rotary"},
    "learned": {"positions": "learned", "embedding_norm": True, "tie_weights": True},
    "fairseq": {"positions": "fairseq", "pad_id": 2, "eos_id": 0},
    "shared bias": {"positions": "none", "relative_bias": "shared", "relative_buckets": 8, "relative_distance": 10},
    "bias each": {"relative_bias": "each", "relative_buckets": 8, "relative_distance": 10, "memory_layers": "mixed"},
    "T5": {"norm": "rms", "gated": True, "bias": False, "head_dim": 5, "attention_scale": 0.7, "activation": "gelu_tanh"},
    "bos is pad": {"bos_id": 0, "train_padding": True, "output_scale": True, "tie_weights": "output", "embedding_scale": False},
    "source only": {"decoder_cell": "ssru", "positions": "rotary", "relative_bias": "shared"},
}
BY_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(options: dict[str, Any]) -> Transformer:
    sizes = {"d_model": 24, "num_heads": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 20, "max_len": 16}
    model = Transformer(21, 21, dropout=0.0, norm_first=True, **sizes | options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batch(model: Transformer) -> tuple[Tensor, Tensor]:
    src, tgt = torch.randint(3, 21, (2, 7)), torch.randint(3, 21, (2, 6))
    src[1, 4:], tgt[:, 0] = model.pad_id, model.bos_id
    return src, tgt


@BY_OPTIONS
def test_step_by_step_equals_all_at_once(options: dict[str, Any]) -> None:
    model = build(options)
    src, tgt = batch(model)
    with torch.no_grad():
        expected = model(src, tgt)
        state, cache = model.encode(src), KVCache(capacity=2)
        pieces = [model.decode(tgt[:, start:end], state, cache) for start, end in ((0, 3), (3, 4), (4, 5), (5, 6))]
    torch.testing.assert_close(torch.cat(pieces, 1), expected)
    assert (model(src, tgt.flip(1)) - expected).abs().max() > 0.1  # the order matters


@BY_OPTIONS
def test_padding_is_not_seen_and_every_parameter_learns(options: dict[str, Any]) -> None:
    model = build(options)
    src, tgt = batch(model)
    logits = model(src, tgt)
    torch.testing.assert_close(logits[1:], model(src[1:, :4], tgt[1:]))
    logits.logsumexp(-1).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name
    again = Transformer(**model.config)
    again.load_state_dict(model.state_dict())
    assert again.eval()(src, tgt).equal(logits)


def test_exported_steps() -> None:
    one_layer = {"num_encoder_layers": 1, "num_decoder_layers": 1}  # torch.export takes seconds for each
    model = build({"positions": "rotary", "relative_bias": "shared", "bos_id": 0} | one_layer)
    src, _ = batch(model)
    encoder, step = (program.module() for program in export_programs(model))
    tokens, state, caches = encoder(src)
    for _ in range(4):
        logits, caches = step(tokens, state, caches)
        torch.testing.assert_close(logits[:, 1:], model(src, tokens)[:, -1, 1:])  # but for pad_id, which is never generated
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)


def test_a_relative_bias_is_prepared_once_per_batch_with_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for owner, name in ((memory, "prepare_mask"), (RelativeBias, "forward")):
        original = getattr(owner, name)

        def spy(*args: Any, original: Any = original, name: str = name, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, spy)
    model = build(OPTIONS["shared bias"])
    model(*batch(model))
    assert calls == ["prepare_mask", "forward", "prepare_mask", "prepare_mask", "forward"]  # encoder; decoder; attention to the source


def test_8_bit_caches_have_no_relative_bias() -> None:
    model = build(OPTIONS["shared bias"])
    model.cache_dtype = torch.int8
    with pytest.raises(ValueError, match="cache_dtype must be None with a relative bias"):
        model.generate(batch(model)[0], 3)


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    heads = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    numbers = torch.complex(heads[..., :4], heads[..., 4:])
    angle = torch.arange(3, 8)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    expected = numbers * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(rotate(heads, 3), torch.cat((expected.real, expected.imag), -1), check_dtype=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "learnt"}, "positions must be one of 'interleaved', .*, 'learned', 'rotary', 'none', got 'learnt'"),
        ({"activation": "mish"}, "activation must be one of 'relu', 'gelu', 'gelu_tanh', 'silu', got 'mish'"),
        ({"norm": 1}, "norm must be one of 'layer', 'rms', got 1"),
        ({"tie_weights": "all"}, "tie_weights must be one of True, False, 'embeddings', 'output', got 'all'"),
        ({"tie_weights": "embeddings", "src_vocab": 22}, "tie_weights = 'embeddings' needs equal vocabularies, got 22 and 21"),
        ({"attention_scale": 0.0}, "attention_scale must be a float > 0 or None, got 0.0"),
        ({"positions": "rotary", "head_dim": 5}, "positions = 'rotary' needs an even head_dim, got 5"),
        ({"relative_distance": 8}, r"relative_distance must be at least 32, got 8"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(**{"src_vocab": 21, "tgt_vocab": 21, "d_model": 24, "num_heads": 2} | options)


@pytest.mark.parametrize(
    ("src", "error", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.int64), TypeError, "src must be a tensor of floating point log-mel features, got dtype torch.int64"),
        (torch.zeros(1, 9, 4), ValueError, r"src must have shape \(batch, src_features = 8, frames <= 20\), got \(1, 9, 4\)"),
        (torch.zeros(1, 8, 21), ValueError, "frames <= 20"),
    ],
)
def test_bad_spectrograms(src: Tensor, error: type[Exception], message: str) -> None:
    model = Transformer(1, 21, 16, 2, 1, 1, 16, src_features=8, max_src_len=10, eos_id=0)
    with pytest.raises(error, match=message):
        model.generate(src)
