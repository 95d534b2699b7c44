"""Microseconds of Python that one eager attention() costs on the Triton path, with a driver that launches nothing.

    python benchmarks/host_cost.py        from a checkout; needs no GPU

Small CPU tensors stand in for GPU ones, the kernels are compiled for sm_90 but not run (tests/triton_offline.py). The real driver adds its
launch, a GPU allocator its own time. Beside it torch's attention on the same CPU tensors, kernel included, to compare machines.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import triton_offline
from torch.nn.functional import scaled_dot_product_attention

from fused_attention import attention, attention_decode
from fused_attention.kernels import triton_backend

CALLS, ROUNDS = 1000, 15


def microseconds(function: Callable[[], object]) -> tuple[float, float]:
    """The least and the median of several rounds, per call."""
    for _ in range(CALLS):
        function()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        rounds.append(1e6 * (time.perf_counter() - start) / CALLS)
    return min(rounds), statistics.median(rounds)


def main() -> None:
    query, newest = torch.randn(2, 4, 128, 32, dtype=torch.bfloat16), torch.randn(2, 4, 1, 32, dtype=torch.bfloat16)
    leaf = query.clone().requires_grad_()
    key_mask = torch.ones(2, 128, dtype=torch.bool)
    lengths = torch.tensor([128, 100], dtype=torch.int32)
    cases: dict[str, Callable[[], object]] = {
        "attention, causal": lambda: attention(query, query, query, is_causal=True, backend="triton"),
        "attention, causal, with grad": lambda: attention(leaf, query, query, is_causal=True, backend="triton"),
        "attention, key_mask": lambda: attention(query, query, query, key_mask=key_mask, backend="triton"),
        "attention_decode": lambda: attention_decode(newest, query, query, lengths, backend="triton"),
        "torch, causal, with its kernel": lambda: scaled_dot_product_attention(newest, newest, newest, is_causal=True),
    }
    triton_backend._machine_reason = lambda device: None
    triton_offline._Launcher.__call__ = lambda self, *arguments: None
    print(f"torch {torch.__version__}, microseconds per call: least, median of {ROUNDS} rounds")
    with triton_offline.offline(arch=90):
        for name, function in cases.items():
            with torch.set_grad_enabled("grad" in name):
                least, median = microseconds(function)
            print(f"{name:32s}{least:7.1f}{median:7.1f}")


if __name__ == "__main__":
    main()
