"""The build of the CUDA kernels: the list of instances, what is generated from it, which compiler is taken, what is compiled again."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import standin_driver
from emulator import find_nvcc
from emulator.build import CXX

from csrc.cuda import build_images, toolkit
from csrc.cuda.build_images import Cost
from csrc.cuda.instances import manifest
from csrc.cuda.instances.manifest import INSTANCES
from fused_attention.kernels.native import cuda as cuda_backend

ROOT = Path(__file__).resolve().parents[1]
HEAD_DIMS = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)]
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc was not found (CUDA_HOME, PATH, wheels)")


# The list of instances


def test_every_head_dim_dtype_and_class_has_its_instance() -> None:
    def kinds(pass_name: str) -> list[tuple]:
        rows = [row for row in INSTANCES if row.pass_name == pass_name]
        return sorted((row.head_dim_qk, row.head_dim_v, row.dtype, row.feature_class, row.dropout) for row in rows)

    classes = [("plain", False), ("plain", True), ("masked", False), ("bias", False)]
    assert kinds("forward") == sorted((*dims, dtype, *kind) for dims, dtype, kind in product(HEAD_DIMS, ("bf16", "fp16"), classes))
    single_tile = sorted((*dims, dtype, kind, False) for dims, dtype, kind in product(HEAD_DIMS[:4], ("bf16", "fp16"), ("masked", "bias")))
    assert kinds("single_tile_forward") == kinds("single_tile_backward") == single_tile
    assert kinds("decode") == sorted((*dims, dtype, "masked", False) for dims, dtype in product(HEAD_DIMS, ("bf16", "fp16")))


def test_instances_keep_to_the_limits() -> None:
    assert max(Counter(row.name for row in INSTANCES).values()) == 1
    assert max(Counter((row.family, row.pass_name) for row in INSTANCES).values()) <= 60
    for row in INSTANCES:
        # Where the backward in one pass does not fit, there are two passes.
        most = manifest.LARGE_SHARED_BYTES if row.pass_name == "backward" else manifest.SMALL_SHARED_BYTES
        assert row.shared_bytes <= most, row.name
        assert row.shared_bytes % 16 == 0, row.name
        assert row.num_threads <= 1024, row.name
        if row.pass_name == "forward":  # the tiles of masks are lists for blocks of so many rows, of 64 keys: whole or in halves
            assert row.block_m in (64, 128), row.name
            assert row.block_n in (32, 64), row.name


def test_a_name_says_what_the_instance_is() -> None:
    names = {row.name for row in INSTANCES}
    assert {"sm80_forward_192x128_bf16_plain_dropout", "sm80_forward_32x32_fp16_bias", "sm80_decode_256x256_fp16"} < names
    assert {"combine_bf16", "mask_tiles_merge"} < names
    row = next(row for row in INSTANCES if row.name == "sm80_forward_192x128_bf16_plain_dropout")
    assert (row.head_dim_qk, row.head_dim_v, row.dtype, row.feature_class, row.dropout) == (192, 128, "bf16", "plain", True)


@pytest.mark.skipif(not cuda_backend.compiled()[0].isdigit(), reason=f"built without CUDA: {cuda_backend.compiled()}")
def test_the_extension_has_every_instance_and_its_ptx() -> None:
    assert cuda_backend._native.cuda_images() == [row.name for row in manifest.INSTANCES]
    folder = ROOT / "build" / str(sysconfig.get_config_var("SOABI")) / "cuda"
    for row in manifest.INSTANCES:
        assert f".entry {row.name}(" in (folder / f"{row.image}.ptx").read_text()


# Generated sources


READ_TABLE = """
#include <cstdio>
#include "cuda/images.h"
using namespace fused_attention::cuda;
int main() {
  for (int i = 0; i < kNumImages; ++i) {
    const Image& image = kImages[i];
    std::printf("%s %d %d %d %d %d %d %d %d %d %d %.*s\\n", image.name, int(image.pass), image.head_dim_qk, image.head_dim_v,
                int(image.dtype), int(image.feature_class), int(image.dropout), image.block_m, image.block_n, image.num_threads,
                image.shared_bytes, int(image.end - image.begin), reinterpret_cast<const char*>(image.begin));
  }
  for (int i = 0; i < kNumMachineCode; ++i) {
    const MachineCode& code = kMachineCode[i];
    std::printf("sm_%d%.*s ", code.compute_capability, int(code.suffix != 0), &code.suffix);
  }
  std::printf("%d %s|%s\\n", kToolkitVersion, kBuilt, kWhyNoImages ? kWhyNoImages : "-");
}
"""


def read_table(folder: Path) -> list[str]:
    """Compiles folder/cuda/images.cpp and prints what C++ sees of it."""
    (folder / "main.cpp").write_text(READ_TABLE)
    command = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", "main.cpp", "cuda/images.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)
    return subprocess.run([folder / "main"], capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_table_holds_the_rows_and_the_images(tmp_path: Path) -> None:
    rows = [row for row in INSTANCES if row.name in ("sm80_forward_192x128_bf16_plain_dropout", "sm80_decode_64x64_fp16")]
    rows += [row for row in INSTANCES if row.image == "mask_tiles"]
    (tmp_path / "cuda").mkdir()
    for image in manifest.image_names(rows):
        (tmp_path / f"cuda/{image}.fatbin").write_text(f"bytes of {image}")
    (tmp_path / "cuda/images.cpp").write_text(
        manifest.table_source(rows, architectures=["80", "90a"], toolkit_version=13000, built='nvcc "13.0"')
    )
    forward, decode, *helpers, last = read_table(tmp_path)
    name = "sm80_forward_192x128_bf16_plain_dropout"
    row = rows[0]
    numbers = f"{row.block_m} {row.block_n} {row.num_threads} {row.shared_bytes}"
    assert forward == f"{name} 0 192 128 1 0 1 {numbers} bytes of {name}"
    assert decode.startswith("sm80_decode_64x64_fp16 1 64 64 2 1 0 ")
    assert [line.split()[0] for line in helpers] == [f"mask_tiles_{step}" for step in ("classify", "list", "keys", "merge")]
    assert all(line.endswith(" bytes of mask_tiles") for line in helpers)
    assert last == 'sm_80 sm_90a 13000 nvcc "13.0"|-'


def test_without_cuda_the_table_is_empty_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", "0")
    images = build_images.prepare(tmp_path)
    assert images.rules == images.fatbins == []
    assert [path.name for path in (tmp_path / "cuda").iterdir()] == ["images.cpp"]
    (line,) = read_table(tmp_path)
    assert line.startswith("0 |the CUDA kernels are not built: FUSED_ATTENTION_CUDA=0 was set")


# Compiling

ENTRY = """
#include "shared.h"
#include "{cuda}/row.cuh"
#include "{cuda}/shared_memory.cuh"
using namespace fused_attention::cuda;
template struct SharedBytes<{shared_bytes}, Row::kSharedBytes>;
extern "C" __global__ void __launch_bounds__(Row::kThreads, Row::kBlocksPerSm) ROW_NAME(float* out) {{ out[threadIdx.x] = kNumber; }}
"""


class SmallBuild:
    """Two images from entry files of their own, which include a header of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.csrc = folder / "build", folder / "csrc"
        self.csrc.mkdir()
        self.shared = self.csrc / "shared.h"
        self.shared.write_text("#pragma once\nconstexpr float kNumber = 3;\n")
        rows = [row for row in INSTANCES if row.name in ("sm80_forward_64x64_bf16_plain", "sm80_forward_64x64_fp16_plain")]
        self.rows = [replace(row, source=f"{row.dtype}.cu") for row in rows]
        for row in self.rows:
            entry = ENTRY.format(cuda=ROOT / "csrc/cuda", shared_bytes=row.shared_bytes)
            (self.csrc / row.source).write_text(entry)
        monkeypatch.setenv("FUSED_ATTENTION_CUDA", "1")
        monkeypatch.setattr(build_images, "CSRC", self.csrc)
        monkeypatch.setattr(build_images, "INSTANCES", self.rows)

    def run(self) -> build_images.Images:
        self.images = build_images.prepare(self.folder)
        (self.folder / "build.ninja").write_text("\n".join(self.images.rules) + "\n")
        ninja = subprocess.run([sys.executable, "-m", "ninja", "-j2", "-C", self.folder], capture_output=True, text=True)
        self.output = ninja.stdout + ninja.stderr
        return self.images

    def compiled(self) -> int:
        """How many images the build compiles now."""
        self.run()
        assert "FAILED" not in self.output, self.output
        return sum(line.startswith("[") for line in self.output.splitlines())


