"""The table that gpu_attention.py ends with, and what our kernels are meant to reach in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .gpu_calls import OURS, PROVIDERS, SDPA, Cell
from .gpu_libraries import LIBRARIES
from .gpu_timing import GRAPH, Time
from .journal import Key

PASSES = ("forward", "backward")
Results = Mapping[Key, Any]  # by feature, length, head dim and provider


class Bar(NamedTuple):
    """How many times faster than some peers a backend is meant to be, at head dims 64 and 128."""

    ratio: float
    peers: tuple[str, ...]  # the best of those that ran counts
    shortest: int  # length from which it holds


ANY, FLASH, EFFICIENT = (*SDPA, "flex", *LIBRARIES), ("flash",), ("efficient",)
BARS: dict[tuple[str, str], dict[str, Bar]] = {
    ("triton", "forward"): {
        "full": Bar(0.75, ANY, 2048), "causal": Bar(0.75, ANY, 2048), "bias": Bar(1.0, ANY, 2048), "bool mask": Bar(1.0, ANY, 2048),
    },
    ("triton", "backward"): {"full": Bar(0.5, ANY, 2048), "causal": Bar(0.5, ANY, 2048), "bias gradient": Bar(1.2, ANY, 2048)},
    ("cuda", "forward"): {
        "full": Bar(1.0, FLASH, 1024), "causal": Bar(1.0, FLASH, 1024),
        "bias": Bar(1.5, EFFICIENT, 512), "bool mask": Bar(1.5, EFFICIENT, 512), "short, padded": Bar(1.3, ANY, 32),
    },
    ("cuda", "backward"): {
        "full": Bar(1.0, FLASH, 1024), "causal": Bar(1.0, FLASH, 1024), "bias gradient": Bar(1.5, EFFICIENT, 512),
        "short, padded": Bar(1.3, ANY, 32),
    },
}  # fmt: skip
# Of our own time in the cell without the feature, for every length.
OWN_BARS = {"dropout": (0.7, "triton", PASSES), "deterministic": (0.82, "cuda", ("backward",))}


def table(results: Results, wanted: list[Cell]) -> str:
    """A Markdown table for each pass: both times of every provider, ours in TFLOP/s and as a ratio to the best peer. Reasons follow."""
    lines = []
    for measured_pass in PASSES:
        lines.append(f"## {measured_pass}: milliseconds of the GPU, by graph replay (e: by events); in brackets microseconds of the host")
        lines += [
            "",
            "| feature | length | head_dim | " + " | ".join(PROVIDERS) + " | cuda TFLOP/s | best peer / cuda | best peer / triton |",
        ]
        lines.append("|---" * (6 + len(PROVIDERS)) + "|")
        for cell in wanted:
            lines.append("| " + " | ".join(_row(cell, measured_pass, results)) + " |")
        lines.append("")
    reasons: dict[str, list[str]] = {}
    for cell in wanted:
        for name in PROVIDERS:
            if isinstance(why := results.get((*cell, name)), str):
                reasons.setdefault(f"{name}: {why}", []).append(f"{cell.feature} {cell.length} {cell.head_dim}")
    if reasons:
        lines += ["## not timed (-)", "", *(f"- {why} ({', '.join(where)})" for why, where in reasons.items()), ""]
    return "\n".join(lines)


def state_line(results: Results) -> str:
    """Clocks, power and temperature right after the cells: the least and the most of each; in how many clocks were held down, and why."""
    states = [state for key, state in results.items() if key[-1] == "state"]
    unknown = next((state["unknown"] for state in states if "unknown" in state), None)
    known = [state for state in states if "unknown" not in state]
    if not known:
        return f"clocks and power: {unknown or 'not read'}"
    words = []
    for title in ("SM MHz", "memory MHz", "W", "C"):
        values = sorted(float(state[title]) for state in known if state[title].replace(".", "").isdigit())
        words.append(f"{values[0]:g} to {values[-1]:g} {title}" if values else f"{title} not read")
    idle = 0x1  # of the reasons for lower clocks, the one that says nothing
    held = [state["throttled"] for state in known if state["throttled"].startswith("0x") and int(state["throttled"], 16) & ~idle]
    words.append(f"clocks held down in {len(held)} of {len(known)} cells" + (f" ({', '.join(sorted(set(held)))})" if held else ""))
    return f"after the cells: {', '.join(words)}"


def _row(cell: Cell, measured_pass: str, results: Results) -> list[str]:
    row = [cell.feature, str(cell.length), str(cell.head_dim)]
    times = _times(results, cell, measured_pass)
    for name in PROVIDERS:
        if name in times:
            mark = "" if times[name].by in (GRAPH, "") else "e"
            row.append(f"{times[name].kernel_ms:.4f}{mark} ({1e3 * times[name].call_ms:.0f})")
        else:
            row.append("-" if (*cell, name) in results else "not run")
    row.append(f"{cell.flops(measured_pass) / times['cuda'].kernel_ms / 1e9:.0f}" if "cuda" in times else "")
    return row + [_ratios(cell, measured_pass, results, backend) for backend in OURS]


def _ratios(cell: Cell, measured_pass: str, results: Results, backend: str) -> str:
    """Of the best peer's time on the GPU, and of what a bar speaks of, to the backend's; with the bar."""
    times = {name: times.kernel_ms for name, times in _times(results, cell, measured_pass).items()}
    if backend not in times:
        return ""
    peers = [milliseconds for name, milliseconds in times.items() if name not in OURS]
    words = [f"{min(peers) / times[backend]:.2f}" if peers else "no peer"]
    bar = BARS[backend, measured_pass].get(cell.feature)
    if bar is not None and cell.head_dim in (64, 128) and cell.length >= bar.shortest:
        judged = {name: times[name] for name in bar.peers if name in times}
        if judged:
            best = min(judged, key=judged.__getitem__)
            words.append(f"{judged[best] / times[backend]:.2f} of {best}{_against(judged[best] / times[backend], bar.ratio)}")
    ratio, judged_backend, passes = OWN_BARS.get(cell.feature, (0.0, "", ()))
    own_full = _times(results, cell._replace(feature="full"), measured_pass).get(backend)
    if backend == judged_backend and measured_pass in passes and own_full:
        own_ratio = own_full.kernel_ms / times[backend]
        words.append(f"{own_ratio:.2f} of its own full{_against(own_ratio, ratio)}")
    return "; ".join(words)


def _times(results: Results, cell: Cell, measured_pass: str) -> dict[str, Time]:
    found = {name: results.get((*cell, name)) for name in PROVIDERS}
    return {name: Time(*result[measured_pass]) for name, result in found.items() if isinstance(result, dict)}


def _against(ratio: float, bar: float) -> str:
    return f" ({'>=' if ratio >= bar else 'below'} {bar:g})"
