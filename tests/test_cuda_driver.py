"""The host code of the CUDA kernels against drivers that are missing, old or fail: what Python is told, and that nothing is launched."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import standin_driver
from emulator.build import CXX

from csrc.cuda.instances import manifest
from fused_attention.kernels.native import cuda as cuda_backend

pytestmark = pytest.mark.skipif(not cuda_backend.compiled()[0].isdigit(), reason=f"built without CUDA: {cuda_backend.compiled()}")

ROOT = Path(__file__).resolve().parents[1]
# The extension alone, without torch, which would take seconds: a process finds one driver and keeps it.
PRELUDE = """
import ctypes, importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_native", sys.argv[1])
native = importlib.util.module_from_spec(importlib.util.spec_from_loader("_native", loader))
loader.exec_module(native)
native.cuda_set_single_tile_kernels(False)

def problem(head_dim=64, seqlen_q=70, seqlen_k=70, dtype=1, **changed):
    strides = (head_dim * 128, head_dim * 128, head_dim)
    fields = dict(
        dtype=dtype, sizes=(1, 1, 1, seqlen_q, seqlen_k, head_dim, head_dim), num_tokens=(0, 0), scale=1.0, diagonal=0, bottom_right=False,
        window=(2**30, 2**30), softcap=0.0, dropout_threshold=0, query=strides, key=strides, value=strides, out=strides,
        attn_mask=(0, 0, 0), attn_mask_key=0, attn_mask_dtype=0, key_mask=(0, 0), alibi_slopes=(0, 0), mask_bits=(0, 0, 0),
        row_tiles=(0, 0, 0), num_tiles=0, cache_dtype=-1, key_scale=(0, 0, 0, 1), value_scale=(0, 0, 0, 1))
    return native.problem(**fields | changed)

def forward(plain, *, device=0, workspace=0, query=4096, key=4096, value=4096, out=4096, lse=4096, key_mask=0, rng_state=0):
    return native.cuda_forward(plain, device, 0, workspace, query, key, value, out, lse, [0, key_mask, *[0] * 4, rng_state, *[0] * 6])

def calls():
    numbers = (ctypes.c_int * 6)()
    ctypes.CDLL("libcuda.so.1").standin_calls(numbers)
    return tuple(numbers)

