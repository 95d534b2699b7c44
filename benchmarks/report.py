"""One comparison of our time with a peer's, and the table of all comparisons that a benchmark run ends with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fused_attention.kernels import native
from fused_attention.transformer.machine import processor_name


@dataclass(frozen=True)
class Comparison:
    """Medians of interleaved rounds in milliseconds. Comparisons of one group and case share a line of the table."""

    group: str  # what is compared with what: the title of a block of the table
    case: dict[str, str]  # column title -> value; the same titles throughout a group
    measure: str  # what was timed, such as "forward"
    ours_ms: float
    peer_ms: float
    peer: str  # the peer's short name, for the column title
    rounds: int
    bar: float | None  # the ratio that this comparison is meant to reach
    note: str

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.peer_ms / self.ours_ms


def machine_line() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    missing = native.status()
    kernels = f"native kernels: {native.instruction_sets()[0]}" if missing is None else f"no native kernels ({missing})"
    return f"{processor_name()}, {torch.get_num_threads()} threads; torch {torch.__version__} ({capability}); {kernels}"


def table(comparisons: Iterable[Comparison]) -> str:
    """A block per group, a line per case, and for every measure: ours, the peer's, and the ratio with its bar, if it has one."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.group, []).append(comparison)
    return "\n\n".join(_block(group, members) for group, members in groups.items())


def _block(group: str, comparisons: list[Comparison]) -> str:
    titles = list(comparisons[0].case)
    measures = list(dict.fromkeys(comparison.measure for comparison in comparisons))
    peer = comparisons[0].peer
    lines: dict[tuple[str, ...], dict[str, Comparison]] = {}
    for comparison in comparisons:
        lines.setdefault(tuple(comparison.case.values()), {})[comparison.measure] = comparison

    rows = [[*titles, *(title for _ in measures for title in ("ours ms", f"{peer} ms", "ratio")), ""]]
    for case, by_measure in lines.items():
        cells = [cell for measure in measures for cell in _cells(by_measure.get(measure))]
        notes = [comparison.note for comparison in by_measure.values() if comparison.note]
        rows.append([*case, *cells, "; ".join(notes)])

    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, measure in enumerate(measures):  # a title over three columns may be wider than they are
        first = len(titles) + 3 * number
        widths[first] += max(0, len(measure) - sum(widths[first : first + 3]) - 4)
    left = len(titles)
    over = " " * (sum(widths[:left]) + 2 * left)
    for number, measure in enumerate(measures):
        first = left + 3 * number
        over += measure.rjust(sum(widths[first : first + 3]) + 4) + "  "
    body = [
        "  ".join(
            cell.ljust(width) if column < left or column == len(widths) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([group, over.rstrip(), *body])


def _cells(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return ["-", "-", "-"]
    ratio = f"{comparison.ratio:.2f}"
    if comparison.bar is not None:
        ratio += f" ({'>=' if comparison.ratio >= comparison.bar else 'below'} {comparison.bar:g})"
    return [f"{comparison.ours_ms:.3f}", f"{comparison.peer_ms:.3f}", ratio]
