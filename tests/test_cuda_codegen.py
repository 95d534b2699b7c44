"""The CUDA codegen gate finds what it is there for, and passes on a sample of the kernels; `make codegen-cuda` runs it on all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import cuda_codegen_gate as gate
import pytest
import sass
from cuda_resources import Code, Usage, code, code_failures, expected, failures, usages
from occupancy import most_registers, room

from csrc.cuda.instances.manifest import INSTANCES, Instance

needs_build = pytest.mark.skipif(gate.why_not() is not None, reason=f"nothing to inspect: {gate.why_not()}")


def instance(name: str) -> Instance:
    return next(row for row in INSTANCES if row.name == name)


PLAIN = instance("sm80_forward_64x64_bf16_plain")

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 1032 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers
"""


def test_what_ptxas_says_is_read_for_each_kernel_and_architecture() -> None:
    assert usages(LOG) == {("first", "sm_80"): Usage(168, 4, 8), ("second", "sm_90a"): Usage(30, 0, 0)}
    with pytest.raises(ValueError, match="says nothing about the registers of second"):
        usages(LOG.replace("Used 30 registers", ""))


def test_a_listing_is_cut_into_kernels() -> None:
    line = "        /*0000*/                   EXIT ;\n"
    listing = f"//--------------------- .text.a    --------------------------\n{line}//------- .text.longer --------\n{line}{line}"
    pieces = sass.functions(listing)
    assert {name: len(sass.parse(piece)[0]) for name, piece in pieces.items()} == {"a": 1, "longer": 2}


def test_how_many_blocks_an_sm_has_room_for() -> None:
    assert room(80, 128, 128, 48 * 1024) == {"registers": 4, "shared memory": 3, "threads": 16}
    assert room(89, 129, 256, 99 * 1024) == {"registers": 1, "shared memory": 1, "threads": 6}
    assert [most_registers(128, blocks) for blocks in (1, 2, 3, 4)] == [255, 255, 168, 128]
    assert room(80, most_registers(256, 3), 256, 0)["registers"] == 3


def test_expected_counts_follow_from_the_tile() -> None:
    """Counted by hand for 32 rows to a warp, 64 keys and head dim 64; and for 16 rows by 16 keys of a decoding warp."""
    assert expected(PLAIN) == {
        "HMMA.16816.F32": (128, 128),  # 2 x 8 x 4 for the scores, as many for out
        "LDSM.16.M88.4": (24, 24),  # K: 4 x 4; Q: 2 x 4, once
        "LDSM.16.MT88.4": (16, 16),
        "LDGSTS": (8, 8),  # 2 tiles of 8 KB by 128 threads
        "MUFU.EX2": (68, 68),
    }
    assert expected(instance("sm80_forward_64x64_bf16_masked"))["LDGSTS"] == (8, 16)
    single_tile = expected(instance("sm80_single_tile_forward_64x64_bf16_masked"))  # Q once; four times 32 keys
    assert (single_tile["HMMA.16816.F32"], single_tile["LDSM.16.M88.4"], single_tile["LDGSTS"]) == (
        (128, 128),
        (4 + 4 * 8, 4 + 4 * 8),
        (4 + 64, 4 + 64),
    )
    single_tile = expected(instance("sm80_single_tile_backward_64x64_bf16_masked"))  # four products of 16, and a step or three of dquery
    assert (single_tile["HMMA.16816.F32"], single_tile["LDSM.16.M88.4"], single_tile["LDGSTS"]) == ((68, 76), (24, 24), (8 + 2, 8 + 4))
    decode = expected(instance("sm80_decode_64x64_fp16"))
    assert (decode["HMMA.16816.F32"], decode["LDGSTS"], decode["MUFU.EX2"]) == ((16, 16), (8, 8), (18, 18))


def good_code() -> Code:
    loop = Counter({
        "HMMA.16816.F32.BF16": 128, "LDSM.16.M88.4": 24, "LDSM.16.MT88.4": 16, "LDGSTS.E.BYPASS.128": 8, "MUFU.EX2": 68, "FFMA": 68,
    })  # fmt: skip
    return Code([loop, loop.copy()], loop + loop + Counter({"STG.E.128": 8, "STG.E": 4, "LDG.E": 6}))


GOOD = Usage(251, 0, 0)


def test_a_good_kernel_passes() -> None:
    assert failures(PLAIN, GOOD, good_code()) == []
    assert failures(PLAIN, GOOD, None) == []


@pytest.mark.parametrize(
    ("row", "usage", "reason"),
    [
        (PLAIN, Usage(251, 4, 0), "4 bytes spilled"),
        (PLAIN, Usage(251, 0, 8), "a stack frame of 8 bytes"),
        (replace(PLAIN, blocks_per_sm=3), Usage(176, 0, 0), "176 registers, 168 at most for 3 blocks"),
        (replace(PLAIN, blocks_per_sm=2, shared_bytes=82 * 1024), GOOD, "too much for 2 blocks"),
    ],
)
def test_too_much_of_a_resource_is_found(row: Instance, usage: Usage, reason: str) -> None:
    (found,) = failures(row, usage, None)
    assert reason in found


