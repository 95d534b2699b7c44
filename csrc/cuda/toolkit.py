"""Finds the CUDA compiler: an installed toolkit, or the wheels that NVIDIA publishes. Needs the standard library alone.

FUSED_ATTENTION_CUDA          auto (build the CUDA kernels where an NVIDIA driver is), 1 (build them, for other machines too), 0 (do not)
FUSED_ATTENTION_CUDA_VERSION  the toolkit to take, 13.0 for example; otherwise one that the driver can run
FUSED_ATTENTION_CUDA_ARCHS    GPUs to make machine code for, "80 90" for example; otherwise 80 and this machine's GPUs. PTX for newer
                              ones is always included
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST = (12, 8)
OLDEST_ARCHITECTURE = "80"
USUAL_FOLDER = Path("/usr/local/cuda")
WHEELS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
WHEELS_VERSION = "13.0"
# There are no wheels of nvcc 12. For drivers of CUDA 12, a ptxas 12 assembles nvcc 13's PTX, which uses nothing newer.
PTXAS_WHEEL = "nvidia-cuda-nvcc-cu12==12.9.*"
PTX_OF_OLDER_PTXAS = "8.8"
# The host compiler only preprocesses the kernels: any version will do.
PTX_FLAGS = ("-ptx", "-lineinfo", "-std=c++17", "-O3", "-allow-unsupported-compiler")


class NoToolkit(Exception):
    """Why the CUDA kernels cannot, or are not to, be compiled."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: str  # its path, as that of the others
    ptxas: str
    fatbinary: str
    release: str  # of nvcc: 13.0.88
    ptxas_release: str

    @property
    def driver_version(self) -> int:
        """The CUDA version that the machine code is for, in the driver's format: 13000 is CUDA 13.0."""
        major, minor = _version(self.ptxas_release)
        return 1000 * major + 10 * minor

    @property
    def ptx_version(self) -> str | None:
        """The version that the PTX must state for an older ptxas to read it; None: as nvcc wrote it."""
        return PTX_OF_OLDER_PTXAS if self.ptxas_release != self.release else None

    def __str__(self) -> str:
        return f"nvcc {self.release}" + (f" with ptxas {self.ptxas_release}" if self.ptx_version else "")


