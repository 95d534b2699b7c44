"""torch.distributed: DTensors sharded over batch or heads run in two processes as in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_attention.kernels.native import cpu

pytestmark = [
    pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

SCRIPT = Path(__file__).with_name("sharded_calls.py")


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Every case of tests/sharded_calls.py, in one run of two processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    files = [str(tmp_path / "rendezvous"), str(tmp_path / "results.json")]
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), *files], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    outcomes = json.loads((tmp_path / "results.json").read_text())
    assert len(outcomes) > 30
    failures = [f"{case}:\n{error}" for case, error in outcomes.items() if error]
    assert not failures, "\n\n".join(failures)
