"""Encoder and decoder layers on the fused attention operation (Vaswani et al. 2017, section 3).

Parameter names and the order of operations are those of torch.nn.TransformerEncoderLayer and TransformerDecoderLayer
with activation relu, or gelu if so configured, and batch_first, so the weights of a torch.nn.Transformer load by name
and give the same outputs. The implementation differs: each attention projects once into a packed buffer that the
kernels read in place, and padding is given as key masks and lengths, prepared once per batch by the caller and passed
to every layer as attention options.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention import attention, attention_decode, attention_kv_packed, attention_qkv_packed, attention_weights
from ..kernels.torch_internals import functorch_interpreter
from .cache import LayerCache
from .linear import Linear, linear
from .ssru import SSRU


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """In training, zeroes each element with probability p and scales the others by 1 / (1 - p).

    In eager mode on the CPU, the mask takes 16 bits per element from torch's generator, with p rounded to 1/65536 as in
    the attention kernels. This is about 5 times faster than torch.nn.functional.dropout, which draws 32 bits per element
    through a Bernoulli sampler. torch.compile and vmap use that function, since they cannot handle these draws.
    """
    if not training or p == 0.0:
        return x
    # functorch's stack is checked only in eager mode, because torch.compile cannot trace the check.
    if x.device.type != "cpu" or p == 1.0 or torch.compiler.is_compiling() or functorch_interpreter() is not None:
        return F.dropout(x, p, training=True)
    threshold = min(max(round(p * 65536), 1), 65535)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    # Comparing straight into the dtype of x avoids a boolean tensor and a slow mixed-dtype product.
    keep = torch.ge(bits, threshold - 32768, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
    return x * keep.mul_(65536 / (65536 - threshold))


def add_residual(x: Tensor, sublayer_output: Tensor, p: float, training: bool) -> Tensor:
    """x + dropout(sublayer_output). The cast is explicit because CPU additions of mixed dtypes (autocast) are slow."""
    return x + dropout(sublayer_output, p, training).to(x.dtype)


def attend_to_cache(query: Tensor, kv: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_kv_packed` without gradients, by `attention`, which skips the checks of calls whose sizes it has seen."""
    return attention(query, kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2), **options)


class _PackedAttention(nn.Module):
    """The parameters of torch.nn.MultiheadAttention under the same names, initialized as in torch.nn.Transformer."""

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * d_model))
        self.out_proj = Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    @property
    def dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def merge_heads(self, heads: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Projects heads (B, H, L, D) to the output (B, L, d_model). The kernels' layout makes merging the heads a view."""
        return self.out_proj(cast(Tensor, heads).transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_heads={self.num_heads}, dropout={self.dropout}"


class SelfAttention(_PackedAttention):
    """Multi-head attention of a sequence to itself, with one projection into a packed (B, L, 3, H, D) buffer."""

    def project(self, x: Tensor) -> Tensor:
        return linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))

    def forward(self, x: Tensor, cache: LayerCache | None = None, **options: Any) -> Tensor:
        """x (B, L, d_model) -> (B, L, d_model). With a cache, x attends to everything cached and to itself.

        options: masks and lengths of `attention`, for the keys of x, or of cache and x together.
        """
        qkv = self.project(x)
        if cache is None:
            return self.merge_heads(attention_qkv_packed(qkv, dropout_p=self.dropout_p, **options))
        query, kv = qkv[:, :, 0].transpose(1, 2), cache.append(qkv[:, :, 1:])
        if cache.self_scale is None:
            return self.merge_heads(attend_to_cache(query, kv, dropout_p=self.dropout_p, **options))
        masks = {name: options[name] for name in ("key_mask", "key_lengths")}  # decoding is causal from the bottom right
        key, value, key_scale, value_scale = (part.transpose(1, 2) for part in (*kv.unbind(2), *cache.self_scale.unbind(2)))
        return self.merge_heads(attention_decode(query, key, value, **masks, key_scale=key_scale, value_scale=value_scale))

    def weights(self, x: Tensor, **options: Any) -> Tensor:
        """The attention weights (B, H, L, L) of forward(x, **options), before dropout."""
        query, key, value = self.project(x).permute(2, 0, 3, 1, 4)
        _, lse = attention(query, key, value, return_lse=True, **options)
        return attention_weights(query, key, lse, **options)


