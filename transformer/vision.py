"""The Vision Transformer (Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words") on the encoder of the Transformer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_maps import weights_in_forward
from .checks import check_layers, checked_integer_in
from .layers import Encoder, EncoderLayer, dropout
from .linear import Linear

ACTIVATIONS = ("gelu", "relu")
SIZES = ("num_classes", "channels", "d_model", "num_heads", "num_layers", "dim_feedforward")


class VisionTransformer(nn.Module):
    """Classifies images (B, channels, height, width), or turns them into states of patches.

    1. Patches that do not overlap, each projected to d_model: one convolution with stride patch_size. 2. A learned class
    token before them, and a learned position added to each. 3. Encoder layers, normalised before each sublayer, and a final
    LayerNorm. 4. A linear head on the class token's state.

    image_size, patch_size: pixels, an int for squares or (height, width); patch_size divides image_size. The defaults
    that follow are ViT-Base.
    num_classes: of the head. channels: of the images, 3 for RGB.
    dropout: probability for embeddings, residual branches, the inside of the feed-forward network and attention weights.
    activation: of the feed-forward network, "gelu" (the paper) or "relu". layer_norm_eps: of every LayerNorm.

    `config` holds these arguments: VisionTransformer(**model.config) builds the same architecture. Parameter names below
    `encoder` are those of torch.nn.TransformerEncoder with norm_first and a final norm, whose weights load by name.

    Raises ValueError or TypeError, naming the argument, for sizes and options outside what is written here.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        channels: int = 3,
        d_model: int = 768,
        num_heads: int = 12,
        num_layers: int = 12,
        dim_feedforward: int = 3072,
        dropout: float = 0.1,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-6,
    ) -> None:
        arguments = locals()
        config: dict[str, Any] = {name: arguments[name] for name in inspect.signature(VisionTransformer).parameters}
        config |= {name: _checked_pair(name, config[name]) for name in ("image_size", "patch_size")}
        config |= {name: checked_integer_in(name, config[name], 1) for name in SIZES}
        check_layers(config["d_model"], config["num_heads"], dropout, layer_norm_eps)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        num_classes, channels, d_model, num_heads, num_layers, dim_feedforward = (config[name] for name in SIZES)
        super().__init__()
        self.config = config
        self.channels, self.dropout = channels, dropout
        self.patch_size: tuple[int, int] = config["patch_size"]
        self.grid = self._grid_of("image_size", config["image_size"])  # rows and columns of patches that `positions` is for

        self.patch_embedding = nn.Conv2d(channels, d_model, self.patch_size, self.patch_size)
        self.class_token = nn.Parameter(torch.zeros(d_model))
        self.positions = nn.Parameter(torch.empty(1 + self.grid[0] * self.grid[1], d_model))
        # About as large as the embeddings of patches: from the paper's std of 0.02 a small model learns places much more slowly.
        nn.init.normal_(self.positions, std=0.5)
        sizes = (d_model, num_heads, dim_feedforward, dropout, True, layer_norm_eps, activation)
        self.encoder = Encoder([EncoderLayer(*sizes) for _ in range(num_layers)], nn.LayerNorm(d_model, layer_norm_eps))
        self.head = Linear(d_model, num_classes)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, channels, height, width), floating point.

        Images of another size than image_size get positions interpolated to their grid of patches (section 3.2 of the paper).
        Raises ValueError for a number of channels or a size that does not fit, TypeError for integers.
        """
        return self.head(self.encode(images)[:, 0])

    def encode(self, images: Tensor) -> Tensor:
        """Images, as of forward, -> (B, 1 + patches, d_model): the class token's state, then those of the patches, row by row."""
        grid = self._checked_grid(images)
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), 1, -1), patches], dim=1)
        return self.encoder(dropout(tokens + self._positions_on(grid), self.dropout, self.training))[0]

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """The attention weights (B, H, 1 + patches, 1 + patches) of every layer, without dropout and without gradients.

        Row and column 0 are the class token's; maps[-1][:, :, 0, 1:] is where it looks last.
        """
        modules = [layer.get_submodule("self_attn") for layer in self.encoder.layers]
        weights = weights_in_forward(self, modules, images)
        return [weights[module] for module in modules]

    def _positions_on(self, grid: tuple[int, int]) -> Tensor:
        """(1 + patches, d_model) for rows and columns of patches."""
        if grid == self.grid:
            return self.positions
        table = self.positions[1:].T.unflatten(1, self.grid)  # (d_model, rows, columns)
        resized = F.interpolate(table[None], grid, mode="bicubic", align_corners=False)[0]
        return torch.cat([self.positions[:1], resized.flatten(1).T])

    def _checked_grid(self, images: Tensor) -> tuple[int, int]:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            given = f"dtype {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor, got {given}")
        if images.ndim != 4:
            raise ValueError(f"images must have 4 dimensions (batch, channels, height, width), got shape {tuple(images.shape)}")
        if images.shape[1] != self.channels:
            raise ValueError(f"images must have {self.channels} channels, got {images.shape[1]} in shape {tuple(images.shape)}")
        return self._grid_of("the size of images", (images.shape[2], images.shape[3]))

    def _grid_of(self, name: str, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in (height, width)."""
        (height, width), (patch_height, patch_width) = size, self.patch_size
        if not height or not width or height % patch_height or width % patch_width:
            raise ValueError(
                f"{name} must be a multiple of patch_size = {patch_height} x {patch_width} (height x width), got {height} x {width}"
            )
        return height // patch_height, width // patch_width


def _checked_pair(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be an int or (height, width), got {value!r}")
    return checked_integer_in(name, value[0], 1), checked_integer_in(name, value[1], 1)
