"""torch.distributed: DTensors sharded over batch or heads run in two processes as in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_attention.kernels import native

pytestmark = [
    pytest.mark.skipif(native.status() is not None, reason=f"no native kernels: {native.status()}"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

SCRIPT = Path(__file__).with_name("sharded_calls.py")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What every case in tests/sharded_calls.py came to, from one run of two processes."""
    folder = tmp_path_factory.mktemp("sharding")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT)]
    files = [str(folder / "rendezvous"), str(folder / "results.json")]
    processes = [subprocess.Popen([*command, str(rank), *files], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return json.loads((folder / "results.json").read_text())


def names() -> list[str]:
    if not torch.distributed.is_available():
        return []
    import sharded_calls

    return [*sharded_calls.CASES, *sharded_calls.OTHERS]


@pytest.mark.parametrize("case", names())
def test_two_processes_give_what_one_gives(case: str, outcomes: dict[str, str | None]) -> None:
    if outcomes[case]:
        pytest.fail(outcomes[case])
