"""transformers on the fused kernels: tiny random models of each family give what their eager attention gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from fused_attention.integrations import transformers as integration
from fused_attention.integrations.transformers import NAME, Masking, fused_attention_forward, fused_attention_mask, register
from fused_attention.transformer.optional import MissingModuleError

transformers = pytest.importorskip("transformers", minversion="5.24")

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # its older name

BATCH, LENGTH, VOCABULARY = 3, 9, 64
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = TOKENS | SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
BERT = TOKENS | SIZES | {"max_position_embeddings": 64}
GEMMA2 = {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
GPT_OSS = EXPERTS | {"sliding_window": 4, "rope_parameters": ROPE}
GEMMA3 = {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
DEEPSEEK = {
    "max_position_embeddings": 64,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,  # values are narrower than keys
    "first_k_dense_replace": 2,  # no experts
}
BART: dict[str, Any] = TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
FRAMES = {"num_mel_bins": 8, "max_source_positions": LENGTH, "max_target_positions": 64}
WHISPER = BART | FRAMES | {"suppress_tokens": [], "begin_suppress_tokens": []}
VIT: dict[str, Any] = SIZES | {"image_size": 16, "patch_size": 4}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", GROUPED),
    "GPT-2": ("GPT2Config", TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Mistral, sliding window": ("MistralConfig", GROUPED | {"sliding_window": 4}),
    "Gemma 2, softcap and sliding window": ("Gemma2Config", GROUPED | GEMMA2),
    "gpt-oss, sinks and sliding window": ("GptOssConfig", GROUPED | GPT_OSS),
    "Qwen2": ("Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3Config", GROUPED),
    "Mixtral": ("MixtralConfig", GROUPED | EXPERTS),
    "Gemma 3, sliding window": ("Gemma3TextConfig", GROUPED | GEMMA3),
    "Phi-3": ("Phi3Config", GROUPED | {"original_max_position_embeddings": 64}),
    "OLMo 2": ("Olmo2Config", GROUPED),
    "DeepSeek-V3": ("DeepseekV3Config", TOKENS | SIZES | {"num_key_value_heads": 4} | DEEPSEEK),
    "Llama 4, chunks": ("Llama4TextConfig", GROUPED | EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 4}),
}

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertConfig", BERT),
    "RoBERTa": ("RobertaConfig", BERT),
    "ELECTRA": ("ElectraConfig", BERT | {"embedding_size": 32}),
    "DistilBERT": ("DistilBertConfig", TOKENS | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "ALBERT": ("AlbertConfig", BERT | {"embedding_size": 16}),
    "ModernBERT, sliding window": ("ModernBertConfig", BERT | {"local_attention": 4, "global_attn_every_n_layers": 2}),
}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTConfig", VIT),
    "DINOv2": ("Dinov2Config", VIT),
    "SigLIP": ("SiglipVisionConfig", VIT),
    "CLIP": ("CLIPVisionConfig", VIT),
}
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Marian": ("MarianConfig", BART),
    "BART": ("BartConfig", BART),
    "mBART": ("MBartConfig", BART),
    "Pegasus": ("PegasusConfig", BART),
    "M2M-100": ("M2M100Config", BART),
    "Blenderbot": ("BlenderbotConfig", BART),
    "T5": ("T5Config", T5),
    "UMT5": ("UMT5Config", T5),
    "LongT5": ("LongT5Config", T5 | {"local_radius": 4}),
    "mT5": ("MT5Config", T5),
}
CONVOLUTIONS = {"conv_dim": (32,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1}
WAV2VEC2 = SIZES | CONVOLUTIONS | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
DETR = {key: size for key, size in BART.items() if "_" in key and "token" not in key} | {"d_model": 32, "num_queries": 5}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


class Run(NamedTuple):
    """One forward and backward pass; what stands at padding is 0."""

    outputs: Tensor
    gradients: dict[str, Tensor]


def tiny(auto_class: str, config: str, options: dict[str, Any]) -> torch.nn.Module:
    """A random model in eval mode whose scores are large enough to matter; T5 does not scale them."""
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(getattr(transformers, config)(**options)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.1 if "T5" in config else 0.2)
    return model


def padded(padding: str, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of those that are tokens, (B, L) each."""
    ids = torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4], mask[1, :1] = 0, 0
    if padding == "right":
        mask[0, 5:], mask[1, 8:] = 0, 0
    return ids * mask, mask


