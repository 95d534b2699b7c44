"""PyTorch's own test files with stock torch and with this package in its place: what differs must be what docs/torch-suites.md says.

    python tests/torch_suites.py /path/to/pytorch/test                      both files, as chosen below
    python tests/torch_suites.py /path/to/pytorch/test nn/test_multihead_attention.py -k bias

The files are PyTorch's, of any version near the installed one, and are not part of this repository; they need the package `expecttest`.
Each runs twice in a process of its own, under pytest, where this module is a plugin: it puts the package in torch's place, gives each
test a limit and writes the outcomes down as they come.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

DOCUMENT = Path(__file__).parent.parent / "docs" / "torch-suites.md"
SECONDS_PER_TEST = 120
SAMPLE = 61  # of a function with thousands of cases every 61st runs, counted from the first; all of them with --all


class Suite(NamedTuple):
    file: str  # below PyTorch's folder test/
    choice: str  # pytest's -k
    sampled: str | None = None  # how the names of a function's cases begin


SUITES = (
    Suite("test_transformers.py", "not PrivateUse1 and not CUDA", "test_scaled_dot_product_fused_attention_mask_vs_math_cpu"),
    Suite("nn/test_multihead_attention.py", "not CUDA"),
)


class Row(NamedTuple):
    """A line of the document's tables: the tests that `pattern` names end so with this package in torch's place."""

    pattern: str
    outcome: str
    reason: str


def rows_of(file: str, document: str) -> list[Row]:
    """The rows of a file's section: its heading is `## file`, a row `| pattern | outcome | reason |`."""
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", document, flags=re.MULTILINE | re.DOTALL))
    cells = re.findall(r"^\| `(.+?)` \| (passed|failed|skipped|timeout|crashed) \| (.+?) \|$", sections.get(file, ""), flags=re.MULTILINE)
    return [Row(*row) for row in cells]


def differences(stock: dict[str, str], ours: dict[str, str], rows: list[Row]) -> tuple[list[str], list[str]]:
    """What no row explains, and the rows that explain nothing although their tests ran."""
    unexplained, used = [], set()
    for test, outcome in stock.items():
        ended = ours.get(test, "missing")
        if ended == outcome or outcome == "timeout":  # where torch itself takes too long, there is nothing to compare with
            continue
        found = [row for row in rows if fnmatch.fnmatchcase(test, row.pattern) and row.outcome == ended]
        used.update(found)
        if not found:
            unexplained.append(f"{test}: {outcome} with torch, {ended} with this package")
    stale = [row for row in rows if row not in used and any(fnmatch.fnmatchcase(test, row.pattern) for test in stock)]
    return unexplained, [f"{row.pattern} does not end {row.outcome}, or does so with torch too: {row.reason}" for row in stale]


