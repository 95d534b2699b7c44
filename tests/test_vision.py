"""The Vision Transformer: equality with plain PyTorch, sizes and channels, attention maps, checks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from torch import Tensor, nn

from fused_attention import VisionTransformer
from fused_attention.transformer import layers

# 4 x 6 pixels in patches of 2 x 3: two rows of two patches.
SIZES: dict[str, Any] = {
    "image_size": (4, 6),
    "patch_size": (2, 3),
    "num_classes": 5,
    "channels": 2,
    "d_model": 24,
    "num_heads": 3,
    "num_layers": 2,
    "dim_feedforward": 40,
}


def build(**options: Any) -> VisionTransformer:
    """A small model in which biases, norms and the class token too have random values, without dropout unless asked."""
    model = VisionTransformer(**{**SIZES, "dropout": 0.0, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def plain_encoder(model: VisionTransformer) -> nn.TransformerEncoder:
    """torch.nn.TransformerEncoder with the model's weights, in its dtype."""
    config = model.config
    layer = nn.TransformerEncoderLayer(
        config["d_model"],
        config["num_heads"],
        config["dim_feedforward"],
        dropout=0.0,
        activation=config["activation"],
        layer_norm_eps=config["layer_norm_eps"],
        batch_first=True,
        norm_first=True,
    )
    norm = nn.LayerNorm(config["d_model"], config["layer_norm_eps"])
    encoder = nn.TransformerEncoder(layer, config["num_layers"], norm, enable_nested_tensor=False)
    encoder.load_state_dict(model.encoder.state_dict())  # strict: the names are the same, none missing, none over
    return encoder.to(model.positions.dtype)


def plain_tokens(model: VisionTransformer, images: Tensor) -> Tensor:
    """What the encoder gets: patches cut out by slices and projected by a matrix, after the class token, with positions."""
    (height, width), weight = model.patch_size, model.patch_embedding.weight.flatten(1)
    rows = [
        images[:, :, top : top + height, left : left + width].flatten(1) @ weight.T + model.patch_embedding.bias
        for top in range(0, images.shape[2], height)
        for left in range(0, images.shape[3], width)
    ]
    return torch.stack([model.class_token.expand(len(images), -1), *rows], dim=1) + model.positions


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_a_plain_one_with_the_same_weights(training: bool, activation: str) -> None:
    model = build(activation=activation)
    exact_model = build(activation=activation).double()
    exact_model.load_state_dict(model.state_dict())
    images, labels = torch.randn(3, 2, 4, 6), torch.tensor([0, 4, 2])

    def logits_and_gradients(model: VisionTransformer, encoder: nn.Module | None) -> dict[str, Tensor]:
        model.train(training)
        model.zero_grad()
        inputs = images.to(model.positions.dtype)
        if encoder is None:
            logits, stack = model(inputs), model.encoder
        else:
            stack = encoder.train(training)
            logits = model.head(stack(plain_tokens(model, inputs))[:, 0])
        F.cross_entropy(logits, labels).backward()
        named = {name: p.grad for name, p in model.named_parameters() if not name.startswith("encoder.")}
        named |= {name: p.grad for name, p in stack.named_parameters()}
        assert all(gradient is not None for gradient in named.values())
        return {"logits": logits.detach(), **{name: gradient.clone() for name, gradient in named.items()}}  # type: ignore[union-attr]

    exact = logits_and_gradients(exact_model, plain_encoder(exact_model))
    eager = logits_and_gradients(model, plain_encoder(model))
    in_float64, in_float32 = logits_and_gradients(exact_model, None), logits_and_gradients(model, None)
    for name, expected in exact.items():
        torch.testing.assert_close(in_float64[name], expected)
        ours, other = in_float32[name], eager[name]
        if name.endswith("in_proj_bias"):  # of a key's bias it is exactly 0, and rounding noise in float32
            ours, other, expected = (torch.cat([t[:24], t[48:]]) for t in (ours, other, expected))
        assert_accurate(name, "out" if name == "logits" else "gradient", ours, other, expected)


class TestSizes:
    @pytest.mark.parametrize(
        ("image_size", "patch_size", "channels", "grid"),
        [(8, 2, 1, (4, 4)), (16, (4, 8), 3, (4, 2)), ((3, 10), (1, 5), 7, (3, 2)), (6, 6, 1, (1, 1))],
    )
    def test_any(self, image_size: Any, patch_size: Any, channels: int, grid: tuple[int, int]) -> None:
        model = build(image_size=image_size, patch_size=patch_size, channels=channels)
        height, width = model.config["image_size"]
        images = torch.randn(2, channels, height, width)
        assert model.grid == grid
        assert model(images).shape == (2, 5)
        assert model.encode(images).shape == (2, 1 + grid[0] * grid[1], 24)

    def test_an_empty_batch(self) -> None:
        model = build()
        model(torch.empty(0, 2, 4, 6)).sum().backward()
        assert not model.positions.grad.any()

    def test_positions_on_a_finer_grid_keep_those_at_the_same_place(self) -> None:
        """Of three rows (or columns) in place of one, the middle one lies where that was."""
        model = build(image_size=(4, 9))  # 2 rows and 3 columns of patches
        resized = model._positions_on((6, 9))
        assert torch.equal(resized[0], model.positions[0])
        torch.testing.assert_close(resized[1:].unflatten(0, (6, 9))[1::3, 1::3], model.positions[1:].unflatten(0, (2, 3)))

    def test_images_of_another_size(self) -> None:
        model = build()
        logits = model(torch.randn(2, 2, 8, 9))
        assert logits.shape == (2, 5)
        logits.sum().backward()
        assert model.positions.grad.abs().amax(1).gt(0).all()
        # Their positions are interpolated and no others: a patch means something else at another place.
        image = torch.randn(1, 2, 8, 9)
        turned = image.roll((2, 3), (2, 3))
        assert (model(image) - model(turned)).abs().max() > 1e-4


