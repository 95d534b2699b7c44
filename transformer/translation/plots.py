"""Figures of a trained model, drawn by matplotlib without a display: loss curve, positional encoding, attention maps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..optional import optional_module
from .train import History

TEXT, MUTED, ACCENT, SECOND = "#1f2937", "#94a3b8", "#2563eb", "#d97706"
# White means no attention at all; a single hue, so that darker always means more.
ATTENTION_COLORS = ["#ffffff", "#dbeafe", "#93c5fd", "#3b82f6", "#1e40af", "#172554"]
# The training loss is smoothed with a running mean over this fraction of the run.
SMOOTHING_PART = 0.03


def png(figure: Any) -> bytes:
    """The figure as a PNG image, at a resolution that stays sharp on a high-density screen."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def loss_curve(history: History) -> Any:
    """Training loss of each step (faint), its running mean, and the validation cross entropy."""
    figure = _new_figure(8.0, 3.6)
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
    axes.grid(axis="y", color="#e2e8f0")
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
    figure = _new_figure(8.0, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, columns, title in zip(panels, (table[:, 0::2], table[:, 1::2]), ("sine", "cosine"), strict=True):
        image = axes.imshow(columns.T.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest", origin="lower")
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
    colors = optional_module("matplotlib.colors").LinearSegmentedColormap.from_list("attention", ATTENTION_COLORS)
    # Inches: one cell per token, and a margin for the labels of the left and bottom panels.
    panel_width, panel_height = max(1.8, 0.15 * len(key_tokens)), max(1.8, 0.15 * len(query_tokens))
    figure = _new_figure(num_heads * panel_width + 1.2, num_layers * panel_height + 1.2)
    panels = figure.subplots(num_layers, num_heads, squeeze=False)
    for layer, row in enumerate(panels):
        for head, axes in enumerate(row):
            axes.imshow(maps[layer][head].float().numpy(), cmap=colors, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
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


def _new_figure(width: float, height: float) -> Any:
    """An empty figure, size in inches; made without pyplot, so nothing stays open and no display is needed."""
    return optional_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(MUTED)
    axes.tick_params(length=0, colors=TEXT)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
