"""The tables and plots of a comparison, from its journal.

    python -m fused_attention.benchmarks.recurrence.curves docs/results/recurrence-2026-11-30.jsonl docs/pictures

prints the tables, and writes recurrence-speed and recurrence-quality, each as -light.svg and -dark.svg.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..journal import Journal, Key
from ..pictures import Style, log_ticks, new_figure, save, style_axes

MODELS = ("Transformer", "SSRU decoder", "LSTM")
ALL_PAIRS = 0  # stands for their number in keys of the journal


class Panel(NamedTuple):
    """One plot and one table: a measure of each model."""

    title: str
    x_label: str
    y_label: str
    format: str  # of y
    curves: dict[str, dict[float, float]]  # model -> x -> y
    logarithmic: bool  # the x axis


def panels(results: Mapping[Key, Any]) -> dict[str, list[Panel]]:
    """File name -> the panels of that figure, with the points measured so far."""
    minutes = max((float(key[3]) for key in results if key[0] == "bleu"), default=0.0)
    by_minutes = {
        model: {float(key[3]): result["bleu"] for key, result in results.items() if key[:3] == ("bleu", model, ALL_PAIRS)}
        for model in MODELS
    }
    by_pairs: dict[str, dict[float, float]] = {model: {} for model in MODELS}
    for key, result in results.items():
        if key[0] == "bleu" and float(key[3]) == minutes:
            by_pairs[str(key[1])][result["pairs"]] = result["bleu"]
    length = "tokens in a sentence"
    speed = [
        Panel("Training", length, "tokens a second", ",.0f", by_length(results, "training"), True),
        Panel("Decoding, one sentence at a time", length, "milliseconds a sentence", ",.1f", by_length(results, "decoding"), True),
    ]
    quality = [
        Panel("Quality by training time", "minutes of training", "BLEU", ".1f", by_minutes, False),
        Panel(f"Quality by size of the training set, {minutes:g} min", "sentence pairs", "BLEU", ".1f", by_pairs, True),
    ]
    return {"recurrence-speed": speed, "recurrence-quality": quality}


def by_length(results: Mapping[Key, Any], measure: str) -> dict[str, dict[float, float]]:
    found = {float(key[1]): values for key, values in results.items() if key[0] == measure}
    return {model: {length: values[model] for length, values in sorted(found.items())} for model in MODELS}


def table(panel: Panel) -> str:
    """Markdown, with a row per model and a column per x."""
    columns = sorted({x for curve in panel.curves.values() for x in curve})
    lines = [f"| {panel.y_label}, by {panel.x_label} | {' | '.join(f'{x:,g}' for x in columns)} |", "|---|" + "--:|" * len(columns)]
    for model, curve in panel.curves.items():
        cells = [format(curve[x], panel.format) if x in curve else "-" for x in columns]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def model_table(results: Mapping[Key, Any]) -> str:
    """Markdown, with a row per model: its size, and what it did in the longest training on all pairs."""
    minutes = max((key[3] for key in results if key[0] == "bleu"), key=float, default="")
    lines = ["| model | parameters | wide | steps | tokens a second | cross entropy |", "|---|--:|--:|--:|--:|--:|"]
    for model in MODELS:
        facts, run = results["run",]["models"][model], results.get(("bleu", model, ALL_PAIRS, minutes))
        cells = [model, f"{facts['parameters']:,}", str(facts["config"]["d_model"])]
        cells += [f"{run['steps']:,}", f"{run['tokens'] / run['seconds']:,.0f}", f"{run['cross_entropy']:.2f}"] if run else ["-"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(results: Mapping[Key, Any]) -> str:
    titled = {panel.title: table(panel) for group in panels(results).values() for panel in group}
    return "\n\n".join(f"{title}:\n\n{text}" for title, text in {"Models": model_table(results), **titled}.items())


def plot(group: list[Panel], style: Style) -> Any:
    figure = new_figure(9, 3.4)
    for panel, axes in zip(group, figure.subplots(1, len(group)), strict=True):
        for (model, curve), color in zip(panel.curves.items(), style.curves, strict=False):
            axes.plot(sorted(curve), [curve[x] for x in sorted(curve)], color=color, marker="o", markersize=4, label=model)
        ticks = sorted({x for curve in panel.curves.values() for x in curve})
        if panel.logarithmic and ticks:
            log_ticks(axes, ticks, [f"{x:,g}" for x in ticks])
        else:
            axes.set_xlim(left=0)
        style_axes(axes, style, panel.title, panel.x_label)
        axes.set_ylabel(panel.y_label, color=style.text)
    figure.axes[0].legend(frameon=False, labelcolor=style.text)
    return figure


def description(group: list[Panel]) -> str:
    """The numbers that a figure shows, in words."""
    sentences = []
    for panel in group:
        curves = (f"{model} {', '.join(f'{x:g}: {y:.4g}' for x, y in sorted(curve.items()))}" for model, curve in panel.curves.items())
        sentences.append(f"{panel.title}, {panel.y_label} by {panel.x_label}: {'; '.join(curves)}.")
    return " ".join(sentences)


def draw(results: Mapping[Key, Any], folder: Path) -> list[Path]:
    """Write the figures; returns their paths."""
    paths = []
    for name, group in panels(results).items():
        paths += save(partial(plot, group), folder, name, description(group))
    return paths


def main() -> None:
    results, folder = map(Path, sys.argv[1:])
    found = Journal(results).results
    print(tables(found))
    draw(found, folder)


if __name__ == "__main__":
    main()
