"""The README's table and plot of speed, from a recorded run that docs/results keeps.

    python -m fused_attention.benchmarks.front_page docs/results/RUN.jsonl docs/pictures

prints the table, and writes speed-light.svg and speed-dark.svg.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .cell import Cell, Run, read
from .pictures import Style, log_ticks, new_figure, save, style_axes

TORCH = "torch"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MEASURES = ("forward", "forward + backward")
ROWS: dict[str, Callable[[Cell], bool]] = {
    "whole sequences, 64 to 4,096 tokens": lambda cell: cell.suite == "attention",
    "sentences, padded": lambda cell: cell.suite == "short",
    "padding and bool masks, 512 tokens": lambda cell: cell.suite == "masks" and cell.case["mask"].startswith(("padding", "bool")),
    "a float bias": lambda cell: cell.suite == "masks" and cell.case["mask"].startswith("bias") and "gradient" not in cell.case["mask"],
    "a bias with its gradient": lambda cell: cell.suite == "masks" and "gradient" in cell.case["mask"],
    "dropout": lambda cell: cell.suite == "masks" and cell.case["mask"] == "dropout",
    "decoding, one query": lambda cell: cell.suite == "decode",
    "weights averaged over heads": lambda cell: cell.suite == "weights",
}


def best(cell: Cell) -> float:
    """How many times faster ours is than the fastest of all engines."""
    return min(cell.ratios().values())


def against_torch(cell: Cell) -> float:
    return cell.ratio(TORCH)


def geometric_mean(cells: Iterable[Cell], ratio: Callable[[Cell], float]) -> str:
    ratios = [ratio(cell) for cell in cells if TORCH in cell.times]
    return f"{statistics.geometric_mean(ratios):.1f}" if ratios else "-"


def table(run: Run) -> str:
    """Markdown: geometric means of how many times as fast ours is."""
    titles = [f"{name}, torch" for name in DTYPES.values()] + ["float32, fastest engine"]
    lines = [f"| times as fast as | {' | '.join(titles)} |", "|---|" + "--:|" * len(titles)]
    for row, belongs in ROWS.items():
        for measure in MEASURES:
            cells = [cell for cell in run.cells.values() if belongs(cell) and cell.measure == measure]
            of_dtype = {dtype: [cell for cell in cells if cell.case["dtype"] == dtype] for dtype in DTYPES}
            means = [geometric_mean(found, against_torch) for found in of_dtype.values()] + [geometric_mean(of_dtype["fp32"], best)]
            if set(means) != {"-"}:
                lines.append(f"| {row}: {measure} | {' | '.join(means)} |")
    return "\n".join(lines)


class Curve(NamedTuple):
    measure: str
    label: str
    ratios: dict[int, float]  # by sequence length


def curves(run: Run) -> list[Curve]:
    """Of whole sequences in (B, L, H, D) memory on one thread, head_dim 64."""
    plotted = {"mask": "full", "layout": "BLHD", "threads": "1", "head dim": "64"}
    cells = [cell for cell in run.cells.values() if cell.suite == "attention" and plotted.items() <= cell.case.items() and TORCH in cell.times]
    found: dict[tuple[str, str], dict[int, float]] = {}
    for cell in sorted(cells, key=lambda cell: int(cell.case["tokens"])):
        dtype, length = DTYPES[cell.case["dtype"]], int(cell.case["tokens"])
        found.setdefault((cell.measure, f"{dtype}, torch"), {})[length] = cell.ratio(TORCH)
        if len(cell.times) > 2 and dtype == "float32":
            found.setdefault((cell.measure, f"{dtype}, fastest engine"), {})[length] = best(cell)
    return [Curve(*kind, ratios) for kind, ratios in found.items()]


def plot(run: Run, style: Style) -> Any:
    """Times as fast by sequence length, a panel for each measure."""
    figure = new_figure(9, 3.6)
    panels = dict(zip(MEASURES, figure.subplots(1, len(MEASURES)), strict=True))
    drawn = curves(run)
    labels = [*(f"{name}, torch" for name in DTYPES.values()), "float32, fastest engine"]
    colors = dict(zip(labels, style.curves, strict=True))
    for curve in drawn:
        lengths, ratios = list(curve.ratios), list(curve.ratios.values())
        panels[curve.measure].plot(lengths, ratios, color=colors[curve.label], marker="o", markersize=4, label=curve.label)
    for measure, axes in panels.items():
        lengths = sorted({length for curve in drawn if curve.measure == measure for length in curve.ratios})
        axes.axhline(1, color=style.text, linewidth=1, linestyle=(0, (4, 3)))
        log_ticks(axes, [float(length) for length in lengths], [f"{length:,}" for length in lengths])
        style_axes(axes, style, measure, "sequence length")
        axes.legend(frameon=False, labelcolor=style.text, fontsize=9)
    panels[MEASURES[0]].set_ylabel("times as fast", color=style.text)
    return figure


def data_of(run: Run) -> str:
    """What the plot shows, in words: the description that its picture carries."""
    described = [f"{c.measure} {c.label}: {', '.join(f'{length} {ratio:.2f}' for length, ratio in c.ratios.items())}" for c in curves(run)]
    return "Times as fast by sequence length. " + "; ".join(described)


def main() -> None:
    recorded, folder = map(Path, sys.argv[1:])
    run = read(recorded)
    print(table(run))
    save(lambda style: plot(run, style), folder, "speed", data_of(run))


if __name__ == "__main__":
    main()
