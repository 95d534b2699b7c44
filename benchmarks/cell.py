"""One cell of the benchmarks: the times of ours and of every peer on the same inputs. Cells are kept in files, a line of JSON each."""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..kernels.native import cpu
from ..transformer.translation.machine import processor_name, usable_cores
from ..transformer.translation.output_files import atomic_write

OURS = "ours"
PACKAGES = ("torch", "onnxruntime", "openvino", "transformers", "ctranslate2", "numpy")  # whose versions a run keeps


class UnusableFile(ValueError):
    """A file that holds no cells, or none that this version can read."""


@dataclass(frozen=True)
class Time:
    """Of one call, over rounds in which all took turns: median and quartiles in milliseconds."""

    ms: float
    low: float
    high: float
    rounds: int
    peak_mb: float | None = None  # MB (10^6 bytes) that a call takes while it runs, None where the system does not say

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, relative to the median."""
        return (self.high - self.low) / (2 * self.ms) if self.ms else 0.0


def summary(seconds: Sequence[float], peak_mb: float | None = None) -> Time:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
    return Time(1e3 * middle, 1e3 * low, 1e3 * high, len(seconds), peak_mb)


@dataclass(frozen=True)
class Cell:
    """What was measured of one case of a suite."""

    suite: str
    case: dict[str, str]  # column title -> value; the same titles throughout a suite
    measure: str  # what was timed, such as "forward"
    times: dict[str, Time]  # by name, OURS among them
    missing: dict[str, str] = field(default_factory=dict)  # peer -> why it has no time
    work: float = 0.0  # of a call: 10^9 floating point operations or bytes, or tokens
    unit: str = ""  # of the rate: GFLOP/s, GB/s or tokens/s
    roof: float | None = None  # the rate of a plain product, or of a copy, in the same rounds
    bars: dict[str, float] = field(default_factory=dict)  # peer -> the ratio that is meant to be reached
    traffic: float = 0.0  # GB that a call must read and write at least, where its place under the roofs is to be shown
    gflop: float = 0.0  # of a call, where `work` counts something else
    busy: str = ""  # what else the machine did

    def ratio(self, peer: str) -> float:
        """How many times faster ours is."""
        return self.times[peer].ms / self.times[OURS].ms

    def ratios(self) -> dict[str, float]:
        return {peer: self.ratio(peer) for peer in self.times if peer != OURS}

    def noise(self, peer: str) -> float:
        """By which part the ratio may differ in another run for no reason: the spreads of both times."""
        return self.times[OURS].spread + self.times[peer].spread

    def rate(self, name: str = OURS) -> float | None:
        return self.work / self.times[name].ms * 1e3 if self.work else None

    def flops(self) -> float:
        """GFLOP of a call."""
        return self.gflop or (self.work if self.unit == "GFLOP/s" else 0.0)

    def share(self, name: str = OURS) -> float | None:
        """Of the roof."""
        rate = self.rate(name)
        return rate / self.roof if rate and self.roof else None


def from_json(record: dict[str, Any]) -> Cell:
    return Cell(**record | {"times": {name: Time(**time) for name, time in record["times"].items()}})


def machine_line() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    missing = cpu.status()
    kernels = f"CPU kernels: {cpu.instruction_sets()[0]}" if missing is None else f"no CPU kernels ({missing})"
    return f"{processor_name()}, {torch.get_num_threads()} threads; torch {torch.__version__} ({capability}); {kernels}"


def machine_facts(isa: str | None) -> dict[str, Any]:
    """What a run was measured on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    day = time.strftime("%Y-%m-%d")
    return {"machine": machine_line(), "cores": usable_cores(), "isa": isa, "commit": commit(), "versions": versions, "date": day}


def commit() -> str:
    """Of the checkout that this file is in."""
    here = Path(__file__).resolve().parent
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown (no git)"
    return git.stdout.strip() or "not from a checkout"


def begin(path: Path, isa: str | None = None) -> None:
    """Starts a file of cells with what they were measured on."""
    if not path.exists():
        atomic_write(path, f"{json.dumps(machine_facts(isa))}\n".encode())


def append(path: Path, name: str, cell: Cell) -> None:
    """Whatever kills the run, the file is whole, with this cell or without it. Raises OSError."""
    line = json.dumps({"name": name, "cell": asdict(cell)})
    atomic_write(path, path.read_bytes() + f"{line}\n".encode())


@dataclass(frozen=True)
class Run:
    """A file of cells."""

    facts: dict[str, Any]  # of machine_facts()
    cells: dict[str, Cell]  # by the name of the benchmark


def read(path: Path) -> Run:
    """Raises OSError or UnusableFile."""
    try:
        head, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not isinstance(head, dict) or "machine" not in head:
            raise ValueError("its first line does not name a machine")
        return Run(head, {record["name"]: from_json(record["cell"]) for record in records})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnusableFile(f"{path} is not a file of benchmark results: {error or type(error).__name__}") from error
