"""Fused attention kernels, a drop-in MultiHeadAttention and an encoder-decoder Transformer: every public name."""

from .kernels import torch_internals  # noqa: F401  # first: it refuses a torch that is too old
from .kernels.attention import (
    attention,
    attention_decode,
    attention_varlen,
    attention_weights,
    explain,
)
from .kernels.prepared_mask import prepare_mask
from .kernels.problem import PreparedMask
from .kernels.quantized import dequantize_kv, quantize_kv
from .kernels.routing import Explanation
from .kernels.scaled_dot_product_attention import scaled_dot_product_attention
from .transformer.attention import MultiHeadAttention
from .transformer.cache import KVCache
from .transformer.model import Transformer
from .transformer.quantize import quantize_int8
from .transformer.replace import attention_calls, replace_attention, restore_attention
from .transformer.vision import VisionTransformer

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "KVCache",
    "MultiHeadAttention",
    "PreparedMask",
    "Transformer",
    "VisionTransformer",
    "attention",
    "attention_calls",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "dequantize_kv",
    "explain",
    "prepare_mask",
    "quantize_int8",
    "quantize_kv",
    "replace_attention",
    "restore_attention",
    "scaled_dot_product_attention",
]
