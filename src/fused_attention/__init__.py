"""Fused attention kernels, a drop-in MultiHeadAttention and an encoder-decoder Transformer: every public name."""

from fused_attention.kernels import torch_internals  # noqa: F401  # first: it refuses a torch that is too old
from fused_attention.kernels.attention import (
    attention,
    attention_decode,
    attention_varlen,
    attention_weights,
    explain,
)
from fused_attention.kernels.prepared_mask import PreparedMask, prepare_mask
from fused_attention.kernels.routing import Explanation
from fused_attention.kernels.scaled_dot_product_attention import scaled_dot_product_attention
from fused_attention.transformer.attention import MultiHeadAttention
from fused_attention.transformer.cache import KVCache
from fused_attention.transformer.model import Transformer
from fused_attention.transformer.replace import attention_calls, replace_attention, restore_attention

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "KVCache",
    "MultiHeadAttention",
    "PreparedMask",
    "Transformer",
    "attention",
    "attention_calls",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "explain",
    "prepare_mask",
    "replace_attention",
    "restore_attention",
    "scaled_dot_product_attention",
]
