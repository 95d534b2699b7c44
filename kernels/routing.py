"""Which backend runs a problem, and why the others do not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from . import cpu, cuda_backend, reference, triton_backend
from .problem import Problem

ORDER = ("cuda", "triton", "cpu", "reference")
WARN_ABOVE_SCORES = 2**20  # a routed call that lands on the reference with more scores per head than this warns once


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that would run, and for each other backend the reasons why it would not."""

    backend: str
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        others = [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.reasons.items()]
        return "\n".join([f"{self.backend} runs", *others])


def unsupported_reasons(backend: str, problem: Problem) -> list[str]:
    """Why a backend cannot run this problem; empty when it can."""
    if backend == "reference":
        return reference.unsupported_reasons(problem)
    if backend == "cuda":
        return cuda_backend.unsupported_reasons(problem)
    if backend == "triton":
        return triton_backend.unsupported_reasons(problem)
    return cpu.unsupported_reasons(problem)


def routed_reasons(backend: str, problem: Problem) -> list[str]:
    """Why routing does not choose a backend: because it cannot run the problem, or because it is Triton's interpreter, made for tests."""
    reasons = unsupported_reasons(backend, problem)
    if backend == "triton" and not reasons and triton_backend.interpreted():
        return ["Triton is interpreted (TRITON_INTERPRET=1), which only backend='triton' asks for"]
    return reasons


def backend_status() -> dict[str, str | None]:
    """For each backend None when this machine can run it, else the reason why not."""
    return {"cuda": cuda_backend.status(), "triton": triton_backend.status(), "cpu": cpu.status(), "reference": None}


def choose(problem: Problem, backend: str | None) -> str:
    """The backend to run: the named one, else the first in ORDER that covers the problem.

    Raises:
        ValueError: the name is unknown, or that backend cannot run this problem; the message lists the reasons.
    """
    if backend is not None:
        if backend not in ORDER:
            raise ValueError(f"backend must be None or one of {ORDER}, got {backend!r}")
        reasons = unsupported_reasons(backend, problem)
        if reasons:
            raise ValueError(f"backend {backend!r} cannot run this call: {'; '.join(reasons)}")
        return backend
    for name in ORDER[:-1]:
        if not routed_reasons(name, problem):
            return name
    if problem.max_seqlen_q * problem.max_seqlen_k > WARN_ABOVE_SCORES and not torch.compiler.is_compiling():
        warnings.warn(f"attention runs unfused: {explain_problem(problem)}", stacklevel=3)
    return ORDER[-1]


def explain_problem(problem: Problem) -> Explanation:
    reasons = {name: routed_reasons(name, problem) for name in ORDER}
    chosen = next(name for name in ORDER if not reasons[name])
    others = {name: reasons[name] or [f"{chosen} comes first"] for name in ORDER if name != chosen}
    return Explanation(chosen, others)
