"""Tests of the CUDA kernels on a real GPU, which `make gpu` runs: python -m pytest tests/on_gpu."""

from __future__ import annotations

import pytest
import torch

from fused_attention.kernels import cuda_backend

if not torch.cuda.is_available():
    raise pytest.UsageError("these tests need a GPU")
if cuda_backend.status() is not None:
    raise pytest.UsageError(f"no CUDA kernels: {cuda_backend.status()}")
