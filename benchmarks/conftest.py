"""The `compare` fixture, which every benchmark uses, and the table at the end of a run.

`make bench` and `fused-attention bench` run them all. To run some, from a checkout:

    python -m pytest benchmarks --benchmark-quiet -k multi_head

--benchmark-max-time is the time given to each comparison, both sides together; --benchmark-storage says where runs are saved. --grid full
runs what is marked `full` too. --results FILE.jsonl keeps every comparison as it ends, and takes those that it holds from there: a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attention.benchmarks.report import Comparison, append, begin, machine_line, read, report

COMPARISONS = pytest.StashKey[dict[str, Comparison]]()  # by the test's node id
MIN_ROUNDS, MAX_ROUNDS = 7, 300


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., float]:
    """Times `ours` and `peer` in turn, one call each per round, and returns the ratio of the medians (> 1: ours is faster).

    Taking turns gives both the same share of whatever else the machine does; only ratios are meant to be compared between
    runs. `check` runs first and raises if ours is wrong: wrong results are not timed. `group`, `case` and `measure` place the
    comparison in the table (see report.Comparison), `bar` is the ratio it is meant to reach. `ceiling` is ours with the part under
    test removed, timed in the same rounds: the ratio that nothing could exceed, printed at the end of the line.
    `threads`: of torch, during the comparison; by default as many as it has. `geomean_bar`: what the ratios of all comparisons of the
    group, measure and dtype are meant to reach together.
    `warmup_rounds`: calls of each before timing; the first call with every new shape allocates, and torch may compile for it.

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
        check()
        if benchmark.disabled:
            benchmark.pedantic(ours)
            return math.nan
        others = [peer] if ceiling is None else [peer, ceiling]
        for function in [ours, *others] * warmup_rounds:
            function()
        seconds = float(request.config.getoption("benchmark_max_time"))
        rounds = int(seconds / (_seconds(ours) + _seconds(peer)))
        rounds = min(max(rounds, min_rounds), MAX_ROUNDS)

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
        request.config.stash[COMPARISONS][request.node.nodeid] = comparison
        if (results := request.config.getoption("--results")) is not None:
            append(results, request.node.nodeid, comparison)
        return comparison.ratio

    return run


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--grid", choices=("quick", "full"), default="quick", help="which benchmarks to run")
    parser.addoption("--results", type=Path, help="a .jsonl file; comparisons that it holds are not run again")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a benchmark that --grid quick leaves out")
    results = config.getoption("--results")
    config.stash[COMPARISONS] = {} if results is None else read(results)
    if results is not None:
        begin(results)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick = config.getoption("--grid") == "quick"
    left_out = [item for item in items if (quick and item.get_closest_marker("full")) or item.nodeid in config.stash[COMPARISONS]]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    comparisons = list(config.stash[COMPARISONS].values())
    if comparisons:
        terminalreporter.section("medians of interleaved rounds; ratio = peer / ours")
        terminalreporter.write_line(machine_line())
        terminalreporter.write_line("")
        terminalreporter.write_line(report(comparisons))
