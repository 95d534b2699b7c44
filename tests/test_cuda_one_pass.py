"""The backward in one pass in the emulator, in any order of additions and in the fixed one: features, instances, sizes, seeded mistakes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import attention_calls
import cuda_emulation
import pytest
import torch
from attention_calls import CALL, FEATURES, build, prepared, run
from cuda_emulation import A100, RTX_4090, EmulatedGpu
from emulator import Module, compile_ptx, find_nvcc
from function_calls import VARLEN, check_packed_sequences

from csrc.cuda.instances.manifest import CSRC, INSTANCES, Instance
from fused_attention.benchmarks import cuda_backward
from fused_attention.benchmarks.gpu_timing import Time
from fused_attention.kernels.native import cuda as cuda_backend

pytestmark = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST = {"head_dims": (32, 32), "dtype": torch.bfloat16}
RESIDENT = (1, 2, 7, None)  # blocks at the same time; None: all
ORDERED = pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "fixed order"])


def check_call(call: dict[str, Any], number: int, gpu: cuda_emulation.Gpu = A100) -> EmulatedGpu:
    """Against the accuracy rule; number: of the case, so that cases differ in their schedules."""
    call = CALL | call
    problem, dout, dlse = build(call, "cpu")
    resident = RESIDENT[number % len(RESIDENT)]
    with EmulatedGpu(number % 3, gpu, backward="one pass", resident_blocks=resident, ordered_additions=call["deterministic"]) as emulated:
        attention_calls.check(cuda_backend, problem, dout, dlse, call["memory"], prepare=call["prepare"])
    return emulated


def one_pass_of(emulated: EmulatedGpu) -> list[str]:
    return [name for name in emulated.launched if "backward" in name]


def why_two_passes(call: dict[str, Any]) -> bool:
    """Whether something is summed over keys, or needs more registers than there are."""
    mask = call.get("attn_mask")
    return call.get("alibi_slopes") is not None or (mask is not None and mask[0] != "bool")


COVERED = [name for name, call in FEATURES.items() if not why_two_passes(call)]


@ORDERED
@pytest.mark.parametrize("feature", COVERED)
def test_features(feature: str, deterministic: bool) -> None:
    emulated = check_call(SMALLEST | FEATURES[feature] | {"deterministic": deterministic}, COVERED.index(feature))
    names = one_pass_of(emulated)
    assert names[0] == "backward_delta_bf16"
    assert names[1].startswith("sm80_backward_32x32_bf16_")
    assert names[2:] == ["backward_dquery_bf16"]


@ORDERED
@pytest.mark.parametrize("case", VARLEN)
def test_packed_sequences(case: str, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    number = list(VARLEN).index(case)
    resident = RESIDENT[number % len(RESIDENT)]
    try:
        with EmulatedGpu(number % 3, backward="one pass", resident_blocks=resident, ordered_additions=deterministic) as emulated:
            check_packed_sequences("cuda", case, torch.bfloat16, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert "backward_dquery_bf16" in emulated.launched


CLASSES: dict[tuple[str, bool], dict[str, Any]] = {
    ("plain", False): {"lse_gradient": True},
    ("plain", True): {"dropout_p": 0.25, "is_causal": "bottom_right"},
    ("masked", False): {"key_mask": "holes", "softcap": 2.0, "dropout_p": 0.25, "sinks": True, "is_causal": "bottom_right"},
}
ROWS = [row for row in INSTANCES if row.pass_name == "backward"]


@ORDERED
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_instance_around_the_sides_of_its_tile(row: Instance, deterministic: bool) -> None:
    m, n = row.block_m, row.block_n
    for number, seqlens in enumerate([(1, 2 * n + 3), (m - 1, n + 1), (m + 1, n - 1), (2 * m + 3, 1)]):
        call = {"dtype": DTYPES[row.dtype], "head_dims": (row.head_dim_qk, row.head_dim_v), "seqlens": seqlens, "sizes": (1, 2, 1)}
        emulated = check_call(call | CLASSES[row.feature_class, row.dropout] | {"deterministic": deterministic}, number)
        assert row.name in emulated.launched


@pytest.mark.parametrize("head_dims", [(8, 8), (40, 40), (72, 72), (64, 32), (72, 40), (120, 8)], ids=str)
def test_head_dims_between_those_of_the_instances(head_dims: tuple[int, int]) -> None:
    for number, options in enumerate(({}, {"key_mask": "right"})):
        if options and max(head_dims) > 96:
            continue
        check_call({"dtype": torch.bfloat16, "head_dims": head_dims, "seqlens": (40, 127), **options}, number)


@pytest.mark.parametrize("memory", ["heads first", "sequence first", "one batch element expanded"])
def test_memory_orders(memory: str) -> None:
    order = ("batch first", memory, memory, memory)
    check_call(SMALLEST | {"memory": order, "sizes": (2, 2, 2), "is_causal": "top_left"}, 0)


@ORDERED
@pytest.mark.parametrize(("sizes", "seqlens"), [((0, 2, 2), (5, 7)), ((2, 2, 1), (0, 7)), ((2, 2, 1), (5, 0))], ids=str)
def test_empty_inputs(sizes: tuple[int, int, int], seqlens: tuple[int, int], deterministic: bool) -> None:
    check_call({"sizes": sizes, "seqlens": seqlens, "dtype": torch.bfloat16, "deterministic": deterministic}, 0)


# The order. Three and five blocks of keys, tiles that some of them skip, whichever of the three rules says whose turn it is.
LONG = SMALLEST | {"seqlens": (330, 300), "sizes": (1, 2, 1), "deterministic": True}
ORDERS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": "top_left"},
    "causal bottom-right": {"is_causal": "bottom_right", "seqlens": (200, 300)},
    "window": {"window": (30, 20)},
    "window left": {"window": (40, None)},
    "window right": {"window": (None, 40)},
    "window, causal, lengths": {"window": (70, 9), "is_causal": "bottom_right", "key_lengths": (217,), "query_lengths": (290,)},
    "key_mask": {"key_mask": "holes", "window": (100, 30)},
    "bool mask and causal": {"attn_mask": ("bool", "1HQK"), "is_causal": "top_left"},
    "bool mask, fewer rows than a tile of the lists": {
        "attn_mask": ("bool", "1HQK"),
        "head_dims": (96, 96),  # in steps of 32 rows
        "seqlens": (20, 200),
        "sizes": (2, 2, 1),
    },
    "prepared window": {"window": (30, 20), "prepare": True},
    "prepared bool mask and causal": {"attn_mask": ("bool", "11QK"), "is_causal": "top_left", "prepare": True},
}


@pytest.mark.parametrize("case", ORDERS)
def test_the_fixed_order_gives_the_same_bits_in_every_schedule(case: str) -> None:
    call = CALL | LONG | ORDERS[case]
    problem, dout, dlse = build(call, "cpu")
    problem = prepared(problem) if call["prepare"] else problem
    results = []
    for number, resident in enumerate(RESIDENT):
        with EmulatedGpu(number, A100, backward="one pass", resident_blocks=resident, ordered_additions=True) as emulated:
            results.append(run(cuda_backend, problem, dout, dlse))
        assert "backward_dquery_bf16" in emulated.launched
    for result in results[1:]:
        for name, gradient in result.items():
            assert torch.equal(gradient, results[0][name]), name
    if case == "full":
        check_call(call, 3)  # and they are right


def test_without_an_order_additions_are_not_ordered() -> None:
    problem, dout, dlse = build(LONG | {"deterministic": False}, "cpu")
    with (
        EmulatedGpu(1, A100, backward="one pass", resident_blocks=None, ordered_additions=True),
        pytest.raises(AssertionError, match="unordered-addition"),
    ):
        run(cuda_backend, problem, dout, dlse)


def test_the_table_of_waits_is_what_its_program_prints() -> None:
    root = Path(__file__).resolve().parents[1]
    printed = subprocess.run([sys.executable, root / "tests/cuda_addition_order.py"], capture_output=True, text=True, check=True).stdout
    assert f"<!-- begin: order -->\n{printed}<!-- end: order -->" in (root / "docs/cuda-kernels.md").read_text()


def test_the_benchmark_reaches_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backward, "timed", lambda functions, device, seconds: {name: call() for name, call in functions.items()})
    with EmulatedGpu() as emulated:
        results = cuda_backward.measure({}, 32, 32, "cpu", 0.0, 32, 32)  # gradients in place of milliseconds
    assert list(results) == ["one pass", "one pass, one order", "two passes", "chosen"]
    assert emulated.launched.count("sm80_backward_32x32_bf16_plain") == 4  # twice for each order
    assert torch.equal(results["two passes"].query, results["chosen"].query)
    torch.testing.assert_close(results["one pass"].query, results["two passes"].query, rtol=0.02, atol=0.02)
    one_pass, two_passes, chosen = (Time(kernel_ms, 0.05, "graph") for kernel_ms in (1.5, 2.0, 1.25))
    times = {"one pass": one_pass, "one pass, one order": "too slow", "two passes": two_passes, "chosen": chosen}
    assert cuda_backward.row("full", 64, 32, times) == "| full | 64 | 32 | 1.5000 (50) | - | 2.0000 (50) | 1.2500 (50) | one pass |"


# Mistakes: (file, what stands there, what stands there instead, call, what the emulator or the comparison says)
WINDOW = {"window": (30, 20)}
MISTAKES: dict[str, tuple[str, str, str, dict[str, Any], str]] = {
    "a tile that is skipped is counted, from below": (
        "sm80/row_visits.cuh", "(start_n + BLOCK_N - 1 - first) / BLOCK_N", "start_n / BLOCK_N", {"window": (30, None)}, "livelock",
    ),
    "a tile that is skipped is counted, from above": (
        "sm80/row_visits.cuh", "if (!sequence.sees_all_to_the_right()) last", "if (false) last", WINDOW, "livelock",
    ),
    "a tile that a list skips is counted": (
        "sm80/row_visits.cuh", "turn += __popc", "turn += 1 + __popc", {"attn_mask": ("bool", "11QK")}, "livelock",
    ),
    "the order of the keys turned around": (
        "sm80/backward.cuh", "descending ? block_columns - 1 - place : place", "place", WINDOW, "livelock",
    ),
    "no ticket": ("sm80/backward.cuh", "ticket = *shared;", "ticket = gridDim.x - 1 - blockIdx.x;", {}, "livelock"),
    "no acquire": ("ptx.cuh", "ld.acquire.gpu.global.u32", "ld.relaxed.gpu.global.u32", {}, "unordered-addition"),
    "no release": ("ptx.cuh", "red.release.gpu.global.add.u32", "red.relaxed.gpu.global.add.u32", {}, "unordered-addition"),
    "no barrier before the release": (
        "sm80/backward.cuh", "__syncthreads();  // every warp is past", "//", {}, "unordered-addition|race",
    ),
    "no wait": ("sm80/backward.cuh", "while (lane == 0 && ", "if (lane == 0 && ", {}, "unordered-addition"),
    "turns not cleared": ("backward_delta.cuh", "arguments.turns[i] = 0;", "", {}, "livelock"),
    "sums not cleared": (
        "backward_delta.cuh", "make_float4(0.0f, 0.0f, 0.0f, 0.0f)", "make_float4(1.0f, 0.0f, 0.0f, 0.0f)", {}, "gradient of query",
    ),
    "gradients of scores read too early": (
        "sm80/backward.cuh", "__syncthreads();  // all of dS", "//", {}, "race",
    ),
}  # fmt: skip


@pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake: str, tmp_path: Path) -> None:
    file, right, wrong, options, kind = MISTAKES[mistake]
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc/cuda" / file
    assert source.read_text().count(right) == 1, f"{right!r} in {file}"
    source.write_text(source.read_text().replace(right, wrong))
    call = CALL | LONG | options
    name = "backward_delta_bf16" if "delta" in file else f"sm80_backward_32x32_bf16_{'masked' if call['attn_mask'] else 'plain'}"
    (row,) = (row for row in INSTANCES if row.name == name)
    include = [tmp_path / "csrc", tmp_path / "csrc/cuda", tmp_path / "csrc/cuda/sm80"]
    flags = [f"-D{macro}={value}" for macro, value in row.macros().items()]
    modules = {name: Module(compile_ptx(tmp_path / "csrc" / row.source, "80", include=include, flags=flags))}
    problem, dout, dlse = build(call, "cpu")

    def run_with_mistake() -> None:
        for seed, resident in enumerate((2, None, 1)):
            with EmulatedGpu(seed, A100, backward="one pass", resident_blocks=resident, ordered_additions=True, modules=modules):
                attention_calls.check(cuda_backend, problem, dout, dlse)

    with pytest.raises(AssertionError, match=kind):
        run_with_mistake()


# Which kernels run

LONGER = {"head_dims": (64, 64), "dtype": torch.bfloat16, "seqlens": (8, 512), "sizes": (1, 1, 1)}


@pytest.mark.parametrize(
    ("options", "gpu", "one_pass"),
    [
        ({}, A100, True),
        ({"is_causal": "top_left"}, A100, True),
        ({"deterministic": True}, A100, True),
        ({"dropout_p": 0.25}, A100, True),
        ({"seqlens": (8, 256)}, A100, False),  # clearing and reading the sums takes too much of the time
        ({}, RTX_4090, False),  # the tile does not fit
        ({"head_dims": (32, 32)}, RTX_4090, True),
        ({"key_mask": "right"}, A100, False),  # blocks of 64 keys add twice as often
        ({"attn_mask": ("float32", "BHQK")}, A100, False),
        ({"alibi_slopes": "H"}, A100, False),
    ],
    ids=str,
)
def test_which_kernels_are_chosen(options: dict[str, Any], gpu: cuda_emulation.Gpu, one_pass: bool) -> None:
    problem, dout, dlse = build(LONGER | options, "cpu")
    with EmulatedGpu(0, gpu, "none of them") as emulated:
        run(cuda_backend, problem, dout, dlse)
    names = [name for name, _ in emulated.planned]
    assert ("backward_dquery_bf16" in names) == one_pass
    assert any("backward_query" in name for name in names) != one_pass


@pytest.mark.parametrize(
    "options", [{"attn_mask": ("float32", "BHQK")}, {"alibi_slopes": "H"}, {"head_dims": (128, 128), "softcap": 1.0}], ids=str
)
def test_what_one_pass_does_not_take_is_refused_in_words(options: dict[str, Any]) -> None:
    problem, dout, dlse = build(LONGER | options, "cpu")
    with (
        EmulatedGpu(0, A100, "none of them", backward="one pass"),
        pytest.raises((ValueError, RuntimeError), match="backward in one pass takes no|no CUDA kernel"),
    ):
        run(cuda_backend, problem, dout, dlse)


@ORDERED
def test_the_workspace_is_one_float32_copy_of_the_gradient_and_less_than_another(deterministic: bool) -> None:
    problem, dout, dlse = build(LONGER | {"seqlens": (512, 512), "deterministic": deterministic}, "cpu")
    with EmulatedGpu(0, A100, "none of them", backward="one pass") as emulated:
        run(cuda_backend, problem, dout, dlse)
    copy = 4 * problem.query.numel()
    assert copy <= emulated.workspace_bytes < 2 * copy
