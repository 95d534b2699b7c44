"""Figures show the numbers they are given."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from fused_attention.transformer.embedding import sinusoidal_positions
from fused_attention.transformer.translation import plots
from fused_attention.transformer.translation.beam_tree import Node
from fused_attention.transformer.translation.train import History


@given(st.lists(st.floats(-10, 10), max_size=50), st.integers(1, 60))
def test_running_mean(values: list[float], width: int) -> None:
    windows = [values[max(0, index + 1 - width) : index + 1] for index in range(len(values))]
    assert plots.running_mean(values, width) == pytest.approx([sum(w) / len(w) for w in windows], abs=1e-9)


def test_loss_curve_draws_losses_mean_and_validations() -> None:
    losses = [5.0, 4.0, 3.0, 2.0]
    (axes,) = plots.loss_curve(History(losses, [1.0, 2.0, 3.0, 4.0], 100, [(2, 3.5), (4, 2.5)])).axes
    raw, _mean, validation = axes.lines
    assert raw.get_xydata().tolist() == [[1, 5], [2, 4], [3, 3], [4, 2]]
    assert validation.get_xydata().tolist() == [[2, 3.5], [4, 2.5]]
    assert axes.get_ylim()[0] == 0


def test_loss_curve_without_validations() -> None:
    (axes,) = plots.loss_curve(History([1.0], [1.0])).axes
    assert len(axes.lines) == 2


def test_positional_encoding_separates_sines_and_cosines() -> None:
    table = sinusoidal_positions(20, 8)
    sine, cosine, _bar = plots.positional_encoding(table).axes
    assert torch.equal(torch.as_tensor(sine.images[0].get_array().data), table[:, 0::2].T)
    assert torch.equal(torch.as_tensor(cosine.images[0].get_array().data), table[:, 1::2].T)


def test_attention_grid_has_a_panel_for_each_layer_and_head() -> None:
    maps = [torch.rand(3, 2, 4).softmax(-1) for _ in range(2)]
    figure = plots.attention_grid(maps, ["q1", "q2"], ["k1", "k2", "k3", "k4"])
    assert len(figure.axes) == 6
    for index, axes in enumerate(figure.axes):
        layer, head = divmod(index, 3)
        assert torch.equal(torch.as_tensor(axes.images[0].get_array().data), maps[layer][head])
        assert axes.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["q1", "q2"]
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == ["k1", "k2", "k3", "k4"]


def test_matrix_writes_numbers_and_leaves_out_what_is_masked() -> None:
    values = torch.tensor([[0.5, -torch.inf], [-0.25, 2.0]])
    (axes,) = plots.matrix(values, ["a", "b"], ["c", "d"], ".1f").axes
    assert [text.get_text() for text in axes.texts] == ["0.5", "−∞", "−0.2", "2.0"]
    shown = torch.as_tensor(axes.images[0].get_array().filled(-9))
    assert torch.equal(shown, values.masked_fill(values == -torch.inf, -9))
    assert axes.images[0].get_clim() == (-2, 2)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_colors_are_nothing_at_zero() -> None:
    colors = plots._tints(plots.ACCENT, plots.SECOND)
    assert [round(colors(place)[3], 2) for place in (0.0, 0.5, 1.0)] == [1, 0, 1]
    assert colors(1.0)[2] > colors(0.0)[2]  # blue above, orange below


def test_bars_are_percentages() -> None:
    (axes,) = plots.bars(["yes", "no"], [0.997, 0.003]).axes
    assert [bar.get_width() for bar in axes.patches] == [0.997, 0.003]
    assert [text.get_text() for text in axes.texts] == [" 100%", " <1%"]


def test_a_beam_tree_has_a_row_for_each_end() -> None:
    end = Node(2, math.log(0.4), -0.7, best=True)
    other = Node(2, math.log(0.001), -3.0)
    root = Node(1, 0.0, None, True, [Node(5, math.log(0.5), None, True, [end, other]), Node(6, math.log(0.4))])
    (axes,) = plots.beam_tree(root, str).axes
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert {name: texts[name][0] for name in "156"} == {"1": 0, "5": 1, "6": 1}
    assert {"50%", "80%", "40%", "<1%", "−0.70", "−3.00"} <= texts.keys()
    rows = [round(texts[name][1]) for name in ("−0.70", "−3.00", "6")]
    assert rows == [0, 1, 2]


def test_svg_takes_its_colors_from_the_page() -> None:
    text = plots.svg(plots.loss_curve(History([1.0, 2.0], [1.0, 2.0], 100, [(2, 3.5)])))
    assert text.startswith("<svg")
    assert "var(--accent)" in text
    assert "var(--text)" in text
    assert not any(color in text for color in plots.VARIABLES)
    assert text == plots.svg(plots.loss_curve(History([1.0, 2.0], [1.0, 2.0], 100, [(2, 3.5)])))
