"""Which features are crossed with sizes, dtypes and memory orders, and few rows in which every pair of those meets."""

from __future__ import annotations

import random
from itertools import combinations, product
from typing import Any

# Fields of attention_calls.CALL.
FEATURES: dict[str, dict[str, Any]] = {
    "full": {"lse_gradient": True},
    "causal": {"is_causal": "top_left"},
    "causal bottom-right": {"is_causal": "bottom_right"},
    "window": {"window": (9, 4), "is_causal": "bottom_right"},
    "window off the diagonal": {"window": (9, 4), "diagonal": 11},
    "key_mask": {"key_mask": "holes", "is_causal": "top_left"},
    "lengths": {"key_lengths": (50, 20), "query_lengths": (30, 60)},
    "bool mask": {"attn_mask": ("bool", "B1QK")},
    "float mask": {"attn_mask": ("float32", "1HQK")},
    "float mask per key": {"attn_mask": ("float16", "B11K"), "key_mask": "right"},
    "dropout": {"dropout_p": 0.25, "is_causal": "bottom_right"},
    "softcap": {"softcap": 1.5, "key_mask": "left"},
    "alibi": {"alibi_slopes": "BH"},
    "sinks": {"sinks": True},
    "prepared mask": {"attn_mask": ("bool", "1HQK"), "key_mask": "right", "is_causal": "top_left", "prepare": True},
    "grouped heads": {"sizes": (1, 2, 1), "key_lengths": (50,)},
}


def pairwise(*axes: list) -> list[tuple]:
    """Few rows that hold, for any two axes, every pair of their values: greedily, the best of some random rows at a time."""
    chance = random.Random(0)
    pairs = {(a, x, b, y) for a, b in combinations(range(len(axes)), 2) for x, y in product(range(len(axes[a])), range(len(axes[b])))}
    rows = []
    while pairs:
        a, x, b, y = min(pairs)
        candidates = [[chance.randrange(len(axis)) for axis in axes] for _ in range(30)]
        for row in candidates:
            row[a], row[b] = x, y
        covered = [{(i, row[i], j, row[j]) for i, j in combinations(range(len(axes)), 2)} & pairs for row in candidates]
        best = max(range(len(candidates)), key=lambda index: len(covered[index]))
        pairs -= covered[best]
        rows.append(tuple(axis[index] for axis, index in zip(axes, candidates[best], strict=True)))
    return rows
