"""Tests of the CUDA kernels on a real GPU, which `make gpu` runs: python -m pytest tests/on_gpu."""

from __future__ import annotations

import pytest
import torch

from fused_attention.kernels.native import cuda as cuda_backend

if not torch.cuda.is_available():
    raise pytest.UsageError("these tests need a GPU")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without our CUDA kernels those of Triton can be tested."""
    if item.path.name.startswith("test_cuda") and cuda_backend.status() is not None:
        pytest.fail(f"no CUDA kernels: {cuda_backend.status()}", pytrace=False)
