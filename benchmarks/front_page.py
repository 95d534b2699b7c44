"""The README's table and plot of speed, from a recorded run that docs/results keeps.

    python -m fused_attention.benchmarks.front_page docs/results/RUN.jsonl docs/pictures

prints the table, and writes speed-light.svg and speed-dark.svg.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .cell import Cell, Run, read
from .pictures import Style, log_ticks, new_figure, save, style_axes

TORCH = "torch"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MEASURES = ("forward", "forward + backward")


def of(suite: str, dtype: str = "fp32", **case: tuple[str, ...]) -> Callable[[Cell], bool]:
    """Whether a cell belongs to a row: its suite, dtype, and how the values of its case begin."""
    return lambda cell: (
        cell.suite == suite
        and cell.case.get("dtype") == dtype
        and all(cell.case.get(title, "").startswith(beginnings) for title, beginnings in case.items())
    )


ROWS = {
    "whole sequences, 64 to 4,096 tokens, float32": of("attention"),
    "... bfloat16": of("attention", "bf16"),
    "... float16": of("attention", "fp16"),
    "sentences, padded": of("short"),
    "padding and bool masks, 512 tokens": of("masks", mask=("padding", "bool")),
    "a float bias": of("masks", mask=("bias B", "bias 1", "bias of")),
    "a float bias and its gradient": of("masks", mask=("bias gradient",)),
    "dropout": of("masks", mask=("dropout",)),
    "decoding, one query": of("decode"),
}


def geometric_mean(ratios: list[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.1f}" if ratios else "-"


def table(run: Run) -> str:
    """Markdown: geometric means of how many times as fast ours is. The fastest engine of a cell is not torch alone."""
    lines = [
        "| times as fast | " + " | ".join(f"{measure}: torch" for measure in MEASURES) + " | forward: fastest engine |",
        "|---|--:|--:|--:|",
    ]
    for row, belongs in ROWS.items():
        cells = {measure: [cell for cell in run.cells.values() if belongs(cell) and cell.measure == measure] for measure in MEASURES}
        means = [geometric_mean([cell.ratio(TORCH) for cell in cells[measure] if TORCH in cell.times]) for measure in MEASURES]
        means.append(geometric_mean([best(cell) for cell in cells["forward"] if len(cell.times) > 2]))
        lines.append(f"| {row} | {' | '.join(means)} |")
    return "\n".join(lines)


def best(cell: Cell) -> float:
    """How many times faster ours is than the fastest of all engines."""
    return min(cell.ratios().values())


class Curve(NamedTuple):
    measure: str
    label: str
    ratios: dict[int, float]  # by sequence length


def curves(run: Run) -> list[Curve]:
    """Of whole sequences in (B, L, H, D) memory on one thread, head_dim 64."""
    plotted = {"mask": "full", "layout": "BLHD", "threads": "1", "head dim": "64"}
    cells = [
        cell for cell in run.cells.values() if cell.suite == "attention" and plotted.items() <= cell.case.items() and TORCH in cell.times
    ]
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