@pytest.mark.parametrize(
    ("opcode", "change", "reason"),
    [
        ("HMMA.16816.F32.BF16", -1, "127 HMMA.16816.F32 in the lean loop, not 128"),
        ("LDSM.16.M88.4", 8, "32 LDSM.16.M88.4 in the lean loop, not 24"),
        ("LDSM.16.MT88.4", 1, "17 LDSM.16.MT88.4 in the lean loop, not 16"),
        ("LDGSTS.E.BYPASS.128", 4, "12 LDGSTS in the lean loop, not 8"),
        ("MUFU.EX2", 64, "132 MUFU.EX2 in the lean loop, not 68"),
        ("STL.64", 2, "2 local memory accesses in the lean loop"),
        ("LDG.E.64", 1, "1 loads from global memory in the lean loop"),
    ],
)
def test_what_does_not_belong_in_a_hot_loop_is_found(opcode: str, change: int, reason: str) -> None:
    found = good_code()
    found.loops[0][opcode] += change
    assert code_failures(PLAIN, found) == [reason]


@pytest.mark.parametrize(
    ("opcode", "change", "reason"),
    [
        ("LDGSTS.E.64", 1, "1 asynchronous copies that are not LDGSTS.E.BYPASS.128"),
        ("ST.E", 1, "1 accesses to what the compiler does not know to be global memory"),
        ("STG.E.128", -1, "7 stores of 16 bytes, 8 at least for out"),
        ("STG.E.U16", 16, "20 stores of less than 16 bytes, 4 at most for lse"),
    ],
)
def test_accesses_that_should_be_wide_are_found(opcode: str, change: int, reason: str) -> None:
    found = good_code()
    found.kernel[opcode] += change
    assert code_failures(PLAIN, found) == [reason]


def test_a_lost_hot_loop_is_found() -> None:
    assert code_failures(PLAIN, Code(good_code().loops[:1], good_code().kernel)) == ["1 hot loops, not 2"]


# The committed table


def test_a_kernel_worse_than_its_line_is_found() -> None:
    found = good_code()
    line = gate.Line(PLAIN, GOOD, found, {}, [])
    committed = gate.read_table(gate.table([line], "nvcc"))
    assert gate.worse(line, committed) == []
    found.loops[1]["IMAD.MOV.U32"] += 6  # 1.9 % of 312
    assert gate.worse(line, committed) == []
    found.loops[1]["IMAD.MOV.U32"] += 1
    assert gate.worse(line, committed) == ["319 instructions in the masked loop, 312 in cuda-codegen.md"]
    assert gate.worse(line, {}) == ["it is not in cuda-codegen.md"]


def test_the_table_has_every_instance() -> None:
    assert list(gate.read_table(gate.TABLE.read_text())) == [row.name for row in INSTANCES]


# The kernels that were built


@needs_build
def test_no_kernel_spills_and_as_many_blocks_run_as_intended() -> None:
    built = gate.built_usages()
    assert {row.name: reasons for row in INSTANCES if (reasons := failures(row, built[row.name], None))} == {}


@needs_build
@pytest.mark.parametrize("kind", ["forward_64x64_bf16_plain", "forward_64x64_fp16_plain_dropout", "forward_64x64_fp16_masked",
                                  "forward_64x64_fp16_bias", "decode_64x64_bf16", "backward_query_64x64_bf16_plain",
                                  "backward_key_64x64_bf16_masked", "single_tile_forward_64x64_bf16_masked",
                                  "single_tile_backward_64x64_bf16_masked"])  # fmt: skip
def test_the_code_of_every_class_passes(kind: str) -> None:
    """For other GPUs, too, where that is quick."""
    others = ("sm_90", "sm_120") if kind in ("forward_64x64_bf16_plain", "decode_64x64_bf16") else ()
    lines = gate.compared(gate.check(f"sm80_{kind}", others), gate.TABLE.read_text())
    assert {line.row.name: line.failures for line in lines if line.failures} == {}, f"if a change is meant to do this: {gate.WRITE}"
    assert [set(line.others) for line in lines] == [set(others)]


@needs_build
def test_a_kernel_that_counts_wrong_is_found() -> None:
    """The real listing, taken for that of another tile."""
    found = code(sass.functions(sass.disassemble((gate.FOLDER / f"{PLAIN.image}.sm_80.cubin").read_bytes()))[PLAIN.name])
    assert code_failures(PLAIN, found) == []
    reasons = code_failures(replace(PLAIN, block_n=128), found)
    assert any("HMMA" in reason for reason in reasons)
