"""`pytest --processor-seconds FILE`: what every test costs in seconds of processor time, its child processes with it, which a busy machine
adds little to. A line for each test as it ends, and the slowest twenty at the end of the run.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SLOWEST = 20


def seconds_so_far() -> float:
    """Of this process and its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class ProcessorSeconds:
    """Where tests run, their reports get an attribute; where reports arrive, it is written."""

    def __init__(self, file: Path, writes: bool) -> None:
        self._file, self._writes = file, writes
        self._started = 0.0
        self._seconds: dict[str, float] = {}

    def pytest_runtest_logstart(self) -> None:
        self._started = seconds_so_far()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """After the setup, the call and the teardown."""
        report = yield
        now = seconds_so_far()
        report.processor_seconds, self._started = now - self._started, now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.processor_seconds
        if report.when == "teardown" and self._writes:
            with self._file.open("a") as file:
                file.write(f"{self._seconds[report.nodeid]:9.3f} {report.nodeid}\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"processor seconds: {sum(self._seconds.values()):.0f} in all")
        for nodeid, seconds in sorted(self._seconds.items(), key=lambda row: -row[1])[:SLOWEST]:
            terminalreporter.write_line(f"{seconds:9.2f} {nodeid}")
