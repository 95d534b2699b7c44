"""Long commands in a terminal: signs of life, and an orderly stop on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

HEARTBEAT_SECONDS = 5.0


@contextlib.contextmanager
def heartbeat(step: str) -> Iterator[None]:
    """While the body runs, write a line to stderr every HEARTBEAT_SECONDS: "... step: 5 s"."""
    started, done = time.monotonic(), threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            print(f"... {step}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C was pressed. The first press does nothing else; a second raises KeyboardInterrupt.

    Python allows this only in the main thread, and an existing handler of the caller is kept; in those cases the function returns False.
    """
    pressed = False

    def take_note(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):  # there may be no stderr; bypass its buffer, which may be half written when the signal arrives
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, take_note)
    try:
        yield lambda: pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
