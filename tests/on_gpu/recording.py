"""A pytest plugin for runs that may be stopped: --record FILE adds a line of JSON for each test that ended, and leaves out those that FILE
says have passed or been skipped. Works under xdist, where the controller alone writes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="a .jsonl file of the tests that ended")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--record")
    if path is None or not path.exists():
        return
    states = {record["test"]: record["state"] for record in map(json.loads, path.read_text().splitlines())}
    done = [item for item in items if states.get(item.nodeid) in ("passed", "skipped")]
    items[:] = [item for item in items if item not in done]
    config.hook.pytest_deselected(items=done)


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path))


class Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            record = {"test": report.nodeid, "state": report.outcome, "seconds": round(report.duration, 2)}
            with self.path.open("a") as file:
                print(json.dumps(record), file=file)
