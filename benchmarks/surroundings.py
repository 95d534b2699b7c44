"""What a call takes besides time, and what else the machine does meanwhile, as Linux tells; nothing where it does not."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cell import Time

STATUS, RESET, LOAD = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/loadavg")
KEEP_MEMORY = ("onnxruntime", "OpenVINO")  # engines that hold what their first call took: it is the one to look at
DRIFT = 0.1  # the largest spread of a yardstick on a quiet machine


def peak_mb(function: Callable[[], Any]) -> tuple[Any, float | None]:
    """What a call returns, and by how many MB (10^6 bytes) the process grew within it, after memory that it held free was given back."""
    before = None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        RESET.write_text("5")  # the highest resident size is from now on
        before = _kilobytes("VmRSS")
    result = function()
    after = _kilobytes("VmHWM")
    return result, None if before is None or after is None else max(0.0, 1.024e-3 * (after - before))


def _kilobytes(field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    return None


def others_running() -> int:
    """Tasks besides this one that run or want a processor at this moment."""
    try:
        running = int(LOAD.read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 0
    return max(0, running - 1)


def busy(others: Sequence[int], yardstick: Time | None) -> str:
    """What disturbed the rounds, in words; empty for a quiet machine."""
    found = []
    if others and statistics.mean(others) >= 0.5:
        found.append(f"{statistics.mean(others):.1f} other tasks ran")
    if yardstick is not None and yardstick.rounds >= 4 and yardstick.spread > DRIFT:
        found.append(f"the same product or copy varied by {yardstick.spread:.0%}")
    return ", ".join(found)
