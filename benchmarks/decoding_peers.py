"""The same random Transformer in CTranslate2 and in Hugging Face's Marian, both optional, as functions src -> tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_attention import Transformer
from fused_attention.benchmarks.peers import library_of

Decode = Callable[[Tensor], Tensor]  # src (B, S) int64 -> tokens (B, num_tokens) int64


def ctranslate2(model: Transformer, num_tokens: int, beam: int) -> Decode:
    """CTranslate2, float32, with as many threads as torch has. Its tokens are strings: here the ids."""
    library = library_of("ctranslate2")
    specs = library_of("ctranslate2.specs")
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config = model.config
    layers = config["num_encoder_layers"], config["num_decoder_layers"]
    spec = specs.TransformerSpec.from_config(layers, config["num_heads"], pre_norm=False, no_final_norm=True)

    def linear(target: Any, name: str) -> None:
        target.weight, target.bias = weights[f"{name}weight"], weights[f"{name}bias"]

    def norm(target: Any, name: str) -> None:
        target.gamma, target.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def attention(target: Any, name: str, normed: str, packed: tuple[slice, ...]) -> None:
        for place, rows in enumerate(packed):
            target.linear[place].weight = weights[f"{name}.in_proj_weight"][rows]
            target.linear[place].bias = weights[f"{name}.in_proj_bias"][rows]
        linear(target.linear[len(packed)], f"{name}.out_proj.")
        norm(target.layer_norm, normed)

    width = config["d_model"]
    together, query_apart = (slice(None),), (slice(width), slice(width, None))
    for stack, embeddings in ((spec.encoder, spec.encoder.embeddings[0]), (spec.decoder, spec.decoder.embeddings)):
        name = "encoder" if stack is spec.encoder else "decoder"
        embeddings.weight, stack.scale_embeddings = weights["tgt_embedding.weight"], True
        stack.position_encodings.encodings = model.tgt_embedding.positions.numpy()
        for i, layer in enumerate(stack.layer):
            attention(layer.self_attention, f"{name}.layers.{i}.self_attn", f"{name}.layers.{i}.norm1", together)
            if stack is spec.decoder:
                attention(layer.attention, f"{name}.layers.{i}.multihead_attn", f"{name}.layers.{i}.norm2", query_apart)
            linear(layer.ffn.linear_0, f"{name}.layers.{i}.linear1.")
            linear(layer.ffn.linear_1, f"{name}.layers.{i}.linear2.")
            norm(layer.ffn.layer_norm, f"{name}.layers.{i}.norm{3 if stack is spec.decoder else 2}")
    spec.decoder.projection.weight, spec.decoder.projection.bias = weights["tgt_embedding.weight"], weights["output_bias"]
    vocabulary = [str(token) for token in range(config["tgt_vocab"])]
    names = {"unk_token": config["pad_id"], "bos_token": config["bos_id"], "eos_token": config["eos_id"]}
    for setting, token in {**names, "decoder_start_token": config["bos_id"]}.items():
        setattr(spec.config, setting, str(token))
    spec.config.add_source_bos = spec.config.add_source_eos = False
    spec.register_source_vocabulary(vocabulary)
    spec.register_target_vocabulary(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        spec.validate()
        spec.save(folder)
        translator = library.Translator(
            folder, device="cpu", compute_type="float32", inter_threads=1, intra_threads=torch.get_num_threads()
        )
    options = {"beam_size": beam, "max_decoding_length": num_tokens, "min_decoding_length": num_tokens, "max_input_length": 0}

    def decode(src: Tensor) -> Tensor:
        found = translator.translate_batch([list(map(str, row)) for row in src.tolist()], length_penalty=0, **options)
        return torch.tensor([[int(token) for token in sentence.hypotheses[0]] for sentence in found])

    return decode


def hugging_face(model: Transformer, num_tokens: int, beam: int) -> Decode:
    """MarianMTModel.generate with sdpa, in float32."""
    library = library_of("transformers")
    ours, width = model.config, model.config["d_model"]
    sizes = {"vocab_size": ours["tgt_vocab"], "d_model": width, "max_position_embeddings": ours["max_len"]}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"], sizes[f"{side}_attention_heads"] = ours[f"num_{side}_layers"], ours["num_heads"]
        sizes[f"{side}_ffn_dim"] = ours["dim_feedforward"]
    tokens = {"pad_token_id": ours["pad_id"], "eos_token_id": ours["eos_id"], "decoder_start_token_id": ours["bos_id"]}
    config = library.MarianConfig(
        **sizes, **tokens, activation_function="relu", scale_embedding=True, forced_eos_token_id=None, attn_implementation="sdpa"
    )
    marian = library.MarianMTModel(config).eval()
    weights = {
        "model.shared.weight": model.state_dict()["tgt_embedding.weight"],
        "final_logits_bias": model.state_dict()["output_bias"][None],
    }
    norms = {
        "encoder": {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
        "decoder": {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"},
    }
    parts = {"self_attn": "self_attn", "multihead_attn": "encoder_attn", "linear1": "fc1", "linear2": "fc2"}
    for name, tensor in model.state_dict().items():
        if not name.startswith(("encoder.", "decoder.")):
            continue
        side, _, layer, part, *rest = name.split(".")
        prefix = f"model.{side}.layers.{layer}.{(parts | norms[side])[part]}"
        if rest[0].startswith("in_proj_"):
            for letter, rows in zip("qkv", tensor.split(width), strict=True):
                weights[f"{prefix}.{letter}_proj.{rest[0].removeprefix('in_proj_')}"] = rows
        else:
            weights[".".join([prefix, *rest])] = tensor
    missing, unexpected = marian.load_state_dict(weights, strict=False)
    if unexpected or any("layers" in name for name in missing):
        raise RuntimeError(f"weights of another shape than Marian's: {missing}, {unexpected}")
    for stack in (marian.model.encoder, marian.model.decoder):  # whose table has other frequencies than Marian's own
        stack.embed_positions.weight.data.copy_(model.tgt_embedding.positions)
    marian.tie_weights()
    options: dict[str, Any] = {"num_beams": beam, "do_sample": False, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    if beam > 1:
        options["length_penalty"] = 0.0

    @torch.no_grad()
    def decode(src: Tensor) -> Tensor:
        return marian.generate(src, attention_mask=(src != ours["pad_id"]).long(), **options)[:, 1:]

    return decode


PEERS: dict[str, Callable[[Transformer, int, int], Decode]] = {"CTranslate2": ctranslate2, "Hugging Face": hugging_face}
