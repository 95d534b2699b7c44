"""The `compare` fixture, which every benchmark uses, and the table at the end of a run.

`make bench` and `fused-attention bench` run them, the most telling ones first, for ten minutes or --minutes; what there was no time for is
named at the end. To run some, from a checkout:

    python -m pytest benchmarks --benchmark-quiet -k multi_head

--benchmark-max-time is the time given to each comparison, both sides together. --grid full runs what is marked `full` too, in the order of
the files and for as long as it takes. Every comparison is printed and saved as it ends, in a new file in .benchmarks or in --results
FILE.jsonl; those that the file holds are taken from there: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attention.benchmarks.budget import Budget, by_importance, left_out_text
from fused_attention.benchmarks.report import Comparison, append, begin, machine_line, read, report

COMPARISONS = pytest.StashKey[dict[str, Comparison]]()  # by the test's node id
BUDGET = pytest.StashKey[Budget]()
RESULTS = pytest.StashKey[Path]()
CELLS = pytest.StashKey[list[str]]()  # node ids of all that is to be in the tables, in the order of the files
MINUTES = 10.0
MIN_ROUNDS, MAX_ROUNDS = 7, 300


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., float]:
    """Times `ours` and `peer` in turn, one call each per round, and returns the ratio of the medians (> 1: ours is faster).

    Taking turns gives both the same share of whatever else the machine does; only ratios are meant to be compared between
    runs. `check` runs before the timing and raises if ours is wrong; what it compares must not depend on earlier calls of ours. A cell
    whose first rounds show that it does not fit into what is left of the run is skipped. `group`, `case` and `measure` place the
    comparison in the table (see report.Comparison), `bar` is the ratio it is meant to reach. `ceiling` is ours with the part under
    test removed, timed in the same rounds: the ratio that nothing could exceed, printed at the end of the line.
    `threads`: of torch, during the comparison; by default as many as it has. `geomean_bar`: what the ratios of all comparisons of the
    group, measure and dtype are meant to reach together.
    `warmup_rounds`: calls of each before timing, at least 2; the first call with every new shape allocates, and torch may compile for it.

    pytest-benchmark records our rounds; the peer's median, the ratio and the labels are saved with them as extra_info.
    """

    def run(
        ours: Callable[[], Any],
        peer: Callable[[], Any],
        *,
        check: Callable[[], None],
        group: str,
        case: dict[str, str],
        measure: str,
        peer_name: str = "torch",
        bar: float | None = None,
        ceiling: Callable[[], Any] | None = None,
        warmup_rounds: int = 1,
        min_rounds: int = MIN_ROUNDS,
        threads: int | None = None,
        geomean_bar: float | None = None,
    ) -> float:
        all_threads = torch.get_num_threads()
        request.addfinalizer(lambda: torch.set_num_threads(all_threads))
        torch.set_num_threads(threads or all_threads)
        if benchmark.disabled:
            check()
            benchmark.pedantic(ours)
            return math.nan
        config, cell = request.config, request.node.nodeid
        others = [peer] if ceiling is None else [peer, ceiling]
        seconds = float(config.getoption("benchmark_max_time"))
        warmup_rounds = max(warmup_rounds, 2)
        for warmups_left in reversed(range(warmup_rounds)):
            times = [_seconds(function) for function in [ours, *others]]
            rounds = min(max(int(seconds / sum(times[:2])), min_rounds), MAX_ROUNDS)
            if warmups_left == warmup_rounds - 1:  # mostly compilation, perhaps: it tells about one more round only
                config.stash[BUDGET].require(cell, sum(times), largest_part=1.0)
            else:
                config.stash[BUDGET].require(cell, sum(times) * (warmups_left + rounds))
        check()

        others_seconds: list[list[float]] = [[] for _ in others]

        def others_take_their_turn() -> None:
            for function, times in zip(others, others_seconds, strict=True):
                times.append(_seconds(function))

        benchmark.group = group
        # The setup of a round is not part of its time.
        benchmark.pedantic(ours, setup=others_take_their_turn, rounds=rounds)
        peer_ms, *ceiling_ms = (1e3 * statistics.median(times) for times in others_seconds)
        comparison = Comparison(
            group=group,
            case=case,
            measure=measure,
            ours_ms=1e3 * benchmark.stats.stats.median,
            peer_ms=peer_ms,
            peer=peer_name,
            rounds=rounds,
            bar=bar,
            note=f"ceiling {peer_ms / ceiling_ms[0]:.2f}" if ceiling_ms else "",
            geomean_bar=geomean_bar,
        )
        benchmark.extra_info |= vars(comparison) | {"ratio": comparison.ratio}
        config.stash[COMPARISONS][cell] = comparison
        try:
            begin(config.stash[RESULTS])
            append(config.stash[RESULTS], cell, comparison)
        except OSError as error:
            pytest.exit(f"{error.filename}: {error.strerror}", returncode=2)
        return comparison.ratio

    return run


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--grid", choices=("quick", "full"), default="quick", help="which benchmarks to run")
    parser.addoption("--results", type=Path, help="a .jsonl file; comparisons that it holds are not run again (default: a new one)")
    parser.addoption(
        "--minutes", type=float, help=f"how long the run may take (default: {MINUTES:g}; as long as it takes with --grid full)"
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
        config.stash[COMPARISONS] = read(results)
        if not config.getoption("collectonly"):
            results.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise pytest.UsageError(f"{results} is not a file of comparisons: {error}") from error
    config.pluginmanager.register(Progress(config), "benchmark-progress")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick = config.getoption("--grid") == "quick"
    left_out = [item for item in items if quick and item.get_closest_marker("full")]
    config.stash[CELLS] = [item.nodeid for item in items if item not in left_out]
    left_out += [item for item in items if item.nodeid in config.stash[COMPARISONS] and item not in left_out]
    items[:] = [item for item in items if item not in left_out]
    if config.stash[BUDGET].minutes is not None:
        items[:] = by_importance(items)
    config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str:
    minutes = config.stash[BUDGET].minutes
    time_given = "" if minutes is None else f", {minutes:g} minutes at most"
    return f"{len(items)} comparisons{time_given}; each is saved in {config.stash[RESULTS]} as it ends"


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[BUDGET].require(item.nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with item.config.stash[BUDGET].enforced(item.nodeid):
        yield


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots: a comparison has a line of its own."""
    return (report.outcome, "", "") if report.skipped or (report.passed and report.when == "call") else None


