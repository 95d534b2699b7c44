"""One comparison of our time with a peer's, files of them, and the tables that a benchmark run ends with.

    python -m fused_attention.benchmarks.report RUN1.jsonl [RUN2.jsonl ...]

prints the tables of files that `fused-attention bench --results RUN1.jsonl` wrote: of several, the run with the median ratio for each
comparison. `--leave 1.3 RUN2.jsonl` starts another run's file with the comparisons whose ratio is at least that: only the others run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..kernels.native import cpu
from ..transformer.translation.machine import processor_name
from ..transformer.translation.output_files import atomic_write


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
    geomean_bar: float | None = None  # that the comparisons of the same group, measure and dtype are meant to reach together

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.peer_ms / self.ours_ms


def machine_line() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    missing = cpu.status()
    kernels = f"CPU kernels: {cpu.instruction_sets()[0]}" if missing is None else f"no CPU kernels ({missing})"
    return f"{processor_name()}, {torch.get_num_threads()} threads; torch {torch.__version__} ({capability}); {kernels}"


def begin(path: Path) -> None:
    """Starts a file of comparisons with what they were measured on."""
    if not path.exists():
        head = json.dumps({"machine": machine_line(), "commit": commit()})
        atomic_write(path, f"{head}\n".encode())


def commit() -> str:
    """Of the checkout that this file is in."""
    here = Path(__file__).resolve().parent
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown (no git)"
    return git.stdout.strip() or "not from a checkout"


def append(path: Path, name: str, comparison: Comparison) -> None:
    """Whatever kills the run, the file is whole, with this comparison or without it. Raises OSError."""
    line = json.dumps({"name": name, "comparison": asdict(comparison)})
    atomic_write(path, path.read_bytes() + f"{line}\n".encode())


def read(path: Path) -> dict[str, Comparison]:
    """By the name of the benchmark; nothing where there is no such file."""
    records = _records(path) if path.exists() else []
    return {record["name"]: Comparison(**record["comparison"]) for record in records if "name" in record}


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def median_run(comparisons: list[Comparison]) -> Comparison:
    """Of several runs of one comparison; the slower of two."""
    return sorted(comparisons, key=lambda comparison: comparison.ratio)[(len(comparisons) - 1) // 2]


def report(comparisons: list[Comparison]) -> str:
    return "\n\n".join(part for part in (table(comparisons), means(comparisons)) if part)


def means(comparisons: Iterable[Comparison]) -> str:
    """A line for each group, measure, dtype and number of threads that has a bar together: geometric mean, least ratio and its case."""
    parts: dict[tuple[str, ...], list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.geomean_bar is not None:
            for threads in (comparison.case["threads"], "all"):
                parts.setdefault((comparison.group, comparison.measure, comparison.case["dtype"], threads), []).append(comparison)
    lines: list[str] = []
    for (group, measure, dtype, threads), members in sorted(parts.items()):
        if not any(line == group for line in lines):
            lines += [group, f"{'':10}{'dtype':6}{'threads':>8}{'cells':>7}{'geometric mean':>20}{'below 1':>9}  least"]
        mean, bar = statistics.geometric_mean(member.ratio for member in members), members[0].geomean_bar
        least = min(members, key=lambda member: member.ratio)
        below = sum(member.ratio < 1 for member in members)
        judged = f"{mean:.2f} ({'>=' if mean >= bar else 'below'} {bar:g})" if threads == "all" else f"{mean:.2f}"  # type: ignore[operator]
        where = "; ".join(value for title, value in least.case.items() if title not in ("dtype", "threads"))
        lines.append(f"{measure:10}{dtype:6}{threads:>8}{len(members):>7}{judged:>20}{below:>9}  {least.ratio:.2f}: {where}")
    return "\n".join(lines)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help=".jsonl files of comparisons")
    parser.add_argument("--leave", nargs=2, metavar=("RATIO", "FILE"), help="write FILE with the comparisons that need not be run again")
    options = parser.parse_args()
    runs: dict[str, list[Comparison]] = {}
    for path in options.results:
        for name, comparison in read(path).items():
            runs.setdefault(name, []).append(comparison)
    comparisons = [median_run(found) for found in runs.values()]
    if options.leave is not None:
        least, file = float(options.leave[0]), Path(options.leave[1])
        begin(file)
        for name, comparison in zip(runs, comparisons, strict=True):
            if comparison.ratio >= least:
                append(file, name, comparison)
        return
    first, *_ = _records(options.results[0])
    heading = f"{first['machine']}; commit {first['commit']}"
    print(f"{heading}\n\nmedians of interleaved rounds; ratio = peer / ours\n\n{report(comparisons)}")


if __name__ == "__main__":
    main()
