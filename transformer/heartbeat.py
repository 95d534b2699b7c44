"""Tells whoever waits that a long step still goes on."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

SECONDS = 5.0


@contextlib.contextmanager
def heartbeat(step: str) -> Iterator[None]:
    """While the body runs, write a line to stderr every SECONDS: "... step: 5 s"."""
    started, done = time.monotonic(), threading.Event()

    def beat() -> None:
        while not done.wait(SECONDS):
            print(f"... {step}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
