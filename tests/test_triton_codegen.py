"""The codegen gate finds what it is there for, and passes on kernels of every kind; `make codegen` runs it on the whole tile table."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sass
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("these tests compile kernels", allow_module_level=True)

import triton.language as tl  # noqa: E402
import triton_codegen_gate as gate  # noqa: E402
import triton_codegen_record  # noqa: E402
from triton_offline import Binary, OfflineDriver, offline  # noqa: E402
from triton_resources import Resources, failures, resources  # noqa: E402

from fused_attention.benchmarks import tune  # noqa: E402
from fused_attention.kernels.triton.launch import Tile, launch, tile_table  # noqa: E402

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
.L_x_1:
        /*0020*/                   FFMA R5, R5, R6, R7 ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
.L_x_2:
        /*0050*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8] ;
        /*0060*/                   LDL R3, [R1] ;
        /*0070*/               @P0 EXIT ;
        /*0080*/                   BRA.U UP0, `(.L_x_2) ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3) ;
"""


def test_hot_loops_are_the_innermost_ones_with_matrix_products() -> None:
    """x_0 holds x_1, which has no product, and x_2, which has one; x_3 is never reached."""
    instructions, labels = sass.parse(LISTING)
    assert len(instructions) == 12
    assert labels == {".L_x_0": 1, ".L_x_1": 2, ".L_x_2": 5, ".L_x_3": 11}
    _, successors = sass.control_flow(instructions, labels)
    headers = sorted(sass.natural_loops(successors))
    assert len(headers) == 3
    (hot,) = sass.hot_loops(instructions, labels)
    assert [instruction.opcode for instruction in hot] == ["HGMMA.64x64x16.F32", "LDL", "EXIT", "BRA.U"]


def test_dominators_of_a_diamond_in_a_loop() -> None:
    successors = [{1}, {2, 3}, {4}, {4}, {1, 5}, set(), {4}]
    assert sass.dominators(successors) == {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 3}, 4: {0, 1, 4}, 5: {0, 1, 4, 5}}
    assert sass.natural_loops(successors) == {1: {1, 2, 3, 4}}


def test_without_warpgroups_loops_of_multiply_adds_are_hot() -> None:
    body = "\n".join("        /*0010*/                   FFMA R5, R5, R6, R7 ;" for _ in range(sass.LEAST_MULTIPLY_ADDS))
    listing = f".L_x_0:\n{body}\n        /*0020*/              @!P1 BRA `(.L_x_0) ;\n        /*0030*/                   EXIT ;\n"
    (hot,) = sass.hot_loops(*sass.parse(listing))
    assert len(hot) == sass.LEAST_MULTIPLY_ADDS + 1


@triton.jit
def product_kernel(
    left, right, result, steps: tl.int32, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows, columns, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        a = tl.load(left + rows[:, None] * D + inner[None, :] + step)
        b = tl.load(right + inner[:, None] * BLOCK_N + columns[None, :] + step)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    tl.store(result + rows[:, None] * BLOCK_N + columns[None, :], sums)


def product(arch: int, head_dim: int, tile: Tile, dtype: torch.dtype = torch.bfloat16) -> tuple[Binary, Resources]:
    tensors = (torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype), torch.zeros(1))
    with offline(arch, inspect=True) as launches:
        launch(product_kernel, 1, tensors, (4,), (head_dim, "ieee"), tile)
    return launches[0].binary, resources(launches[0].binary, arch)


def test_a_good_kernel_passes() -> None:
    binary, found = product(90, 64, Tile(64, 64, 4, 2))
    assert failures(found, 90, warpgroups=True) == []
    assert found.counts["HGMMA"][1] > 0
    assert found.threads == 128
    assert found.spills == found.stack == 0
    assert ".target sm_90a" in binary.ptx


SPILLING = (80, 64, Tile(64, 128, 1, 1))  # 256 sums in each thread


def test_spills_are_found() -> None:
    _, found = product(*SPILLING)
    assert found.counts["HMMA"][1] > 0
    reasons = failures(found, 80, warpgroups=True)
    assert any("spilled" in reason for reason in reasons)
    assert any("local memory" in reason for reason in reasons)


def test_too_much_shared_memory_is_found() -> None:
    _, found = product(120, 256, Tile(128, 128, 8, 4))
    assert any("shared memory" in reason for reason in failures(found, 120, warpgroups=True))
    assert not any("shared memory" in reason for reason in failures(found, 90, warpgroups=False))


