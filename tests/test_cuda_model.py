"""cuda_model.py: counts by hand, bounds that must hold, and the comparison with the machine code that was built."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from itertools import product

import cuda_codegen_gate as gate
import cuda_model as model
import pytest
from cuda_resources import expected

from csrc.cuda.instances.manifest import INSTANCES

FORWARD = [row for row in INSTANCES if row.pass_name == "forward"]
PLAIN = {row.head_dim_qk: row for row in FORWARD if row.name.endswith("_bf16_plain") and row.head_dim_qk == row.head_dim_v}


@pytest.mark.parametrize(("name", "tflops"), [("A100", 312), ("RTX 4090", 165.2), ("H200", 0.629 * 989.4)])
def test_the_table_reproduces_the_published_peaks(name: str, tflops: float) -> None:
    gpu = model.GPUS[name]
    assert 2 * gpu.tensor * gpu.sms * gpu.megahertz * 1e6 / 1e12 == pytest.approx(tflops, rel=1e-3)


def test_counts_of_head_dim_64_by_hand() -> None:
    """A warp has 32 rows and 64 keys, a lane 64 scores and 4 rows' shares of them."""
    every, seldom = model.work(PLAIN[64])
    assert (every["HMMA"], every["LDSM"], every["LDGSTS"], every["EX2"]) == (128, 16 + 16, 8, 68)
    assert (every["FFMA"], every["FADD"], every["FMNMX"], every["F2FP"]) == (68, 68, 72, 32)
    assert seldom == {"FMUL": 64, "LDSM": 8}


def test_the_model_and_the_gate_count_alike() -> None:
    """Two derivations of the same counts; those of the gate include what runs seldom, and in masked classes what softcap needs."""
    for row in FORWARD:
        counts = sum(model.work(row), Counter())
        counted = expected(row)
        assert counts["HMMA"] == counted["HMMA.16816.F32"][0]
        assert counts["LDSM"] == counted["LDSM.16.M88.4"][0] + counted["LDSM.16.MT88.4"][0]
        assert counts["LDGSTS"] == counted["LDGSTS"][0]
        if row.feature_class == "plain":
            assert counts["EX2"] == counted["MUFU.EX2"][0]


@pytest.mark.parametrize("gpu", model.GPUS)
def test_no_prediction_is_faster_than_the_tensor_cores(gpu: str) -> None:
    properties = model.GPUS[gpu]
    peak = 2 * properties.tensor * properties.sms * properties.megahertz / 1e6
    for row, seqlen in product(FORWARD, (512, 4096)):
        full, causal = (model.predict(row, properties, 2, 8, seqlen, is_causal) for is_causal in (False, True))
        assert 0 < full.tflops <= peak * 1.0001
        assert 0 < causal.tflops <= peak * 1.0001  # partial tiles on the diagonal cost as much as whole ones
        assert causal.microseconds <= full.microseconds
        assert full.limit in {*model.cycles(row, properties), "memory", "L2"}


def test_one_block_more_than_there_are_sms_takes_twice_as_long() -> None:
    gpu = model.GPUS["A100"]._replace(memory=10**6, l2=None)
    one, two = (model.predict(PLAIN[128], gpu, 1, heads, PLAIN[128].block_m, False) for heads in (108, 109))
    assert one.limit == two.limit == "tensor"
    assert two.microseconds == pytest.approx(2 * one.microseconds)


def test_few_blocks_wait_for_memory() -> None:
    slow = model.GPUS["H200"]._replace(memory=10)
    assert model.predict(PLAIN[64], slow, 1, 132, 128, False).limit == "memory"


def test_a_deviation_above_15_percent_is_listed_by_opcode() -> None:
    row = PLAIN[64]
    expected = sum(model.work(row), Counter())
    loop = Counter({"HMMA.16816.F32.BF16": 128, "LDSM.16.M88.4": 24, "LDSM.16.MT88.4": 16, "LDGSTS.E.BYPASS.128": 8, "MUFU.EX2": 68})
    loop += Counter({"FFMA": 68, "FADD": 78, "FMUL": 68, "FMNMX": 72, "FSETP.NEU.AND": 4, "F2FP.BF16.PACK_AB": 32, "SHFL.BFLY": 8})
    loop += Counter({"IADD3": expected["integer"], "BAR.SYNC": expected["waits, branches, votes"]})
    assert model.deviations(row, loop) == []  # 78 FADD of 68 are within
    loop += Counter({"FADD": 1, "IMAD.MOV.U32": 20, "LDL": 3})
    assert [one.family for one in model.deviations(row, loop)] == ["FADD", "integer", "other"]
    assert str(model.deviations(row, loop)[0]) == "FADD: 79, model 68 (+16%): FADD 79"
    assert str(model.deviations(row, loop)[2]) == "other: 3, model 0: LDL 3"


@pytest.mark.skipif(gate.why_not() is not None, reason=f"nothing to compare with: {gate.why_not()}")
@pytest.mark.parametrize("head_dim", [64, 256])
def test_what_does_the_arithmetic_deviates_nowhere(head_dim: int) -> None:
    """Every family but those of addresses and control, which compilers add to, is exactly what the model says."""
    (line,) = gate.check(PLAIN[head_dim].image, ())
    arithmetic = {"HMMA", "LDSM", "LDGSTS", "LDG", "EX2", "FFMA", "FADD", "FMUL", "FMNMX", "FSEL, FSETP", "F2FP", "SHFL"}
    found = model.deviations(PLAIN[head_dim], line.code.loops[0], tolerance=0)
    assert [str(one) for one in found if one.family in arithmetic] == []
    assert model.deviations(replace(PLAIN[head_dim], block_n=128), line.code.loops[0])


def test_the_page_shows_what_the_model_says() -> None:
    page = model.PAGE.read_text()
    tables = model.page_tables()
    for name in ("tile", "cells", "single-tile cells"):
        assert "\n".join(tables[name]) in page, "docs/cuda-kernels.md is out of date: python tests/cuda_model.py --write"


def test_the_command_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_model.py", "--only", "128x128_bf16_plain$", "--seqlen", "2048", "--causal"])
    model.main()
    heading, _, line = capsys.readouterr().out.splitlines()
    assert heading == "| instance | batch, heads, seqlen | A100 | RTX 4090 | H200 |"
    assert line.startswith("| 128x128_plain | 4, 16, 2048 causal | ")
    assert line.count("TFLOP/s, ") == 3


def test_the_kernel_for_short_sequences_reads_no_row_twice_and_rescales_nothing() -> None:
    (row,) = [row for row in INSTANCES if row.name == "sm80_single_tile_forward_64x64_bf16_masked"]
    every, seldom = model.work(row)
    counted = expected(row)
    assert every["HMMA"] == counted["HMMA.16816.F32"][0]
    assert every["EX2"] == every["FFMA"] == 64  # scores of a lane: 16 rows, 128 keys
    assert seldom["FMUL"] == 0
    long = model.predict(PLAIN[64], model.GPUS["A100"], 128, 8, 128, False)
    assert model.predict(row, model.GPUS["A100"], 128, 8, 128, False).microseconds <= long.microseconds
