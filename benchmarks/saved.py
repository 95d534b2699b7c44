"""What `fused-attention bench` makes of a saved run: its page and tables, and the comparison with an earlier run."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

from ..transformer.optional import MissingModuleError
from ..transformer.translation.output_files import atomic_write
from .cell import Run, UnusableFile, read

COLUMNS = (
    "suite",
    "case",
    "measure",
    "side",
    "ms",
    "low ms",
    "high ms",
    "rounds",
    "peak MB",
    "rate",
    "unit",
    "roof",
    "times as fast as it",
)


def write_all(path: Path) -> list[Path]:
    """Beside a .jsonl file of cells: the page, a CSV with a line for each side of a cell, and one JSON document. Returns what was written:
    without matplotlib there is no page.
    """
    run = read(path)
    written = {
        ".csv": as_csv(run),
        ".json": json.dumps({"facts": run.facts, "cells": [asdict(cell) for cell in run.cells.values()]}, indent=1),
    }
    try:
        from .page import write

        written[".html"] = write(run)
    except MissingModuleError as error:
        print(f"no page: {error}")
    for suffix, text in written.items():
        atomic_write(path.with_suffix(suffix), text.encode())
    return [path.with_suffix(suffix) for suffix in written]


def as_csv(run: Run) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in run.cells.values():
        case = "; ".join(f"{title} {value}" for title, value in cell.case.items())
        for side, time in cell.times.items():
            measured = time.ms, time.low, time.high, time.rounds, time.peak_mb
            writer.writerow([cell.suite, case, cell.measure, side, *measured, cell.rate(side), cell.unit, cell.roof, cell.ratio(side)])
        for side, reason in cell.missing.items():
            writer.writerow([cell.suite, case, cell.measure, side, reason])
    return text.getvalue()


def slower_than(new: Run, old: Run) -> list[str]:
    """A line for each cell and peer whose ratio fell by more than the noise of both runs. UnusableFile where nothing can be compared."""
    compared, lines = 0, []
    for name, cell in new.cells.items():
        before = old.cells.get(name, cell)
        for peer in cell.ratios() if name in old.cells else ():
            if peer not in before.times:
                continue
            compared += 1
            was, now = before.ratio(peer), cell.ratio(peer)
            noise = before.noise(peer) + cell.noise(peer)
            if now < was * (1 - noise):
                case = "; ".join([cell.suite, *cell.case.values(), cell.measure])
                lines.append(f"{case}: {now:.2f}x {peer}, was {was:.2f}x (noise {noise:.0%})")
    if not compared:
        raise UnusableFile("the earlier run has no cell of this one, or no peer of it")
    return lines