def test_a_tile_without_warpgroup_products_is_found() -> None:
    _, found = product(90, 64, Tile(32, 64, 4, 1))
    assert failures(found, 90, warpgroups=True) == ["no warpgroup matrix products"]
    assert failures(found, 90, warpgroups=False) == []


def test_serialised_warpgroup_products_are_found() -> None:
    binary, _ = product(90, 64, Tile(64, 64, 4, 2))
    warning = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...\n"
    found = resources(dataclasses.replace(binary, log=warning + binary.log), 90)
    assert failures(found, 90, warpgroups=True) == ["warpgroup matrix products wait for one another"]


def test_a_kernel_without_a_log_is_not_passed() -> None:
    binary, _ = product(90, 64, Tile(64, 64, 4, 2))
    with pytest.raises(ValueError, match="not in the ptxas log"):
        resources(dataclasses.replace(binary, log=""), 90)


def test_the_gate_covers_the_tile_table() -> None:
    """Every row, but for devices of no known family."""
    gated = {row for task in gate.tasks("") for row in task.rows().values()}
    assert gated == {key for key in tile_table() if key[1] != "other"}


def test_a_row_with_the_same_tile_and_more_to_do_is_checked_in_a_rows_place() -> None:
    for row in (row for task in gate.tasks("") for row in task.rows().values()):
        other = gate.stands_for(row)
        assert tile_table()[other] == tile_table()[row]
        assert gate.stands_for(other) == other
        if row.feature_class == "plain":
            assert other == row
        assert other[:4] == row[:4]
        assert tune.FEATURE_CLASSES.index(other.feature_class) >= tune.FEATURE_CLASSES.index(row.feature_class)


def on_record() -> gate.Compiler:
    """Compiles only what changed since the record was written: for tests of which kernels are checked."""
    return gate.Compiler(triton_codegen_record.read())


def test_only_kernels_that_nothing_stands_for_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    task = gate.Task("backward", "sm80", "16-bit", 64, "plain")
    monkeypatch.setattr(gate, "checked_names", lambda task, form: {"dq"} if form == "separate" else set())
    names = [line.kernel_name for line in gate.check(task, on_record(), every=False)]
    assert "dq" in names
    assert "dkdv" not in names


def test_without_counting_the_same_kernels_fail() -> None:
    for arch, head_dim, tile in (SPILLING, (90, 64, Tile(32, 64, 4, 1)), (90, 64, Tile(64, 64, 4, 2))):
        binary, found = product(arch, head_dim, tile)
        assert failures(resources(binary, arch, count=False), arch, warpgroups=True) == failures(found, arch, warpgroups=True)


