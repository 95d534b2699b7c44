"""The tables that a benchmark run ends with.

    python -m fused_attention.benchmarks.report RUN1.jsonl [RUN2.jsonl ...]

prints the tables of files that `fused-attention bench --results RUN1.jsonl` wrote: of several, the run with the median ratio to the best
peer for each cell. `--leave 1.3 RUN2.jsonl` starts another run's file with the cells whose ratio is at least that: only the others run
again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from .cell import OURS, Cell, append, begin, read


def report(cells: Sequence[Cell]) -> str:
    return "\n\n".join(part for part in (tables(cells), means(cells), remarks(cells)) if part)


def by_suite(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    suites: dict[str, list[Cell]] = {}
    for cell in cells:
        suites.setdefault(cell.suite, []).append(cell)
    return suites


def peers_of(cells: Iterable[Cell]) -> list[str]:
    """All peers that have a time in one of the cells, in their order."""
    return list(dict.fromkeys(peer for cell in cells for peer in cell.ratios()))


def tables(cells: Iterable[Cell]) -> str:
    """A block for each suite, a line for each cell."""
    return "\n\n".join(f"{suite}\n{aligned(rows(members), len(members[0].case) + 1)}" for suite, members in by_suite(cells).items())


def rows(cells: Sequence[Cell]) -> list[list[str]]:
    """The table of one suite's cells: titles, then a row for each. Columns that would be empty are left out."""
    peers = peers_of(cells)
    titles = [*cells[0].case, "measure", "ours ms", "+-%", "rate", "of roof", *(f"x {peer}" for peer in peers), "x best", "peak MB", ""]
    found = []
    for cell in cells:
        ratios = {peer: _judged(cell, peer) if peer in cell.times else "-" for peer in peers}
        rate, share, peak = cell.rate(), cell.share(), cell.times[OURS].peak_mb
        found.append(
            [
                *cell.case.values(),
                cell.measure,
                f"{cell.times[OURS].ms:.3f}",
                f"{100 * cell.times[OURS].spread:.0f}",
                f"{rate:.{0 if rate >= 100 else 1}f} {cell.unit}" if rate else "",
                f"{share:.0%}" if share else "",
                *ratios.values(),
                f"{best_ratio(cell):.2f}" if len(cell.times) > 2 else "",
                "" if peak is None else f"{peak:.0f}",
                "busy" if cell.busy else "",
            ]
        )
    kept = [column for column in range(len(titles)) if any(row[column] for row in found)]
    return [[row[column] for column in kept] for row in [titles, *found]]


def _judged(cell: Cell, peer: str) -> str:
    ratio, bar = cell.ratio(peer), cell.bars.get(peer)
    return f"{ratio:.2f}" if bar is None else f"{ratio:.2f} ({'>=' if ratio >= bar else 'below'} {bar:g})"


def best_ratio(cell: Cell) -> float:
    """To the fastest peer; infinite where none has a time."""
    return min(cell.ratios().values(), default=float("inf"))


def aligned(lines: Sequence[Sequence[str]], words: int) -> str:
    """The first columns, so many, are words; the others numbers."""
    widths = [max(len(row[column]) for row in lines) for column in range(len(lines[0]))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.ljust(width) if column < words else cell.rjust(width) for column, (cell, width) in enumerate(cells)).rstrip()

    return "\n".join(map(line, lines))


def means(cells: Sequence[Cell]) -> str:
    lines = means_rows(cells)
    return aligned(lines, 4) if len(lines) > 1 else ""


def means_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """Geometric means of the ratios, for each suite, measure, dtype and peer: of the peer's cells, and of all to the best peer."""
    lines = [["geometric means", "measure", "dtype", "peer", "cells", "mean", "below 1", "least", "where"]]
    for suite, members in by_suite(cells).items():
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in members:
            if len(cell.times) > 1:
                groups.setdefault((cell.measure, cell.case.get("dtype", "")), []).append(cell)
        for (measure, dtype), group in groups.items():
            peers = peers_of(group)
            for peer in [*peers, *(["best"] if len(peers) > 1 else [])]:
                of_peer = [cell for cell in group if peer in (*cell.times, "best")]
                values = [best_ratio(cell) if peer == "best" else cell.ratio(peer) for cell in of_peer]
                least = of_peer[values.index(min(values))]
                where = "; ".join(value for title, value in least.case.items() if title != "dtype")
                below = sum(value < 1 for value in values)
                mean = statistics.geometric_mean(values)
                lines.append([suite, measure, dtype, peer, str(len(values)), f"{mean:.2f}", str(below), f"{min(values):.2f}", where])
    return lines


def remarks(cells: Sequence[Cell]) -> str:
    """Why peers have no time, which were wrong, and what disturbed the run."""
    reasons: dict[tuple[str, str], int] = {}
    for cell in cells:
        for peer, reason in cell.missing.items():
            reasons[peer, reason] = reasons.get((peer, reason), 0) + 1
    lines = [f"no time: {peer}, in {count} cells: {reason}" for (peer, reason), count in reasons.items()]
    disturbed = [cell for cell in cells if cell.busy]
    if disturbed:
        lines.append(f"busy machine in {len(disturbed)} of {len(cells)} cells, such as: {disturbed[0].busy}")
    return "\n".join(lines)


def median_run(runs: Sequence[Cell]) -> Cell:
    """Of several runs of one cell; the slower of two."""
    return sorted(runs, key=best_ratio)[(len(runs) - 1) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help=".jsonl files of cells")
    parser.add_argument("--leave", nargs=2, metavar=("RATIO", "FILE"), help="write FILE with the cells that need not be measured again")
    options = parser.parse_args()
    files = [read(path) for path in options.results]
    runs: dict[str, list[Cell]] = {}
    for file in files:
        for name, cell in file.cells.items():
            runs.setdefault(name, []).append(cell)
    cells = {name: median_run(found) for name, found in runs.items()}
    if options.leave is not None:
        least, path = float(options.leave[0]), Path(options.leave[1])
        begin(path, files[0].facts["isa"])
        for name, cell in cells.items():
            if best_ratio(cell) >= least:
                append(path, name, cell)
        return
    facts = files[0].facts
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items() if version != "not installed")
    print(f"{facts['machine']}; {versions}; commit {facts['commit']}; {facts['date']}\n")
    print(f"medians of rounds in turn; x peer: times as fast as it\n\n{report(list(cells.values()))}")


if __name__ == "__main__":
    main()
