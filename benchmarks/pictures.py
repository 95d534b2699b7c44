"""Plots for the docs: SVG files for light and dark backgrounds, which contain their numbers as a description."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Style(NamedTuple):
    """Colors of a picture."""

    text: str
    grid: str
    curves: tuple[str, ...]  # distinguishable for color-blind readers


STYLES = {
    "light": Style("#1f2328", "#d8dee4", ("#0969da", "#bc4c00", "#1a7f37", "#6e7781")),
    "dark": Style("#e6edf3", "#30363d", ("#58a6ff", "#f0883e", "#3fb950", "#8b949e")),
}


def new_figure(width: float, height: float) -> Any:
    """A figure without a background; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def style_axes(axes: Any, style: Style, title: str, x_label: str, *, from_zero: bool = True) -> None:
    """Grid lines and no frame; the y axis starts at 0, unless it is logarithmic."""
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(title, color=style.text, fontsize=11, loc="left")
    axes.set_xlabel(x_label, color=style.text)
    axes.tick_params(length=0, colors=style.text)
    axes.grid(axis="y", color=style.grid)
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)


def log_ticks(axes: Any, ticks: list[float], labels: list[str]) -> None:
    """A logarithmic x axis with only these ticks."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_ticklabels(labels)


def save(plot: Callable[[Style], Any], folder: Path, name: str, description: str) -> list[Path]:
    """Write folder/NAME-light.svg and NAME-dark.svg; the same numbers give the same bytes."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{background}.svg" for background in STYLES]
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        for path, style in zip(paths, STYLES.values(), strict=True):
            plot(style).savefig(path, metadata={"Date": None, "Description": description})
    return paths
