"""The ways in which the CUDA backend can compute a backward, against each other: what kOperationsPerAddedByte (sm80/plan.cpp) follows from.

    python -m fused_attention.benchmarks.cuda_backward

prints milliseconds of the GPU for the whole backward, delta included, in one pass with additions in any order and in one order, and in two
passes; then what the backend would choose, in brackets the microseconds of the host. bfloat16, as many tokens and channels as in
gpu_attention.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..kernels.checks import make_problem
from ..kernels.native import cuda as cuda_backend
from ..kernels.ops import forward
from ..kernels.problem import Gradients
from .gpu_calls import CHANNELS, TOKENS
from .gpu_timing import Time, reason, timed, timing_stream

LENGTHS = (4096, 1024, 16384, 256, 512, 2048)
HEAD_DIMS = (128, 64, 96, 32)
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.1},
    "masked": {"softcap": 30.0},
}
# Which of BACKWARD_KERNELS, and whether in one order.
WAYS = {"one pass": ("one pass", False), "one pass, one order": ("one pass", True), "two passes": ("two passes", False)}
CHOICE = "chosen"


def calls(
    options: dict[str, Any], length: int, head_dim: int, device: str, tokens: int, channels: int
) -> dict[str, Callable[[], Gradients]]:
    """The backward of each way, on the same inputs; what is returned is written anew by each call."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (tokens // length, length, channels // head_dim, head_dim)
    query, key, value, dout = (torch.randn(shape, device=device, generator=generator).to(torch.bfloat16).transpose(1, 2) for _ in range(4))
    rng_state = torch.tensor([1, 2], device=device) if options.get("dropout_p") else None
    problems = [
        make_problem("separate", (query, key, value), rng_state=rng_state, deterministic=in_order, **options) for in_order in (False, True)
    ]
    out, lse = forward(cuda_backend, problems[0])

    def backward(kernels: str, in_order: bool) -> Gradients:
        gradients = Gradients(torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        cuda_backend.backward(problems[in_order], out, lse, dout, None, gradients, kernels=kernels)
        return gradients

    return {name: partial(backward, *way) for name, way in (WAYS | {CHOICE: (CHOICE, False)}).items()}


def measure(
    options: dict[str, Any], length: int, head_dim: int, device: str, seconds: float = 0.2, tokens: int = TOKENS, channels: int = CHANNELS
) -> dict[str, Time | str]:
    """{way: its time, or why it cannot}"""
    results: dict[str, Time | str] = {}
    runnable = {}
    for name, call in calls(options, length, head_dim, device, tokens, channels).items():
        try:
            call()
            runnable[name] = call
        except (ValueError, RuntimeError) as error:
            results[name] = reason(error)
    return results | timed(runnable, device, seconds)


def row(feature: str, length: int, head_dim: int, results: dict[str, Time | str]) -> str:
    times = {name: time for name, time in results.items() if isinstance(time, Time)}
    best = min((name for name in times if name != CHOICE), key=lambda name: times[name].kernel_ms, default="none")
    cells = [f"{times[name].kernel_ms:.4f} ({1e3 * times[name].call_ms:.0f})" if name in times else "-" for name in (*WAYS, CHOICE)]
    return f"| {feature} | {length} | {head_dim} | {' | '.join(cells)} | {best} |"


def main() -> int:
    if not torch.cuda.is_available():
        print("cuda_backward: torch sees no GPU", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"| feature | length | head_dim | {' | '.join((*WAYS, CHOICE))} | the fastest |\n|{'---|' * (len(WAYS) + 5)}")
    with timing_stream("cuda"):
        for head_dim in HEAD_DIMS:
            for length in LENGTHS:
                for feature, options in FEATURES.items():
                    print(row(feature, length, head_dim, measure(options, length, head_dim, "cuda")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