def answer(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin_driver.build(tmp_path_factory.mktemp("driver")).parent


def ask(driver: Path, *expressions: str, **machine: object) -> list[Any]:
    """What the expressions give, one after another, in a process whose driver is in that folder; an exception as its text."""
    lines = [f"print(repr(answer(lambda: {expression})))" for expression in expressions]
    environment = {f"STANDIN_{name.upper()}": str(value) for name, value in machine.items()}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([PRELUDE, *lines]), cuda_backend._native.__file__],
        env=os.environ | environment | {"LD_LIBRARY_PATH": str(driver)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [ast.literal_eval(line) for line in done.stdout.splitlines()]


WHY_NOT, FORWARD = "native.cuda_why_not(0)", "forward(problem())"
TOOLKIT = cuda_backend._native.cuda_versions()[1] if cuda_backend._native else 0
COMPILED = f"the kernels were compiled by CUDA {TOOLKIT // 1000}.{TOOLKIT % 1000 // 10}"


def test_a_launch(driver: Path) -> None:
    """Loaded once, launched twice, in the GPU's own context."""
    answers = ask(driver, WHY_NOT, "native.cuda_device_count()", "native.cuda_device_limits(0)", FORWARD, FORWARD, "calls()")
    assert answers == [None, 1, (80, 108, 163 * 1024), 0, 0, (2, 1, 0, 2, 2, 1)]


def test_a_current_context_stays(driver: Path) -> None:
    current = "ctypes.CDLL('libcuda.so.1').standin_make_current(0)"
    *_, counted = ask(driver, current, FORWARD, "forward(problem(), device=1)", "calls()", gpus=2)
    assert counted == (2, 2, 0, 1, 1, 1)


def test_nothing_is_launched_without_its_workspace(driver: Path) -> None:
    masked = "problem(key_mask=(128, 1))"
    wanted, none_yet, launched, after = ask(
        driver, f"forward({masked}, key_mask=64)", "calls()", f"forward({masked}, key_mask=64, workspace=4096)", "calls()"
    )
    assert wanted > 0
    assert none_yet[0] == 0
    assert (launched, after[0]) == (0, 2)  # the list of tiles, and the forward


# No driver, an old one, one that sees no GPU


def test_no_driver(tmp_path: Path) -> None:
    (tmp_path / standin_driver.NAME).write_text("")  # before a real one, if there is one
    reason, launched, count, versions = ask(tmp_path, WHY_NOT, FORWARD, "native.cuda_device_count()", "native.cuda_versions()")
    assert reason.startswith("no NVIDIA driver: ")
    assert standin_driver.NAME in reason
    assert launched == f"RuntimeError: {reason}"
    assert (count, versions) == (0, (0, TOOLKIT))


def test_a_driver_without_a_function(tmp_path: Path) -> None:
    standin_driver.build(tmp_path, old=True)
    reason, launched = ask(tmp_path, WHY_NOT, FORWARD, version=10000)
    needed = "it supports CUDA 10.0 and has no cuThreadExchangeStreamCaptureMode"
    assert reason == f"the NVIDIA driver is too old: {needed}, {COMPILED}: update the driver"
    assert launched == f"RuntimeError: {reason}"


def test_a_driver_older_than_the_toolkit(driver: Path) -> None:
    (reason,) = ask(driver, WHY_NOT, version=11080)
    assert reason.startswith(f"the NVIDIA driver is too old: the driver supports CUDA 11.8, {COMPILED}: update the driver")


@pytest.mark.skipif(TOOLKIT % 1000 == 0, reason="every driver of this toolkit's major version compiles its PTX")
def test_a_driver_too_old_for_the_ptx(driver: Path) -> None:
    version = TOOLKIT // 1000 * 1000
    answers = ask(driver, WHY_NOT, version=version, capability=90), ask(driver, WHY_NOT, version=version, capability=80)
    assert "the NVIDIA driver is too old for GPU 0 (Stand-in, compute capability 9.0)" in answers[0][0]
    assert answers[1] == [None]


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"gpus": 0}, "the NVIDIA driver sees no GPU"),
        ({"failure": "cuInit=100"}, "the NVIDIA driver does not start: CUDA_ERROR_OF_THE_STAND_IN (as the test asked for)"),
        ({"failure": "cuDeviceGetCount=3"}, "the NVIDIA driver cannot count GPUs: CUDA_ERROR"),
        ({"failure": "cuDeviceGetName=101"}, "the NVIDIA driver cannot describe GPU 0: CUDA_ERROR"),
    ],
)
def test_no_gpu(driver: Path, machine: dict[str, object], reason: str) -> None:
    on_any, on_first, launched, counted = ask(driver, "native.cuda_why_not(-1)", WHY_NOT, FORWARD, "calls()", **machine)
    assert on_any.startswith(reason)
    assert on_first.startswith(reason)
    assert launched.startswith("RuntimeError: ")
    assert counted[0] == 0


def test_a_gpu_that_is_not_there(driver: Path) -> None:
    sentence = "there is no GPU 3: the driver has 1"
    assert ask(driver, "native.cuda_why_not(3)", "forward(problem(), device=3)") == [sentence, f"RuntimeError: {sentence}"]


def test_an_architecture_without_an_image(driver: Path) -> None:
    reason, launched, counted = ask(driver, WHY_NOT, FORWARD, "calls()", capability=75)
    assert launched == "RuntimeError: the CUDA kernels need compute capability 8.0, this GPU has 7.5"
    assert counted[:2] == (0, 0)
    assert reason == "no image for GPU 0 (Stand-in, compute capability 7.5): the kernels need compute capability 8.0"


@pytest.mark.parametrize("capability", [86, 89, 90, 100, 120])
def test_newer_architectures_run_the_ptx(driver: Path, capability: int) -> None:
    assert ask(driver, WHY_NOT, FORWARD, capability=capability, shared_bytes=99 * 1024, version=TOOLKIT) == [None, 0]


