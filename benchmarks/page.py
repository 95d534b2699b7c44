"""A run as one HTML page without references to other files: plots, a heat map of ratios, and every number."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..transformer.translation import plots
from ..transformer.translation.report import Picture, figures, page, section
from .cell import OURS, Cell, Run
from .pictures import Style, log_ticks, new_figure, style_axes
from .report import best_ratio, by_suite, means_rows, peers_of, remarks, rows

# Colors of the page's theme for ours and the first peers; further ones are told apart by their lines.
STYLE = Style(plots.TEXT, plots.LINE, (plots.ACCENT, plots.SECOND, plots.THIRD, plots.MUTED))
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
MARKERS = "osD^vPX"
MOST_PANELS = 12  # of one kind of plot
LENGTH, BATCH = "tokens", "batch"  # columns that a plot has along its x axis
HEAT_STYLE = """<style>
.scroll { overflow-x: auto; }
@media (max-width: 600px) { figure > svg { width: 100%; } }
.scroll table { font-size: 13px; font-variant-numeric: tabular-nums; width: auto; }
.scroll th, .scroll td { display: table-cell; white-space: nowrap; width: auto; padding: 3px 10px 3px 0;
  border-top: 1px solid var(--line); }
.heat td.ratio { text-align: center; padding: 3px 8px; }
.faster { background: color-mix(in srgb, var(--third) var(--part), transparent); }
.slower { background: color-mix(in srgb, var(--second) var(--part), transparent); }
</style>"""


def write(run: Run) -> str:
    cells = list(run.cells.values())
    facts = run.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version != "not installed")
    restricted = f"; every engine kept to {facts['isa']}" if facts.get("isa") else ""
    lead = f"{facts['machine']}{restricted}. {versions}. Commit {facts['commit']}, {facts['date']}."
    ratios = [best_ratio(cell) for cell in cells if len(cell.times) > 1]
    tiles = {"cells": str(len(cells)), "engines compared": str(len(peers_of(cells)))}
    if ratios:
        tiles["times as fast as the best other engine, geometric mean"] = f"{statistics.geometric_mean(ratios):.2f}"
        tiles["cells where ours is the fastest"] = f"{sum(ratio >= 1 for ratio in ratios)} of {len(ratios)}"
    parts = [HEAT_STYLE]
    for title, note, pictures in (
        ("Speed by length", "Medians; more is better. The dashed line is a plain product of matrices in the same rounds.", speed(cells)),
        ("Roofline", "Work against the memory that must be read and written at least; both axes are logarithmic.", roofline(cells)),
        ("Memory", "What a call takes at its peak beyond its inputs; less is better.", memory(cells)),
        ("Decoding", "New tokens a second; more is better.", decoding(cells)),
    ):
        if pictures:
            parts.append(section(title, note, figures(pictures) if len(pictures) > 1 else figures([*pictures])))
    if ratios:
        parts.append(section("Ratios", "Times as fast as the best other engine; orange where another one is faster.", heat_map(cells)))
        parts.append(section("Means", "Geometric means of the ratios to each engine.", _table(means_rows(cells))))
    for suite, members in by_suite(cells).items():
        parts.append(section(suite, "Medians of rounds in turn; x peer: times as fast as it.", _table(rows(members))))
    if text := remarks(cells):
        parts.append(section("What is missing, and what disturbed the run", "", "<br>".join(map(html.escape, text.splitlines()))))
    return page("Attention, compared on this machine", lead, tiles, parts)


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    text = "".join(f"<tr>{''.join(f'<td>{html.escape(value)}</td>' for value in row)}</tr>" for row in body)
    return f'<div class="scroll"><table><tr>{titles}</tr>{text}</table></div>'


def grouped(cells: Iterable[Cell], along: str) -> dict[str, list[Cell]]:
    """Cells that differ only in the column `along`, in its order: those with two values or more, by what they have in common."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if along in cell.case:
            shared = [f"{title} {value}" for title, value in cell.case.items() if title not in (along, "batch x heads")]
            groups.setdefault(", ".join([cell.suite, *shared, cell.measure]), []).append(cell)
    ordered = {title: sorted(members, key=lambda cell: float(cell.case[along])) for title, members in groups.items()}
    return {title: members for title, members in ordered.items() if len(members) > 1}


def speed(cells: Sequence[Cell]) -> list[Picture]:
    found = grouped((cell for cell in cells if cell.unit == "GFLOP/s"), LENGTH)
    return [_curves(title, members, LENGTH, lambda cell, side: cell.rate(side), "GFLOP/s") for title, members in _first(found)]


def memory(cells: Sequence[Cell]) -> list[Picture]:
    found = grouped((cell for cell in cells if cell.suite == "attention" and cell.case.get("layout") == "BLHD"), LENGTH)
    return [
        _curves(title, members, LENGTH, lambda cell, side: cell.times[side].peak_mb, "MB")
        for title, members in _first(found)
        if all(time.peak_mb is not None for cell in members for time in cell.times.values())
    ]


def decoding(cells: Sequence[Cell]) -> list[Picture]:
    found = grouped((cell for cell in cells if cell.unit == "tokens/s"), BATCH)
    return [_curves(title, members, BATCH, lambda cell, side: cell.rate(side), "tokens/s") for title, members in _first(found)]


