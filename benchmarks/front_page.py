"""The README's table and plot of speed, from the tables of a run that docs/results keeps.

    python -m fused_attention.benchmarks.front_page docs/results/cpu-2026-11-28.txt docs/pictures

prints the table, and writes speed-light.svg and speed-dark.svg.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .pictures import Style, log_ticks, new_figure, save, style_axes

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LENGTHS = {  # batch, heads, Lq, Lk, D of self-attention -> Lq
    "32, 8, 64, 64, 64": 64,
    "8, 8, 128, 128, 64": 128,
    "4, 8, 512, 512, 64": 512,
    "1, 8, 2048, 2048, 64": 2048,
    "1, 16, 4096, 4096, 128": 4096,
}


class Row(NamedTuple):
    """A line of a table: its case, and milliseconds by measure, "forward" for example."""

    case: dict[str, str]
    ours: dict[str, float]
    torch: dict[str, float]

    def ratio(self) -> float:
        """Times as fast as torch, all measures together."""
        return sum(self.torch.values()) / sum(self.ours.values())


def rows(text: str, title: str) -> list[Row]:
    """Those of the first table with this title, down to the blank line that ends it."""
    lines = text[text.index(f"\n{title}\n") :].strip("\n").split("\n\n")[0].splitlines()
    measures = re.split(r"\s{2,}", lines[1].strip())
    titles = re.split(r"\s{2,}", lines[2].strip())
    titles = titles[: titles.index("ours ms")]
    found = []
    for line in lines[3:]:
        cells = re.split(r"\s{2,}", line.strip())
        of_measures = zip(measures, range(len(titles), len(cells), 3), strict=False)
        times = {measure: (float(cells[at]), float(cells[at + 1])) for measure, at in of_measures if cells[at] != "-"}
        ours, torch = ({measure: pair[place] for measure, pair in times.items()} for place in (0, 1))
        found.append(Row(dict(zip(titles, cells, strict=False)), ours, torch))
    return found


def table(text: str) -> str:
    """Markdown: how many times as fast as torch, by dtype."""
    fused = rows(text, "attention against torch.nn.functional.scaled_dot_product_attention")
    unfused = rows(text, "attention against torch.nn.functional.scaled_dot_product_attention where it runs unfused")
    modules = rows(text, "MultiHeadAttention against torch.nn.MultiheadAttention, 512 wide, 8 heads")

    def mean(dtype: str, measure: str) -> float:
        ratios = [row.torch[measure] / row.ours[measure] for row in fused if row.case["dtype"] == dtype and measure in row.ours]
        return statistics.geometric_mean(ratios)

    def long(feature: str, dtype: str) -> float:
        return one(row for row in unfused if list(row.case.values())[:3] == ["4, 8, 512, 512, 64", dtype, feature]).ratio()

    def module(attention: str, dtype: str) -> float | None:
        found = [row for row in modules if list(row.case.values()) == ["4, 512", dtype, attention]]
        return one(found).ratio() if found else None

    kinds: dict[str, Any] = {
        "`attention`, forward, mean of 32 shapes and masks": lambda dtype: mean(dtype, "forward"),
        "`attention`, backward": lambda dtype: mean(dtype, "backward"),
        "... with dropout, both, 512 tokens": lambda dtype: long("dropout", dtype),
        "... with a bias and its gradient, both, 512 tokens": lambda dtype: long("bias gradient", dtype),
        "`MultiHeadAttention`, training, 512 tokens": lambda dtype: module("self", dtype),
        "... with dropout": lambda dtype: module("self, dropout 0.1", dtype),
    }
    lines = [f"| times as fast as torch | {' | '.join(DTYPES.values())} |", "|---|" + "--:|" * len(DTYPES)]
    for kind, ratio in kinds.items():
        cells = ["-" if value is None else f"{value:.1f}" for value in map(ratio, DTYPES)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def one(found: Iterable[Row]) -> Row:
    (row,) = found
    return row


THREADS, PANELS = "2", ("fp32", "bf16")  # of the plot
LABELS = {"causal": "causal", "key padding": "padding", "float bias": "float bias", "none": "no mask"}


class Curve(NamedTuple):
    dtype: str
    feature: str
    ratios: dict[int, float]  # by sequence length


def curves(text: str) -> list[Curve]:
    """Forward and backward together against torch: a curve for each dtype and mask of the plot."""
    fused = rows(text, "attention against torch.nn.functional.scaled_dot_product_attention")
    found: dict[tuple[str, str], dict[int, float]] = {(dtype, feature): {} for dtype in PANELS for feature in LABELS}
    for row in fused:
        shape, dtype, feature, threads = row.case.values()
        if (dtype, feature) in found and shape in LENGTHS and threads == THREADS:
            found[dtype, feature][LENGTHS[shape]] = row.ratio()
    return [Curve(*kind, ratios) for kind, ratios in found.items()]


def plot(text: str, style: Style) -> Any:
    """Times as fast as torch by sequence length, a panel for each dtype."""
    figure = new_figure(9, 3.4)
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS)), strict=True))
    colors = dict(zip(LABELS, style.curves, strict=True))
    for curve in curves(text):
        lengths, ratios = list(curve.ratios), list(curve.ratios.values())
        panels[curve.dtype].plot(lengths, ratios, color=colors[curve.feature], marker="o", markersize=4, label=LABELS[curve.feature])
    for dtype, axes in panels.items():
        axes.axhline(1, color=style.text, linewidth=1, linestyle=(0, (4, 3)))
        log_ticks(axes, list(LENGTHS.values()), list(map(str, LENGTHS.values())))
        style_axes(axes, style, DTYPES[dtype], "sequence length")
    panels["fp32"].set_ylabel("times as fast as torch", color=style.text)
    panels["fp32"].legend(frameon=False, labelcolor=style.text, ncols=2, loc="lower right")
    return figure


def data_of(text: str) -> str:
    """What the plot shows, in words: the description that its picture carries."""
    described = [f"{c.dtype} {c.feature}: {', '.join(f'{length} {ratio:.2f}' for length, ratio in c.ratios.items())}" for c in curves(text)]
    return "Times as fast as torch by sequence length. " + "; ".join(described)


def main() -> None:
    results, folder = map(Path, sys.argv[1:])
    text = results.read_text()
    print(table(text))
    save(lambda style: plot(text, style), folder, "speed", data_of(text))


if __name__ == "__main__":
    main()
