"""What this machine offers: attention backends, and the device and precision to run in."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from ...kernels import torch_internals
from ...kernels.native import cpu
from ...kernels.native import cuda as cuda_backend
from ...kernels.routing import backend_status

AUTOCAST_CHOICES = ("auto", "bf16", "fp16", "off")


class GpuFacts(NamedTuple):
    """What is known once CUDA is initialized."""

    gpus: list[str]  # one line each
    bf16_autocast: str
    backends: dict[str, str | None]  # as from routing.backend_status


def gpu_facts() -> GpuFacts:
    """If there may be a GPU, a separate process checks, because a process that has initialized CUDA cannot fork others that use it."""
    may_be_there = cuda_backend.driver() != "none" or torch.cuda.device_count() > 0
    return _asked_by_another_process() if may_be_there else _asked()


def _asked() -> GpuFacts:
    device = choose_device()
    names = cuda_backend.gpus() or [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return GpuFacts(names, f"{'pays' if bf16_pays(device) else 'does not pay'} on {device.type}", backend_status())


@functools.cache
def _asked_by_another_process() -> GpuFacts:
    program = "import json; from fused_attention.transformer.translation import machine; print(json.dumps(machine._asked()))"
    search = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=search, capture_output=True, text=True)
    if done.returncode != 0:
        reason = f"not known: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}"
        return GpuFacts([reason], reason, {"cuda": reason, "triton": reason, "cpu": cpu.status(), "reference": None})
    return GpuFacts(*json.loads(done.stdout.splitlines()[-1]))


def machine_facts() -> dict[str, str]:
    """Label -> value, one line each, in display order."""
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
    """The output of the command `info`."""
    tables = {"machine": machine_facts(), "backends": backend_lines()}
    lines = []
    for title, table in tables.items():
        lines.append(title)
        lines += [f"  {label:<15} {value}" for label, value in table.items()]
    return "\n".join(lines)


def cpu_kernels() -> str:
    """The instruction set in use and the others that can be forced, or the reason why there are no CPU kernels."""
    reason = cpu.status()
    if reason is not None:
        return f"none ({reason})"
    used, available = cpu.instruction_sets()
    others = [name for name in available if name != used]
    return f"{used} (also {', '.join(others)})" if others else used


def usable_cores() -> int:
    """Cores this process may run on; in a container, there may be fewer than the machine has."""
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


def choose_device(name: str = "auto") -> torch.device:
    """The named device; "auto" is the GPU if there is one. Raises ValueError if torch cannot use the device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def bf16_pays(device: torch.device) -> bool:
    """Whether bfloat16 autocast is faster than float32: on GPUs with bf16 tensor cores and CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return cpu.status() is None and cpu.instruction_sets()[0] == "amx"
    return False


def autocast(device: torch.device, choice: str = "auto") -> contextlib.AbstractContextManager[object]:
    """The autocast context for a choice of "auto" (bf16 where it pays), "bf16", "fp16" or "off"."""
    if choice not in AUTOCAST_CHOICES:
        raise ValueError(f"autocast must be one of {', '.join(AUTOCAST_CHOICES)}, not {choice!r}")
    if choice == "bf16" or (choice == "auto" and bf16_pays(device)):
        return torch.autocast(device.type, torch.bfloat16)
    if choice == "fp16":
        return torch.autocast(device.type, torch.float16)
    return contextlib.nullcontext()
