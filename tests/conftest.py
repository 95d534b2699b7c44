"""Fixtures that every test file may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import durations
import pytest
import reference_kernels
import sample
import torch

from fused_attention.kernels import backends, replay
from fused_attention.kernels.native import cpu
from fused_attention.kernels.native import cuda as cuda_backend

pytest_plugins = ["pytester"]
collect_ignore = ["on_aarch64", "on_triton", "on_gpu"]  # runs of their own: their conftests say how

ALL_INSTRUCTION_SETS = ("base", "avx2", "avx512", "avx512_bf16", "amx")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=sample.PARTS, help="a sample of the cases of every test function, or all others")
    parser.addoption("--processor-seconds", metavar="FILE", type=Path, help="write there what every test costs")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("processor_seconds"):
        config.pluginmanager.register(durations.ProcessorSeconds(file, writes=not hasattr(config, "workerinput")))


@pytest.hookimpl(tryfirst=True)  # before -k and -m take cases away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if part := config.getoption("part"):
        sample.keep_part(config, items, part)


@pytest.fixture(autouse=True)
def _as_at_first() -> None:
    torch.manual_seed(0)
    replay.forget()


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point memory holds NaN: an element that a kernel forgets to write shows up."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args, **kwargs) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.dtype.is_floating_point else tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", poisoned(torch.Tensor.new_empty_strided))
    monkeypatch.setattr("fused_attention.kernels.call.allocators", {})


@pytest.fixture
def no_single_tile_kernels() -> Iterator[None]:
    """Short sequences, too, run on the CUDA kernels that are for any length."""
    if cuda_backend._native is None:
        yield
    else:
        with cuda_backend.single_tile_kernels(False):
            yield


@pytest.fixture
def kernels_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference stands in for the Triton kernels, so that what surrounds kernels that cover everything runs without a GPU."""
    monkeypatch.setitem(backends.BACKENDS, "triton", reference_kernels)


@pytest.fixture(params=ALL_INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set in turn, forced; one that this machine lacks is a named skip."""
    if cpu.status() is not None:
        pytest.skip(f"no CPU kernels: {cpu.status()}")
    available = cpu.instruction_sets()[1]
    if request.param not in available:
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("FUSED_ATTENTION_CPU_ISA", request.param)
    assert cpu.instruction_sets()[0] == request.param
    return request.param