@pytest.fixture
def small_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallBuild:
    return SmallBuild(tmp_path, monkeypatch)


@needs_nvcc
def test_only_what_changed_is_compiled(small_build: SmallBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_build.compiled() == 2
    assert small_build.compiled() == 0
    (small_build.csrc / "bf16.cu").touch()
    assert small_build.compiled() == 1
    assert "sm80_forward_64x64_bf16_plain" in small_build.output
    small_build.shared.touch()
    assert small_build.compiled() == 2
    small_build.rows[0] = replace(small_build.rows[0], blocks_per_sm=3)
    assert small_build.compiled() == 1
    monkeypatch.setenv("FUSED_ATTENTION_CUDA_ARCHS", "sm_80 9.0")
    assert small_build.compiled() == 2


@needs_nvcc
def test_an_image_and_what_lies_beside_it(small_build: SmallBuild, capsys: pytest.CaptureFixture[str]) -> None:
    images = small_build.run()
    name = small_build.rows[0].name
    assert f".entry {name}(" in (images.folder / f"{name}.ptx").read_text()
    assert "0 bytes spill stores" in (images.folder / f"{name}.log").read_text()
    rows = build_images.costs(images.folder, [row.image for row in small_build.rows])
    assert [row.image for row in rows] == [row.name for row in small_build.rows]
    for row in rows:
        assert 0.05 < row.seconds < build_images.MAX_SECONDS
        assert row.architectures == 1
        assert row.kilobytes == pytest.approx((images.folder / f"{row.image}.fatbin").stat().st_size / 1024, abs=0.1)


@needs_nvcc
def test_other_shared_memory_than_the_manifest_says_does_not_compile(small_build: SmallBuild) -> None:
    small_build.rows[0] = replace(small_build.rows[0], shared_bytes=small_build.rows[0].shared_bytes + 16)
    small_build.run()
    assert "manifest.py has another number of bytes of shared memory" in small_build.output
    assert "BYTES=49152, IN_MANIFEST=49168" in small_build.output
    assert "FAILED" in small_build.output


@needs_nvcc
def test_ptx_for_an_older_assembler(small_build: SmallBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replace(toolkit.find_toolkit(), ptxas_release="12.9.86")
    monkeypatch.setattr(build_images, "toolkit_to_build_with", lambda: found)
    images = small_build.run()
    assert "FAILED" not in small_build.output, small_build.output
    assert images.built.startswith(f"nvcc {found.release} with ptxas 12.9.86, ")
    for row in small_build.rows:
        assert "\n.version 8.8\n" in (images.folder / f"{row.image}.ptx").read_text()
    assert "kToolkitVersion = 12090;" in images.table.read_text()


def test_limits_of_an_image() -> None:
    fine = [Cost("a", 12.0, 250.0, 1), Cost("b", 0.1, 1.0, 1), Cost("c", 24.0, 500.0, 2)]
    assert build_images.over_limits(fine) == []
    slow, large = build_images.over_limits([*fine, Cost("slow", 12.01, 10.0, 1), Cost("large", 1.0, 500.1, 2)])
    assert slow == "slow: 12.01 seconds of processor time, at most 12 are allowed"
    assert large == "large: 500.1 kilobytes, at most 500 are allowed"


@needs_nvcc
def test_a_build_over_the_limits_is_reported_as_any_other(
    small_build: SmallBuild, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_CUDA_ARCHS", "80 90")
    monkeypatch.setattr(build_images, "MAX_SECONDS", 0.0)
    images = small_build.run()
    rows = build_images.costs(images.folder, [row.image for row in small_build.rows])
    assert [row.architectures for row in rows] == [2, 2]
    assert len(build_images.over_limits(rows)) == 2
    build_images.report(images)
    assert "machine code for sm_80, sm_90, PTX for compute_80: 2 images" in capsys.readouterr().err


# Which compiler


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without nvcc and without a driver."""
    for name in ("CUDA_HOME", "FUSED_ATTENTION_CUDA", "FUSED_ATTENTION_CUDA_VERSION", "FUSED_ATTENTION_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(toolkit, "USUAL_FOLDER", tmp_path / "usual")
    monkeypatch.setattr(toolkit, "driver_version", lambda: None)
    monkeypatch.setattr(toolkit, "find_toolkit", toolkit.find_toolkit.__wrapped__)
    return tmp_path


def install(folder: Path, release: str, *, tools: tuple[str, ...] = ("nvcc", "ptxas", "fatbinary"), works: bool = True) -> Path:
    folder.mkdir(parents=True)
    otherwise = "exit 0" if works else "echo 'fatal error: no headers' >&2; exit 1"
    for name in tools:
        program = folder / name
        program.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "release, V{release}"; else {otherwise}; fi\n')
        program.chmod(0o755)
    return folder / "nvcc"


def refusal() -> str:
    with pytest.raises(toolkit.NoToolkit) as refused:
        toolkit.find_toolkit()
    return str(refused.value)


def test_no_nvcc_anywhere(machine: Path) -> None:
    assert refusal() == f"nvcc was not found in CUDA_HOME, in PATH, in {machine}/usual or as a wheel"
    assert toolkit.find_nvcc() is None


def test_cuda_home_is_before_path_is_before_the_usual_folder_is_before_wheels(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = install(machine / "site/nvidia/cu13/bin", "13.0.88")
    assert toolkit.find_nvcc() == str(wheel)
    usual = install(machine / "usual/bin", "13.0.48")
    assert toolkit.find_nvcc() == str(usual)
    path = install(machine / "path", "12.8.61")
    assert toolkit.find_nvcc() == str(path)
    home = install(machine / "home/bin", "13.1.10")
    monkeypatch.setenv("CUDA_HOME", str(machine / "home"))
    assert toolkit.find_nvcc() == str(home)
    assert toolkit.find_toolkit().driver_version == 13010


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"release": "12.4.131"}, "is 12.4.131, 12.8 or newer is needed"),
        ({"release": "x"}, "does not run"),
        ({"release": "13.0.88", "tools": ("nvcc", "fatbinary")}, "has no ptxas beside it"),
        ({"release": "13.0.88", "works": False}, "does not work: fatal error: no headers"),
    ],
)
def test_an_nvcc_that_will_not_do(machine: Path, options: dict, reason: str) -> None:
    nvcc = install(machine / "path", **options)
    assert refusal() == f"{nvcc} (PATH) {reason}"
    wheel = install(machine / "site/nvidia/cu13/bin", "13.0.88")
    assert toolkit.find_nvcc() == str(wheel)


def test_a_cuda_home_without_nvcc_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(machine / "nowhere"))
    assert refusal() == f"{machine}/nowhere/bin/nvcc (CUDA_HOME) is not there"


def test_the_toolkit_follows_the_driver(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine / "path", "13.0.88")
    monkeypatch.setattr(toolkit, "driver_version", lambda: (12, 4))
    assert "is 13.0.88, the driver, for CUDA 12.4, does not run its code" in refusal()
    install(machine / "site/nvidia/cuda_nvcc/bin", "12.9.86", tools=("ptxas",))
    found = toolkit.find_toolkit()
    assert found.ptxas == str(machine / "site/nvidia/cuda_nvcc/bin/ptxas")
    assert (found.release, found.driver_version, found.ptx_version) == ("13.0.88", 12090, "8.8")
    assert str(found) == "nvcc 13.0.88 with ptxas 12.9.86"
    monkeypatch.setattr(toolkit, "driver_version", lambda: (13, 2))
    assert toolkit.find_toolkit().ptx_version is None


def test_a_version_may_be_asked_for(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine / "path", "13.0.88")
    monkeypatch.setattr(toolkit, "driver_version", lambda: (12, 4))
    monkeypatch.setenv("FUSED_ATTENTION_CUDA_VERSION", "13.0")
    assert toolkit.find_toolkit().release == "13.0.88"
    monkeypatch.setenv("FUSED_ATTENTION_CUDA_VERSION", "13.1")
    assert refusal().endswith("is 13.0.88, FUSED_ATTENTION_CUDA_VERSION asks for 13.1")
    monkeypatch.setenv("FUSED_ATTENTION_CUDA_VERSION", "latest")
    with pytest.raises(SystemExit, match="must be like 13.0, is 'latest'"):
        toolkit.find_toolkit()


WHEELS_13 = [f"{name}==13.0.*" for name in toolkit.WHEELS]


@pytest.mark.parametrize(
    ("wanted", "driver", "version", "wheels"),
    [
        ("auto", None, None, []),
        ("auto", (13, 1), None, WHEELS_13),
        ("auto", (12, 4), None, [*WHEELS_13, toolkit.PTXAS_WHEEL]),
        ("0", (13, 1), None, []),
        ("1", None, None, WHEELS_13),
        ("1", None, "12.9", [*WHEELS_13, toolkit.PTXAS_WHEEL]),
        ("1", (12, 4), "13.2", [f"{name}==13.2.*" for name in toolkit.WHEELS]),
    ],
)
def test_wheels_that_pip_is_to_install(
    machine: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, driver: tuple[int, int] | None, version: str | None, wheels: list[str]
) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", wanted)
    monkeypatch.setattr(toolkit, "driver_version", lambda: driver)
    if version:
        monkeypatch.setenv("FUSED_ATTENTION_CUDA_VERSION", version)
    assert toolkit.wheel_requirements() == wheels


def test_an_installed_nvcc_needs_no_wheels(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", "1")
    install(machine / "path", "13.0.88")
    assert toolkit.wheel_requirements() == []


def test_what_is_said_without_nvcc(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(toolkit.NoToolkit, match="this machine has no NVIDIA driver"):
        toolkit.toolkit_to_build_with()
    monkeypatch.setattr(toolkit, "driver_version", lambda: (13, 0))
    with pytest.raises(toolkit.NoToolkit, match="there is an NVIDIA driver, but no usable CUDA compiler"):
        toolkit.toolkit_to_build_with()
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", "1")
    with pytest.raises(SystemExit, match="(?s)no CUDA compiler: nvcc was not found.*CUDA_HOME.*pip install 'nvidia-cuda-nvcc==13.0"):
        toolkit.toolkit_to_build_with()
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, is 'yes'"):
        toolkit.toolkit_to_build_with()


def test_only_a_driver_or_the_user_asks_for_the_kernels(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvcc alone does not: minutes of compiling for a machine that cannot run them."""
    nvcc = install(machine / "path", "13.0.88")
    with pytest.raises(toolkit.NoToolkit, match="this machine has no NVIDIA driver"):
        toolkit.toolkit_to_build_with()
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", "1")
    assert toolkit.toolkit_to_build_with().nvcc == str(nvcc)
    monkeypatch.delenv("FUSED_ATTENTION_CUDA")
    monkeypatch.setattr(toolkit, "driver_version", lambda: (13, 0))
    assert toolkit.toolkit_to_build_with().nvcc == str(nvcc)
    monkeypatch.setenv("FUSED_ATTENTION_CUDA", "0")
    with pytest.raises(toolkit.NoToolkit, match="FUSED_ATTENTION_CUDA=0 was set"):
        toolkit.toolkit_to_build_with()


def test_architectures(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine / "path", "13.0.88")
    found = toolkit.find_toolkit()
    monkeypatch.setattr(toolkit, "gpu_architectures", list)
    assert toolkit.architectures(found) == ("80",)
    monkeypatch.setattr(toolkit, "gpu_architectures", lambda: [100, 75, 90, 80, 90])
    assert toolkit.architectures(found) == ("80", "90", "100")
    monkeypatch.setenv("FUSED_ATTENTION_CUDA_ARCHS", "8.0; sm_89,90a 120 89")
    assert toolkit.architectures(found) == ("80", "89", "90a", "120")
    for wrong in ("70", "ampere", "8.0+PTX"):
        monkeypatch.setenv("FUSED_ATTENTION_CUDA_ARCHS", wrong)
        with pytest.raises(SystemExit, match="is no architecture from sm_80 on"):
            toolkit.architectures(found)


@needs_nvcc
def test_a_gpu_newer_than_the_toolkit_compiles_the_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_ATTENTION_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(toolkit, "gpu_architectures", lambda: [90, 199])
    assert toolkit.architectures(toolkit.find_toolkit()) == ("80", "90")


ASK_TOOLKIT = """
import ctypes
from csrc.cuda import toolkit
numbers = (ctypes.c_int * 6)()
print(toolkit.driver_version(), toolkit.gpu_architectures())
ctypes.CDLL("libcuda.so.1").standin_calls(numbers)
print(numbers[5])
"""


def test_the_driver_is_asked_for_its_gpus_elsewhere(tmp_path: Path) -> None:
    standin_driver.build(tmp_path)

    def ask(**machine: str) -> list[str]:
        environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)} | machine
        command = [sys.executable, "-c", ASK_TOOLKIT]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    assert ask(STANDIN_GPUS="2", STANDIN_CAPABILITY="90") == ["(13, 0) [90, 90]", "0"]
    assert ask(STANDIN_CAPABILITY="121") == ["(13, 0) [121]", "0"]
    assert ask(STANDIN_FAILURE="cuInit=100") == ["(13, 0) []", "0"]