def wanted() -> str:
    value = os.environ.get("FUSED_ATTENTION_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"FUSED_ATTENTION_CUDA must be auto, 0 or 1, is {value!r}")
    return value


def architectures(toolkit: Toolkit) -> tuple[str, ...]:
    """To make machine code for: 80 is compute capability 8.0. Those asked for, or the oldest one and those of this machine's GPUs that
    the toolkit knows."""
    text = os.environ.get("FUSED_ATTENTION_CUDA_ARCHS", "").strip()
    if not text:
        newer = sorted({number for number in gpu_architectures() if number > int(OLDEST_ARCHITECTURE)})
        return (OLDEST_ARCHITECTURE, *(str(number) for number in newer if _assembles(toolkit, number)))
    names = re.split(r"[\s,;]+", text)
    numbers = [name.removeprefix("sm_").replace(".", "") for name in names]
    for number, name in zip(numbers, names, strict=True):
        if not re.fullmatch(r"(8|9|1[0-9])[0-9][af]?", number):
            raise SystemExit(f"FUSED_ATTENTION_CUDA_ARCHS: {name!r} is no architecture from sm_80 on; an example: '80 90'")
    return tuple(dict.fromkeys(numbers))


ASK_DRIVER = """
import ctypes
cuda, count, device, number = ctypes.CDLL("libcuda.so.1"), *(ctypes.c_int() for _ in range(3))
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
for i in range(count.value):
    assert cuda.cuDeviceGet(ctypes.byref(device), i) == 0
    capability = []
    for attribute in (75, 76):  # major, minor
        assert cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device) == 0
        capability.append(number.value)
    print(10 * capability[0] + capability[1])
"""


@functools.cache
def gpu_architectures() -> list[int]:
    """Ten times the compute capability of each of this machine's GPUs. Asked in another process, because asking initializes the driver."""
    if driver_version() is None:
        return []
    try:
        asked = subprocess.run([sys.executable, "-c", ASK_DRIVER], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return []
    return [int(line) for line in asked.stdout.split()] if asked.returncode == 0 else []


def _assembles(toolkit: Toolkit, number: int) -> bool:
    """Whether the toolkit's ptxas knows an architecture: a GPU may be newer."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.ptx")
        source.write_text(".version 8.0\n.target sm_80\n.address_size 64\n")
        run = subprocess.run([toolkit.ptxas, f"-arch=sm_{number}", source, "-o", Path(folder, "probe.cubin")], capture_output=True)
    return run.returncode == 0


def asked_version() -> str | None:
    text = os.environ.get("FUSED_ATTENTION_CUDA_VERSION") or None
    if text is not None and not re.fullmatch(r"\d+\.\d+(\.\d+)?", text):
        raise SystemExit(f"FUSED_ATTENTION_CUDA_VERSION must be like 13.0, is {text!r}")
    return text


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that this machine's NVIDIA driver supports; None without a driver."""
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _places() -> Iterator[tuple[str, Path]]:
    """Where an nvcc may be, best first."""
    if home := os.environ.get("CUDA_HOME"):
        yield "CUDA_HOME", Path(home, "bin/nvcc")
    if found := shutil.which("nvcc"):
        yield "PATH", Path(found)
    if (usual := USUAL_FOLDER / "bin/nvcc").is_file():
        yield "the usual folder", usual
    for folder in sys.path:
        for path in sorted(Path(folder or ".", "nvidia").glob("cu[0-9]*/bin/nvcc")):
            yield "wheel", path


def _wheel_ptxas() -> tuple[str, str] | None:
    """Path and release of the ptxas for drivers of CUDA 12."""
    for folder in sys.path:
        path = Path(folder or ".", "nvidia/cuda_nvcc/bin/ptxas")
        if path.is_file() and (release := _release(path)):
            return str(path), release
    return None


def _version(release: str) -> tuple[int, int]:
    major, minor = release.split(".")[:2]
    return int(major), int(minor)


def _release(program: Path) -> str | None:
    try:
        text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return match[1] if match else None


def _why_unfit(release: str) -> str | None:
    """Why machine code of this release is not what was asked for, or does not run on this driver."""
    if asked := asked_version():
        return None if f"{release}.".startswith(f"{asked}.") else f"FUSED_ATTENTION_CUDA_VERSION asks for {asked}"
    driver = driver_version()
    unfit = driver is not None and _version(release)[0] > driver[0]
    return f"the driver, for CUDA {driver[0]}.{driver[1]}, does not run its code" if driver and unfit else None


def _toolkit_of(nvcc: Path) -> Toolkit:
    """NoToolkit: what is wrong with it."""
    if not nvcc.is_file():
        raise NoToolkit("is not there")
    release = _release(nvcc)
    if release is None:
        raise NoToolkit("does not run")
    if _version(release) < OLDEST:
        raise NoToolkit(f"is {release}, {OLDEST[0]}.{OLDEST[1]} or newer is needed")
    tools = {}
    for name in ("ptxas", "fatbinary"):
        paths = [folder / name for folder in (nvcc.parent, nvcc.resolve().parent) if (folder / name).is_file()]
        if not paths:
            raise NoToolkit(f"has no {name} beside it")
        tools[name] = str(paths[0])
    ptxas_release = release
    if unfit := _why_unfit(release):
        older = _wheel_ptxas()
        if older is None or _why_unfit(older[1]) or _version(older[1]) > _version(release):
            raise NoToolkit(f"is {release}, {unfit}")
        tools["ptxas"], ptxas_release = older
    if failure := _why_it_fails(nvcc):
        raise NoToolkit(f"does not work: {failure}")
    return Toolkit(str(nvcc), tools["ptxas"], tools["fatbinary"], release, ptxas_release)


def _why_it_fails(nvcc: Path) -> str:
    """Compiles an empty kernel with the headers that the kernels need."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n__global__ void probe() {}\n")
        run = subprocess.run(
            [nvcc, *PTX_FLAGS, "-arch=compute_80", source, "-o", Path(folder, "probe.ptx")], capture_output=True, text=True
        )
    lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
    return "" if run.returncode == 0 else lines[0]


@functools.cache
def find_toolkit() -> Toolkit:
    """The first nvcc that can be used: of CUDA_HOME, of PATH, of /usr/local/cuda, of wheels. NoToolkit says what is wrong with each."""
    refused = []
    for place, nvcc in _places():
        try:
            return _toolkit_of(nvcc)
        except NoToolkit as reason:
            refused.append(f"{nvcc} ({place}) {reason}")
    raise NoToolkit("; ".join(refused) or f"nvcc was not found in CUDA_HOME, in PATH, in {USUAL_FOLDER} or as a wheel")


def find_nvcc() -> str | None:
    try:
        return find_toolkit().nvcc
    except NoToolkit:
        return None


def wheel_requirements() -> list[str]:
    """The wheels to install for find_toolkit to find; none if they are not wanted or not needed."""
    if _why_unwanted() or find_nvcc() is not None:
        return []
    driver = driver_version()
    major, minor = _version(asked_version() or ("12.9" if driver and driver < (13, 0) else WHEELS_VERSION))
    if major < 13:
        return [*(f"{name}=={WHEELS_VERSION}.*" for name in WHEELS), PTXAS_WHEEL]
    return [f"{name}=={major}.{minor}.*" for name in WHEELS]


def _why_unwanted() -> str | None:
    """Why not to build the kernels, whatever compiler there is."""
    if wanted() == "0":
        return "FUSED_ATTENTION_CUDA=0 was set"
    return "this machine has no NVIDIA driver" if wanted() == "auto" and driver_version() is None else None


def toolkit_to_build_with() -> Toolkit:
    """Raises NoToolkit if the kernels are not wanted or, with FUSED_ATTENTION_CUDA=auto, cannot be compiled."""
    if unwanted := _why_unwanted():
        raise NoToolkit(unwanted)
    try:
        return find_toolkit()
    except NoToolkit as reason:
        if wanted() == "auto":
            raise NoToolkit(f"there is an NVIDIA driver, but no usable CUDA compiler ({reason})") from None
        wheels = " ".join(repr(name) for name in wheel_requirements())
        raise SystemExit(
            f"FUSED_ATTENTION_CUDA=1, but there is no CUDA compiler: {reason}.\nInstall a CUDA toolkit from {OLDEST[0]}.{OLDEST[1]} on and "
            "set CUDA_HOME; or build without --no-build-isolation, so that pip fetches the compiler's wheels; or install them into this "
            f"environment: pip install {wheels}"
        ) from None


if __name__ == "__main__":  # for the Makefile: the wheels that are missing
    print("\n".join(wheel_requirements()))
