"""Figures show the numbers they are given."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
import matplotlib.image

from fused_attention.transformer.embedding import sinusoidal_positions
from fused_attention.transformer.translation import plots
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


def test_png_is_an_image_that_is_not_blank() -> None:
    pixels = matplotlib.image.imread(io.BytesIO(plots.png(plots.positional_encoding(sinusoidal_positions(20, 8)))), format="png")
    assert pixels.shape[1] == 8.0 * 160
    assert pixels.std() > 0.05
