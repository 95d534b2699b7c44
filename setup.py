"""Builds the compiled extension fused_attention._native; everything else about the package is in pyproject.toml.

No torch, network, git or GPU is needed at build time. Without a compiler, or on a platform the kernels were never
compiled for, the package installs without the extension and runs on the reference backend.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.append(str(ROOT))
from csrc.cuda import build_images, toolkit  # noqa: E402

CXX = os.environ.get("CXX", "g++")
X86_64 = platform.machine() in ("x86_64", "AMD64")

BINDING = ["csrc/module.cpp"]
CPU_KERNELS = ["csrc/cpu/dispatch.cpp", "csrc/cpu/isa_base.cpp"]
CPU_KERNELS_X86 = [f"csrc/cpu/isa_{name}.cpp" for name in ("avx2", "avx512", "avx512_bf16", "amx", "amx_bf16x3")]
CUDA_HOST = ["csrc/cuda/driver.cpp", "csrc/cuda/plan.cpp", "csrc/cuda/planner.cpp", "csrc/cuda/families.cpp", "csrc/cuda/sm80/plan.cpp"]
SOURCES = BINDING + CUDA_HOST + CPU_KERNELS + (CPU_KERNELS_X86 if X86_64 else [])

LINKED_PACKAGES = ("kernels", "transformer", "integrations", "benchmarks")


def why_not_native() -> str | None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64", "aarch64"):
        return f"the native kernels support Linux on x86-64 and aarch64, not {sys.platform} on {platform.machine()}"
    if shutil.which(CXX) is None:
        return f"no C++ compiler: {CXX!r} was not found (set CXX to another one)"
    return None


class NinjaBuild(build_ext):
    """Compiles through ninja: in parallel, and only what changed since the last build."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build_dir = ROOT / "build" / sysconfig.get_config_var("SOABI")
        build_dir.mkdir(parents=True, exist_ok=True)
        includes = " ".join(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"), ROOT / "csrc"))
        flags = f"-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra {includes}"
        lines = [
            "rule compile",
            f"  command = {CXX} {flags} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            f"  command = {CXX} -shared -fopenmp -Wl,--exclude-libs,ALL $in -ldl -o $out",
            "  description = link $out",
        ]
        objects = []
        for source in ext.sources:
            objects.append(source.replace("/", "_") + ".o")
            lines.append(f"build {objects[-1]}: compile {ROOT / source}")
        images = build_images.prepare(build_dir)
        objects.append("cuda/images.o")
        lines += [*images.rules, f"build {objects[-1]}: compile {images.table} | {' '.join(images.fatbins)}"]
        lines.append(f"build {target}: link {' '.join(objects)}")
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.call([sys.executable, "-m", "ninja", *jobs, "-C", str(build_dir), str(target)]) != 0:
            hint = " (FUSED_ATTENTION_CUDA=0 builds without the CUDA kernels)" if images.built else ""
            raise SystemExit(f"fused_attention: the native kernels do not compile: ninja's messages are above{hint}")
        build_images.report(images)


def packages() -> dict[str, object]:
    """The top-level folders are linked under src/fused_attention; a checkout without symlinks maps them explicitly."""
    if all((ROOT / "src/fused_attention" / name).is_dir() for name in LINKED_PACKAGES):
        return {"packages": find_namespace_packages("src"), "package_dir": {"": "src"}}
    inside = [package for name in LINKED_PACKAGES for package in (name, *(f"{name}.{p}" for p in find_namespace_packages(name)))]
    package_dir = {"fused_attention": "src/fused_attention"} | {f"fused_attention.{p}": p.replace(".", "/") for p in inside}
    return {"packages": list(package_dir), "package_dir": package_dir}


reason = why_not_native()
if reason:
    print(f"fused_attention: building without native kernels: {reason}", file=sys.stderr)
# Only pip's isolated builds install setup_requires; anywhere else setuptools would download eggs.
by_pip = "setuptools.build_meta" in sys.modules
setup(
    setup_requires=toolkit.wheel_requirements() if by_pip and not reason else [],
    ext_modules=[] if reason else [Extension("fused_attention._native", SOURCES)],
    cmdclass={"build_ext": NinjaBuild},
    package_data={"fused_attention": ["py.typed", "_native.pyi"], "fused_attention.kernels.triton": ["*.json"]},
    **packages(),
)
