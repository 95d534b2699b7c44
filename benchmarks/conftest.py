"""The `measure_cell` fixture, which every benchmark uses, and the table at the end of a run.

`make bench` and `fused-attention bench` run them, the most telling ones first, for ten minutes or --minutes; what there was no time for is
named at the end. To run some, from a checkout:

    python -m pytest benchmarks --benchmark-quiet -k multi_head

--benchmark-max-time is the time given to the rounds of a cell, all sides together; as the time of the run gets short, cells get less.
--grid full runs what is marked `full` too, in the order of the files and for as long as it takes. Every cell is printed and saved as it
ends, in a new file in .benchmarks or in --results FILE.jsonl; those that the file holds are taken from there: a run that was stopped goes
on where it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attention.benchmarks import surroundings
from fused_attention.benchmarks.budget import Budget, by_importance, left_out_text
from fused_attention.benchmarks.cell import OURS, Cell, Run, UnusableFile, append, begin, machine_line, read, summary
from fused_attention.benchmarks.isa import OUR_VARIABLE
from fused_attention.benchmarks.peers import short_reason
from fused_attention.benchmarks.report import report
from fused_attention.benchmarks.yardsticks import Yardstick

CELLS = pytest.StashKey[dict[str, Cell]]()  # by the test's node id
BUDGET = pytest.StashKey[Budget]()
RESULTS = pytest.StashKey[Path]()
NAMES = pytest.StashKey[list[str]]()  # node ids of all that is to be in the tables, in the order of the files
MINUTES = 10.0
LEAST_ROUNDS, MIN_ROUNDS, MAX_ROUNDS = 3, 7, 300  # the least: where time is short
YARDSTICK_PART = 0.25  # of the rounds' time, at most
SLOW = 3  # a peer that takes so many times as long as the fastest sits out every other round, and so on
PART_FOR_ROUNDS = 0.6  # of the time left for a cell; the rest is for building and checking

Check = Callable[[str, Any], None]  # raises AssertionError where what the named side returned is wrong


@pytest.fixture
def measure_cell(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Cell | None]:
    """Times `sides`, OURS and its peers, in turn, one call each per round: all get the same share of whatever else the machine does, and
    only ratios are meant to be compared between runs.

    A peer may also be the reason why it has no function. `check` gets what the first call of each side returned; a wrong peer is listed
    as wrong, and if ours is wrong the benchmark fails. Calls change what they return only in their numbers.
    `suite`, `case` and `kind` place the cell in the table (see cell.Cell). `work` in `unit`, and the yardstick that is timed in the same
    rounds, give the rate and its share of the roof. `bars`: the ratios to some peers that are meant to be reached.
    `threads`: of torch, while this is measured; by default as many as it has. `warmup_rounds`: calls of each before the rounds, at least 2.

    pytest-benchmark records our rounds; the cell is saved with them as extra_info.
    """

    def run(
        sides: Mapping[str, Callable[[], Any] | str],
        *,
        check: Check,
        suite: str,
        case: dict[str, str],
        kind: str,
        work: float = 0.0,
        unit: str = "",
        traffic: float = 0.0,
        gflop: float = 0.0,
        yardstick: Callable[[], Yardstick] | None = None,
        threads: int | None = None,
        bars: Mapping[str, float] | None = None,
        warmup_rounds: int = 2,
        min_rounds: int = MIN_ROUNDS,
    ) -> Cell | None:
        all_threads = torch.get_num_threads()
        request.addfinalizer(lambda: torch.set_num_threads(all_threads))
        torch.set_num_threads(threads or all_threads)
        config, name = request.config, request.node.nodeid
        chosen = config.getoption("peers")
        missing = {side: function for side, function in sides.items() if isinstance(function, str)}
        functions = {side: function for side, function in sides.items() if not isinstance(function, str)}
        if chosen is not None:
            functions = {side: function for side, function in functions.items() if side == OURS or side in chosen}
            missing = {side: reason for side, reason in missing.items() if side in chosen}
        if benchmark.disabled:
            for side, function in functions.items():
                check(side, function())
            benchmark.pedantic(functions[OURS])
            return None
        budget = config.stash[BUDGET]

        peaks: dict[str, float | None] = {}
        for side, function in list(functions.items()):
            try:
                result, peaks[side] = surroundings.peak_mb(function)
                check(side, result)
                del result
            except Exception as error:
                if side == OURS:
                    raise
                missing[side] = f"wrong: {error}".splitlines()[0] if isinstance(error, AssertionError) else short_reason(error)
                del functions[side]
        roof = None if yardstick is None else yardstick()
        for _ in range(max(warmup_rounds - 1, 1)):
            once = {}
            for side, function in functions.items():
                before = time.perf_counter()
                peak = surroundings.peak_mb(function)[1]
                once[side] = time.perf_counter() - before
                if not side.startswith(surroundings.KEEP_MEMORY):
                    peaks[side] = peak
            budget.require(name, sum(once.values()))
        fastest = min(once.values())
        every = {side: max(1, min(int(once[side] / (SLOW * fastest)), min_rounds // LEAST_ROUNDS)) for side in functions}
        a_round = sum(once[side] / every[side] for side in functions)
        rounds = budget.rounds(name, a_round, _seconds_for(config), LEAST_ROUNDS, min_rounds, MAX_ROUNDS)

        taken: dict[str, list[float]] = {side: [] for side in functions if side != OURS}
        roof_taken: list[float] = []
        others: list[int] = []
        started = time.perf_counter()
        number = 0

        def others_take_their_turn() -> None:
            nonlocal number
            others.append(surroundings.others_running())
            if roof is not None and sum(roof_taken) <= YARDSTICK_PART * (time.perf_counter() - started):
                roof_taken.append(_seconds(roof.run))
            for side, times in taken.items():
                if number % every[side] == 0:
                    times.append(_seconds(functions[side]))
            number += 1

        benchmark.group = suite
        # The setup of a round is not part of its time.
        benchmark.pedantic(functions[OURS], setup=others_take_their_turn, rounds=rounds)
        times = {OURS: summary(benchmark.stats.stats.data, peaks[OURS])}
        times |= {side: summary(seconds, peaks[side]) for side, seconds in taken.items()}
        roof_time = summary(roof_taken) if roof_taken else None
        cell = Cell(
            suite=suite,
            case=case,
            measure=kind,
            times=times,
            missing=missing,
            work=work,
            unit=unit,
            roof=None if roof is None or roof_time is None else 1e3 * roof.work / roof_time.ms,
            bars=dict(bars or {}),
            traffic=traffic,
            gflop=gflop,
            busy=surroundings.busy(others, roof_time),
        )
        benchmark.extra_info |= {"ratios": cell.ratios(), "missing": missing}
        config.stash[CELLS][name] = cell
        try:
            begin(config.stash[RESULTS], os.environ.get(OUR_VARIABLE))
            append(config.stash[RESULTS], name, cell)
        except OSError as error:
            pytest.exit(f"{error.filename}: {error.strerror}", returncode=2)
        return cell

    def _seconds_for(config: pytest.Config) -> float:
        """The time for the rounds of a cell: as asked for, or less where the run would end before its cells do."""
        waiting = sum(name not in config.stash[CELLS] and name not in config.stash[BUDGET].left_out for name in config.stash[NAMES])
        return min(float(config.getoption("benchmark_max_time")), PART_FOR_ROUNDS * config.stash[BUDGET].left() / max(waiting, 1))

    return run


@pytest.fixture
def compare(measure_cell: Callable[..., Cell | None]) -> Callable[..., None]:
    """`measure_cell` of ours against one peer, where one check holds ours against what it must be."""

    def run(
        ours: Callable[[], Any],
        peer: Callable[[], Any],
        *,
        check: Callable[[], None],
        group: str,
        case: dict[str, str],
        peer_name: str = "torch",
        bar: float | None = None,
        ceiling: Callable[[], Any] | None = None,
        **options: Any,
    ) -> None:
        sides = {OURS: ours, peer_name: peer} | ({"ours without attention": ceiling} if ceiling is not None else {})
        measure_cell(
            sides,
            check=lambda side, _: check() if side == OURS else None,
            suite=group,
            case=case,
            kind=options.pop("measure"),
            bars={} if bar is None else {peer_name: bar},
            **options,
        )

    return run


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--grid", choices=("quick", "full"), default="quick", help="which benchmarks to run")
    parser.addoption("--results", type=Path, help="a .jsonl file; cells that it holds are not measured again (default: a new one)")
    parser.addoption(
        "--minutes", type=float, help=f"how long the run may take (default: {MINUTES:g}; as long as it takes with --grid full)"
    )
    parser.addoption("--peers", type=lambda names: names.split(","), help="only these, by their names in the table, with commas between")
    parser.addoption(
        "--only",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="only benchmarks whose parameter NAME is one of VALUES, as length=64,512; may be repeated; those without it are left out",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a benchmark that --grid quick leaves out")
    minutes = config.getoption("--minutes")
    if minutes is not None and not minutes > 0:
        raise pytest.UsageError(f"--minutes must be positive, not {minutes}")
    if minutes is None and config.getoption("--grid") == "quick":
        minutes = MINUTES
    config.stash[BUDGET] = Budget(minutes)
    results = config.getoption("--results") or Path(".benchmarks", time.strftime("%Y-%m-%d-%H%M%S.jsonl"))
    config.stash[RESULTS] = results
    try:
        config.stash[CELLS] = dict((read(results) if results.exists() else Run({}, {})).cells)
        if not config.getoption("collectonly"):
            results.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"{error.filename}: {error.strerror}") from error
    except UnusableFile as error:
        raise pytest.UsageError(str(error)) from error
    config.pluginmanager.register(Progress(config), "benchmark-progress")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted: dict[str, list[str]] = {}
    for choice in config.getoption("--only"):
        name, equals, values = choice.partition("=")
        if not equals:
            raise pytest.UsageError(f"--only {choice}: not of the form NAME=VALUES")
        wanted.setdefault(name, []).extend(values.split(","))

    def is_left_out(item: Any) -> bool:
        if config.getoption("--grid") == "quick" and item.get_closest_marker("full"):
            return True
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return any(str(parameters.get(name)) not in values for name, values in wanted.items())

    left_out = [item for item in items if is_left_out(item)]
    config.stash[NAMES] = [item.nodeid for item in items if item not in left_out]
    left_out += [item for item in items if item.nodeid in config.stash[CELLS] and item not in left_out]
    items[:] = [item for item in items if item not in left_out]
    if config.stash[BUDGET].minutes is not None:
        items[:] = by_importance(items)
    config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str:
    minutes = config.stash[BUDGET].minutes
    time_given = "" if minutes is None else f", {minutes:g} minutes at most"
    return f"{len(items)} cells{time_given}; each is saved in {config.stash[RESULTS]} as it ends"


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[BUDGET].require(item.nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with item.config.stash[BUDGET].enforced(item.nodeid):
        yield


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots: a cell has a line of its own."""
    return (report.outcome, "", "") if report.skipped or (report.passed and report.when == "call") else None