def run(model: torch.nn.Module, implementation: str, counted: Tensor | None, **inputs: Any) -> Run:
    """counted: (B, L), which outputs are not those of padding; None means all."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    model.zero_grad()
    outputs = model(**inputs)[0]
    outputs = outputs if counted is None else outputs * counted[..., None]
    outputs.tanh().square().sum().backward()
    return Run(outputs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def assert_same(ours: Run, theirs: Run) -> None:
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, mine, expected in [("outputs", ours.outputs, theirs.outputs)] + [
        (name, gradient, theirs.gradients[name]) for name, gradient in ours.gradients.items()
    ]:
        scale = max(1.0, expected.abs().max().item())
        assert_close(mine / scale, expected / scale, atol=1e-5, rtol=0.0, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_weights(model: torch.nn.Module, counted: Tensor, names: tuple[str, ...], **inputs: Any) -> None:
    """counted: (B, Lq), which queries are not padding."""
    weights = {}
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        outputs = model(**inputs, output_attentions=True)
        weights[implementation] = [layer * counted[:, None, :, None] for name in names for layer in outputs[name]]
    assert len(weights[NAME]) == len(names) * 2
    assert_close(weights[NAME], weights["eager"], atol=1e-5, rtol=0.0)


def assert_same_tokens(model: torch.nn.Module, cache: str, **inputs: Any) -> None:
    """cache: dynamic, static, or beams on a dynamic one."""
    options = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}, "beams": {"num_beams": 3}}[cache]
    tokens = {}
    for name in (NAME, "eager"):
        model.set_attn_implementation(name)
        tokens[name] = model.generate(**inputs, do_sample=False, min_new_tokens=6, max_new_tokens=6, **options).tolist()
    assert len(tokens[NAME][0]) >= 6
    assert tokens[NAME] == tokens["eager"]


class TestDecoders:
    @pytest.mark.parametrize("padding", ["none", "left", "right"])
    @pytest.mark.parametrize("family", DECODERS)
    def test_logits_and_gradients(self, family, padding):
        model = tiny("AutoModelForCausalLM", *DECODERS[family])
        ids, mask = padded(padding)
        ours, theirs = (run(model, name, mask, input_ids=ids, attention_mask=mask, use_cache=False) for name in (NAME, "eager"))
        assert_same(ours, theirs)

    @pytest.mark.parametrize("cache", ["dynamic", "static", "beams"])
    @pytest.mark.parametrize("family", DECODERS)
    def test_generates_the_same_tokens(self, family, cache):
        ids, mask = padded("left")
        assert_same_tokens(tiny("AutoModelForCausalLM", *DECODERS[family]), cache, input_ids=ids, attention_mask=mask)

    @pytest.mark.parametrize("family", DECODERS)
    def test_several_tokens_after_a_cache(self, family):
        model = tiny("AutoModelForCausalLM", *DECODERS[family])
        ids, mask = padded("left")
        logits = {}
        for name in (NAME, "eager"):
            model.set_attn_implementation(name)
            with torch.no_grad():
                first = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
                logits[name] = model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values).logits
        assert_close(logits[NAME], logits["eager"], atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("family", DECODERS)
    def test_weights(self, family):
        model = tiny("AutoModelForCausalLM", *DECODERS[family])
        ids, mask = padded("left")
        assert_same_weights(model, mask, ("attentions",), input_ids=ids, attention_mask=mask)

    def test_dropout_in_training(self):
        model = tiny("AutoModelForCausalLM", "LlamaConfig", GROUPED | {"attention_dropout": 0.5})
        model.set_attn_implementation(NAME)
        ids, mask = padded("none")
        undropped = model(input_ids=ids, attention_mask=mask).logits
        model.train()
        torch.manual_seed(5)
        first = model(input_ids=ids, attention_mask=mask).logits
        torch.manual_seed(5)
        assert_close(model(input_ids=ids, attention_mask=mask).logits, first, atol=0.0, rtol=0.0)
        assert (first - undropped).abs().max() > 0.1


class TestEncoders:
    @pytest.mark.parametrize("padding", ["none", "left", "right"])
    @pytest.mark.parametrize("family", ENCODERS)
    def test_outputs_and_gradients(self, family, padding):
        model = tiny("AutoModel", *ENCODERS[family])
        ids, mask = padded(padding)
        ours, theirs = (run(model, name, mask, input_ids=ids, attention_mask=mask) for name in (NAME, "eager"))
        assert_same(ours, theirs)

    @pytest.mark.parametrize("family", VISION)
    def test_images(self, family):
        model = tiny("AutoModel", *VISION[family])
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        ours, theirs = (run(model, name, None, pixel_values=pixels) for name in (NAME, "eager"))
        assert_same(ours, theirs)

    def test_speech(self):
        model = tiny("AutoModel", "Wav2Vec2Config", WAV2VEC2)
        sound = torch.randn(2, 84, generator=torch.Generator().manual_seed(1))  # 20 frames
        mask = torch.ones(2, 84, dtype=torch.long)
        mask[0, 40:] = 0
        frames = torch.arange(20) < torch.tensor([[9], [20]])
        ours, theirs = (run(model, name, frames, input_values=sound, attention_mask=mask) for name in (NAME, "eager"))
        assert_same(ours, theirs)
        assert_same_weights(model, frames, ("attentions",), input_values=sound, attention_mask=mask)

    def test_detection(self):
        """DETR, whose decoder looks at an image of which a part is padding."""
        backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
        model = tiny("AutoModel", "DetrConfig", DETR | {"backbone_config": backbone})
        pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        mask = torch.ones(2, 64, 64, dtype=torch.long)
        mask[0, 40:], mask[1, :, 24:] = 0, 0
        ours, theirs = (run(model, name, None, pixel_values=pixels, pixel_mask=mask) for name in (NAME, "eager"))
        assert_same(ours, theirs)
        names = ("decoder_attentions", "cross_attentions")
        assert_same_weights(model, torch.ones(2, 5), names, pixel_values=pixels, pixel_mask=mask)

    @pytest.mark.parametrize("family", ENCODERS)
    def test_weights(self, family):
        ids, mask = padded("right")
        assert_same_weights(tiny("AutoModel", *ENCODERS[family]), mask, ("attentions",), input_ids=ids, attention_mask=mask)


class TestEncoderDecoders:
    @pytest.mark.parametrize("padding", ["none", "left", "right"])
    @pytest.mark.parametrize("family", ENCODER_DECODERS)
    def test_logits_and_gradients(self, family, padding):
        model = tiny("AutoModelForSeq2SeqLM", *ENCODER_DECODERS[family])
        ids, mask = padded(padding)
        targets, target_mask = padded("none" if padding == "none" else "right", LENGTH)
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets, "decoder_attention_mask": target_mask}
        ours, theirs = (run(model, name, target_mask, **inputs) for name in (NAME, "eager"))
        assert_same(ours, theirs)
        if "T5" in family:
            bias = ours.gradients["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
            assert bias.abs().max() > 1e-3

    @pytest.mark.parametrize("cache", ["dynamic", "static", "beams"])
    @pytest.mark.parametrize("family", ENCODER_DECODERS)
    def test_generates_the_same_tokens(self, family, cache):
        ids, mask = padded("right")
        assert_same_tokens(tiny("AutoModelForSeq2SeqLM", *ENCODER_DECODERS[family]), cache, input_ids=ids, attention_mask=mask)

    @pytest.mark.parametrize("family", ["Marian", "T5"])
    def test_weights(self, family):
        model = tiny("AutoModelForSeq2SeqLM", *ENCODER_DECODERS[family])
        ids, mask = padded("right")
        names = ("encoder_attentions", "decoder_attentions", "cross_attentions")
        assert_same_weights(model, mask, names, input_ids=ids, attention_mask=mask, decoder_input_ids=ids, decoder_attention_mask=mask)

    def test_whisper(self):
        model = tiny("AutoModelForSpeechSeq2Seq", "WhisperConfig", WHISPER)
        features = torch.randn(BATCH, 8, 2 * LENGTH, generator=torch.Generator().manual_seed(1))
        ids, _ = padded("none")
        ours, theirs = (run(model, name, None, input_features=features, decoder_input_ids=ids) for name in (NAME, "eager"))
        assert_same(ours, theirs)
        assert_same_tokens(model, "dynamic", input_features=features)


class TestCompiled:
    @pytest.mark.parametrize(
        ("auto_class", "family", "layers", "backend"),
        [
            ("AutoModelForCausalLM", "Mistral, sliding window", "num_hidden_layers", "aot_eager"),
            ("AutoModelForCausalLM", "Mistral, sliding window", "num_hidden_layers", "inductor"),
            ("AutoModel", "BERT", "num_hidden_layers", "aot_eager"),
            ("AutoModel", "BERT", "num_hidden_layers", "inductor"),
            ("AutoModelForSeq2SeqLM", "T5", "num_layers", "aot_eager"),
        ],
    )
    def test_without_a_graph_break(self, auto_class, family, layers, backend):
        """Forward and backward, of one layer."""
        config, options = (DECODERS | ENCODERS | ENCODER_DECODERS)[family]
        model = tiny(auto_class, config, options | {layers: 1})
        ids, mask = padded("right")
        more = {"T5": {"decoder_input_ids": ids, "use_cache": False}, "BERT": {}}.get(family, {"use_cache": False})
        inputs = {"input_ids": ids, "attention_mask": mask, **more}
        expected = run(model, NAME, mask, **inputs)
        model.zero_grad()
        outputs = torch.compile(model, backend=backend, fullgraph=True)(**inputs)[0] * mask[..., None]
        outputs.tanh().square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if name in expected.gradients}
        assert_same(Run(outputs.detach(), gradients), expected)

    @torch.no_grad()
    def test_decoding_on_a_static_cache(self):
        """One graph for all steps."""
        config, options = DECODERS["Llama"]
        model = tiny("AutoModelForCausalLM", config, options | {"num_hidden_layers": 1})
        model.set_attn_implementation(NAME)
        ids, mask = padded("left")
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 6:]
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        model(input_ids=ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(model, backend=counter, fullgraph=True)
        filled = torch.nn.functional.pad(mask, (0, 16 - LENGTH))
        logits = []
        for token in range(6, LENGTH):
            inputs = {"input_ids": ids[:, token : token + 1], "position_ids": torch.tensor([[token]]), "attention_mask": filled}
            logits.append(step(**inputs, past_key_values=cache).logits)
        assert counter.frame_count == 1
        assert_close(torch.cat(logits, 1), expected, atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("family", ["Llama", "Gemma 3, sliding window"])
    def test_generate_compiled_on_a_static_cache(self, family, monkeypatch):
        """As many graphs as with sdpa: one for all steps, and one more where the sliding cache is full."""
        monkeypatch.setattr(transformers.CompileConfig, "_compile_all_devices", True)  # else only on GPUs
        ids, mask = padded("left")
        plain = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        graphs: dict[str, int] = {}
        for name in ("sdpa", NAME):
            torch._dynamo.reset()

            def compiled(graph, inputs, name=name):
                graphs[name] = graphs.get(name, 0) + 1
                return graph

            model = tiny("AutoModelForCausalLM", *DECODERS[family])
            model.set_attn_implementation(name)
            expected = model.generate(ids, **plain)
            config = transformers.CompileConfig(mode=None, fullgraph=True, backend=compiled)
            assert torch.equal(model.generate(ids, **plain, cache_implementation="static", compile_config=config), expected)
        assert graphs["sdpa"] == graphs[NAME] > 0

    def test_gradient_checkpointing(self):
        model = tiny("AutoModelForCausalLM", *DECODERS["Mistral, sliding window"])
        inputs = dict(zip(("input_ids", "attention_mask"), padded("right"), strict=True))
        expected = run(model, NAME, inputs["attention_mask"], **inputs, use_cache=False)
        model.train()  # checkpoints only then; it has no dropout
        model.gradient_checkpointing_enable()
        assert_same(run(model, NAME, inputs["attention_mask"], **inputs, use_cache=False), expected)


class TestForward:
    def test_weights_are_those_of_the_dropped_output(self):
        query, key, value = torch.randn(3, 2, 4, 6, 8).unbind()
        out, weights = fused_attention_forward(
            torch.nn.Identity(), query, key, value, None, dropout=0.5, is_causal=True, output_attentions=True
        )
        assert (weights == 0.0).float().mean() > 0.6  # causal, and half of the rest
        assert_close(out, (weights @ value).transpose(1, 2), atol=1e-6, rtol=1e-5)

    def test_a_row_for_all_queries_is_a_key_mask(self, monkeypatch):
        query, row = torch.randn(2, 2, 3, 8), torch.rand(2, 1, 1, 3) > 0.3
        calls: list[dict[str, Any]] = []
        monkeypatch.setattr(integration, "attention", lambda *inputs, **options: calls.append(options) or query)
        fused_attention_forward(torch.nn.Identity(), query, query, query, row)
        assert calls[0]["attn_mask"] is None
        assert_close(calls[0]["key_mask"], row[:, 0, 0])

    def test_keys_selected_by_index_are_refused(self):
        query = torch.randn(1, 2, 3, 8)
        with pytest.raises(ValueError, match="Identity passes indices"):
            fused_attention_forward(torch.nn.Identity(), query, query, query, None, indices=torch.zeros(1))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
    def test_a_matrix_is_the_whole_mask(self, dtype):
        """Even if the layer is causal; with a bias too."""
        query, bias = torch.randn(2, 2, 5, 8), torch.randn(1, 2, 5, 5)
        allowed = torch.rand(2, 1, 5, 5) > 0.4
        allowed[..., 0] = True
        mask = allowed if dtype == torch.bool else torch.zeros(2, 1, 5, 5).masked_fill(~allowed, torch.finfo(dtype).min)
        module = torch.nn.Identity()
        module.is_causal = True
        out, weights = fused_attention_forward(module, query, query, query, mask, scaling=1.0, position_bias=bias)
        scores = (query @ query.transpose(2, 3) + bias).masked_fill(~allowed, -torch.inf)
        assert weights is None
        assert_close(out, (scores.softmax(-1) @ query).transpose(1, 2))


class TestMask:
    """What reaches the kernels is not a matrix where the pattern is a plain one."""

    sizes: dict[str, Any] = {"batch_size": BATCH, "q_length": LENGTH, "kv_length": LENGTH}  # noqa: RUF012

    def test_without_padding_there_is_none(self):
        assert fused_attention_mask(**self.sizes) is None
        assert fused_attention_mask(**self.sizes, attention_mask=padded("none")[1].bool()) is None
        assert fused_attention_mask(BATCH, 1, LENGTH, q_offset=LENGTH - 1) is None
        assert fused_attention_mask(**self.sizes, allow_is_causal_skip=False, allow_is_bidirectional_skip=True) is None

    def test_padding_stays_two_dimensional(self):
        padding = padded("right")[1].bool()
        causal = fused_attention_mask(**self.sizes, attention_mask=padding)
        assert causal[1:] == (True, None, None)
        assert_close(causal.key_mask, padding)
        both_ways = fused_attention_mask(**self.sizes, attention_mask=padding, allow_is_causal_skip=False, allow_is_bidirectional_skip=True)
        assert both_ways[1:] == (False, None, None)

    def test_padding_and_keys_of_a_cache(self):
        """Keys 3 to 11 of 14; the padding ends before them."""
        padding = torch.ones(BATCH, 10, dtype=torch.bool)
        mask = fused_attention_mask(BATCH, 2, 9, q_offset=10, kv_offset=3, attention_mask=padding)
        assert mask[1:] == (True, None, 7)
        assert mask.key_mask.int().tolist() == [[1] * 7 + [0] * 2] * BATCH

    def test_window(self):
        assert fused_attention_mask(**self.sizes, local_size=4) == Masking(None, True, (3, None), None)
        assert fused_attention_mask(**self.sizes, local_size=LENGTH) is None
        both_ways = fused_attention_mask(**self.sizes, local_size=2, allow_is_causal_skip=False, allow_is_bidirectional_skip=True)
        assert both_ways == Masking(None, False, (2, 2), None)

    def test_window_on_a_cache(self):
        assert fused_attention_mask(BATCH, 2, 8, q_offset=6, local_size=8) == Masking(None, True, None, 6)
        assert fused_attention_mask(BATCH, 2, 8, q_offset=6, local_size=7) == Masking(None, True, (6, None), 6)

    def test_other_patterns_are_matrices(self):
        packed = fused_attention_mask(**self.sizes, allow_is_causal_skip=False)
        assert packed.shape == (BATCH, 1, LENGTH, LENGTH)
        assert packed.dtype == torch.bool
        chunks = fused_attention_mask(**self.sizes, local_size=4, config=transformers.Llama4TextConfig(attention_chunk_size=4))
        assert chunks.shape == (BATCH, 1, LENGTH, LENGTH)


def test_page_names_the_families():
    page = (Path(__file__).resolve().parents[1] / "docs/support.md").read_text()
    for family in (*DECODERS, *ENCODERS, *VISION, *ENCODER_DECODERS, "Whisper"):
        assert family.partition(",")[0] in page.partition("# transformers")[2]


class TestRegister:
    def test_a_second_time_changes_nothing(self):
        check = transformers.PreTrainedModel.get_correct_attn_implementation
        register()
        assert transformers.PreTrainedModel.get_correct_attn_implementation is check

    @pytest.mark.parametrize("config", ["BloomConfig", "MPNetConfig", "DebertaConfig", "FalconConfig"])
    def test_models_without_attention_functions_are_refused(self, config):
        options = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        with pytest.raises(ValueError, match=f"{config.removesuffix('Config')}Model computes attention itself"):
            transformers.AutoModel.from_config(getattr(transformers, config)(**options), attn_implementation=NAME)

    @pytest.mark.parametrize(
        ("auto_class", "config"), [("AutoModelForSeq2SeqLM", "BigBirdPegasusConfig"), ("AutoModel", "Gemma4TextConfig")]
    )
    def test_models_that_do_so_in_part_are_refused(self, auto_class, config):
        options = BART if "Pegasus" in config else GROUPED
        with pytest.raises(ValueError, match=f"{config.removesuffix('Config').removesuffix('Text')}.* computes attention itself"):
            getattr(transformers, auto_class).from_config(getattr(transformers, config)(**options), attn_implementation=NAME)

    def test_such_a_model_is_left_as_it_was(self):
        model = transformers.AutoModel.from_config(transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4))
        before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        assert model.config._attn_implementation == before

    def test_without_transformers(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(MissingModuleError, match=r"fused-attention\[transformers\]"):
            register()

    def test_an_old_version(self, monkeypatch):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.0.0")
        with pytest.raises(MissingModuleError, match=r"transformers 5\.0\.0 is too old"):
            integration.register()