class SameProcess(Executor):
    """Saves what a process of its own takes to import."""

    def submit(self, function: Callable, /, *arguments: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


new_devices = itertools.count(10_000)


def run_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str, same_process: bool = True
) -> tuple[int, str]:
    """Exit status and report of `triton_codegen_gate.py` for one kernel."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["triton_codegen_gate.py", "--only", "weights sm80 16-bit 64 plain", *options])
        if same_process:
            device = next(new_devices)  # on which Triton has compiled nothing yet
            patch.setattr(OfflineDriver, "get_current_device", lambda driver: device)
            patch.setattr(gate, "ProcessPoolExecutor", lambda jobs, context: SameProcess())
        with pytest.raises(SystemExit) as end:
            gate.main()
    return end.value.code, capsys.readouterr().out


def test_what_is_on_record_is_compiled_only_in_a_sample(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(triton_codegen_record, "FOLDER", tmp_path)
    status, report = run_gate(monkeypatch, capsys, "--write-record", "--minutes", "0")
    assert (status, "1 were NOT compiled: out of time (--minutes 0)" in report, triton_codegen_record.read()) == (0, True, {})
    status, report = run_gate(monkeypatch, capsys, "--write-record", same_process=False)
    assert (status, "0 did not change and are on record, 1 were compiled" in report) == (0, True)
    ((key, found),) = triton_codegen_record.read().items()
    triton_codegen_record.write({key: dataclasses.replace(found, shared_memory=7)})
    status, report = run_gate(monkeypatch, capsys, "--sample", "0")
    assert (status, "1 did not change and are on record, 0 were compiled" in report) == (0, True)
    status, report = run_gate(monkeypatch, capsys, "--sample", "1")
    assert (status, "on record is" in report) == (1, True)
    assert run_gate(monkeypatch, capsys, "--count")[0] == 0, "what counting finds is not compared"
    assert run_gate(monkeypatch, capsys, "--count", "--write-record")[0] == 2
    triton_codegen_record.write({key: dataclasses.replace(found, spills=4)})
    status, report = run_gate(monkeypatch, capsys, "--sample", "0")
    assert (status, "FAILS: 4 bytes spilled" in report) == (1, True), report


def test_the_key_of_a_kernel_is_that_of_all_that_is_compiled() -> None:
    options = {"num_warps": 4, "extern_libs": [["libdevice", "/somewhere"]]}
    data = {"signature": {"x": "*bf16"}, "attrs_keys": [[0], [1]], "attrs_vals": [["aligned"], []], "options": options, "key": "x"}

    def key(arch: int = 80, source: str = "source", **changed: Any) -> str:
        return triton_codegen_record.key(SimpleNamespace(cache_key=source), json.dumps(data | changed), arch)

    elsewhere = options | {"extern_libs": [["libdevice", "/elsewhere"]]}
    assert key() == key(options=elsewhere) == key(attrs_keys=[[0]], attrs_vals=[["aligned"]]) == key(key="y")
    others = [
        key(90),
        key(source="changed"),
        key(signature={"x": "*fp16"}),
        key(attrs_vals=[[], []]),
        key(options=options | {"num_warps": 8}),
    ]
    assert len({key(), *others}) == 6


def test_prepared_masks_and_packed_sequences_are_checked_in_every_pass_that_takes_them() -> None:
    """Whatever stands for their rows."""
    checked = [task for task in gate.tasks("") if len(task.forms()) > 1]
    for form, passes in gate.PASSES_OF_FORM.items():
        assert {task.measured_pass for task in checked if form in task.forms()} == set(passes)
    assert {task.family for task in checked} == set(gate.ARCHITECTURES)
    assert all(gate.checked_names(task, form) == set(task.rows()) for task in checked for form in task.forms() if form != "separate")
    lines = gate.check(gate.Task("weights", "sm80", "fp32", 64, "dropout"), on_record())
    assert [line.form for line in lines if line.kernel_name == "weights"] == ["separate", "prepared"]


def test_a_tile_is_chosen_that_passes_with_two_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is this one in a process of its own, which finds a tile too large that passes here."""
    task = gate.Task("weights", "sm86", "16-bit", 64, "plain")
    row = task.rows()["weights"]
    shipped, too_large = tile_table()[row], Tile(64, 64, 4, 8)
    monkeypatch.setattr(gate, "failures", lambda found, arch, warpgroups: [])
    monkeypatch.setattr(tune, "candidates", lambda row: [too_large, shipped])
    failed: set[gate.Failed] = set()
    other = gate.OtherTriton(sys.executable)
    try:
        lines = gate.choose(task, False, failed, [other])
        assert [candidate.tile for candidate in failed] == [too_large]
        assert [(line.tile, line.failures) for line in lines if line.kernel_name == "weights"] == [(shipped, [])] * 2
        assert tile_table()[row] == shipped
        tile_table()[row] = too_large
        other.ask(task)
        (line,) = [line for line in other.answer(task) if line.kernel_name == "weights"]
        assert any(f"at most with triton {triton.__version__}" in reason for reason in line.failures), line
    finally:
        other.end()
        tile_table()[row] = shipped


# One of each pass; `make codegen` checks every row.
SAMPLE = (
    ("forward", "16-bit", 64, "plain"),
    ("forward", "16-bit", 128, "dropout"),
    ("backward", "16-bit", 64, "bias"),
    ("dbias", "16-bit", 64, "bias"),
    ("decode", "16-bit", 128, "bias"),
    ("weights", "fp32", 32, "masked"),
)


@pytest.mark.parametrize("family", ["sm80", "sm90"])
@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: " ".join(map(str, row)))
def test_shipped_tiles_pass(family: str, row: tuple[str, str, int, str]) -> None:
    measured_pass, dtype, head_dim, feature_class = row
    lines = gate.check(gate.Task(measured_pass, family, dtype, head_dim, feature_class))
    assert {line.kernel_name for line in lines} >= set(tune.PASSES[measured_pass])
    assert [gate.text(line) for line in lines if line.failures] == []
