"""The Transformer: equality with torch.nn.Transformer, padding, memory layers, weight tying, checks; that it learns."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import Tensor, nn

from fused_attention import MultiHeadAttention, PreparedMask, prepare_mask
from fused_attention.transformer import layers
from fused_attention.transformer import memory as memory_module
from fused_attention.transformer.cache import KVCache
from fused_attention.transformer.model import Transformer

SIZES: dict[str, Any] = {
    "src_vocab": 23,
    "tgt_vocab": 29,
    "d_model": 24,
    "num_heads": 3,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dim_feedforward": 40,
    "max_len": 32,
}
MEMORY_LAYERS = pytest.mark.parametrize("memory_layers", ["last", "each", "mixed"])
# Row 0 full, row 1 padded on the right, row 2 on the left and inside.
SRC = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 0, 0, 0], [0, 0, 12, 0, 13, 14, 0]])
TGT = torch.tensor([[1, 4, 5, 6, 7], [1, 8, 9, 0, 0], [1, 0, 10, 11, 0]])


def build(**options: Any) -> Transformer:
    """A small model in which biases and norms too have random values, without dropout unless asked."""
    model = Transformer(**{**SIZES, "dropout": 0.0, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def torchs(model: Transformer, dtype: torch.dtype) -> nn.Transformer:
    config = model.config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
        theirs = nn.Transformer(
            config["d_model"],
            config["num_heads"],
            config["num_encoder_layers"],
            config["num_decoder_layers"],
            config["dim_feedforward"],
            dropout=0.0,
            batch_first=True,
            norm_first=config["norm_first"],
        )
    own = {name: value for name, value in model.state_dict().items() if name.startswith(("encoder.", "decoder."))}
    theirs.load_state_dict(own)  # strict: the names are the same, none missing, none over
    return theirs.to(dtype)


def torchs_logits(model: Transformer, theirs: nn.Transformer, src: Tensor, tgt: Tensor) -> Tensor:
    """What torch.nn.Transformer computes between the model's embeddings and its output projection."""
    assert model.src_embedding is not None
    length = tgt.shape[1]
    states = theirs(
        model.src_embedding(src),
        model.tgt_embedding(tgt),
        tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(1),
        src_key_padding_mask=src == 0,
        tgt_key_padding_mask=tgt == 0,
        memory_key_padding_mask=src == 0,
    )
    return model.project(states)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
def test_equals_torchs_transformer_with_the_same_weights(norm_first: bool, training: bool) -> None:
    model = build(norm_first=norm_first)
    exact_model = build(norm_first=norm_first).double()
    exact_model.load_state_dict(model.state_dict())
    theirs, exact_theirs = torchs(model, torch.float32), torchs(model, torch.float64)
    for module in (model, exact_model, theirs, exact_theirs):
        module.train(training)
    labels = TGT.roll(-1, 1)
    seen = TGT != 0  # at positions of padding neither model's output means anything

    def logits_and_gradients(logits: Tensor, stacks: nn.Module) -> dict[str, Tensor]:
        F.cross_entropy(logits[seen], labels[seen]).backward()
        gradients = {name: p.grad for name, p in stacks.named_parameters() if name.startswith(("encoder.", "decoder."))}
        assert all(gradient is not None for gradient in gradients.values())
        return {"logits": logits[seen].detach(), **gradients}  # type: ignore[dict-item]

    exact = logits_and_gradients(torchs_logits(exact_model, exact_theirs, SRC, TGT), exact_theirs)
    eager = logits_and_gradients(torchs_logits(model, theirs, SRC, TGT), theirs)
    exact_model.zero_grad()
    in_float64 = logits_and_gradients(exact_model(SRC, TGT), exact_model)
    model.zero_grad()
    in_float32 = logits_and_gradients(model(SRC, TGT), model)
    d_model = SIZES["d_model"]
    for name, expected in exact.items():
        torch.testing.assert_close(in_float64[name], expected)
        ours, other = in_float32[name], eager[name]
        if name.endswith("in_proj_bias"):
            # Softmax ignores what all scores of a row share, so the gradient of a key's bias is exactly 0. In float32 it is
            # rounding noise in either implementation, and no error to measure another by.
            noise = [tensor[d_model : 2 * d_model].abs().max() for tensor in (expected, ours)]
            assert noise[0] < 1e-12
            assert noise[1] < 1e-6
            expected, ours, other = (torch.cat([t[:d_model], t[2 * d_model :]]) for t in (expected, ours, other))
        assert_accurate(name, "out" if name == "logits" else "gradient", ours, other, expected)


