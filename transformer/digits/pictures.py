"""A small image as an SVG element, with attention drawn over it, in the colors of the report's page."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

INK_OPACITY = 0.75  # of a pixel of value 1, so that the tint of its patch shows through


def attention_over(image: Tensor, attention: Tensor) -> str:
    """An SVG element of image (height, width), values 0 to 1, whose patches are tinted by attention (rows, columns), values >= 0.

    The tint is relative to the patch with the most.
    """
    height, width = image.shape
    patch_height, patch_width = height / attention.shape[0], width / attention.shape[1]
    parts = [
        *_cells(attention / attention.max(), "var(--second)", patch_height, patch_width),
        *_cells(image * INK_OPACITY, "var(--text)"),
    ]
    return f'<svg viewBox="0 0 {width} {height}" shape-rendering="crispEdges">{"".join(parts)}</svg>'


def _cells(opacities: Tensor, color: str, height: float = 1, width: float = 1) -> Iterator[str]:
    """A rectangle for each value of opacities (rows, columns) that is not 0."""
    for row, line in enumerate(opacities.tolist()):
        for column, opacity in enumerate(line):
            if opacity > 0.005:
                place = f'x="{column * width:g}" y="{row * height:g}" width="{width:g}" height="{height:g}"'
                yield f'<rect {place} fill="{color}" fill-opacity="{opacity:.2f}"/>'