def outcomes(folder: Path, suite: Suite, ours: bool) -> dict[str, str]:
    """How each test ends, by `Class::test`; "crashed" for one that ended the process."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "outcomes"
        written.touch()
        while True:
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), str(folder), os.environ.get("PYTHONPATH")))),
                "TORCH_SUITES_OUTCOMES": str(written),
                "TORCH_SUITES_OURS": str(int(ours)),
                "TORCH_SUITES_SAMPLED": suite.sampled or "",
            }
            options = ("-p", "torch_suites", "-p", "no:cacheprovider", "-c", os.devnull, "-q", "--tb=short", "--disable-warnings")
            command = (sys.executable, "-m", "pytest", *options, "-k", suite.choice, str(folder / suite.file))
            log = Path(tempfile.gettempdir()) / f"{Path(suite.file).stem}.{'ours' if ours else 'torch'}.log"
            with log.open("a") as output:
                status = subprocess.run(command, env=environment, cwd=scratch, stdout=output, stderr=subprocess.STDOUT, check=False)
            started = dict(line.split("\t") for line in written.read_text().splitlines())
            crashed = [test for test, outcome in started.items() if outcome == "started"]
            if status.returncode in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                return started
            if not crashed:
                raise RuntimeError(f"pytest ended with status {status.returncode}: see {log}")
            with written.open("a") as outcome_file:  # and on with the tests after it
                outcome_file.write(f"{crashed[-1]}\tcrashed\n")


def compare(folder: Path, suite: Suite) -> list[str]:
    """Runs a suite both ways; the complaints, none when all that differs is in the document."""
    stock, ours = (outcomes(folder, suite, replaced) for replaced in (False, True))
    unexplained, stale = differences(stock, ours, rows_of(suite.file, DOCUMENT.read_text()))
    ends = list(ours.values())
    counts = ", ".join(f"{ends.count(outcome)} {outcome}" for outcome in sorted(set(ends)))
    num_different = sum(ours.get(test) != outcome for test, outcome in stock.items() if outcome != "timeout")
    print(f"{suite.file}: {len(stock)} tests, with this package {counts}; {num_different} end otherwise than with torch")
    return [f"{suite.file}: {complaint}" for complaint in (*unexplained, *stale)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="PyTorch's folder test/")
    parser.add_argument("file", nargs="?", choices=[suite.file for suite in SUITES], help="one file; default: both")
    parser.add_argument("-k", dest="choice", help="pytest's expression, in place of the suite's own")
    parser.add_argument("--all", action="store_true", help="every case of every function")
    given = parser.parse_args()
    complaints = []
    for suite in SUITES:
        if given.file in (None, suite.file):
            suite = suite._replace(choice=given.choice or suite.choice, sampled=None if given.all else suite.sampled)
            complaints += compare(given.folder.resolve(), suite)
    print(*complaints, sep="\n")
    return len(complaints) > 0


# The plugin.


def pytest_configure() -> None:
    if not _is_at_work():
        return
    neighbour = "test_cpp_extensions_open_device_registration"  # another test file, of which one imports a function for its last class
    if importlib.util.find_spec(neighbour) is None:
        sys.modules[neighbour] = types.ModuleType(neighbour)
        sys.modules[neighbour].generate_faked_module = None  # type: ignore[attr-defined]
    if os.environ["TORCH_SUITES_OURS"] == "1":
        put_in_torchs_place()


def put_in_torchs_place() -> None:
    import torch

    import fused_attention

    torch.nn.functional.scaled_dot_product_attention = fused_attention.scaled_dot_product_attention
    for module in (torch.nn, torch.nn.modules, torch.nn.modules.activation, torch.nn.modules.transformer):
        module.MultiheadAttention = fused_attention.MultiHeadAttention


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _is_at_work():
        return
    sampled = os.environ["TORCH_SUITES_SAMPLED"]
    many = [item for item in items if sampled and item.name.startswith(sampled)]
    left_out = {*many} - {*many[::SAMPLE]}
    done = {line.split("\t")[0] for line in Path(os.environ["TORCH_SUITES_OUTCOMES"]).read_text().splitlines()}
    items[:] = [item for item in items if item not in left_out and _name(item.nodeid) not in done]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not _is_at_work():
        return (yield)
    _write(item.nodeid, "started")
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(SECONDS_PER_TEST)
    try:
        return (yield)
    finally:
        signal.alarm(0)


class OutOfTime(BaseException):
    """No Exception: tests catch those."""


def _out_of_time(*_: Any) -> None:
    raise OutOfTime(f"longer than {SECONDS_PER_TEST} seconds")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _is_at_work() and (report.when == "call" or report.outcome != "passed"):
        timed_out = "OutOfTime" in str(report.longrepr)
        _write(report.nodeid, "timeout" if timed_out else report.outcome)


def _write(nodeid: str, outcome: str) -> None:
    with Path(os.environ["TORCH_SUITES_OUTCOMES"]).open("a") as file:
        file.write(f"{_name(nodeid)}\t{outcome}\n")


def _name(nodeid: str) -> str:
    return nodeid.split("::", 1)[1]


def _is_at_work() -> bool:
    return "TORCH_SUITES_OUTCOMES" in os.environ


if __name__ == "__main__":
    sys.exit(main())
