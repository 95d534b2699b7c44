"""A pytest plugin for runs that may be stopped: --record FILE adds a line of JSON for each test that ended, and leaves out those that FILE
says have passed. Works under xdist, where the controller alone writes.

A test that hangs, and one after which no call to the GPU works any more, ends its process: xdist starts another one for the tests that are
left.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

LIMIT_SECONDS = 240.0  # of a test, the compilation of its kernels included


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="a .jsonl file of the tests that ended")
    parser.addoption("--limit-seconds", type=float, default=LIMIT_SECONDS, help="of a test")


def read(path: Path) -> tuple[int, dict[str, str]]:
    """How many tests there are in all, and the last state of those that ended: passed, failed or skipped."""
    total, states = 0, {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off
        if "test" in record:
            states[record["test"]] = record["state"]
        total = record.get("total", total)
    return total, states


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--record")
    if path is None:
        return
    _, states = read(path)
    done = [item for item in items if states.get(item.nodeid) == "passed"]
    items[:] = [item for item in items if item not in done]
    config.hook.pytest_deselected(items=done)


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    is_worker = hasattr(config, "workerinput")
    if path is not None and not is_worker:
        config.pluginmanager.register(Recorder(path))
    if is_worker or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Watchdog(config.getoption("--limit-seconds")))


class Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed_before = list(read(path)[1].values()).count("passed")

    def write(self, record: dict[str, object]) -> None:
        with self.path.open("a") as file:
            print(json.dumps(record), file=file)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write({"total": self.passed_before + len(session.items)})

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.write({"total": self.passed_before + len(ids)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.write({"test": report.nodeid, "state": report.outcome, "seconds": round(report.duration, 2)})


class Watchdog:
    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        faulthandler.dump_traceback_later(self.limit_seconds, exit=True, file=2)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            os.write(2, f"\nthe GPU is lost to this process after {nodeid}: {error}\n".encode())
            os._exit(1)
