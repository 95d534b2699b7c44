"""Which backend runs a problem, and why the others do not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from .backends import BACKENDS
from .problem import Problem

WARN_ABOVE_SCORES = 2**20  # warn once if routing sends a call with more scores per head to the reference


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`: the backend that would run, and for each other backend the reasons why it would not."""

    backend: str
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        others = [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.reasons.items()]
        return "\n".join([f"{self.backend} runs", *others])


def unsupported_reasons(backend: str, problem: Problem) -> list[str]:
    """Why a backend cannot run this problem; empty if it can."""
    return BACKENDS[backend].unsupported_reasons(problem)


def routed_reasons(backend: str, problem: Problem) -> list[str]:
    """Why routing does not choose a backend: it cannot run the problem, or it is Triton's interpreter, which is for tests only."""
    reasons = unsupported_reasons(backend, problem)
    if backend == "triton" and not reasons and BACKENDS["triton"].interpreted():
        return ["Triton is interpreted (TRITON_INTERPRET=1), which only backend='triton' asks for"]
    return reasons


def backend_status() -> dict[str, str | None]:
    """For each backend, None if this machine can run it, else the reason why not."""
    return {name: backend.status() for name, backend in BACKENDS.items()}


def choose(problem: Problem, backend: str | None) -> str:
    """The backend to run: the named one, else the first in BACKENDS that can run the problem.

    Raises:
        ValueError: the name is unknown, or that backend cannot run this problem; the message lists the reasons.
    """
    if backend is not None:
        if backend not in tuple(BACKENDS):  # `backend` may be unhashable
            raise ValueError(f"backend must be None or one of {tuple(BACKENDS)}, got {backend!r}")
        reasons = unsupported_reasons(backend, problem)
        if reasons:
            raise ValueError(f"backend {backend!r} cannot run this call: {'; '.join(reasons)}")
        return backend
    for name in BACKENDS:
        if name != "reference" and not routed_reasons(name, problem):
            return name
    if problem.max_seqlen_q * problem.max_seqlen_k > WARN_ABOVE_SCORES and not torch.compiler.is_compiling():
        warnings.warn(f"attention runs unfused: {explain_problem(problem)}", stacklevel=3)
    return "reference"


def is_read(problem: Problem, backend: str | None) -> bool:
    """Whether the named backend reads the problem's 8-bit keys and values; None: any that has a kernel for them."""
    names = [name for name in BACKENDS if name != "reference"] if backend is None else [name for name in BACKENDS if name == backend]
    return any([not unsupported_reasons(name, problem) for name in names])


def explain_problem(problem: Problem) -> Explanation:
    reasons = {name: routed_reasons(name, problem) for name in BACKENDS}
    chosen = next(name for name in BACKENDS if not reasons[name])
    others = {name: reasons[name] or [f"{chosen} comes first"] for name in BACKENDS if name != chosen}
    return Explanation(chosen, others)
