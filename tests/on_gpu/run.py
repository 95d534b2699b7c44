"""One call of `make gpu`: runs programs and tests until its time is over, into files of the results."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from .machine import ROOT
from .processes import run_until
from .recording import read
from .results import FAILED, NOT_RUN, PARTLY, PASSED, Outcome, Results

WORKERS = min(16, os.cpu_count() or 1)


class Run:
    def __init__(self, results: Results, seconds: float) -> None:
        self.results = results
        self.files = results.files
        self.call_end = self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that the step under way may take."""
        return self.end - time.monotonic()

    def limit(self, seconds: float) -> None:
        """What is begun from now on has so many seconds, or those that the call has left."""
        self.end = min(self.call_end, time.monotonic() + seconds)

    def command(self, log: str, *words: str | Path, **environment: str) -> int | None:
        """Runs a program, its output at the end of a log; the exit status, None where time ran out."""
        texts = [str(word) for word in words]
        with (self.files / log).open("a") as file:
            print(f"$ {' '.join(texts)}", file=file, flush=True)
            return run_until(texts, max(1.0, self.left()), file, ROOT, os.environ | environment, self.results.save)

    def tests(self, name: str, *words: str | Path, workers: int = WORKERS, **environment: str) -> Outcome:
        """Runs tests that no earlier run saw pass; `name`.jsonl remembers them (recording.py). What was skipped was not run."""
        record = self.files / f"{name}.jsonl"
        parallel = ("-n", workers, "--max-worker-restart", 200) if workers > 1 else ()
        pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "on_gpu.recording", "--record", record, *parallel, *words]
        status = self.command("tests.log", *map(str, pytest), **environment)
        total, states = read(record)
        passed, failed = (list(states.values()).count(state) for state in ("passed", "failed"))
        not_run = max(total, len(states)) - passed - failed
        counts = f"{passed} passed, {failed} failed, {not_run} not run{', out of time' if status is None else ''}; tests.log"
        if failed or status not in (None, 0, 5):  # 5: none was left to run
            return Outcome(FAILED, counts)
        if status is not None and passed and not not_run:
            return Outcome(PASSED, counts)
        return Outcome(PARTLY if passed else NOT_RUN, counts)

    def program(self, log: str, *words: str | Path, **environment: str) -> Outcome:
        """Of a program whose exit status says it all."""
        status = self.command(log, *words, **environment)
        return Outcome(NOT_RUN, f"out of time; {log}") if status is None else Outcome(PASSED if status == 0 else FAILED, log)