class TestPadding:
    @MEMORY_LAYERS
    @pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
    def test_right_padding_changes_nothing(self, memory_layers: str, norm_first: bool) -> None:
        model = build(memory_layers=memory_layers, norm_first=norm_first).double()
        src, tgt = SRC[:1, :4], TGT[:1, :3]
        alone = model(src, tgt)
        batch_src = torch.cat([F.pad(src, (0, 3)), SRC[:1]])
        batch_tgt = torch.cat([F.pad(tgt, (0, 2)), TGT[:1]])
        torch.testing.assert_close(model(batch_src, batch_tgt)[:1, :3], alone)

    @pytest.mark.parametrize("side", ["src_embedding", "tgt_embedding"])
    def test_what_stands_at_padding_positions_has_no_influence(self, side: str) -> None:
        model = build().double()
        logits, gradients = {}, {}
        for value in (0.0, 3.0, torch.nan):
            with torch.no_grad():
                model.get_parameter(f"{side}.weight")[0] = value
            model.zero_grad()
            logits[value] = model(SRC, TGT)[TGT != 0]
            logits[value].square().sum().backward()
            gradients[value] = {name: p.grad for name, p in model.named_parameters()}
        assert torch.equal(logits[0.0], logits[3.0])
        assert torch.equal(logits[0.0], logits[torch.nan])
        torch.testing.assert_close(gradients[0.0], gradients[3.0], rtol=0, atol=0)

    @MEMORY_LAYERS
    @pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
    def test_a_source_of_padding_only_gives_finite_outputs_and_gradients(self, memory_layers: str, norm_first: bool) -> None:
        model = build(memory_layers=memory_layers, norm_first=norm_first, dropout=0.1)
        src = SRC.clone()
        src[1] = 0
        tgt = TGT.clone()
        tgt[2] = 0
        logits = model(src, tgt)
        logits.square().sum().backward()
        assert logits.isfinite().all()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    @pytest.mark.parametrize(("batch", "seqlen_s", "seqlen_t"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
    def test_empty_batches_and_sequences(self, batch: int, seqlen_s: int, seqlen_t: int) -> None:
        logits = build()(torch.ones(batch, seqlen_s, dtype=torch.int64), torch.ones(batch, seqlen_t, dtype=torch.int64))
        logits.sum().backward()
        assert logits.shape == (batch, seqlen_t, SIZES["tgt_vocab"])
        assert logits.isfinite().all()

    def test_is_prepared_once_per_batch_for_all_layers_and_stays_masks_over_keys_in_cached_decoding(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[dict[str, Any]] = []
        made: list[PreparedMask] = []

        def prepare(**arguments: Any) -> PreparedMask:
            made.append(prepare_mask(**arguments))
            return made[-1]

        monkeypatch.setattr(memory_module, "prepare_mask", prepare)
        for name in ("attention_qkv_packed", "attention_kv_packed", "attend_to_cache"):
            operation = getattr(layers, name)

            def spy(*inputs: Tensor, operation: Any = operation, **options: Any) -> Tensor:
                seen.append(options)
                return operation(*inputs, **options)

            monkeypatch.setattr(layers, name, spy)
        model = build()
        model(SRC, TGT)
        encoder, decoder, cross = made
        assert [options["attn_mask"] for options in seen] == [encoder, encoder, decoder, cross, decoder, cross]
        assert all(set(options) == {"attn_mask", "scale", "dropout_p"} for options in seen)
        assert [mask.mask_bits_transposed is not None for mask in made] == [True] * 3
        seen.clear()
        made.clear()
        model.generate(SRC, max_new_tokens=3)
        assert [mask.mask_bits_transposed for mask in made] == [None]  # the encoder's, without what gradients need
        assert len(seen) >= 2 + 4 * 3
        shapes = {(name, option.ndim) for options in seen for name, option in options.items() if isinstance(option, Tensor)}
        assert shapes == {("key_mask", 2), ("key_lengths", 1)}

    def test_target_positions_see_no_later_token(self) -> None:
        model = build().double()
        changed = TGT.clone()
        changed[0, 3] = 20
        difference = (model(SRC, TGT) - model(SRC, changed))[0].abs().amax(-1)
        assert (difference[:3] == 0).all()
        assert (difference[3:] > 0).all()


class TestMemoryLayers:
    def heights(self, model: Transformer, src: Tensor) -> list[Tensor]:
        """The normalised output of each encoder layer, by the layers themselves."""
        assert model.src_embedding is not None
        heights, x = [], model.src_embedding(src)
        for layer in model.encoder.layers:
            x = layer(x, key_mask=src != 0)
            heights.append(model.encoder.norm(x))
        return heights

    def test_last_reads_the_top(self) -> None:
        model = build().double()
        memory = model.encode(SRC[:1])
        assert len(memory.states) == 1
        torch.testing.assert_close(memory.states[0], self.heights(model, SRC[:1])[-1])

    def test_each_reads_the_height_of_the_decoder_layer(self) -> None:
        model = build(memory_layers="each").double()
        for state, height in zip(model.encode(SRC[:1]).states, self.heights(model, SRC[:1]), strict=True):
            torch.testing.assert_close(state, height)

    def test_mixed_is_a_softmax_weighted_average_for_each_decoder_layer(self) -> None:
        model = build(memory_layers="mixed", num_encoder_layers=3).double()
        with torch.no_grad():
            model.memory_mix.normal_()
        states, heights = model.encode(SRC[:1]).states, self.heights(model, SRC[:1])
        assert len(states) == 2
        for state, scores in zip(states, model.memory_mix, strict=True):
            shares = scores.exp() / scores.exp().sum()
            torch.testing.assert_close(state, sum(share * h for share, h in zip(shares, heights, strict=True)))

    def test_the_mix_is_learned(self) -> None:
        model = build(memory_layers="mixed", num_encoder_layers=3).double()
        epsilon, index = 1e-5, (1, 2)

        def loss() -> Tensor:
            return F.cross_entropy(model(SRC, TGT).flatten(0, 1), TGT.flatten())

        loss().backward()
        assert model.memory_mix.grad is not None
        with torch.no_grad():
            ends = []
            for step in (epsilon, -2 * epsilon):
                model.memory_mix[index] += step
                ends.append(loss().item())
        slope = (ends[0] - ends[1]) / (2 * epsilon)
        assert model.memory_mix.grad[index].item() == pytest.approx(slope, rel=1e-4)
        assert abs(slope) > 1e-6

    def test_each_sends_gradients_to_every_height(self) -> None:
        model = build(memory_layers="each").double()
        memory = model.encode(SRC)
        for state in memory.states:
            state.retain_grad()
        model.decode(TGT, memory).sum().backward()
        assert all(state.grad is not None and state.grad.any() for state in memory.states)

    def test_each_needs_equal_depths(self) -> None:
        with pytest.raises(ValueError, match="memory_layers = 'each' needs an encoder and a decoder of equal depth"):
            build(memory_layers="each", num_encoder_layers=3)


class TestWeightTying:
    def test_output_and_target_embedding(self) -> None:
        model = build(tie_weights=True).eval()
        assert model.output is None
        assert model.src_embedding is not None
        states = model.decode_states(TGT, model.encode(SRC))
        torch.testing.assert_close(model(SRC, TGT), states @ model.tgt_embedding.weight.T)

    def test_source_embedding_too_when_the_vocabularies_are_equal(self) -> None:
        model = build(tie_weights=True, src_vocab=29).eval()
        assert [name for name, p in model.named_parameters() if p.shape[0] == 29] == ["tgt_embedding.weight"]
        before = model.encode(SRC).states[0]
        with torch.no_grad():
            model.tgt_embedding.weight[SRC[0, 0]].mul_(2)
        assert not torch.equal(model.encode(SRC).states[0], before)

    def test_each_tensor_stands_once_in_the_state_dict(self) -> None:
        model = build(tie_weights=True, src_vocab=29)
        pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
        assert len(pointers) == len(set(pointers))

    def test_equal_vocabularies_stay_apart_when_untied(self) -> None:
        model = build(src_vocab=29)
        assert sum(p.shape[0] == 29 for p in model.parameters() if p.ndim == 2) == 3


class TestState:
    @MEMORY_LAYERS
    @pytest.mark.parametrize("tie_weights", [False, True], ids=["untied", "tied"])
    def test_round_trip_through_config_and_state_dict(self, memory_layers: str, tie_weights: bool) -> None:
        model = build(memory_layers=memory_layers, tie_weights=tie_weights, norm_first=True)
        file = io.BytesIO()
        torch.save({"config": model.config, "state": model.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        copy = Transformer(**saved["config"])
        copy.load_state_dict(saved["state"])
        assert torch.equal(copy(SRC, TGT), model(SRC, TGT))

    def test_config_holds_every_argument_and_nothing_else(self) -> None:
        model = build()
        assert model.config == {
            **SIZES,
            "dropout": 0.0,
            "norm_first": False,
            "tie_weights": False,
            "memory_layers": "last",
            "pad_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "decoder_cell": "attention",
            "final_norm": True,
            "layer_norm_eps": 1e-5,
            "positions": "interleaved",
            "output_bias": False,
            **dict.fromkeys(["embedding_dropout", "attention_dropout", "feed_forward_dropout", "residual_dropout"]),
            "layer_drop": 0.0,
            "activation": "relu",
            "gated": False,
            "norm": "layer",
            "bias": True,
            "head_dim": None,
            "attention_scale": None,
            "relative_bias": "none",
            "relative_buckets": 32,
            "relative_distance": 128,
            "embedding_scale": True,
            "embedding_norm": False,
            "train_padding": False,
            "output_scale": False,
            "src_features": 0,
            "max_src_len": None,
        }

    def test_layers_start_different_from_each_other(self) -> None:
        first, second = Transformer(**SIZES).encoder.layers
        assert not torch.equal(first.linear1.weight, second.linear1.weight)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_bfloat16(training: bool) -> None:
    model = build(d_model=64, num_heads=4, dim_feedforward=128).train(training)
    expected = model(SRC, TGT)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(SRC, TGT)
        loss = F.cross_entropy(logits.flatten(0, 1), TGT.flatten())
    loss.backward()
    assert logits.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: about 1 % of the logits' size after two layers of matrix products.
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_without_a_graph_break(training: bool) -> None:
    model = build(dropout=0.1 if training else 0.0, num_encoder_layers=1, num_decoder_layers=1).train(training)
    logits = torch.compile(model, backend="aot_eager", fullgraph=True)(SRC, TGT)
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    if not training:
        torch.testing.assert_close(logits, model(SRC, TGT))


def test_a_whole_model_in_bfloat16() -> None:
    model = build().bfloat16()
    logits = model(SRC, TGT)
    logits.sum().backward()
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


class TestAttentionMaps:
    def test_shapes_and_row_sums(self) -> None:
        model = build(dropout=0.5)
        maps = model.attention_maps(SRC, TGT)
        assert {name: [tuple(m.shape) for m in layers] for name, layers in maps.items()} == {
            "encoder": [(3, 3, 7, 7)] * 2,
            "decoder_self": [(3, 3, 5, 5)] * 2,
            "cross": [(3, 3, 5, 7)] * 2,
        }
        assert model.training
        for weights in maps["cross"]:
            sums = weights.sum(-1).transpose(1, 2)[TGT != 0]
            torch.testing.assert_close(sums, torch.ones_like(sums))
            assert (weights.permute(0, 3, 1, 2)[SRC == 0] == 0).all()
        for weights in maps["decoder_self"]:
            assert (weights.triu(1) == 0).all()

    def test_equal_torchs_averaged_weights(self) -> None:
        model = build().double()
        layer = torchs(model, torch.float64).decoder.layers[0]
        assert model.src_embedding is not None
        x = model.tgt_embedding(TGT[:1])
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        expected = layer.self_attn(x, x, x, attn_mask=causal, average_attn_weights=False)[1]
        torch.testing.assert_close(model.attention_maps(SRC[:1], TGT[:1])["decoder_self"][0], expected)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (
                {"num_heads": 5},
                ValueError,
                "d_model must be divisible by num_heads, got d_model = 24 and num_heads = 5",
            ),
            ({"memory_layers": "all"}, ValueError, "memory_layers must be one of 'last', 'each', 'mixed', got 'all'"),
            ({"dropout": 1.5}, ValueError, r"dropout must lie in \[0, 1\], got 1.5"),
            ({"dropout": math.nan}, ValueError, "dropout must lie in"),
            ({"dropout": "0.1"}, TypeError, "dropout must be a number, got str"),
            ({"num_encoder_layers": 0}, ValueError, "num_encoder_layers must be at least 1, got 0"),
            ({"d_model": 24.0}, TypeError, "d_model must be an int, got float"),
            ({"norm_first": 1}, TypeError, "norm_first must be a bool, got int"),
            ({"pad_id": 23}, ValueError, r"pad_id must be in \[0, 22\], got 23"),
            ({"eos_id": -1}, ValueError, r"eos_id must be in \[0, 28\], got -1"),
            ({"eos_id": 0}, ValueError, "eos_id must differ from pad_id, both are 0"),
            ({"max_len": True}, TypeError, "max_len must be an int, got bool"),
        ],
    )
    def test_constructor(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            build(**options)

    @pytest.mark.parametrize(
        ("src", "tgt", "error", "message"),
        [
            (SRC.int(), TGT, TypeError, "src must be a tensor of int64 token ids, got dtype torch.int32"),
            (SRC, TGT.float(), TypeError, "tgt must be a tensor of int64 token ids, got dtype torch.float32"),
            (SRC.tolist(), TGT, TypeError, "src must be a tensor of int64 token ids, got list"),
            (SRC[0], TGT, ValueError, r"src must have 2 dimensions \(batch, length\), got shape \(7,\)"),
            (SRC, TGT[None], ValueError, r"tgt must have 2 dimensions \(batch, length\), got shape \(1, 3, 5\)"),
            (SRC.repeat(1, 5), TGT, ValueError, "src has 35 tokens a row, more than max_len = 32"),
            (SRC, TGT.repeat(1, 7), ValueError, "tgt has 35 tokens a row, more than max_len = 32"),
            (SRC[:2], TGT, ValueError, r"tgt has 3 rows, src \(memory\) has 2; they must be equal"),
        ],
    )
    def test_tokens(self, src: Any, tgt: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            build()(src, tgt)


def test_learns_to_reverse() -> None:
    """Overfits 16 sequences of different lengths, and generate() then gives every one of them."""
    lengths = torch.arange(16) % 6 + 3
    src = torch.randint(3, 20, (16, 8)).masked_fill(torch.arange(8) >= lengths[:, None], 0)
    tgt = torch.zeros(16, 10, dtype=torch.int64)
    for row, length in enumerate(lengths.tolist()):
        tgt[row, : length + 2] = torch.cat([torch.tensor([1]), src[row, :length].flip(0), torch.tensor([2])])
    model = Transformer(20, 20, 64, 4, 1, 1, dim_feedforward=128, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    for _ in range(75):
        loss = F.cross_entropy(model(src, tgt[:, :-1]).flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    assert torch.equal(model.generate(src, max_new_tokens=9), tgt[:, 1:])


@pytest.mark.parametrize("integer", [numpy.int64, numpy.int16, torch.tensor])
def test_integers_that_are_not_pythons(integer: Any) -> None:
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2}
    model = Transformer(**{name: integer(value) for name, value in (SIZES | ids).items()})
    assert {name: model.config[name] for name in SIZES | ids} == SIZES | ids
    assert {type(model.config[name]) for name in SIZES | ids} == {int}
    assert model(SRC, TGT).shape == (3, 5, 29)
    assert model.generate(SRC, integer(4)).equal(model.generate(SRC, 4))
    assert type(KVCache(integer(3)).capacity) is int
    module = MultiHeadAttention(integer(8), integer(2), batch_first=True) if integer is not torch.tensor else MultiHeadAttention(8, 2)
    assert module(x := torch.randn(2, 3, 8), x, x)[0].shape == (2, 3, 8)
