"""The GPU's and the host's time of a call, on a GPU of which only the clock is real to torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fused_attention.benchmarks import gpu_timing
from fused_attention.benchmarks.gpu_timing import GRAPH, STATE_FIELDS, gpu_state, is_lost, timed


class FakeGpu:
    """Its kernels take a given time each; a launch outside of a graph costs a gap besides."""

    GAP = 0.01

    def __init__(self) -> None:
        self.now = 0.0  # ms
        self.captured: list[float] | None = None
        self.graphs: list[FakeGraph] = []

    def kernel(self, milliseconds: float) -> None:
        if self.captured is not None:
            self.captured.append(milliseconds)
        else:
            self.now += self.GAP + milliseconds


class FakeGraph:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.kernels: list[float] = []
        gpu.graphs.append(self)

    def capture_begin(self) -> None:
        self.gpu.captured = []

    def capture_end(self) -> None:
        assert self.gpu.captured is not None
        self.kernels, self.gpu.captured = self.gpu.captured, None

    def replay(self) -> None:
        self.gpu.now += sum(self.kernels)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = gpu.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, later: Event) -> float:
            return later.time - self.time

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(gpu))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    flush = SimpleNamespace(zero_=lambda: gpu.kernel(0.3))
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: flush)
    return gpu


def test_a_short_call_is_timed_many_times_in_a_graph(gpu: FakeGpu) -> None:
    times = timed({"short": lambda: gpu.kernel(0.02), "long": lambda: gpu.kernel(3.0)}, "cuda", 0.0)
    assert times["short"].kernel_ms == pytest.approx(0.02)  # neither gaps nor the flush
    assert times["long"].kernel_ms == pytest.approx(3.0)
    assert [time.by for time in times.values()] == [GRAPH, GRAPH]
    assert [len(graph.kernels) for graph in gpu.graphs] == [1, 25, 1]
    assert 0 < times["short"].call_ms < 1.0  # of the real clock


def test_what_cannot_be_captured_is_timed_by_events_and_says_why(gpu: FakeGpu) -> None:
    def synchronizing() -> None:
        if gpu.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        gpu.kernel(0.5)

    times = timed({"it": synchronizing, "other": lambda: gpu.kernel(1.0)}, "cuda", 0.0)
    assert times["it"].by == "events: RuntimeError: operation not permitted when stream is capturing"
    assert times["it"].kernel_ms == pytest.approx(0.5 + FakeGpu.GAP)
    assert times["other"].by == GRAPH
    assert gpu.captured is None


def test_the_ceilings_of_a_cpu_are_numbers() -> None:
    assert all(value > 0 for value in gpu_timing.ceilings("cpu").values())


def test_a_lost_gpu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not is_lost()
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert is_lost()


def nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path, text: str, status: int = 0) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{text}'\necho \"$@\" > {tmp_path}/asked\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-5678"))


def test_clocks_and_power_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    nvidia_smi(monkeypatch, tmp_path, "1980, 3201, 412.50, 44, 0x0000000000000000")
    assert gpu_state() == {"SM MHz": "1980", "memory MHz": "3201", "W": "412.50", "C": "44", "throttled": "0x0000000000000000"}
    asked = (tmp_path / "asked").read_text()
    assert "--id=GPU-1234-5678" in asked
    assert ",".join(STATE_FIELDS) in asked


def test_an_nvidia_smi_that_does_not_answer_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    nvidia_smi(monkeypatch, tmp_path, "No devices were found", status=6)
    assert gpu_state() == {"unknown": "No devices were found"}
    monkeypatch.setattr(gpu_timing.shutil, "which", lambda name: None)
    assert gpu_state() == {"unknown": "there is no nvidia-smi"}
    monkeypatch.setattr(gpu_timing.shutil, "which", lambda name: "/nowhere/nvidia-smi")
    assert "FileNotFoundError" in gpu_state()["unknown"]
