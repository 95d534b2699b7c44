"""Times calls on a GPU in both ways that matter: what they cost the GPU, and what they cost the host that issues them.

The GPU's share is the time between two events around the replay of a CUDA graph that holds the call, many times if it is short, so that
neither the host nor the gaps between launches are in it. The host's share is the time until an eager call returns.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

L2_BYTES = 2**28  # more than any L2 cache holds
LEAST_MS = 0.5  # of a graph: events tick in microseconds or less
MOST_CALLS = 50  # in a graph, or in a round of eager calls
MIN_ROUNDS, MAX_ROUNDS = 5, 200
GRAPH = "graph"
GPU_LOST = 3  # exit status of a program after an illegal access, which its next process goes on from
STATE_FIELDS = {  # of nvidia-smi: what they are called here
    "clocks.sm": "SM MHz",
    "clocks.mem": "memory MHz",
    "power.draw": "W",
    "temperature.gpu": "C",
    "clocks_throttle_reasons.active": "throttled",
}


class Time(NamedTuple):
    kernel_ms: float  # of the GPU
    call_ms: float  # of the host
    by: str  # how the GPU's was taken: GRAPH, or why by events around an eager call


@contextlib.contextmanager
def timing_stream(device: str) -> Iterator[None]:
    """A stream that is not the default one, without which there are no graphs. Autograd runs a backward on its forward's stream: both
    belong in here.
    """
    if device != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()


def timed(functions: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, Time]:
    """Medians of rounds in which the functions, which have run before, take turns for so many seconds; within a timing_stream."""
    on_gpu = device == "cuda"
    samplers = {name: _graph_sampler(function) if on_gpu else (partial(_on_host, function, 1), "") for name, function in functions.items()}
    flush = torch.empty(L2_BYTES if on_gpu else 1, dtype=torch.int8, device=device)

    def sample(name: str) -> float:
        flush.zero_()  # also keeps the GPU busy while the host gets there
        return samplers[name][0]()

    kernel_ms = _rounds(list(functions), sample, seconds)
    counts = {name: max(1, min(MOST_CALLS, int(10.0 / max(kernel_ms[name], 1e-3)))) for name in functions}

    def sample_call(name: str) -> float:
        if on_gpu:
            torch.cuda.synchronize()  # so that no launch waits for a place in the queue
        return _on_host(functions[name], counts[name])

    call_ms = _rounds(list(functions), sample_call, seconds / 4) if on_gpu else kernel_ms
    return {name: Time(kernel_ms[name], call_ms[name], samplers[name][1]) for name in functions}


def _rounds(names: list[str], sample: Callable[[str], float], seconds: float) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in names}
    start, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (time.perf_counter() - start < seconds and rounds < MAX_ROUNDS):
        for name in names:
            samples[name].append(sample(name))
        rounds += 1
    return {name: statistics.median(values[1:]) for name, values in samples.items()}


def _graph_sampler(function: Callable[[], Any]) -> tuple[Callable[[], float], str]:
    """What takes a sample, in milliseconds of the GPU per call, and how."""
    try:
        once = _captured(function, 1)
    except RuntimeError as error:
        return partial(_between_events, function, 1), f"events: {reason(error)}"
    once.replay()  # the first one uploads the graph
    calls = min(MOST_CALLS, math.ceil(LEAST_MS / max(_between_events(once.replay, 1), 1e-3)))
    graph = _captured(function, calls) if calls > 1 else once
    graph.replay()
    return partial(_between_events, graph.replay, calls), GRAPH


def _captured(function: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    """torch.cuda.graph() also collects garbage and empties the caches, which takes longer than the measurement."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        for _ in range(calls):
            function()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the capture is invalid; what made it so is raised
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def _between_events(run: Callable[[], Any], calls: int) -> float:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / calls


def _on_host(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return 1e3 * (time.perf_counter() - start) / calls


def reason(error: BaseException) -> str:
    """In one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


def is_lost() -> bool:
    """After an illegal access every call to the GPU fails until the process ends."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def gpu_state() -> dict[str, str]:
    """Clocks, power, temperature and reasons for lower clocks, as nvidia-smi reads them; {"unknown": why} where it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"unknown": "there is no nvidia-smi"}
    which = f"--id=GPU-{str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix('GPU-')}"
    words = [program, which, f"--query-gpu={','.join(STATE_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"unknown": reason(error)}
    values = [value.strip() for value in run.stdout.strip().split(",")]
    if run.returncode != 0 or len(values) != len(STATE_FIELDS):
        return {"unknown": (run.stdout + run.stderr).strip().splitlines()[0] if (run.stdout + run.stderr).strip() else "no answer"}
    return dict(zip(STATE_FIELDS.values(), values, strict=True))


def ceilings(device: str = "cuda") -> dict[str, float]:
    """What the GPU can do at most, measured: TB/s of a copy, read and written, and TFLOP/s of a bfloat16 product of random matrices."""
    source = torch.randn(2**28 if device == "cuda" else 2**10, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    size = 8192 if device == "cuda" else 64
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    functions: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    for function in functions.values():
        function()
    times = timed(functions, device, 0.2)
    return {
        "copy TB/s": float(f"{2 * source.nbytes / times['copy'].kernel_ms / 1e9:.3g}"),
        "product TFLOP/s": float(f"{2 * size**3 / times['product'].kernel_ms / 1e9:.3g}"),
    }
