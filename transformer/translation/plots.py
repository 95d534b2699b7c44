"""Figures of a trained model, drawn by matplotlib without a display: loss curve, positional encoding, attention maps."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optional import optional_module
from .beam_tree import Node
from .train import History

# As in the light theme of the page, which has variables for them (report.py).
TEXT, MUTED, LINE, ACCENT, SECOND, THIRD = "#1f2937", "#94a3b8", "#e2e8f0", "#2563eb", "#d97706", "#15803d"
VARIABLES = {TEXT: "--text", MUTED: "--axis", LINE: "--line", ACCENT: "--accent", SECOND: "--second", THIRD: "--third"}
IMAGE = {"aspect": "auto", "interpolation": "nearest"}  # of a matrix
# The training loss is smoothed with a running mean over this fraction of the run.
SMOOTHING_PART = 0.03


def svg(figure: Any) -> str:
    """The figure as an SVG element without a background, in the colors of the page that it stands in."""
    buffer = io.StringIO()
    with optional_module("matplotlib").rc_context({"svg.hashsalt": "fused_attention"}):  # the same names in every run
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", dpi=160, transparent=True, metadata=nothing)
    text = buffer.getvalue()
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text[text.index("<svg") :]


def loss_curve(history: History) -> Any:
    """Training loss of each step (faint), its running mean, and the validation cross entropy."""
    figure = _new_figure(9.8, 3.8)
    axes = figure.subplots()
    _style(axes)
    width = max(1, round(SMOOTHING_PART * len(history.losses)))
    steps = range(1, len(history.losses) + 1)
    axes.plot(steps, history.losses, color=ACCENT, alpha=0.2, linewidth=0.8)
    axes.plot(steps, running_mean(history.losses, width), color=ACCENT, linewidth=2, label="training loss (label-smoothed)")
    if history.validations:
        axes.plot(*zip(*history.validations, strict=True), color=SECOND, marker="o", markersize=5, label="validation cross entropy")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per target token")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=LINE)
    axes.legend(frameon=False, labelcolor=TEXT)
    return figure


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and up to `width` - 1 values before it."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        means.append(total / min(index + 1, width))
    return means


def positional_encoding(table: Tensor) -> Any:
    """The positional sinusoids; table (length, d_model), even columns sines, odd ones cosines, values -1 to 1."""
    figure = _new_figure(9.8, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, columns, title in zip(panels, (table[:, 0::2], table[:, 1::2]), ("sine", "cosine"), strict=True):
        image = axes.imshow(columns.T.numpy(), cmap=_tints(ACCENT, SECOND), vmin=-1, vmax=1, origin="lower", **IMAGE)
        _style(axes)
        axes.set_title(title, fontsize=10, color=TEXT)
        axes.set_xlabel("position in the sentence")
    panels[0].set_ylabel("frequency number (falling)")
    bar = figure.colorbar(image, ax=panels, ticks=[-1, 0, 1], pad=0.02, fraction=0.04)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=TEXT)
    return figure


def attention_grid(maps: Sequence[Tensor], query_tokens: Sequence[str], key_tokens: Sequence[str]) -> Any:
    """One row of panels per layer, one panel per head; maps[layer] (H, len(query_tokens), len(key_tokens)), rows sum to 1.

    In a panel, each row is a query token and shows how its attention is spread over the key tokens.
    """
    num_layers, num_heads = len(maps), maps[0].shape[0]
    # Inches: one cell per token, and a margin for the labels of the left and bottom panels.
    panel_width, panel_height = max(1.8, 0.15 * len(key_tokens)), max(1.8, 0.15 * len(query_tokens))
    figure = _new_figure(num_heads * panel_width + 1.2, num_layers * panel_height + 1.2)
    panels = figure.subplots(num_layers, num_heads, squeeze=False)
    for layer, row in enumerate(panels):
        for head, axes in enumerate(row):
            axes.imshow(maps[layer][head].float().numpy(), cmap=_tints(ACCENT), vmin=0, vmax=1, **IMAGE)
            _style(axes)
            axes.tick_params(labelsize=7)
            axes.set_xticks(range(len(key_tokens)), key_tokens, rotation=90)
            axes.set_yticks(range(len(query_tokens)), query_tokens)
            axes.tick_params(labelleft=head == 0, labelbottom=layer == num_layers - 1)
            for spine in axes.spines.values():
                spine.set_visible(True)
            if layer == 0:
                axes.set_title(f"head {head + 1}", fontsize=9, color=TEXT)
            if head == 0:
                axes.set_ylabel(f"layer {layer + 1}", fontsize=9)
    return figure


def matrix(values: Tensor, rows: Sequence[str], columns: Sequence[str] = (), numbers: str = "") -> Any:
    """values (R, C) as tints, one hue above 0 and another below; -inf as an empty cell. numbers: the format of those in the cells."""
    figure = _new_figure(3.3, 2.5)
    axes = figure.subplots()
    largest = values[values.isfinite()].abs().max().item() or 1.0
    shown = values.masked_fill(values == -torch.inf, torch.nan).numpy()
    colors = _tints(ACCENT, SECOND, strongest=0.6 if numbers else 1.0)
    axes.imshow(shown, cmap=colors, vmin=-largest, vmax=largest, **IMAGE)
    _style(axes)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    for row, line in enumerate(values.tolist() if numbers else []):
        for column, value in enumerate(line):
            text, color = ("−∞", MUTED) if value == -math.inf else (format(value, numbers).replace("-", "−"), TEXT)
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    return figure


def bars(labels: Sequence[str], parts: Sequence[float]) -> Any:
    """Parts of a whole, the first one on top and marked."""
    figure = _new_figure(3.3, 2.5)
    axes = figure.subplots()
    places = range(len(labels))
    axes.barh(places, parts, color=[ACCENT] + [MUTED] * (len(parts) - 1), height=0.7)
    _style(axes)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_xlim(0, 1.3 * max(parts))
    axes.spines["bottom"].set_visible(False)
    for place, part in zip(places, parts, strict=True):
        axes.text(part, place, f" {percent(part)}", va="center", fontsize=9, color=TEXT)
    return figure


def beam_tree(root: Node, label: Callable[[int], str]) -> Any:
    """A column for each token, a row for each hypothesis that was given up or has ended; `label` names a token.

    Below a token stands its probability after those before it, unless that is nearly 1, and behind one that ended its score.
    """
    nodes = list(_placed(root))
    num_columns, num_rows = 1 + max(node.column for node in nodes), 1 + max(node.row for node in nodes)
    figure = _new_figure(0.85 * num_columns + 0.6, 0.46 * num_rows + 0.3)
    axes = figure.subplots()
    for node, column, row, parent in reversed(nodes):  # the best on top of the others
        color, width = (ACCENT, 2.4) if node.best else (MUTED, 1.2)
        if parent is not None:
            line = [column - 1, column - 0.5, column - 0.5, column], [parent.row, parent.row, row, row]
            axes.plot(*line, color=color, linewidth=width, zorder=1 + node.best)
            probability = math.exp(node.log_probability - parent.node.log_probability)
            if probability < 0.95:
                axes.text(column, row + 0.14, percent(probability), ha="center", va="top", fontsize=7, color=MUTED)
        axes.plot(column, row, marker="o", markersize=4.5, color=color, zorder=3)
        axes.text(column, row - 0.14, label(node.token), ha="center", fontsize=9, color=TEXT)
        if node.score is not None:
            weight = "bold" if node.best else "normal"
            axes.text(column + 0.16, row + 0.02, f"{node.score:.2f}".replace("-", "−"), va="center", fontsize=9, color=TEXT, weight=weight)
    axes.set_xlim(-0.4, num_columns - 0.2)
    axes.set_ylim(num_rows - 0.5, -0.6)
    axes.axis("off")
    return figure


class _Placed(NamedTuple):
    node: Node
    column: int
    row: int
    parent: _Placed | None


def _placed(root: Node) -> Iterator[_Placed]:
    """Depth first; a first child stands in the row of its parent, every other one in a new row below."""
    row = 0
    waiting: list[tuple[Node, _Placed | None]] = [(root, None)]
    while waiting:
        node, parent = waiting.pop()
        if parent is not None and node is not parent.node.children[0]:
            row += 1
        placed = _Placed(node, 0 if parent is None else parent.column + 1, row, parent)
        yield placed
        waiting += [(child, placed) for child in reversed(node.children)]


def percent(part: float) -> str:
    return "<1%" if part < 0.005 else f"{part:.0%}"


def _tints(above: str, below: str = "", strongest: float = 1.0) -> Any:
    """A color map from transparent at 0 to `above` at 1, and `below` at -1: nothing is nothing on any background."""
    colors = optional_module("matplotlib.colors")
    up = [colors.to_rgba(above, alpha) for alpha in (0.0, strongest)]
    if not below:
        return colors.LinearSegmentedColormap.from_list("tints", up)
    down = [colors.to_rgba(below, alpha) for alpha in (strongest, 0.0)]
    return colors.LinearSegmentedColormap.from_list("tints", list(zip((0.0, 0.5, 0.5, 1.0), down + up, strict=True)))


def _new_figure(width: float, height: float) -> Any:
    """An empty figure, size in inches; made without pyplot, so nothing stays open and no display is needed."""
    return optional_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(MUTED)
    axes.tick_params(length=0, colors=TEXT)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
