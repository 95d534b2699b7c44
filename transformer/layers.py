"""Encoder and decoder layers on the fused attention operation (Vaswani et al. 2017, section 3).

Parameter names and, by default, the order of operations are those of torch.nn.TransformerEncoderLayer and
TransformerDecoderLayer with batch_first, so the weights of a torch.nn.Transformer load by name and give the same
outputs; options make the layers of other models (_Layer). The implementation differs: each attention projects once
into a packed buffer that the kernels read in place, and padding is given as key masks and lengths, prepared once per
batch by the caller and passed to every layer as attention options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention import attention, attention_decode, attention_kv_packed, attention_qkv_packed, attention_weights
from ..kernels.torch_internals import functorch_interpreter
from .cache import LayerCache
from .linear import Linear, linear
from .relative_positions import RelativeBias, rotate
from .ssru import SSRU

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
NORMS: dict[str, type[nn.LayerNorm | nn.RMSNorm]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


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
    """The parameters of torch.nn.MultiheadAttention under the same names, initialized as in torch.nn.Transformer.

    head_dim: d_model / num_heads if None; otherwise the projections have num_heads * head_dim columns. scale: of the scores,
    1 / sqrt(head_dim) if None. Without bias, in_proj_bias and out_proj.bias are None.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dropout: float,
        bias: bool = True,
        head_dim: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.inner_dim = num_heads * self.head_dim
        self.dropout = dropout
        self.scale = scale
        self.in_proj_weight = nn.Parameter(torch.empty(3 * self.inner_dim, d_model))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * self.inner_dim)) if bias else None
        self.out_proj = Linear(self.inner_dim, d_model, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def merge_heads(self, heads: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Projects heads (B, H, L, D) to the output (B, L, d_model). The kernels' layout makes merging the heads a view."""
        return self.out_proj(cast(Tensor, heads).transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_heads={self.num_heads}, dropout={self.dropout}"


class SelfAttention(_PackedAttention):
    """Multi-head attention of a sequence to itself, with one projection into a packed (B, L, 3, H, D) buffer.

    rotary: queries and keys are turned by their positions (relative_positions.rotate).
    """

    def __init__(self, *sizes: Any, rotary: bool = False, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.rotary = rotary

    def project(self, x: Tensor, start: int = 0) -> Tensor:
        """x (B, L, d_model), at positions from `start` on -> (B, L, 3, H, D)"""
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        return torch.cat((rotate(qkv[:, :, :2], start), qkv[:, :, 2:]), 2) if self.rotary else qkv

    def forward(self, x: Tensor, cache: LayerCache | None = None, **options: Any) -> Tensor:
        """x (B, L, d_model) -> (B, L, d_model). With a cache, x attends to everything cached and to itself.

        options: masks and lengths of `attention`, for the keys of x, or of cache and x together.
        """
        qkv = self.project(x, 0 if cache is None else cache.length)
        if cache is None:
            return self.merge_heads(attention_qkv_packed(qkv, scale=self.scale, dropout_p=self.dropout_p, **options))
        query, kv = qkv[:, :, 0].transpose(1, 2), cache.append(qkv[:, :, 1:])
        if cache.self_scale is None:
            return self.merge_heads(attend_to_cache(query, kv, scale=self.scale, dropout_p=self.dropout_p, **options))
        masks = {name: options[name] for name in ("key_mask", "key_lengths")}  # decoding is causal from the bottom right
        key, value, key_scale, value_scale = (part.transpose(1, 2) for part in (*kv.unbind(2), *cache.self_scale.unbind(2)))
        scales: dict[str, Any] = {"key_scale": key_scale, "value_scale": value_scale, "scale": self.scale}
        return self.merge_heads(attention_decode(query, key, value, **masks, **scales))

    def weights(self, x: Tensor, **options: Any) -> Tensor:
        """The attention weights (B, H, L, L) of forward(x, **options), before dropout."""
        query, key, value = self.project(x).permute(2, 0, 3, 1, 4)
        _, lse = attention(query, key, value, return_lse=True, scale=self.scale, **options)
        return attention_weights(query, key, lse, scale=self.scale, **options)


class CrossAttention(_PackedAttention):
    """Multi-head attention of a sequence to the encoder's memory; keys and values in a packed (B, S, 2, H, D)
    buffer."""

    def _split_heads(self, query: Tensor) -> Tensor:
        """(B, L, H * D) -> (B, H, L, D)"""
        return query.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def project(self, x: Tensor, memory: Tensor, cache: LayerCache | None = None) -> tuple[Tensor, Tensor]:
        """The query (B, H, L, D), and packed keys and values (B, S, 2, H, D): from the cache if it has them, or memory
        itself if that came from keys_values."""
        held = memory if memory.ndim == 5 else None if cache is None else cache.cross_kv
        if held is not None:
            bias = None if self.in_proj_bias is None else self.in_proj_bias[: self.inner_dim]
            return self._split_heads(linear(x, self.in_proj_weight[: self.inner_dim], bias)), held
        # split, not slices: its backward writes the weight's gradient once.
        sizes = [self.inner_dim, 2 * self.inner_dim]
        weight_q, weight_kv = self.in_proj_weight.split(sizes)
        bias_q, bias_kv = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
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
        heads = attend(query, kv, scale=self.scale, dropout_p=self.dropout_p, **options)
        return self.merge_heads(heads) if x.shape == shape else self.merge_heads(heads).view(shape)

    def keys_values(self, memory: Tensor) -> Tensor:
        """The packed keys and values (B, S, 2, H, D) of memory (B, S, d_model)."""
        bias = None if self.in_proj_bias is None else self.in_proj_bias[self.inner_dim :]
        return linear(memory, self.in_proj_weight[self.inner_dim :], bias).unflatten(-1, (2, self.num_heads, self.head_dim))

    def weights(self, x: Tensor, memory: Tensor, **options: Any) -> Tensor:
        """The attention weights (B, H, L, S) of forward(x, memory, **options), before dropout."""
        query, kv = self.project(x, memory)
        key, value = kv.permute(2, 0, 3, 1, 4)
        _, lse = attention(query, key, value, return_lse=True, scale=self.scale, **options)
        return attention_weights(query, key, lse, scale=self.scale, **options)


class _Layer(nn.Module):
    """What encoder and decoder layers share: self-attention and the feed-forward network.

    activation: of the feed-forward network, a name in ACTIVATIONS. gated: its first product has 2 * dim_feedforward columns, and the
    activation of the first half multiplies the second (Shazeer 2020). norm: a name in NORMS, with eps. bias: whether products have one;
    an RMSNorm has none. head_dim, scale, rotary: of the attentions.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        norm_first: bool,
        eps: float = 1e-5,
        activation: str = "relu",
        gated: bool = False,
        norm: str = "layer",
        bias: bool = True,
        head_dim: int | None = None,
        scale: float | None = None,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = self.feed_forward_dropout = dropout  # of the residual branches, and of the feed-forward network's inside
        self.norm_first = norm_first
        self.activation, self.gated = activation, gated
        self.self_attn: nn.Module = SelfAttention(d_model, num_heads, dropout, bias, head_dim, scale, rotary=rotary)
        self.linear1 = Linear(d_model, (1 + gated) * dim_feedforward, bias)
        self.linear2 = Linear(dim_feedforward, d_model, bias)
        self.norm1 = NORMS[norm](d_model, eps)
        self.norm2 = NORMS[norm](d_model, eps)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)
            if bias:
                nn.init.zeros_(layer.bias)

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden, p = self.linear1(x), self.feed_forward_dropout
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)
            hidden = dropout(ACTIVATIONS[self.activation](gate) * hidden, p, self.training)
        elif self.activation == "relu":
            # relu(dropout(h)) == dropout(relu(h)); in this order autograd saves one fewer (B, L, dim_feedforward) tensor.
            hidden = F.relu(dropout(hidden, p, self.training), inplace=True)
        else:
            hidden = dropout(ACTIVATIONS[self.activation](hidden), p, self.training)
        return self.linear2(hidden)

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

    def __init__(self, *sizes: Any, cell: str = "attention", **options: Any) -> None:
        super().__init__(*sizes, **options)
        own = cast(SelfAttention, self.self_attn)
        if cell == "ssru":
            self.self_attn = SSRU(own.d_model)
        attention_options = own.in_proj_bias is not None, own.head_dim, own.scale
        self.multihead_attn = CrossAttention(own.d_model, own.num_heads, self.dropout, *attention_options)
        self.norm3 = type(self.norm2)(own.d_model, cast(float, self.norm2.eps))

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
    """Layers and a final norm, with relative biases for the self-attentions: none, one for all layers, or one each.

    In training, each layer is left out with probability layer_drop (LayerDrop, Fan et al. 2020).
    """

    def __init__(self, layers: Sequence[_Layer], norm: nn.Module, relative_bias: Sequence[RelativeBias] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.relative_bias = nn.ModuleList(relative_bias)
        self.layer_drop = 0.0
        self.layer_drop_generator: torch.Generator | None = None  # on the CPU; None: torch's own

    def left_out(self) -> list[bool]:
        """Which layers this forward pass leaves out."""
        if not self.training or self.layer_drop == 0.0:
            return [False] * len(self.layers)
        return (torch.rand(len(self.layers), generator=self.layer_drop_generator) < self.layer_drop).tolist()

    def options_of_layers(self, options: dict[str, Any], seqlen_q: int, start: int = 0) -> list[dict[str, Any]]:
        """The batch's options of the self-attention, with each layer's bias for seqlen_q queries from position `start` on.

        A prepared mask is shared: its bits do not depend on the bias.
        """
        if len(self.relative_bias) == 0:
            return [options] * len(self.layers)
        mask = options.get("attn_mask")
        seqlen_k = options["key_mask"].shape[1] if mask is None else mask.shape[3]
        biases = [bias(seqlen_q, seqlen_k, start) for bias in self.relative_bias]
        biased = [options | {"attn_mask": bias if mask is None else replace(mask, bias=bias)} for bias in biases]
        return biased if len(biased) > 1 else biased * len(self.layers)


class Encoder(_Stack):
    """A stack of encoder layers and the final norm of torch.nn.Transformer."""

    def forward(self, x: Tensor, every_height: bool = False, **options: Any) -> list[Tensor]:
        """x (B, S, d_model) -> the normalized output of the last layer, or of every layer, lowest first."""
        heights = []
        options_of_layers = self.options_of_layers(options, x.shape[1])
        for layer, left_out, layer_options in zip(self.layers, self.left_out(), options_of_layers, strict=True):
            x = x if left_out else layer(x, **layer_options)
            heights.append(x)
        return [self.norm(height) for height in (heights if every_height else heights[-1:])]


class Decoder(_Stack):
    """A stack of decoder layers, each with its own memory or all with the same one, and the final norm."""

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
        options = self.options_of_layers(self_options, x.shape[1], 0 if caches is None else caches[0].length)
        for i, (layer, left_out) in enumerate(zip(self.layers, self.left_out(), strict=True)):
            if left_out:
                continue
            memory = memories[i] if len(memories) > 1 else memories[0]
            x = layer(x, memory, options[i], cross_options, caches[i] if caches is not None else None)
        return self.norm(x)