# The table's machine code, read by driver.cpp alone: which GPUs run it, and what the others need.
MACHINE_CODE = """
#include <cstdio>
#include <cstdlib>
#include "cuda/driver.h"
#include "cuda/images.h"
using namespace fused_attention::cuda;
int main(int, char** capabilities) {
  while (*++capabilities != nullptr) std::printf("%d ", has_machine_code(std::atoi(*capabilities)));
  std::printf("|%s", why_not(0).c_str());
}
"""


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program's object files."""
    folder = tmp_path_factory.mktemp("machine_code")
    (folder / "main.cpp").write_text(MACHINE_CODE)
    subprocess.run([CXX, "-std=c++17", f"-I{ROOT / 'csrc'}", "-c", "main.cpp", ROOT / "csrc/cuda/driver.cpp"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(
    ("architectures", "native"),
    [
        (["80"], [80, 86, 89]),
        (["86"], [86, 89]),
        (["80", "90"], [80, 86, 89, 90]),
        (["90a"], [90]),
        (["100f"], [100, 103]),
        (["103a", "120"], [103, 120, 121]),
    ],
)
def test_which_gpus_run_the_machine_code(
    driver: Path, machine_code: Path, tmp_path: Path, architectures: list[str], native: list[int]
) -> None:
    """A driver of the toolkit's major version, but older, runs a build on just those: PTX needs one as new as the toolkit."""
    rows = [row for row in manifest.INSTANCES if row.image == "mask_tiles"]
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/mask_tiles.fatbin").write_text("bytes")
    (tmp_path / "images.cpp").write_text(manifest.table_source(rows, architectures=architectures, toolkit_version=13010))
    objects = [machine_code / "main.o", machine_code / "driver.o"]
    subprocess.run([CXX, "-std=c++17", f"-I{ROOT / 'csrc'}", "images.cpp", *objects, "-ldl", "-o", "main"], cwd=tmp_path, check=True)
    capabilities = [80, 86, 89, 90, 100, 103, 110, 120, 121]
    for capability in capabilities:
        machine = {"STANDIN_CAPABILITY": str(capability), "STANDIN_VERSION": "13000", "LD_LIBRARY_PATH": str(driver)}
        done = subprocess.run([tmp_path / "main", *map(str, capabilities)], env=machine, capture_output=True, text=True, check=True)
        flags, _, why_not = done.stdout.partition("|")
        assert [number for number, flag in zip(capabilities, flags.split(), strict=True) if flag == "1"] == native
        assert (why_not == "") == (capability in native)
        assert why_not == "" or f"rebuild with FUSED_ATTENTION_CUDA_ARCHS={capability}" in why_not


# Failures when a kernel is loaded or launched: which kernel, on which GPU, what to do

KERNEL, GPU = "CUDA kernel sm80_forward_64x64_bf16_plain", "on GPU 0 (Stand-in, compute capability 8.0)"


@pytest.mark.parametrize(
    ("failure", "what", "way_out"),
    [
        ("cuDevicePrimaryCtxRetain=2", "has no context", "the GPU has no memory left for the kernel itself: free some"),
        ("cuCtxGetCurrent=3", "could not be launched", "a forked process cannot use its parent's GPU: start it with"),
        ("cuCtxPushCurrent_v2=201", "could not be launched", "the driver supports CUDA 13.0"),
        ("cuModuleLoadData=209", "could not be loaded", "this build has no code for this GPU: rebuild with FUSED_ATTENTION_CUDA_ARCHS"),
        ("cuModuleLoadData=222", "could not be loaded", "whose PTX is all that fits this GPU: update the driver"),
        ("cuModuleGetFunction=500", "is not in its image", "the driver supports CUDA 13.0"),
        ("cuFuncSetAttribute=1", "cannot have its 98304 bytes of shared memory", "too few registers or too little shared memory"),
        ("cuLaunchKernel=701", "could not be launched", "too few registers or too little shared memory for the kernel: use"),
        ("cuLaunchKernel=700", "could not be launched", "a kernel that ran before, of any library, failed: CUDA_LAUNCH_BLOCKING=1"),
        ("cuLaunchKernel=901", "could not be launched", "the stream is being captured into a graph: run the call once before"),
    ],
)
def test_a_failure_names_the_kernel_the_gpu_and_a_way_out(driver: Path, failure: str, what: str, way_out: str) -> None:
    attribute = failure.startswith("cuFuncSetAttribute")
    call, kernel = (FORWARD, KERNEL) if not attribute else ("forward(problem(head_dim=256))", KERNEL.replace("64x64", "256x256"))
    first, second, counted = ask(driver, call, call, "calls()", failure=failure)
    assert first.startswith(f"RuntimeError: {kernel} {what}")
    assert f"{GPU}: CUDA_ERROR_OF_THE_STAND_IN (as the test asked for); " in first
    assert way_out in first
    assert second == first  # nothing half loaded is kept
    launches, loaded, unloaded, pushed, popped, _ = counted
    assert (launches, pushed) == (0, popped)
    assert loaded == unloaded or failure.startswith("cuLaunchKernel")


def test_not_enough_shared_memory(driver: Path) -> None:
    answer, decodes, counted = ask(
        driver, "forward(problem(head_dim=256))", "forward(problem(head_dim=256, seqlen_q=1))", "calls()", shared_bytes=64 * 1024
    )
    needs = "CUDA kernel sm80_forward_256x256_bf16_plain needs 98304 bytes of shared memory a block, this GPU has 65536"
    assert answer == f"RuntimeError: {needs}: use backend='triton'"
    assert decodes == answer  # a decoding kernel that does not fit either leaves the call to the forward kernel
    assert counted[0] == 0


# Arguments that Python has checked already


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("forward(problem(), query=0)", "query has no memory"),
        ("forward(problem(), value=0)", "value has no memory"),
        ("forward(problem(), key=4104)", "key must have an address and strides that are multiples of 16 bytes"),
        ("forward(problem(query=(8192, 8192, 65)))", "query must have an address and strides"),
        ("forward(problem(), out=0)", "out and lse must have memory"),
        ("forward(problem(), lse=0)", "out and lse must have memory"),
        ("forward(problem(dtype=0))", "the CUDA kernels take bfloat16 and float16"),
        ("forward(problem(head_dim=60))", "head_dim must be divisible by 8"),
        ("forward(problem(scale=float('nan')))", "scale must be finite and > 0"),
        ("forward(problem(dropout_threshold=5))", "dropout needs a threshold below 65536 and rng_state"),
        ("forward(problem(sizes=(1, 3, 2, 70, 70, 64, 64)))", "the heads of query must be a multiple of those of key"),
        ("forward(problem(sizes=(1, 1, 1, 2**30 + 1, 70, 64, 64)))", "sequences may have 2^30 queries and keys at most"),
        ("forward(problem(sizes=(2**20, 2**10, 1, 1024, 70, 64, 64)))", "blocks, a grid has 2^31 - 1 at most: split the batch"),
        ("forward(b'short')", "the problem must be what problem returned"),
    ],
)
def test_nothing_is_launched_on_unchecked_arguments(driver: Path, call: str, message: str) -> None:
    answer, counted = ask(driver, call, "calls()")
    assert answer.startswith("ValueError: ")
    assert message in answer
    assert counted[:2] == (0, 0)


