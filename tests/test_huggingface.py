"""Hugging Face folders: tiny random models made by transformers, read, compared, searched and written back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import Transformer
from fused_attention.transformer.pretrained.find import PretrainedError
from fused_attention.transformer.pretrained.huggingface import FAMILIES
from fused_attention.transformer.relative_positions import RelativeBias

transformers = pytest.importorskip("transformers", minversion="5.24")
safetensors_torch = pytest.importorskip("safetensors.torch")

VOCAB = 40
FAIRSEQ: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
FAIRSEQ |= {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in (("attention_heads", 2), ("ffn_dim", 24))}
TEXT = FAIRSEQ | {"max_position_embeddings": 48, "attention_dropout": 0.0, "forced_eos_token_id": None}
MARIAN = TEXT | {"pad_token_id": 39, "decoder_start_token_id": 39, "eos_token_id": 0, "bos_token_id": 0, "scale_embedding": True}
OWN_VOCABULARIES = {"vocab_size": 43, "decoder_vocab_size": VOCAB, "share_encoder_decoder_embeddings": False}
LAYERS_DROPPED = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
T5: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 48, "decoder_start_token_id": 37, "suppress_tokens": None}
AUDIO |= {"pad_token_id": 38, "bos_token_id": 38, "eos_token_id": 38, "begin_suppress_tokens": None}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "marian": ("Marian", MARIAN | {"activation_function": "swish"}),
    "marian, own vocabularies": ("Marian", MARIAN | OWN_VOCABULARIES),
    "bart": ("Bart", TEXT),
    "mbart": ("MBart", TEXT | {"scale_embedding": True, "decoder_start_token_id": 5}),
    "m2m_100": ("M2M100", TEXT | LAYERS_DROPPED),
    "t5": ("T5", T5),
    "t5 v1.1": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5", T5),
    "umt5": ("UMT5", T5),
    "whisper": ("Whisper", FAIRSEQ | AUDIO),
}


def theirs(name: str) -> Any:
    """A random model of transformers, in eval mode, with weights large enough that tokens and positions matter."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    suffix = "MTModel" if kind == "Marian" else "ForConditionalGeneration"
    model = getattr(transformers, kind + suffix)(getattr(transformers, kind + "Config")(**settings)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name and "embed_positions" not in parameter_name:
                parameter.normal_(0, 0.5 if "T5" not in kind else 0.25)
        if name in ("t5 v1.1", "mt5"):
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        for embedding in model.modules():
            if isinstance(embedding, torch.nn.Embedding) and embedding.padding_idx is not None:
                embedding.weight[embedding.padding_idx] = 0
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def batch(model: Any, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """transformers' arguments for three sources, padded on the right, the left or not at all, and a target (3, 6) without padding."""
    torch.manual_seed(1)
    config = model.config
    tgt = torch.randint(3, 36, (3, 6))
    tgt[:, 0] = config.decoder_start_token_id
    if config.model_type == "whisper":
        return {"input_features": torch.randn(3, 8, 20)}, tgt
    src = torch.randint(3, 36, (3, 9))
    mask = torch.ones_like(src)
    for row, length in enumerate((9, 4, 6)):
        mask[row, length:] = int(padding == "none")
    if padding == "left":
        mask = mask.flip(1)
    return {"input_ids": src.masked_fill(mask == 0, config.pad_token_id), "attention_mask": mask}, tgt


def by_our_names(model: Any, ours: Transformer) -> dict[str, Tensor]:
    """The gradients of a model of transformers, under the names and in the layout of ours."""
    [family] = [family for family in FAMILIES if model.config.model_type in family.model_types]
    gradients = {name.removeprefix("model."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    return {
        place.ours: place.join(lambda name, shape: gradients[name].view(shape), shapes[place.ours])
        for place in family.places(ours.config)
        if place.ours in shapes and all(name is None or name in gradients for name in place.theirs)
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    for padding in ("none", "right", "left"):
        arguments, tgt = batch(model, padding)
        labels = torch.randint(0, VOCAB, (18,))
        for each in (model, ours):
            each.zero_grad()
        expected = model(**arguments, decoder_input_ids=tgt).logits
        torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels).backward()
        logits = ours(next(iter(arguments.values())), tgt)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()
        assert relative_error(logits, expected) < 1e-5
        gradients = by_our_names(model, ours)
        largest = max(gradient.abs().max() for gradient in gradients.values())
        for parameter, gradient in gradients.items():
            found = ours.get_parameter(parameter).grad
            assert found is not None, parameter
            assert (found - gradient).abs().max() / largest < 1e-5, (parameter, padding)
        untrained = {"output_bias", "output.bias"}  # buffers in transformers
        assert {parameter for parameter, _ in ours.named_parameters()} - gradients.keys() <= untrained


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_and_beam_search(name: str, padding: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    arguments, _ = batch(model, padding)
    src = next(iter(arguments.values()))
    never = sorted({ours.pad_id, ours.bos_id} - {ours.eos_id})
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": never or None, "forced_eos_token_id": None}
    options |= {"early_stopping": True, "length_penalty": 1.0}
    for beam in (1, 4):
        expected = model.generate(**arguments, num_beams=beam, **options)
        found = [hypothesis(ours, src, row, beam) for row in range(3)]
        for row, wanted in zip(found, expected.tolist(), strict=True):
            wanted = wanted if name == "whisper" else wanted[1:]  # whose generate leaves the first token out
            assert row == until_end(wanted, ours), beam


def hypothesis(model: Transformer, src: Tensor, row: int, beam: int) -> list[int]:
    """Greedy, or the beam search's with the highest score: transformers does not rank those that have ended before those cut short."""
    if beam == 1:
        return until_end(model.generate(src, 12)[row].tolist(), model)
    found = model.beam_search(src, 12, beam=beam, n_best=beam, early_stopping=True, length_penalty=lambda length: length)
    return max(found[row], key=lambda hypothesis: hypothesis.score).tokens


def until_end(row: list[int], model: Transformer) -> list[int]:
    row = row[: row.index(model.eos_id) + 1] if model.eos_id in row else row
    return [token for token in row if token != model.pad_id or token == model.eos_id]


@pytest.mark.parametrize("name", MODELS)
def test_written_folders_load_in_transformers(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs")
    ours = Transformer.from_pretrained(tmp_path / "theirs")
    model_type = ours.save_pretrained(tmp_path / "ours")
    assert model_type == model.config.model_type.replace("mt5", "t5" if name == "mt5" else "mt5")
    again = transformers.AutoModelForSeq2SeqLM if name != "whisper" else transformers.AutoModelForSpeechSeq2Seq
    arguments, tgt = batch(model, "right")
    loaded = again.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        expected, found = (each(**arguments, decoder_input_ids=tgt).logits for each in (model, loaded))
    assert relative_error(found, expected) < 1e-6


def test_shards_and_half_precision(tmp_path: Path) -> None:
    model = theirs("bart").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = Transformer.from_pretrained(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    assert ours.tgt_embedding.weight.equal(model.model.shared.weight.float())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(PretrainedError, match=f"{shard.name} is missing"):
        Transformer.from_pretrained(tmp_path)


def change(**settings: Any) -> Callable[[dict, dict], None]:
    return lambda config, tensors: config.update(settings)


def keep(edit: Callable[[dict], Any]) -> Callable[[dict, dict], None]:
    return lambda config, tensors: edit(tensors)


NORM = "model.encoder.layernorm_embedding.weight"
SPOILED: dict[str, tuple[Callable[[dict, dict], Any], str]] = {
    "unknown architecture": (change(model_type="gpt2"), "model_type is 'gpt2', known are marian, bart, mbart"),
    "setting missing": (lambda config, tensors: config.pop("d_model"), "d_model is missing"),
    "unknown activation": (change(activation_function="mish"), "the activation is 'mish', covered are relu, gelu"),
    "unequal sides": (change(decoder_ffn_dim=32), "encoder_ffn_dim is 24 and decoder_ffn_dim is 32"),
    "no start": (change(decoder_start_token_id=None, eos_token_id=None), "decoder_start_token_id must be an integer, got None"),
    "sizes that do not fit": (change(encoder_attention_heads=3, decoder_attention_heads=3), "d_model must be divisible by num_heads"),
    "tensor missing": (keep(lambda tensors: tensors.pop(NORM)), r"encoder.layernorm_embedding.weight of shape \(16,\) is missing"),
    "other shape": (
        keep(lambda tensors: tensors.update({NORM: torch.ones(17)})),
        r"encoder.layernorm_embedding.weight has shape \(17,\), expected \(16,\)",
    ),
    "tensor of no layer": (
        keep(lambda tensors: tensors.update({"classification_head.dense.bias": torch.ones(2)})),
        "1 tensors are of no known layer: classification_head.dense.bias",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_folders_that_do_not_fit(how: str, tmp_path: Path) -> None:
    theirs("bart").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    spoil, message = SPOILED[how]
    spoil(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PretrainedError, match=message) as caught:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("config.json", "{", "config.json is not JSON"), ("model.safetensors", "x" * 100, "model.safetensors is not a safetensors file")],
)
def test_damaged_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    theirs("bart").save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(PretrainedError, match=message):
        Transformer.from_pretrained(tmp_path)


def test_a_model_like_no_family_is_not_written(tmp_path: Path) -> None:
    model = Transformer(20, 20, 8, 2, 1, 1, 16, tie_weights=True)
    with pytest.raises(ValueError, match="no Hugging Face model is like this one: .* differs in .*positions"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_relative_buckets_are_t5s() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    for bidirectional in (True, False):
        for count, reach in ((32, 128), (8, 20)):
            bias = RelativeBias(2, count, reach, bidirectional)
            assert bias.buckets(distance).equal(T5Attention._relative_position_bucket(distance, bidirectional, count, reach))


def test_the_documented_families() -> None:
    rows = [f"| {each.title} | {', '.join(f'`{name}`' for name in each.model_types)} | `{each.architecture}` |" for each in FAMILIES]
    text = (Path(__file__).parents[1] / "docs" / "pretrained.md").read_text()
    assert "\n".join(["|---|---|---|", *sorted(rows, key=text.find)]) in text
    assert all(row in text for row in rows)