class Progress:
    """Prints a line for every cell as it ends: how far the run is, the time left, and the cell."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.num_ended = 0
        self.num_all = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.num_all = len(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.when == "setup" and report.skipped):
            return
        self.num_ended += 1
        cell = self.config.stash[CELLS].get(report.nodeid)
        if cell is None:
            return
        budget = self.config.stash[BUDGET]
        at_this_rate = budget.elapsed() / self.num_ended * (self.num_all - self.num_ended)
        left = min(at_this_rate, max(budget.left(), 0.0))
        ratios = "  ".join(f"{ratio:.2f}x {peer}" for peer, ratio in cell.ratios().items())
        case = "; ".join([*cell.case.values(), cell.measure])
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        filled = round(10 * self.num_ended / max(self.num_all, 1))
        bar = "#" * filled + "." * (10 - filled)
        terminal.write_line(
            f"[{bar}] {self.num_ended}/{self.num_all}  {_clock(left)} left  {cell.suite}: {case}: {cell.times[OURS].ms:.3f} ms  {ratios}"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    names = config.stash.get(NAMES, [])
    cells = config.stash[CELLS]
    ordered = {name: cells[name] for name in [*names, *cells] if name in cells}
    if ordered:
        terminalreporter.section("medians of rounds in turn; x peer: times as fast as it")
        terminalreporter.write_line(machine_line())
        terminalreporter.write_line("")
        terminalreporter.write_line(report(list(ordered.values())))
    if config.getoption("collectonly") or config.getoption("benchmark_disable"):
        return
    failed = {report.nodeid for outcome in ("failed", "error") for report in terminalreporter.stats.get(outcome, [])}
    absent = [name for name in names if name not in cells and name not in failed]
    if absent:
        terminalreporter.section(f"left out: {len(absent)} of {len(names)} cells")
        reasons = {name: config.stash[BUDGET].left_out.get(name, "not reached") for name in absent}
        terminalreporter.write_line(left_out_text(reasons, names))
        terminalreporter.write_line(f"\nthese too: fused-attention bench --results {config.stash[RESULTS]} --minutes MINUTES")