def _first(groups: dict[str, list[Cell]]) -> list[tuple[str, list[Cell]]]:
    """The largest groups, in the order of the run."""
    kept = sorted(groups, key=lambda title: -len(groups[title]))[:MOST_PANELS]
    return [(title, members) for title, members in groups.items() if title in kept]


def _curves(title: str, cells: Sequence[Cell], along: str, value: Callable[[Cell, str], float | None], unit: str) -> Picture:
    figure = new_figure(6.2, 3.6)
    axes = figure.subplots()
    for place, side in enumerate([OURS, *peers_of(cells)]):
        points = [(float(cell.case[along]), value(cell, side)) for cell in cells if side in cell.times]
        color, dashes = STYLE.curves[place % len(STYLE.curves)], DASHES[place // len(STYLE.curves) % len(DASHES)]
        axes.plot(*zip(*points, strict=True), color=color, linestyle=dashes, marker=MARKERS[place % len(MARKERS)], markersize=4, label=side)
    if unit == "GFLOP/s" and all(cell.roof for cell in cells):
        roof = [cell.roof for cell in cells]
        axes.plot([float(cell.case[along]) for cell in cells], roof, color=STYLE.text, linewidth=1, linestyle=(0, (6, 3)), label="product")
    ticks = sorted({float(cell.case[along]) for cell in cells})
    log_ticks(axes, ticks, [f"{tick:g}" for tick in ticks])
    style_axes(axes, STYLE, unit, along)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=STYLE.text, fontsize=8)
    return Picture(title, plots.svg(figure))


def roofline(cells: Sequence[Cell]) -> list[Picture]:
    """A panel for each number of threads and dtype: our cells under the roofs of the product and the copy."""
    pictures = []
    kinds = dict.fromkeys((cell.case.get("threads", ""), cell.case.get("dtype", "")) for cell in cells if cell.traffic)
    for threads, dtype in kinds:
        here = [cell for cell in cells if (cell.case.get("threads"), cell.case.get("dtype")) == (threads, dtype)]
        products = [cell.roof for cell in here if cell.roof and cell.unit == "GFLOP/s"]
        copies = [cell.roof for cell in here if cell.roof and cell.unit == "GB/s"]
        points = [cell for cell in here if cell.traffic]
        if not products or not copies:
            continue
        product, copy = statistics.median(products), statistics.median(copies)
        figure = new_figure(6.2, 3.8)
        axes = figure.subplots()
        for place, suite in enumerate(dict.fromkeys(cell.suite for cell in points)):
            members = [cell for cell in points if cell.suite == suite]
            intensity = [cell.flops() / cell.traffic for cell in members]
            rates = [1e3 * cell.flops() / cell.times[OURS].ms for cell in members]
            color = STYLE.curves[place % len(STYLE.curves)]
            axes.plot(intensity, rates, linestyle="none", marker=MARKERS[place % len(MARKERS)], markersize=5, color=color, label=suite)
        left, right = axes.get_xlim()
        left, right = max(min(left, 0.5), 0.1), max(right, 2 * product / copy)
        edges = [left, product / copy, right]
        axes.plot(edges, [min(product, copy * edge) for edge in edges], color=STYLE.text, linewidth=1.2, label="product and copy")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_ylabel("GFLOP/s", color=STYLE.text)
        style_axes(axes, STYLE, f"{dtype}, threads: {threads}", "operations a byte", from_zero=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=STYLE.text, fontsize=8)
        pictures.append(Picture(f"Our cells, {dtype}, threads: {threads}", plots.svg(figure)))
    return pictures


def heat_map(cells: Sequence[Cell]) -> str:
    """Lines: suite and case; columns: lengths where a suite has them."""
    parts = []
    for suite, members in by_suite(cell for cell in cells if len(cell.times) > 1).items():
        along = LENGTH if LENGTH in members[0].case else None
        lengths = sorted({cell.case[LENGTH] for cell in members}, key=float) if along else [""]
        lines: dict[tuple[str, ...], dict[str, Cell]] = {}
        for cell in members:
            line = (*(value for title, value in cell.case.items() if title not in (along, "batch x heads")), cell.measure)
            lines.setdefault(line, {})[cell.case[LENGTH] if along else ""] = cell
        head = "".join(f"<th>{html.escape(length)}</th>" for length in lengths)
        body = "".join(
            f"<tr><td>{html.escape(', '.join(line))}</td>{''.join(_heat(of_line.get(length)) for length in lengths)}</tr>"
            for line, of_line in lines.items()
        )
        parts.append(f'<div class="scroll"><table class="heat"><tr><th>{html.escape(suite)}</th>{head}</tr>{body}</table></div>')
    return "".join(parts)


def _heat(cell: Cell | None) -> str:
    if cell is None:
        return '<td class="ratio"></td>'
    ratio = best_ratio(cell)
    part = min(70, round(35 * abs(math.log2(ratio))))
    kind = "faster" if ratio >= 1 else "slower"
    best = min(cell.ratios(), key=cell.ratio)
    return f'<td class="ratio {kind}" style="--part: {part}%" title="{html.escape(best)}">{ratio:.2f}</td>'