class Progress:
    """Prints a line for every comparison as it ends."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.num_measured = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        comparison = self.config.stash[COMPARISONS].get(report.nodeid)
        if report.when != "call" or comparison is None:
            return
        self.num_measured += 1
        minutes, seconds = divmod(int(self.config.stash[BUDGET].elapsed()), 60)
        times = f"{comparison.ours_ms:.3f} ms, {comparison.peer} {comparison.peer_ms:.3f} ms"
        name = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_")
        case = "; ".join([*comparison.case.values(), comparison.measure])
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(f"{self.num_measured:>4} {minutes:>3}:{seconds:02}  ratio {comparison.ratio:>5.2f}  {times:<34} {name}: {case}")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    cells = config.stash.get(CELLS, [])
    comparisons = config.stash[COMPARISONS]
    ordered = {cell: comparisons[cell] for cell in [*cells, *comparisons] if cell in comparisons}
    if ordered:
        terminalreporter.section("medians of interleaved rounds; ratio = peer / ours")
        terminalreporter.write_line(machine_line())
        terminalreporter.write_line("")
        terminalreporter.write_line(report(list(ordered.values())))
    if config.getoption("collectonly") or config.getoption("benchmark_disable"):
        return
    failed = {report.nodeid for outcome in ("failed", "error") for report in terminalreporter.stats.get(outcome, [])}
    missing = [cell for cell in cells if cell not in comparisons and cell not in failed]
    if missing:
        terminalreporter.section(f"left out: {len(missing)} of {len(cells)} comparisons")
        reasons = {cell: config.stash[BUDGET].left_out.get(cell, "not reached") for cell in missing}
        terminalreporter.write_line(left_out_text(reasons, cells))
        terminalreporter.write_line(f"\nthese too: fused-attention bench --results {config.stash[RESULTS]} --minutes MINUTES")
