"""docs/support.md is true: each of its lines is a call that the backend refuses for that reason, and no line is missing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.kernels import cuda_backend, native, triton_backend
from fused_attention.kernels.problem import Problem, make_problem
from fused_attention.kernels.support import UNCOVERED

PAGE = (Path(__file__).resolve().parents[1] / "docs/support.md").read_text()


def problem(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, query: Tensor | None = None, **options: Any) -> Problem:
    if query is None:
        query = torch.zeros(2, 2, 6, head_dim, dtype=dtype)
    key = torch.zeros(2, 2, 12, head_dim, dtype=dtype)
    return make_problem("separate", (query, key, key), **options)


def long_problem() -> Problem:
    key = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16).expand(1, 1, 2**30 + 1, 64)  # takes 128 bytes
    return make_problem("separate", (torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16), key, key))


EVERYWHERE: dict[str, Callable[[], Problem]] = {
    "a head_dim above 256": lambda: problem(head_dim=320),
    "scale not above 0": lambda: problem(scale=-1.0),
}
CALLS: dict[str, dict[str, Callable[[], Problem]]] = {
    "cuda": EVERYWHERE
    | {
        "float32 or float64": lambda: problem(torch.float32),
        "a head_dim that is not divisible by 8": lambda: problem(head_dim=59),
        "rows that are not 16 bytes apart, or a multiple of that": lambda: problem(query=torch.zeros(2, 2, 6, 68).bfloat16()[..., :64]),
        "a first element at another address than a multiple of 16": lambda: problem(
            query=torch.zeros(2 * 2 * 6 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 2, 6, 64)
        ),
        "more than 2^30 queries or keys": long_problem,
    },
    "triton": EVERYWHERE | {"float64": lambda: problem(torch.float64)},
    "cpu": EVERYWHERE | {"float64": lambda: problem(torch.float64)},
}


def lines(backend: str) -> dict[str, str]:
    """{call: reason} of a backend's table."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{backend}\n")]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {call: reason for call, reason in cells if call != "call"}


@pytest.mark.skipif(native.status() is not None, reason=f"no native kernels: {native.status()}")
@pytest.mark.parametrize(("backend", "call"), [(backend, call) for backend, calls in CALLS.items() for call in calls])
def test_each_line_is_refused_for_its_reason(backend: str, call: str) -> None:
    assert UNCOVERED[backend](CALLS[backend][call]()) == [lines(backend)[call]]


@pytest.mark.parametrize("backend", CALLS)
def test_the_page_and_the_calls_are_the_same_list(backend: str) -> None:
    assert set(lines(backend)) == set(CALLS[backend])


@pytest.mark.parametrize(
    ("backend", "functions"),
    [
        ("cuda", (cuda_backend.uncovered,)),
        ("triton", (triton_backend.uncovered,)),
        ("cpu", (native.unsupported_reasons,)),
    ],
)
def test_no_reason_is_left_out(backend: str, functions: tuple[Callable, ...]) -> None:
    """As many lines as the source has reasons; two of the CPU's are of the machine."""
    of_machine = 2 if backend == "cpu" else 0
    reasons = sum(inspect.getsource(function).count("reasons.append(") for function in functions)
    assert reasons == len(lines(backend)) + of_machine


def test_the_reference_takes_everything() -> None:
    for calls in CALLS.values():
        for call in calls.values():
            assert UNCOVERED["reference"](call()) == []