class CrossAttention(_PackedAttention):
    """Multi-head attention of a sequence to the encoder's memory; keys and values in a packed (B, S, 2, H, D)
    buffer."""

    def _split_heads(self, query: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, H, L, D)"""
        return query.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def project(self, x: Tensor, memory: Tensor, cache: LayerCache | None = None) -> tuple[Tensor, Tensor]:
        """The query (B, H, L, D), and packed keys and values (B, S, 2, H, D): from the cache if it has them, or memory
        itself if that came from keys_values."""
        held = memory if memory.ndim == 5 else None if cache is None else cache.cross_kv
        if held is not None:
            return self._split_heads(linear(x, self.in_proj_weight[: self.d_model], self.in_proj_bias[: self.d_model])), held
        # split, not slices: its backward writes the weight's gradient once.
        sizes = [self.d_model, 2 * self.d_model]
        (weight_q, weight_kv), (bias_q, bias_kv) = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
        query = self._split_heads(linear(x, weight_q, bias_q))
        kv = linear(memory, weight_kv, bias_kv).unflatten(-1, (2, self.num_heads, self.head_dim))
        if cache is not None:
            cache.cross_kv = kv
        return query, kv

    def forward(self, x: Tensor, memory: Tensor, cache: LayerCache | None = None, **options: Any) -> Tensor:
        """x (B, L, d_model), memory (B, S, d_model) -> (B, L, d_model); memory is not read again once it is cached.

        memory may also be keys_values(memory). x may then be (B * beams, L, d_model), where row r reads memory row r // beams.
        """
        shape = x.shape
        if memory.ndim == 5 and shape[0] != memory.shape[0]:
            # The beams of a sentence are queries of one call, so its keys and values are neither copied nor read twice.
            x = x.view(memory.shape[0], -1, self.d_model)
        query, kv = self.project(x, memory, cache)
        attend = attention_kv_packed if cache is None else attend_to_cache
        heads = attend(query, kv, dropout_p=self.dropout_p, **options)
        return self.merge_heads(heads) if x.shape == shape else self.merge_heads(heads).view(shape)

    def keys_values(self, memory: Tensor) -> Tensor:
        """The packed keys and values (B, S, 2, H, D) of memory (B, S, d_model)."""
        weight, bias = self.in_proj_weight[self.d_model :], self.in_proj_bias[self.d_model :]
        return linear(memory, weight, bias).unflatten(-1, (2, self.num_heads, self.head_dim))

    def weights(self, x: Tensor, memory: Tensor, **options: Any) -> Tensor:
        """The attention weights (B, H, L, S) of forward(x, memory, **options), before dropout."""
        query, kv = self.project(x, memory)
        key, value = kv.permute(2, 0, 3, 1, 4)
        _, lse = attention(query, key, value, return_lse=True, **options)
        return attention_weights(query, key, lse, **options)


class _Layer(nn.Module):
    """What encoder and decoder layers share: self-attention and the feed-forward network."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        norm_first: bool,
        eps: float = 1e-5,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.dropout = self.feed_forward_dropout = dropout  # of the residual branches, and of the feed-forward network's inside
        self.norm_first = norm_first
        self.activation = activation  # "relu" or "gelu"
        self.self_attn: nn.Module = SelfAttention(d_model, num_heads, dropout)
        self.linear1 = Linear(d_model, dim_feedforward)
        self.linear2 = Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model, eps)
        self.norm2 = nn.LayerNorm(d_model, eps)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def feed_forward(self, x: Tensor) -> Tensor:
        if self.activation == "gelu":
            return self.linear2(dropout(F.gelu(self.linear1(x)), self.feed_forward_dropout, self.training))
        # relu(dropout(h)) == dropout(relu(h)); in this order autograd saves one fewer (B, L, dim_feedforward) tensor.
        return self.linear2(F.relu(dropout(self.linear1(x), self.feed_forward_dropout, self.training), inplace=True))

    def add(self, x: Tensor, sublayer_output: Tensor) -> Tensor:
        return add_residual(x, sublayer_output, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, norm_first={self.norm_first}"


class EncoderLayer(_Layer):
    """Self-attention and feed-forward network, each in a residual branch with LayerNorm after it (or before:
    norm_first)."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """x (B, S, d_model) -> (B, S, d_model); options: masks and lengths of the self-attention."""
        if self.norm_first:
            x = self.add(x, self.self_attn(self.norm1(x), **options))
            return self.add(x, self.feed_forward(self.norm2(x)))
        x = self.norm1(self.add(x, self.self_attn(x, **options)))
        return self.norm2(self.add(x, self.feed_forward(x)))


class DecoderLayer(_Layer):
    """Self-attention (or an SSRU instead), attention to the encoder's memory and a feed-forward network, each in a residual branch.

    sizes, options: the other arguments of EncoderLayer.
    """

    def __init__(self, d_model: int, num_heads: int, *sizes: Any, cell: str = "attention", **options: Any) -> None:
        super().__init__(d_model, num_heads, *sizes, **options)
        if cell == "ssru":
            self.self_attn = SSRU(d_model)
        self.multihead_attn = CrossAttention(d_model, num_heads, self.dropout)
        self.norm3 = nn.LayerNorm(d_model, self.norm2.eps)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        self_options: dict[str, Any],
        cross_options: dict[str, Any],
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, T, d_model), memory (B, S, d_model) -> (B, T, d_model); options for each of the two attentions."""
        if self.norm_first:
            x = self.add(x, self.self_attn(self.norm1(x), cache, **self_options))
            x = self.add(x, self.multihead_attn(self.norm2(x), memory, cache, **cross_options))
            return self.add(x, self.feed_forward(self.norm3(x)))
        x = self.norm1(self.add(x, self.self_attn(x, cache, **self_options)))
        x = self.norm2(self.add(x, self.multihead_attn(x, memory, cache, **cross_options)))
        return self.norm3(self.add(x, self.feed_forward(x)))

    def memory_keys_values(self, memory: Tensor) -> Tensor:
        """The packed keys and values (B, S, 2, H, D) of memory (B, S, d_model) for the attention to it."""
        return self.multihead_attn.keys_values(memory)


class _Stack(nn.Module):
    """Layers and a final norm. In training, each layer is left out with probability layer_drop (LayerDrop, Fan et al. 2020)."""

    def __init__(self, layers: list[Any], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.layer_drop = 0.0
        self.layer_drop_generator: torch.Generator | None = None  # on the CPU; None: torch's own

    def left_out(self) -> list[bool]:
        """Which layers this forward pass leaves out."""
        if not self.training or self.layer_drop == 0.0:
            return [False] * len(self.layers)
        return (torch.rand(len(self.layers), generator=self.layer_drop_generator) < self.layer_drop).tolist()


class Encoder(_Stack):
    """A stack of encoder layers and the final LayerNorm of torch.nn.Transformer."""

    def forward(self, x: Tensor, every_height: bool = False, **options: Any) -> list[Tensor]:
        """x (B, S, d_model) -> the normalized output of the last layer, or of every layer, lowest first."""
        heights = []
        for layer, left_out in zip(self.layers, self.left_out(), strict=True):
            x = x if left_out else layer(x, **options)
            heights.append(x)
        return [self.norm(height) for height in (heights if every_height else heights[-1:])]


class Decoder(_Stack):
    """A stack of decoder layers, each with its own memory or all with the same one, and the final LayerNorm."""

    def forward(
        self,
        x: Tensor,
        memories: list[Tensor],
        self_options: dict[str, Any],
        cross_options: dict[str, Any],
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """x (B, T, d_model), memories: (B, S, d_model), one or one per layer, or the keys and values for each layer ->
        (B, T, d_model)."""
        for i, (layer, left_out) in enumerate(zip(self.layers, self.left_out(), strict=True)):
            if left_out:
                continue
            memory = memories[i] if len(memories) > 1 else memories[0]
            x = layer(x, memory, self_options, cross_options, caches[i] if caches is not None else None)
        return self.norm(x)