class TestAttentionMaps:
    def test_equal_torchs_weights(self) -> None:
        model = build(num_layers=1).double().eval()
        images = torch.randn(2, 2, 4, 6, dtype=torch.float64)
        layer = plain_encoder(model).layers[0]
        x = layer.norm1(plain_tokens(model, images))
        _, expected = layer.self_attn(x, x, x, average_attn_weights=False)
        (weights,) = model.attention_maps(images)
        torch.testing.assert_close(weights, expected)

    def test_of_every_layer_in_either_mode(self) -> None:
        model = build(dropout=0.5)
        images = torch.randn(2, 2, 4, 6)
        maps = model.attention_maps(images)
        assert [weights.shape for weights in maps] == [(2, 3, 5, 5)] * 2
        assert not any(weights.requires_grad for weights in maps)
        assert model.training
        for weights, again in zip(maps, model.eval().attention_maps(images), strict=True):
            assert torch.equal(weights, again)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
        assert not any(layer.self_attn._forward_pre_hooks for layer in model.encoder.layers)


class TestState:
    def test_round_trip_through_config_and_state_dict(self) -> None:
        model = build(activation="relu", layer_norm_eps=1e-3)
        copy = VisionTransformer(**model.config)
        copy.load_state_dict(model.state_dict())
        images = torch.randn(2, 2, 4, 6)
        assert torch.equal(copy(images), model(images))
        assert model.config == {**SIZES, "dropout": 0.0, "activation": "relu", "layer_norm_eps": 1e-3}

    def test_dropout_reaches_embeddings_and_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, images = build(dropout=0.5), torch.randn(2, 2, 4, 6)
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))
        model.train()
        monkeypatch.setattr(layers, "dropout", lambda x, p, training: x)
        for layer in model.encoder.layers:
            layer.self_attn.dropout = 0.0
        assert not torch.equal(model(images), model(images))  # that of the embeddings


def test_autocast_bfloat16() -> None:
    model, images = build(), torch.randn(2, 2, 4, 6)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    F.cross_entropy(logits.float(), torch.tensor([1, 2])).backward()
    assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_learns_which_patch_is_bright() -> None:
    model = build(num_classes=4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    images, labels = torch.zeros(4, 2, 4, 6), torch.arange(4)
    for place in range(4):
        top, left = place // 2 * 2, place % 2 * 3
        images[place, :, top : top + 2, left : left + 3] = 1
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model(images).argmax(-1), labels)
    assert loss < 0.1


class TestChecks:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"image_size": 7}, ValueError, "image_size must be a multiple of patch_size = 2 x 3 (height x width), got 7 x 7"),
            ({"patch_size": (3, 3)}, ValueError, "image_size must be a multiple of patch_size = 3 x 3 (height x width), got 4 x 6"),
            ({"patch_size": 8}, ValueError, "image_size must be a multiple of patch_size = 8 x 8"),
            ({"image_size": (4, 6, 1)}, ValueError, "image_size must be an int or (height, width), got (4, 6, 1)"),
            ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0"),
            ({"patch_size": 2.0}, TypeError, "patch_size must be an int, got float"),
            ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
            ({"num_classes": "5"}, TypeError, "num_classes must be an int, got str"),
            ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
            ({"num_heads": 5}, ValueError, "d_model must be divisible by num_heads, got d_model = 24 and num_heads = 5"),
            ({"dropout": 1.5}, ValueError, "dropout must lie in [0, 1], got 1.5"),
            ({"activation": "tanh"}, ValueError, "activation must be one of 'gelu', 'relu', got 'tanh'"),
            ({"layer_norm_eps": -1.0}, ValueError, "layer_norm_eps must be a float >= 0, got -1.0"),
        ],
    )
    def test_constructor(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=re.escape(message)):
            build(**options)

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            (torch.zeros(1, 3, 4, 6), ValueError, "images must have 2 channels, got 3 in shape (1, 3, 4, 6)"),
            (torch.zeros(2, 4, 6), ValueError, "images must have 4 dimensions (batch, channels, height, width), got shape (2, 4, 6)"),
            (
                torch.zeros(1, 2, 5, 6),
                ValueError,
                "the size of images must be a multiple of patch_size = 2 x 3 (height x width), got 5 x 6",
            ),
            (
                torch.zeros(1, 2, 0, 6),
                ValueError,
                "the size of images must be a multiple of patch_size = 2 x 3 (height x width), got 0 x 6",
            ),
            (torch.zeros(1, 2, 4, 6, dtype=torch.uint8), TypeError, "images must be a floating-point tensor, got dtype torch.uint8"),
            ([[0.0]], TypeError, "images must be a floating-point tensor, got list"),
        ],
        ids=["channels", "dimensions", "patches", "empty", "integers", "list"],
    )
    def test_images(self, images: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=re.escape(message)):
            build()(images)
