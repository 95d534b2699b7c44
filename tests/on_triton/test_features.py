"""Every feature of the Triton kernels, forward and backward, in every dtype, under the accuracy rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_calls import DTYPES, check_call

from fused_attention.kernels import triton_backend

FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, gradient of lse": {"lse_gradient": True},
    "causal": {"is_causal": "top_left"},
    "causal, more queries than keys": {"is_causal": "top_left", "seqlens": (75, 40)},
    "causal bottom-right, more keys": {"is_causal": "bottom_right", "seqlens": (40, 75)},
    "causal bottom-right, more queries": {"is_causal": "bottom_right", "seqlens": (75, 40), "lse_gradient": True},
    "window": {"window": (9, 4)},
    "window left": {"window": (9, None)},
    "window right": {"window": (None, 4)},
    "window and causal bottom-right": {"window": (20, 3), "is_causal": "bottom_right", "seqlens": (70, 40)},
    "window without a key of its own": {"window": (0, 0), "seqlens": (70, 40)},
    "key_mask right": {"key_mask": "right"},
    "key_mask left": {"key_mask": "left", "is_causal": "top_left"},
    "key_mask holes": {"key_mask": "holes", "lse_gradient": True},
    "key_mask nothing in one": {"key_mask": "nothing in one"},
    "key_lengths": {"key_lengths": (40, 75)},
    "key_lengths zero, too long, negative": {"key_lengths": (0, 90, -3), "sizes": (3, 1, 1)},
    "query_lengths": {"query_lengths": (40, 70), "lse_gradient": True},
    "query_lengths zero, too long, negative": {"query_lengths": (0, 90, -3), "sizes": (3, 1, 1)},
    "all lengths, key_mask and causal bottom-right": {
        "key_lengths": (40, 75), "query_lengths": (65, 9), "key_mask": "holes", "is_causal": "bottom_right",
    },
    "bool mask": {"attn_mask": ("bool", "BHQK"), "sizes": (1, 2, 2)},
    "bool mask, key_mask and causal": {"attn_mask": ("bool", "11QK"), "key_mask": "right", "is_causal": "top_left"},
    "float mask": {"attn_mask": ("float32", "BHQK"), "sizes": (1, 2, 2)},
    "float mask and key_mask": {"attn_mask": ("float32", "1HQK"), "key_mask": "holes"},
    "float mask and causal": {"attn_mask": ("float32", "11QK"), "is_causal": "bottom_right"},
    "bfloat16 mask": {"attn_mask": ("bfloat16", "1HQK"), "sizes": (1, 2, 2)},
    "prepared causal": {"is_causal": "top_left", "prepare": True},
    "prepared bool mask": {"attn_mask": ("bool", "1HQK"), "sizes": (2, 2, 1), "prepare": True},
    "prepared float mask, key_mask, window, bottom-right": {
        "attn_mask": ("float32", "BHQK"), "key_mask": "holes", "window": (30, 5), "is_causal": "bottom_right", "prepare": True,
    },
    "prepared, with everything else": {
        "key_mask": "right", "key_lengths": (60, 70), "query_lengths": (70, 40), "is_causal": "bottom_right", "sizes": (2, 2, 1),
        "dropout_p": 0.25, "softcap": 2.0, "alibi_slopes": "BH", "sinks": True, "lse_gradient": True, "prepare": True,
    },
    "dropout": {"dropout_p": 0.25, "sizes": (1, 2, 2)},
    "dropout with masks": {"dropout_p": 0.25, "key_mask": "holes", "is_causal": "top_left", "lse_gradient": True},
    "dropout and a float mask": {"dropout_p": 0.25, "attn_mask": ("float32", "11QK")},
    "dropout of everything": {"dropout_p": 1.0, "lse_gradient": True},
    "softcap": {"softcap": 1.5},
    "softcap far above the scores": {"softcap": 500.0},
    "softcap, causal, lse": {"softcap": 1.5, "is_causal": "top_left", "lse_gradient": True},
    "alibi": {"alibi_slopes": "H", "sizes": (1, 2, 2)},
    "alibi by batch, bottom-right": {"alibi_slopes": "BH", "is_causal": "bottom_right", "key_lengths": (40, 75), "sizes": (2, 2, 2)},
    "sinks": {"sinks": True, "lse_gradient": True, "sizes": (1, 2, 2)},
    "sinks, a batch element without keys": {"sinks": True, "key_mask": "nothing in one", "query_lengths": (70, 30)},
    "grouped heads": {"sizes": (2, 4, 2), "is_causal": "top_left"},
    "one key head": {"sizes": (1, 4, 1), "key_mask": "holes", "dropout_p": 0.25},
    "everything": {
        "sizes": (2, 4, 2), "is_causal": "bottom_right", "window": (50, 10), "attn_mask": ("float32", "BHQK"), "key_mask": "holes",
        "key_lengths": (60, 75), "query_lengths": (70, 50), "dropout_p": 0.25, "scale": 0.4, "softcap": 2.0, "alibi_slopes": "BH",
        "sinks": True, "lse_gradient": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, dtype: torch.dtype, device: str) -> None:
    check_call(triton_backend, FEATURES[feature] | {"dtype": dtype}, device)
