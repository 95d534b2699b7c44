"""What this machine is and which attention backends run on it, for `info` and for reports."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from fused_attention.kernels import cuda_backend, native, torch_internals
from fused_attention.kernels.routing import backend_status
from fused_attention.transformer.precision import bf16_pays, choose_device


class GpuFacts(NamedTuple):
    """What is known once CUDA is initialized."""

    gpus: list[str]  # a line each
    bf16_autocast: str
    backends: dict[str, str | None]  # as of routing.backend_status


def gpu_facts() -> GpuFacts:
    """Where a GPU may be, another process asks: one that has initialized CUDA cannot fork others that use it."""
    may_be_there = cuda_backend.driver() != "none" or torch.cuda.device_count() > 0
    return _asked_by_another_process() if may_be_there else _asked()


def _asked() -> GpuFacts:
    device = choose_device()
    names = cuda_backend.gpus() or [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return GpuFacts(names, f"{'pays' if bf16_pays(device) else 'does not pay'} on {device.type}", backend_status())


@functools.cache
def _asked_by_another_process() -> GpuFacts:
    program = "import json; from fused_attention.transformer import machine; print(json.dumps(machine._asked()))"
    search = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=search, capture_output=True, text=True)
    if done.returncode != 0:
        reason = f"not known: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}"
        return GpuFacts([reason], reason, {"cuda": reason, "triton": reason, "cpu": native.status(), "reference": None})
    return GpuFacts(*json.loads(done.stdout.splitlines()[-1]))


def machine_facts() -> dict[str, str]:
    """Label -> value, one line each, in the order to be shown."""
    gpus = gpu_facts()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{processor_name()}, {usable_cores()} usable cores, {torch.get_num_threads()} threads",
        "memory": memory_size(),
        **({f"GPU {index}": line for index, line in enumerate(gpus.gpus)} or {"GPU": "none"}),
        "Python": platform.python_version(),
        "torch": torch.__version__ + "".join(f", slower without {name}" for name in torch_internals.missing),
        "CPU kernels": cpu_kernels(),
        "CUDA kernels": cuda_backend.compiled(),
        "NVIDIA driver": cuda_backend.driver(),
        "bf16 autocast": gpus.bf16_autocast,
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "not set"),
    }


def backend_lines() -> dict[str, str]:
    """Backend -> "available", or why it is not."""
    return {name: "available" if reason is None else f"not available: {reason}" for name, reason in gpu_facts().backends.items()}


def machine_report() -> str:
    """The text of the command `info`."""
    tables = {"machine": machine_facts(), "backends": backend_lines()}
    lines = []
    for title, table in tables.items():
        lines.append(title)
        lines += [f"  {label:<15} {value}" for label, value in table.items()]
    return "\n".join(lines)


def cpu_kernels() -> str:
    """The instruction set in use and the others that could be forced; the reason if there are no native kernels."""
    reason = native.status()
    if reason is not None:
        return f"none ({reason})"
    used, available = native.instruction_sets()
    others = [name for name in available if name != used]
    return f"{used} (also {', '.join(others)})" if others else used


def usable_cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def memory_size() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError):
        return "unknown"
