"""What this machine is and which attention backends run on it, for `info` and for reports."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from fused_attention.kernels import cuda_backend, native, torch_internals
from fused_attention.kernels.routing import backend_status
from fused_attention.transformer.precision import bf16_pays, choose_device


def machine_facts() -> dict[str, str]:
    """Label -> value, one line each, in the order to be shown."""
    device = choose_device()
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{processor_name()}, {usable_cores()} usable cores, {torch.get_num_threads()} threads",
        "memory": memory_size(),
        "GPU": ", ".join(gpu_names()) or "none",
        "Python": platform.python_version(),
        "torch": torch.__version__ + "".join(f", slower without {name}" for name in torch_internals.missing),
        "CPU kernels": cpu_kernels(),
        "CUDA kernels": cuda_backend.compiled(),
        "NVIDIA driver": cuda_backend.driver(),
        "bf16 autocast": f"{'pays' if bf16_pays(device) else 'does not pay'} on {device.type}",
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "not set"),
    }
    return facts


def backend_lines() -> dict[str, str]:
    """Backend -> "available", or why it is not."""
    return {name: "available" if reason is None else f"not available: {reason}" for name, reason in backend_status().items()}


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


def gpu_names() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


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
