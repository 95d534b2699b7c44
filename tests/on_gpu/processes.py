"""Programs that end when they are told to, with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL
TICK_SECONDS = 10.0


def run_until(
    words: list[str], seconds: float, output: IO[str], folder: Path, environment: dict[str, str], tick: Callable[[], None]
) -> int | None:
    """The exit status of a program, None where its time ran out. tick: called now and then, and when the program has ended.

    However it ends, by an exception in this process too, nothing that it started is left.
    """
    # A process group of its own; Python 3.10 has no argument for it.
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment, preexec_fn=os.setpgrp
    )
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                return process.wait(max(0.0, min(TICK_SECONDS, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                if time.monotonic() >= end:
                    return None
                tick()
    finally:
        tick()
        end_family(process)


def end_family(process: subprocess.Popen) -> None:
    """Ends what is left of a process, of its process group and of its descendants: ninja gives each compiler a group of its own."""
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        members = family(process.pid)
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, wanted)
        end = time.monotonic() + GRACE_SECONDS
        while any(map(_is_alive, members)) and time.monotonic() < end:
            process.poll()
            time.sleep(0.05)
    process.poll()


def family(pid: int) -> list[int]:
    """Live processes in the process group `pid` and descendants of them."""
    parents, groups = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            if state not in "ZX":
                parents[int(path.parent.name)], groups[int(path.parent.name)] = int(parent), int(group)
    members = {process for process, group in groups.items() if group == pid or process == pid}
    while more := {process for process, parent in parents.items() if parent in members} - members:
        members |= more
    return sorted(members)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
