"""The time that a run of the benchmarks may take, the order of its cells, and what is left out."""

from __future__ import annotations

import random
import signal
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import torch

from ..transformer.translation.machine import bf16_pays

# A cell that is reckoned to take more than the first part of the run is left out, and one that has taken the second is stopped: on a slow
# machine one training step in bfloat16 would take all of it.
LARGEST_PART, HARD_LIMIT = 0.25, 0.5


class Budget:
    """`minutes` from now on, None for as long as it takes; knows which cells were left out, and why."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.seconds = float("inf") if minutes is None else 60 * minutes
        self.started = time.monotonic()
        self.left_out: dict[str, str] = {}  # node id -> reason

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        return self.seconds - self.elapsed()

    def require(self, cell: str, seconds: float = 0.0, *, largest_part: float = LARGEST_PART) -> None:
        """Leave the cell out (by a skip) if `seconds` more are too many."""
        if seconds > largest_part * self.seconds:
            self.leave_out(cell, f"too slow for {self.minutes:g} minutes")
        if seconds >= self.left():
            self.leave_out(cell, "no time left")

    def rounds(self, cell: str, seconds: float, given: float, least: int, wanted: int, most: int) -> int:
        """How many rounds of so many seconds: what fits into the time given but at least `wanted`, or fewer if the run has no time for
        them. The cell is left out if there is none for the least.
        """
        self.require(cell, least * seconds)
        affordable = int(min(LARGEST_PART * self.seconds, self.left()) / max(seconds, 1e-9)) if self.minutes is not None else most
        return max(least, min(max(int(given / max(seconds, 1e-9)), wanted), affordable, most))

    def leave_out(self, cell: str, reason: str) -> NoReturn:
        self.left_out[cell] = reason
        pytest.skip(reason)

    @contextmanager
    def enforced(self, cell: str) -> Iterator[None]:
        """What runs within is stopped at the end of the budget or at HARD_LIMIT, between two operations; not where there is no SIGALRM."""
        if self.minutes is None or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> NoReturn:
            self.leave_out(cell, "no time left" if self.left() <= 0 else f"too slow for {self.minutes:g} minutes")

        handler = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(min(self.left(), HARD_LIMIT * self.seconds), 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)


def by_importance(items: Sequence[Any], *, reduced_precision_pays: bool | None = None) -> list[Any]:
    """Benchmarks so that wherever a run ends, what it has is a fair sample of what matters most here.

    1. float32, and other dtypes after it where this machine is not made for them. 2. The functions take turns. 3. Each function's
    cells in an order drawn at random, the same in every run.
    """
    if reduced_precision_pays is None:
        reduced_precision_pays = bf16_pays(torch.device("cpu"))
    turns: dict[tuple[bool, str], list[Any]] = {}
    for item in items:
        dtype = item.callspec.params.get("dtype", "fp32") if hasattr(item, "callspec") else "fp32"
        later = dtype != "fp32" and not reduced_precision_pays
        turns.setdefault((later, item.originalname), []).append(item)
    order: dict[str, tuple[bool, int]] = {}
    for (later, name), members in turns.items():
        random.Random(name).shuffle(members)
        order |= {item.nodeid: (later, turn) for turn, item in enumerate(members)}
    return sorted(items, key=lambda item: order[item.nodeid])


def left_out_text(left_out: dict[str, str], cells: Sequence[str]) -> str:
    """A block for every reason: how many of `cells`, and by function their names, or "all"."""
    sizes = Counter(_function_and_parameters(cell)[0] for cell in cells)
    reasons: dict[str, dict[str, list[str]]] = {}
    for cell, reason in left_out.items():
        function, parameters = _function_and_parameters(cell)
        reasons.setdefault(reason, {}).setdefault(function, []).append(parameters)
    lines = []
    for reason, functions in reasons.items():
        lines.append(f"{reason}: {sum(map(len, functions.values()))}")
        for function, names in functions.items():
            named = f"all {len(names)}" if len(names) == sizes[function] else "; ".join(names)
            lines += textwrap.wrap(f"{function}: {named}", 138, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def _function_and_parameters(cell: str) -> tuple[str, str]:
    function, _, parameters = cell.rpartition("::")[2].removesuffix("]").partition("[")
    return function.removeprefix("test_"), parameters