def test_wrong_arguments_of_the_binding(driver: Path) -> None:
    answers = ask(
        driver,
        "native.cuda_forward(b'')",
        "native.cuda_forward('', *[0] * 8, [0] * 13)",
        "native.cuda_forward(b'', 'gpu', *[0] * 7, [0] * 13)",
    )
    assert all(answer.startswith("TypeError: ") for answer in answers)
    assert "takes a problem, device, stream, workspace and the problem's addresses" in answers[0]


def info(driver: Path, **machine: object) -> str:
    environment = {f"STANDIN_{name.upper()}": str(value) for name, value in machine.items()}
    done = subprocess.run(
        [sys.executable, "-m", "fused_attention", "info"],
        env=os.environ | environment | {"LD_LIBRARY_PATH": str(driver)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_info_tells_of_each_gpu(driver: Path) -> None:
    shown = info(driver, gpus=2)
    assert "  NVIDIA driver   supports CUDA 13.0\n" in shown
    for index in (0, 1):
        assert f"  GPU {index}           Stand-in, compute capability 8.0; CUDA kernels: native machine code\n" in shown
    at_first_use = "compiled at first use, from PTX (built with FUSED_ATTENTION_CUDA_ARCHS='80 100' they would be native)"
    assert f"compute capability 10.0; CUDA kernels: {at_first_use}\n" in info(driver, capability=100)
    assert "compute capability 7.5; CUDA kernels: none: no image for GPU 0" in info(driver, capability=75)
    failed = info(driver, failure="cuInit=999")
    assert "  GPU             none\n" in failed
    assert "  cuda            not available: the NVIDIA driver does not start" in failed


UNINITIALIZED = """
import ctypes, torch, fused_attention
from fused_attention.kernels.native import cuda as cuda_backend
from fused_attention.transformer.translation.machine import backend_lines, machine_report

def initialized():
    numbers = (ctypes.c_int * 6)()
    ctypes.CDLL("libcuda.so.1").standin_calls(numbers)
    return numbers[5]

query = torch.zeros(1, 1, 4, 8, requires_grad=True)
fused_attention.explain(query, query, query)
fused_attention.attention(query, query, query).sum().backward()
assert "supports CUDA 13.0" in machine_report() and backend_lines()["cuda"] == "available"
before = initialized()
assert cuda_backend.status() is None
print(before, initialized())
"""


def test_nothing_but_a_call_on_a_gpu_initializes_cuda(driver: Path) -> None:
    """Afterwards a forked child could not use it."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver)}
    done = subprocess.run([sys.executable, "-c", UNINITIALIZED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]
