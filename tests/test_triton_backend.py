"""What the Triton backend says on machines where it cannot run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from fused_attention import attention, explain
from fused_attention.kernels import ops
from fused_attention.kernels.torch_internals import release
from fused_attention.kernels.triton import backend as triton_backend

CALL = "import torch\nfrom fused_attention import attention, explain\nquery = torch.randn(1, 1, 8, 16)\n"


def output_of(script: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=inherited | environment, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    triton_backend._machine_reason.cache_clear()
    yield
    triton_backend._machine_reason.cache_clear()


def test_no_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if triton_backend.interpreted():
        pytest.skip("the interpreter needs no GPU")
    query = torch.randn(1, 1, 8, 16)
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call: the tensors are on cpu, not on a GPU"):
        attention(query, query, query, backend="triton")
    assert explain(query, query, query).reasons["triton"] == ["the tensors are on cpu, not on a GPU"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_backend.status() == "torch sees no GPU"


def test_an_old_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert triton_backend.status() == "compute capability 7.5 is below 8.0"
    triton_backend._machine_reason.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert triton_backend.status() is None


BLOCKER = "import sys; sys.modules['triton'] = None\n"  # for Python: there is none; torch, too, asks


def test_a_missing_triton_is_a_reason() -> None:
    script = (
        "print(explain(query, query, query).reasons['triton'][0])\n"
        "from fused_attention.kernels import routing\n"
        "print(routing.backend_status()['triton'])\n"
        "attention(query.requires_grad_(), query, query).sum().backward()\n"
        "try:\n"
        "    attention(query, query, query, backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    missing = "Triton is not installed (import of triton halted; None in sys.modules)"
    reason, status, error = output_of(BLOCKER + CALL + script).splitlines()
    assert reason == "the tensors are on cpu, not on a GPU"  # said first, so that no CPU call imports Triton
    assert status.startswith(missing)
    assert error.startswith(f"backend 'triton' cannot run this call: {reason}")
    reason, status, error = output_of(BLOCKER + CALL + script, TRITON_INTERPRET="1").splitlines()
    assert reason == status
    assert status.startswith(missing)
    assert error.startswith(f"backend 'triton' cannot run this call: {missing}")


def test_cpu_calls_import_neither_triton_nor_dynamo() -> None:
    """They take seconds to import."""
    script = "attention(query, query, query)\nimport sys\nprint({'triton', 'torch._dynamo'} & set(sys.modules))\n"
    assert output_of(CALL + script) == "set()"


def test_the_interpreter_runs_only_by_name() -> None:
    triton = pytest.importorskip("triton")
    if release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 takes no loop bound from NumPy 2.4; tests/on_triton mend it")
    script = (
        "print(explain(query, query, query).reasons['triton'])\n"
        "print(torch.allclose(attention(query, query, query, backend='triton'), attention(query, query, query), atol=1e-5))\n"
        "from fused_attention.kernels.triton import backend as triton_backend\n"
        "print(triton_backend.status())\n"
    )
    reasons, same, status = output_of(CALL + script, TRITON_INTERPRET="1").splitlines()
    assert reasons == "[\"Triton is interpreted (TRITON_INTERPRET=1), which only backend='triton' asks for\"]"
    assert (same, status) == ("True", "None")


def test_keys_that_no_query_head_reads_have_zero_gradients() -> None:
    pytest.importorskip("triton")
    script = (
        "for num_heads_kv in (0, 2):\n"
        "    query = torch.randn(2, 0, 8, 16, requires_grad=True)\n"
        "    key = torch.randn(2, num_heads_kv, 9, 16, requires_grad=True)\n"
        "    mask = torch.randn(8, 9, requires_grad=True)\n"
        "    out = attention(query, key, key, attn_mask=mask, backend='triton')\n"
        "    print([int(gradient.count_nonzero()) for gradient in torch.autograd.grad(out.sum(), (query, key, mask))])\n"
    )
    assert output_of(CALL + script, TRITON_INTERPRET="1").splitlines() == ["[0, 0, 0]"] * 2


def test_kernels_run_with_the_tensors_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of different kinds have different tiles."""
    current, seen = [0], []

    class Query:
        is_cuda = True
        device = torch.device("cuda", 1)

        def get_device(self) -> int:
            return 1

    class Problem:
        query = key = value = Query()

        def kind(self) -> tuple:
            return ()

        def optional_tensors(self) -> tuple:
            return ()

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    class Kernels:
        def takes(self, problem: object) -> bool:
            return False

        def __getattr__(self, name: str) -> object:
            return lambda *arguments: seen.append((name, current[0]))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton_backend, "_module", lambda name: Kernels())
    problem: Any = Problem()
    kernels = types.SimpleNamespace(prepare=lambda problem: lambda *tensors: seen.append(("forward", current[0])) or "results")
    ops.forward(kernels, problem)
    triton_backend.backward(problem, *[None] * 5)
    triton_backend.attention_weights(problem, None, False)
    triton_backend.prepared_tiles(problem, True)
    assert seen == [("forward", 1), ("backward", 1), ("attention_weights", 1), ("prepared_tiles", 1)]
    assert current == [0]
    assert not triton_backend._is_elsewhere(torch.zeros(1))


def test_the_interpreter_is_not_trusted_with_bfloat16() -> None:
    """Unless its products are mended first, as tests/triton_interpreter.py does."""
    pytest.importorskip("triton")
    program = """
import torch
from fused_attention.kernels.triton import backend as triton_backend
from fused_attention.kernels.checks import make_problem
for dtype in (torch.float16, torch.bfloat16):
    query = torch.zeros(1, 1, 4, 16, dtype=dtype)
    print(triton_backend.unsupported_reasons(make_problem("separate", (query, query, query))))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found[0] == "[]"
    assert "bit patterns of bfloat16" in found[1]
