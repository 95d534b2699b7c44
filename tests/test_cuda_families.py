"""Which family of CUDA kernels plans a call: families are asked in turn, and none is ever chosen for a GPU that it does not run on."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from emulator.build import CXX

from csrc.cuda.instances import manifest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILE = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
HOST = [CSRC / "cuda/plan.cpp", CSRC / "cuda/planner.cpp", CSRC / "cuda/sm80/plan.cpp"]
GPUS = ("80", "86", "89", "90", "100", "120")

# main PASS COMPUTE_CAPABILITY HEAD_DIM: the kernels that a call with 1000 rows and keys launches.
MAIN = """
#include <cstdio>
#include <cstdlib>
#include <exception>
#include "cuda/plan.h"
using namespace fused_attention;
int main(int, char** arguments) {
  const cuda::DeviceLimits limits = {std::atoi(arguments[2]), 108, 163 * 1024};
  alignas(16) static float memory[4];
  AttentionProblem problem;
  problem.dtype = Dtype::bfloat16;
  problem.batch = problem.num_heads = problem.num_heads_kv = 1;
  problem.seqlen_q = problem.seqlen_k = 1000;
  problem.head_dim_qk = problem.head_dim_v = std::atoi(arguments[3]);
  for (StridedTensor* tensor : {&problem.query, &problem.key, &problem.value, &problem.out, &problem.dout, &problem.dquery, &problem.dkey,
                                &problem.dvalue}) {
    *tensor = {memory, 0, 0, problem.head_dim_qk};
  }
  problem.lse = memory;
  try {
    const cuda::Plan plan = arguments[1][0] == 'f' ? cuda::plan_forward(problem, limits, nullptr)
                                                   : cuda::plan_backward(problem, {}, limits, nullptr);
    for (const cuda::Launch& launch : plan.launches) std::printf("%s ", launch.image->name);
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
  }
}
"""

# A family for compute capability 9.0 that has one kernel, a forward, and is asked before the others.
FAMILIES = """
#include "cuda/family.h"
#include "cuda/sm80/plan.h"
namespace fused_attention::cuda {
const Family kHopper = {
    90,
    [](const AttentionProblem& problem, const DeviceLimits&) { return problem.head_dim_qk <= 64; },
    [](const AttentionProblem&, const SideGradients&, const DeviceLimits&) { return false; },
    [](Planner& planner, const AttentionProblem& problem) {
      ForwardArguments arguments;
      fill(arguments, problem);
      planner.launch(*planner.find(Pass::forward, FeatureClass::plain, problem, true), 1, arguments);
    },
    nullptr,
};
const Family* const kFamilies[] = {&kHopper, &sm80::kFamily};
const int kNumFamilies = 2;
}
"""


def link(folder: Path, families: str | Path) -> Path:
    """A program with those families and a table in which every kernel of sm80 but the helpers has a twin for Hopper, which comes first."""
    twins = [replace(row, name=row.name.replace("sm80", "sm90"), family=90) for row in manifest.INSTANCES if row.pass_name != "helper"]
    (folder / "cuda").mkdir()
    for image in manifest.image_names():
        (folder / f"cuda/{image}.fatbin").write_text("bytes")
    (folder / "images.cpp").write_text(manifest.table_source([*twins, *manifest.INSTANCES]))
    (folder / "main.cpp").write_text(MAIN)
    if isinstance(families, str):
        (folder / "families.cpp").write_text(families)
        families = folder / "families.cpp"
    subprocess.run([*COMPILE, "main.cpp", "images.cpp", families, *HOST, "-o", "main"], cwd=folder, check=True)
    return folder / "main"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(tmp_path_factory.mktemp("shipped"), CSRC / "cuda/families.cpp")


@pytest.fixture(scope="module")
def with_hopper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link(tmp_path_factory.mktemp("hopper"), FAMILIES)


def launched(program: Path, pass_name: str, capability: str, head_dim: int = 64) -> str:
    done = subprocess.run([program, pass_name, capability, str(head_dim)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("pass_name", ["forward", "backward"])
@pytest.mark.parametrize("capability", GPUS)
def test_a_family_launches_its_own_kernels(shipped: Path, pass_name: str, capability: str) -> None:
    """Whatever else is in the table, on the GPUs of both families too."""
    names = launched(shipped, pass_name, capability).split()
    assert names
    assert not any(name.startswith("sm90_") for name in names)


@pytest.mark.parametrize("capability", GPUS)
def test_a_family_is_not_asked_on_a_gpu_of_another(with_hopper: Path, capability: str) -> None:
    family = "sm90" if capability == "90" else "sm80"
    assert launched(with_hopper, "forward", capability) == f"{family}_forward_64x64_bf16_plain"


def test_the_next_family_takes_what_one_does_not_cover(with_hopper: Path) -> None:
    assert launched(with_hopper, "forward", "90", head_dim=128) == "sm80_forward_128x128_bf16_plain"
    names = launched(with_hopper, "backward", "90").split()
    assert names
    assert not any(name.startswith("sm90_") for name in names)


@pytest.mark.parametrize("pass_name", ["forward", "backward"])
def test_a_gpu_that_no_family_runs_on(with_hopper: Path, pass_name: str) -> None:
    assert launched(with_hopper, pass_name, "75") == "the CUDA kernels need compute capability 8.0, this GPU has 7.5"
