"""The emulator itself: layouts against independently computed ones, seeded bugs, bad input, the conformance file.

tests/emulator/__init__.py says what the emulator is. What its kernels need from nvcc is skipped where nvcc is missing.
"""

from __future__ import annotations

import ctypes
import lzma
from dataclasses import replace
from functools import cache
from pathlib import Path

import emulator
import numpy as np
import pytest
import torch
from emulator import LaunchError, Module, PtxError, Result, Schedule, TensorMap, ptx_text
from emulator.ptx_text import HEADER, kernel, store_words

FOLDER = Path(emulator.__file__).parent
pytestmark = pytest.mark.skipif(emulator.why_not_buildable() is not None, reason=str(emulator.why_not_buildable()))
needs_nvcc = pytest.mark.skipif(emulator.find_nvcc() is None, reason="nvcc was not found (CUDA_HOME, PATH, wheels)")


@cache
def compiled(name: str, architecture: str) -> Module:
    return Module(emulator.compile_ptx(FOLDER / name, architecture, include=[FOLDER / "kernels"]))


def run_threads(body: str, arrays: list[np.ndarray], threads: int = 32, grid: int = 1, **options) -> Result:
    """A hand-written kernel whose parameters are pointers to the arrays."""
    ptx = HEADER + kernel(body, ["u64"] * len(arrays))
    return Module(ptx).launch("kernel", (grid,), (threads,), options.pop("shared_bytes", 1024), arrays, **options)


def to_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)


def small_integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


# ------------------------------------------------------------------------------------------------ layouts

# PTX ISA, figures "mma.m16n8k16 fragment layout": (row, column) of each element that a thread holds.


def mma_a_elements(thread: int, k: int) -> list[tuple[int, int]]:
    group, member = divmod(thread, 4)
    return [(group + 8 * (i in (2, 3, 6, 7)), member * 2 + i % 2 + 8 * (i >= 4)) for i in range(k // 2)]


def mma_b_elements(thread: int, k: int) -> list[tuple[int, int]]:
    group, member = divmod(thread, 4)
    return [(member * 2 + i % 2 + 8 * (i >= 2), group) for i in range(k // 4)]


def mma_c_elements(thread: int) -> list[tuple[int, int]]:
    group, member = divmod(thread, 4)
    return [(group + 8 * (i >= 2), member * 2 + i % 2) for i in range(4)]


def gather(matrix: np.ndarray, elements: list[list[tuple[int, int]]]) -> np.ndarray:
    return np.array([[matrix[element] for element in of_thread] for of_thread in elements])


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize(("inputs", "accumulator"), [("bf16", "f32"), ("f16", "f32"), ("f16", "f16")])
def test_mma_layout(inputs: str, accumulator: str, k: int) -> None:
    a, b, c = small_integers(16, k), small_integers(k, 8, seed=1), small_integers(16, 8, seed=2)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[inputs]
    a_words = to_bits(gather(a, [mma_a_elements(t, k) for t in range(32)]), dtype).view(np.uint32)
    b_words = to_bits(gather(b, [mma_b_elements(t, k) for t in range(32)]), dtype).view(np.uint32)
    held = gather(c, [mma_c_elements(t) for t in range(32)]).astype(np.float32)
    c_words = (to_bits(held, torch.float16) if accumulator == "f16" else held).view(np.uint32)
    words = c_words.shape[1]
    names = {"a": (0, k // 4), "b": (8, k // 8), "c": (16, words)}
    body = "\n".join(
        ptx_text.load_words(f"%p{i}", [f"%r{first + r}" for r in range(count)]) for i, (first, count) in enumerate(names.values())
    )
    a_, b_, c_ = (ptx_text.vector("r", *place) for place in names.values())
    d = [f"%r{24 + r}" for r in range(words)]
    instruction = f"mma.sync.aligned.m16n8k{k}.row.col.{accumulator}.{inputs}.{inputs}.{accumulator}"
    body += f"\n{instruction} {ptx_text.vector('r', 24, words)}, {a_}, {b_}, {c_};\n"
    out = np.zeros((32, words), np.uint32)
    run_threads(body + store_words("%p3", d), [a_words, b_words, c_words, out]).check()
    results = out.view(np.float16 if accumulator == "f16" else np.float32).astype(np.float32)
    assert np.array_equal(results, gather(a @ b + c, [mma_c_elements(t) for t in range(32)]))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix_layout(count: int, transposed: bool) -> None:
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    expected = np.zeros((32, count, 2), np.uint16)
    for t in range(32):
        for i in range(count):
            m = matrices[i].T if transposed else matrices[i]
            expected[t, i] = m[t // 4, 2 * (t % 4)], m[t // 4, 2 * (t % 4) + 1]
    trans = ".trans" if transposed else ""
    registers = [f"%r{i}" for i in range(count)]
    row_address = "mov.u32 %r100, smem;\nshl.b32 %r101, %t, 4;\nadd.u32 %r101, %r100, %r101;\n"
    load = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {ptx_text.vector('r', 0, count)}, [%r101];\n"
    out = np.zeros((32, count, 2), np.uint16)
    body = (
        row_address
        + ptx_text.copy_words("%r100", "%p0", str(count * 32), 32)
        + "\nbar.warp.sync -1;\n"
        + load
        + store_words("%p1", registers)
    )
    result = run_threads(body, [matrices, out]).check()
    assert np.array_equal(out, expected)
    assert result.counts["bank_conflicts"] == 0

    stored = np.zeros((count, 8, 8), np.uint16)
    body = (
        row_address
        + ptx_text.load_words("%p0", registers)
        + f"\nstmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r101], {ptx_text.vector('r', 0, count)};\nbar.warp.sync -1;\n"
        + f"setp.lt.u32 %q0, %t, {count * 8};\n@%q0 ld.shared.v4.u32 {{%r0, %r1, %r2, %r3}}, [%r101];\n"
        + "mul.wide.u32 %d0, %t, 16;\nadd.u64 %d0, %d0, %p1;\n@%q0 st.global.v4.u32 [%d0], {%r0, %r1, %r2, %r3};\n"
    )
    run_threads(body, [expected, stored]).check()
    assert np.array_equal(stored, matrices)


def test_rows_in_the_same_banks_are_counted() -> None:
    body = "mov.u32 %r0, smem;\nmad.lo.u32 %r1, %t, 128, %r0;\nst.shared.u32 [%r1], %t;\nbar.warp.sync -1;\n"
    body += "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];"
    assert run_threads(body, [], shared_bytes=4096).counts["bank_conflicts"] == 4 * 7


def place_operand(matrix: np.ndarray, mn_major: bool, swizzle: int) -> tuple[np.ndarray, int]:
    """The bytes in shared memory of an operand of 16 along K (matrix: MN x 16), and its descriptor without the start address.

    CUTLASS, mma_sm90_desc.hpp, canonical layouts: atoms of 8 rows of `swizzle` bytes (16 without swizzle) along the major dimension, whose
    16-byte chunks are permuted by xor with the row.
    """
    size = matrix.shape[0]
    bits = to_bits(matrix if not mn_major else matrix.T, torch.bfloat16)  # rows of contiguous elements
    lines, length = bits.shape
    row_bytes = swizzle or 16
    atoms_along = -(-length * 2 // row_bytes)
    if mn_major or not swizzle:
        image = np.zeros((lines // 8, atoms_along, 8, row_bytes // 2), np.uint16)
    else:  # K-major rows of the swizzle's width, of which 32 bytes are used
        image = np.zeros((lines // 8, 1, 8, row_bytes // 2), np.uint16)
    for line in range(lines):
        for chunk in range(length // 8):
            atom, within = divmod(chunk, row_bytes // 16)
            place = within ^ (line % 8 * (row_bytes // 16) // 8) if swizzle else within
            image[line // 8, atom, line % 8, place * 8 : place * 8 + 8] = bits[line, chunk * 8 : chunk * 8 + 8]
    between_lines, between_atoms = image[0].nbytes, image[0, 0].nbytes  # to the next 8 lines; to the next atom of the same lines
    if not swizzle:
        # Without swizzle a descriptor's strides go: leading along K, stride along MN.
        leading, stride = (between_lines, between_atoms) if mn_major else (between_atoms, between_lines)
    else:
        leading, stride = between_atoms, between_lines
    layout = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    assert image.size >= size * 16
    return image.reshape(-1), leading >> 4 << 16 | stride >> 4 << 32 | layout << 62


def wgmma_elements(thread: int, n: int) -> list[tuple[int, int]]:
    """PTX ISA, "wgmma.mma_async fragments": like mma's C for every 8 columns, 16 rows per warp."""
    warp, lane = divmod(thread, 32)
    return [(16 * warp + row, 8 * block + column) for block in range(n // 8) for row, column in mma_c_elements(lane)]


WGMMA_CASES = [
    # n, inputs, accumulator, A in registers, A and B MN-major, swizzle
    *((64, "bf16", "f32", False, ta, tb, swizzle) for ta in (False, True) for tb in (False, True) for swizzle in (0, 32, 64, 128)),
    *((64, "bf16", "f32", True, False, tb, 128) for tb in (False, True)),
    *((n, "bf16", "f32", False, False, False, 128) for n in (8, 24, 96, 128, 192, 256)),
    *((n, "bf16", "f32", True, False, True, 128) for n in (128, 256)),
    *(
        (n, "f16", accumulator, registers, False, False, 64)
        for n in (16, 256)
        for accumulator in ("f32", "f16")
        for registers in (False, True)
    ),
]


@pytest.mark.parametrize(("n", "inputs", "accumulator", "a_in_registers", "transpose_a", "transpose_b", "swizzle"), WGMMA_CASES)
def test_wgmma_layout(
    n: int, inputs: str, accumulator: str, a_in_registers: bool, transpose_a: bool, transpose_b: bool, swizzle: int
) -> None:
    a, b, c = small_integers(64, 16), small_integers(16, n, seed=1), small_integers(64, n, seed=2)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[inputs]
    a_image, a_descriptor = place_operand(a, transpose_a, swizzle)
    b_image, b_descriptor = place_operand(b.T, transpose_b, swizzle)
    start_of_b = -(-a_image.nbytes // 1024) * 1024
    image = np.zeros(start_of_b // 2 + b_image.size, np.uint16)
    image[: a_image.size], image[start_of_b // 2 :] = a_image, b_image
    if inputs == "f16":  # the same small integers in the other format
        image = to_bits((image.astype(np.uint32) << 16).view(np.float32), torch.float16)
    registers = to_bits(gather(a, [wgmma_elements(t, 16) for t in range(128)]), dtype).view(np.uint32)
    held = gather(c, [wgmma_elements(t, n) for t in range(128)]).astype(np.float32)
    d = np.ascontiguousarray(to_bits(held, torch.float16) if accumulator == "f16" else held)
    ptx = ptx_text.wgmma(n, inputs, accumulator, a_in_registers=a_in_registers, transpose_a=transpose_a, transpose_b=transpose_b)
    args = [image, image.nbytes // 4, a_descriptor, b_descriptor + (start_of_b >> 4), registers, d, 1]
    Module(ptx).launch("kernel", (1,), (128,), image.nbytes, args, schedule=1).check()
    results = (d.view(np.float16) if accumulator == "f16" else d).astype(np.float32).reshape(128, -1)
    assert np.array_equal(results, gather(c + a @ b, [wgmma_elements(t, n) for t in range(128)]))


# ------------------------------------------------------------------------------------------------ conformance file


@needs_nvcc
def test_conformance_file() -> None:
    """The launches of conformance.cu, which on a GPU writes the same bytes."""
    module = compiled("conformance.cu", "90a")
    output = bytearray()
    words = np.zeros(8192, np.uint32)
    words[4096:] = np.arange(4096, 8192, dtype=np.uint32) * np.uint32(2654435761)
    module.launch("conformance_warp", (1,), (32,), 4096, [words]).check()
    output += words[: 32 * 64].tobytes()
    for swizzle in (0, 32, 64, 128):
        for c0, c1 in ((0, 0), (0, 32), (0, 64), (-8, -3)):
            source, stored, raw = (
                np.arange(72 * 80, dtype=np.uint16).reshape(1, 72, 80),
                np.zeros((1, 72, 80), np.uint16),
                np.zeros(2048, np.uint32),
            )
            maps = [TensorMap(array[:, :, :64], (1, 64, swizzle // 2 or 64), swizzle) for array in (source, stored)]
            box_bytes = (swizzle or 128) * 64
            module.launch("conformance_tma", (1,), (128,), 16640, [*maps, raw, box_bytes, c0, c1], schedule=c1 + 3).check()
            output += raw.tobytes()[:box_bytes] + stored.tobytes()
    for form, lbo, sbo, layout, k_step in (
        ("00", 16, 1024, 1, 32),
        ("00", 16, 512, 2, 32),
        ("00", 16, 256, 3, 2048),
        ("00", 1024, 128, 0, 2048),
        ("11", 8192, 1024, 1, 2048),
        ("11", 4096, 512, 2, 1024),
        ("11", 2048, 256, 3, 512),
        ("11", 1024, 128, 0, 2048),
        ("01", 16, 1024, 1, 2048),
    ):
        sums = np.zeros((128, 64), np.float32)
        module.launch(f"conformance_wgmma_{form}", (1,), (128,), 32768, [sums, lbo, sbo, layout, k_step]).check()
        output += sums.tobytes()
    for path in sorted(FOLDER.glob("conformance_*.bin.xz")):  # one recorded on a GPU goes beside the emulated one
        golden = lzma.decompress(path.read_bytes())
        assert len(output) == len(golden), path.name
        different = np.flatnonzero(np.frombuffer(output, np.uint8) != np.frombuffer(golden, np.uint8))
        assert different.size == 0, f"{path.name}: {different.size} bytes differ, the first at {different[0]}"


# ------------------------------------------------------------------------------------------------ seeded bugs

COMPUTE = {"80": "80", "90": "90a"}
SEQLEN, HEADS = 321, 2  # full tiles, and a tail of one row


@cache
def attention_case() -> tuple[list[np.ndarray], np.ndarray]:
    generator = np.random.default_rng(0)
    q, k, v = generator.standard_normal((3, HEADS, SEQLEN, 64))
    inputs = [to_bits(x, torch.bfloat16) for x in (q, k, v)]
    q, k, v = ((x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in inputs)
    return inputs, np.stack([q, k, v])


def expected_output(causal: bool) -> np.ndarray:
    q, k, v = attention_case()[1]
    scores = np.einsum("hid,hjd->hij", q, k) / 8
    if causal:
        scores = np.where(np.tril(np.ones((SEQLEN, SEQLEN), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def run_forward(architecture: str, entry: str, seed: int, consumers: int = 2) -> tuple[Result, np.ndarray]:
    inputs, _ = attention_case()
    out, lse = np.full((HEADS, SEQLEN, 64), 0x7FFF, np.uint16), np.full((HEADS, SEQLEN), np.nan, np.float32)
    scale_log2 = float(np.log2(np.e) / 8)
    module = compiled(f"kernels/seeded_bugs_sm{architecture}.cu", COMPUTE[architecture])
    if architecture == "80":
        grid, threads, shared_bytes, registers = (-(-SEQLEN // 64), HEADS), 128, 5 * 8192, 0
        args = [*inputs, out, lse, SEQLEN, scale_log2]
    else:
        grid, threads = (-(-SEQLEN // (64 * consumers)), HEADS), 128 * (consumers + 1)
        shared_bytes, registers = (4 + consumers) * 8192 + 256, 168 if consumers == 2 else 0
        args = [*(TensorMap(x, (1, 64, 64), 128) for x in (*inputs, out)), lse, SEQLEN, scale_log2]
    result = module.launch(entry, grid, (threads,), shared_bytes, args, seed, registers=registers)
    return result, (out.astype(np.uint32) << 16).view(np.float32)


@needs_nvcc
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("architecture", "entry"), [("80", "FORWARD"), ("80", "FORWARD_CAUSAL"), ("90", "FORWARD"), ("90", "FORWARD_CAUSAL")]
)
def test_correct_kernels_are_not_reported(architecture: str, entry: str, seed: int) -> None:
    result, out = run_forward(architecture, entry, seed)
    result.check()
    assert np.abs(out - expected_output("CAUSAL" in entry)).max() < 2e-2


@needs_nvcc
def test_one_consumer_warpgroup() -> None:
    result, out = run_forward("90", "FORWARD_ONE_CONSUMER", 1, consumers=1)
    result.check()
    assert np.abs(out - expected_output(False)).max() < 2e-2


# What must be among the reports; None: only the numbers are wrong.
SEEDED_BUGS = {
    ("80", "NO_CP_ASYNC_WAIT"): "in-flight-read",
    ("80", "NO_BARRIER_AFTER_CP_ASYNC"): "race",
    ("80", "NO_SYNCWARP_IN_EPILOGUE"): "race",
    ("80", "PREFETCH_INTO_LIVE_BUFFER"): "race",
    ("80", "TAIL_ROWS_NOT_CLAMPED"): "global-oob",
    ("80", "TAIL_ROWS_STORED"): "global-race",
    ("90", "NO_WAIT_FOR_V"): "race",
    ("90", "NO_PROXY_FENCE_BEFORE_STORE"): "missing-proxy-fence",
    ("90", "WRONG_PARITY"): "deadlock",
    ("90", "EXPECT_TX_TOO_SMALL"): "deadlock",
    ("90", "EXPECT_TX_TOO_LARGE"): "deadlock",
    ("90", "V_RELEASED_BEFORE_WGMMA_WAIT"): "race",
    ("90", "NO_WGMMA_WAIT"): "exit-pending",
    ("90", "NO_WGMMA_FENCE"): "missing-wgmma-fence",
    ("90", "NO_BARRIER_BEFORE_STORE"): "race",
    ("90", "NO_WAIT_FOR_EMPTY_SLOT"): "deadlock",
    ("90", "EMPTY_BARRIER_COUNT"): "deadlock",
    ("90", "NO_BULK_WAIT"): "exit-pending",
    ("90", "NO_FENCE_MBARRIER_INIT"): "missing-proxy-fence",
    ("90", "WRONG_DESCRIPTOR_STRIDE"): None,
    ("90", "PROXY_FENCE_AFTER_BARRIER"): "missing-proxy-fence",
    ("90", "NO_SETMAXNREG_DEC"): "deadlock",
    ("90", "BARRIER_COUNT"): "deadlock",
    ("90", "NO_BARRIER_AFTER_MBARRIER_INIT"): "race",
    ("90", "NO_TAIL_MASK"): None,
    ("90", "EXPECT_TX_OF_ONE_LOAD"): "tx-count",
}


@needs_nvcc
@pytest.mark.parametrize(
    ("architecture", "bug", "kind"), [(*case, kind) for case, kind in SEEDED_BUGS.items()], ids=lambda value: str(value)
)
def test_seeded_bug_is_caught(architecture: str, bug: str, kind: str | None) -> None:
    result, out = run_forward(architecture, bug, 0)
    if kind is None:
        assert np.abs(out - expected_output(False)).max() > 2e-2
    else:
        assert kind in result.kinds
        assert all(report.where.split(":")[0].endswith((".cuh", ".cu")) for report in result.reports)


@needs_nvcc
def test_every_seeded_bug_is_in_the_table() -> None:
    for architecture in ("80", "90"):
        entries = compiled(f"kernels/seeded_bugs_sm{architecture}.cu", COMPUTE[architecture]).entries
        assert {entry for entry in entries if not entry.startswith("FORWARD")} == {
            bug for family, bug in SEEDED_BUGS if family == architecture
        }
    assert len(SEEDED_BUGS) == 26


@needs_nvcc
def test_deadlock_report_says_who_waits_for_what() -> None:
    result, _ = run_forward("90", "BARRIER_COUNT", 0)
    (deadlock,) = (report for report in result.reports if report.kind == "deadlock")
    assert "256 of 384 threads cannot make progress" in deadlock.message
    assert "warps 4-7: lanes ffffffff: barrier at forward_sm90.cuh:" in deadlock.message
    assert "barrier 1: 128 of 256 threads arrived" in deadlock.message


# ------------------------------------------------------------------------------------------------ ordinary CUDA C++


@needs_nvcc
def test_functions_globals_and_constants() -> None:
    out = torch.zeros(17, dtype=torch.int32)
    compiled("kernels/ordinary_cuda.cu", "80").launch("functions", (1,), (16,), 0, [out]).check()
    fibonacci = [0, 1]
    while len(fibonacci) < 16:
        fibonacci.append(sum(fibonacci[-2:]))
    assert out.tolist() == [fibonacci[t] * 1000 + t * 20 + 3 + 3 ** (t % 5) for t in range(16)] + [16]


@needs_nvcc
def test_ordinary_cuda() -> None:
    n = 300
    x = torch.randn(n, dtype=torch.bfloat16)
    total, most = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    compiled("kernels/ordinary_cuda.cu", "80").launch("reversed_sums", (3,), (128,), 0, [x, total, most, n], schedule=2).check()
    table = 3 * sum((t * 7 % 16) * (t + 1) for t in range(128))
    assert total.item() == pytest.approx(x.float().sum().item() + table, rel=1e-5)
    assert most.item() == max((x[i : i + 128] > 0).sum() for i in (0, 128, 256))


@needs_nvcc
def test_math_functions() -> None:
    which, x = torch.arange(32, dtype=torch.int32) % 10, torch.linspace(1, 4, 32)
    cases = [x.sqrt(), x.exp(), x.exp(), x.tanh(), x.log(), x % 3, 1 / x, (x / 2).floor(), -x, -x]
    expected = torch.stack(cases)[which.long(), torch.arange(32)]
    compiled("kernels/ordinary_cuda.cu", "80").launch("math_functions", (1,), (32,), 0, [which, x]).check()
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ instructions


def test_calls_written_by_hand() -> None:
    function = """
.func (.param .b32 result) multiply(.param .b32 a, .param .align 8 .b8 b[8])
{
.reg .b32 %x<4>;
ld.param.u32 %x0, [a];
ld.param.u32 %x1, [b+4];
mul.lo.u32 %x2, %x0, %x1;
st.param.b32 [result], %x2;
ret;
}
"""
    body = """
{
.param .b32 first;
.param .align 8 .b8 second[8];
.param .b32 product;
st.param.b32 [first], %t;
st.param.b32 [second], 1000;
st.param.b32 [second+4], 7;
call.uni (product), multiply, (first, second);
ld.param.b32 %r0, [product];
}
"""
    out = np.zeros(32, np.uint32)
    ptx = HEADER + function + kernel(body + store_words("%p0", ["%r0"]), ["u64"])
    Module(ptx).launch("kernel", (1,), (32,), 0, [out]).check()
    assert out.tolist() == [7 * t for t in range(32)]


def test_branch_by_table() -> None:
    body = """
and.b32 %r0, %t, 3;
table: .branchtargets FIRST, SECOND, THIRD;
setp.lt.u32 %q0, %r0, 3;
mov.u32 %r1, 9;
@%q0 brx.idx %r0, table;
bra END;
FIRST: mov.u32 %r1, 10;
bra END;
SECOND: mov.u32 %r1, 20;
bra END;
THIRD: mov.u32 %r1, 30;
END:
"""
    out = np.zeros(32, np.uint32)
    run_threads(body + store_words("%p0", ["%r1"]), [out]).check()
    assert out.tolist() == [10, 20, 30, 9] * 8


def float_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


ARITHMETIC = [
    ("mul.hi.u32 %r0, 0xD2511F53, 0xDEADBEEF;", 0xD2511F53 * 0xDEADBEEF >> 32),
    ("mul.hi.s32 %r0, -3, 2;", 0xFFFFFFFF),
    ("mad.lo.s32 %r0, -3, 5, 1;", 2**32 - 14),
    ("div.s32 %r0, -7, 2;", 2**32 - 3),
    ("rem.s32 %r0, -7, 2;", 2**32 - 1),
    ("min.relu.s32 %r0, -5, 3;", 0),
    ("shr.s32 %r0, -8, 40;", 0xFFFFFFFF),
    ("shl.b32 %r0, 1, 32;", 0),
    ("shf.l.wrap.b32 %r0, 0x80000000, 1, 33;", 3),
    ("bfe.s32 %r0, 0xF0, 4, 4;", 0xFFFFFFFF),
    ("bfi.b32 %r0, 0xAB, 0x11223344, 8, 8;", 0x1122AB44),
    ("prmt.b32 %r0, 0x33221100, 0x77665544, 0x7531;", 0x77553311),
    ("lop3.b32 %r0, 0xF0F0, 0xFF00, 0xAAAA, 0x96;", 0xF0F0 ^ 0xFF00 ^ 0xAAAA),
    ("clz.b32 %r0, 0x00010000;", 15),
    ("brev.b32 %r0, 1;", 0x80000000),
    ("bfind.u32 %r0, 0x00010000;", 16),
    ("popc.b32 %r0, 0xF0F0;", 8),
    ("fma.rn.f32 %r0, 0f40000000, 0f40400000, 0fBF800000;", float_bits(5)),
    ("min.NaN.f32 %r0, 0f7FC00000, 0f3F800000;\nabs.f32 %r0, %r0;", 0x7FC00000),
    ("max.f32 %r0, 0f7FC00000, 0f3F800000;", float_bits(1)),
    ("ex2.approx.ftz.f32 %r0, 0f40400000;", float_bits(8)),
    ("tanh.approx.f32 %r0, 0f00000000;", 0),
    ("add.ftz.f32 %r0, 0f00000001, 0f00000000;", 0),
    ("add.rz.f32 %r0, 0f3F800000, 0f33C00000;", float_bits(1)),  # 1 + 1.5 * 2^-24
    ("add.rn.f32 %r0, 0f3F800000, 0f33C00000;", float_bits(1) + 1),
    ("fma.rm.f32 %r0, 0fBF800000, 0f3F800000, 0fB3000000;", float_bits(-1) + 1),
    ("mul.sat.f32 %r0, 0f40000000, 0f40400000;", float_bits(1)),
    ("copysign.f32 %r0, 0fBF800000, 0f40000000;", float_bits(-2)),
    ("cvt.rn.bf16x2.f32 %r0, 0f40000000, 0f3F800000;", 0x40003F80),
    ("cvt.rn.f16x2.f32 %r0, 0f40000000, 0f3F800000;", 0x40003C00),
    ("cvt.rzi.s32.f32 %r0, 0fC0200000;", 2**32 - 2),
    ("cvt.rni.s32.f32 %r0, 0f40200000;", 2),
    ("cvt.rni.f32.f32 %r0, 0f40600000;", float_bits(4)),
    ("cvt.rzi.u32.f32 %r0, 0fBF800000;", 0),
    ("cvt.rzi.s32.f32 %r0, 0f7F800000;", 0x7FFFFFFF),
    ("cvt.sat.s8.s32 %r0, 300;", 127),
    ("cvt.rn.f32.s32 %r0, -3;", float_bits(-3)),
    ("fma.rn.bf16x2 %r0, 0x40003F80, 0x40004000, 0x3F803F80;", 0x40A04040),  # (2 * 2 + 1, 1 * 2 + 1)
    ("add.f16x2 %r0, 0x40003C00, 0x3C003C00;", 0x42004000),
    ("setp.lt.s32 %q0, -1, 1;\nselp.u32 %r0, 5, 6, %q0;", 5),
    ("setp.lt.u32 %q0, -1, 1;\nselp.u32 %r0, 5, 6, %q0;", 6),
    ("setp.ltu.f32 %q0, 0f7FC00000, 0f00000000;\nselp.u32 %r0, 5, 6, %q0;", 5),
    ("setp.eq.u32 %q1, 1, 2;\nsetp.eq.and.u32 %q0, 1, 1, !%q1;\nselp.u32 %r0, 5, 6, %q0;", 5),
    ("mov.b64 %d0, {1, 2};\nshr.u64 %d0, %d0, 32;\ncvt.u32.u64 %r0, %d0;", 2),
    ("vote.sync.ballot.b32 %r0, 1, -1;", 0xFFFFFFFF),
    ("redux.sync.max.s32 %r0, %t, -1;", 31),
    ("redux.sync.add.u32 %r0, %t, -1;", 31 * 16),
    ("shfl.sync.idx.b32 %r0, %t, 7, 31, -1;", 7),
    ("mov.u32 %r1, 0;\nactivate: add.u32 %r1, %r1, 1;\nsetp.lt.u32 %q0, %r1, 9;\n@%q0 bra activate;\nmov.u32 %r0, %r1;", 9),
]


@pytest.mark.parametrize(("text", "expected"), ARITHMETIC, ids=[text.split()[0] for text, _ in ARITHMETIC])
def test_instruction(text: str, expected: int) -> None:
    out = np.zeros(32, np.uint32)
    run_threads(text + "\n" + store_words("%p0", ["%r0"]), [out]).check()
    assert (out == expected).all(), f"{text} gives {out[0]:#x}, not {expected:#x}"


def test_movmatrix_transposes() -> None:
    matrix = np.arange(64, dtype=np.uint16)
    words, out = matrix.view(np.uint32).copy(), np.zeros(32, np.uint32)
    body = ptx_text.load_words("%p0", ["%r0"]) + "\nmovmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;\n" + store_words("%p1", ["%r1"])
    run_threads(body, [words, out]).check()
    assert np.array_equal(out.view(np.uint16).reshape(8, 8), matrix.reshape(8, 8).T)


MBARRIER = """
mov.u32 %r0, smem;
add.u32 %r1, %r0, 512;
setp.eq.u32 %q0, %t, 0;
@%q0 mbarrier.init.shared::cta.b64 [%r1], {count};
@%q0 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
MBARRIER_WAIT = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %q1, [%r1], 0;\n@!%q1 bra WAIT;\n"


@pytest.mark.parametrize("seed", range(9))
def test_bulk_copies_and_reductions(seed: int) -> None:
    source, copied, added = (np.arange(64, dtype=np.float32) * factor for factor in (1, 0, 10))
    body = (
        MBARRIER.format(count=1)
        + "@%q0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 256;\n"
        + "@%q0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%p0], 256, [%r1];\n"
        + MBARRIER_WAIT
        + "@%q0 cp.async.bulk.global.shared::cta.bulk_group [%p1], [%r0], 256;\n"
        + "@%q0 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%p2], [%r0], 256;\n"
        + "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"
    )
    run_threads(body, [source, copied, added], schedule=seed).check()
    assert np.array_equal(copied, source)
    assert np.array_equal(added, 11 * source)


@pytest.mark.parametrize("seed", range(3))
def test_cp_async_signals_an_mbarrier(seed: int) -> None:
    source, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = (
        MBARRIER.format(count=32)
        + "mad.lo.u32 %r2, %t, 4, %r0;\nmad.wide.u32 %d0, %t, 4, %p0;\ncp.async.ca.shared.global [%r2], [%d0], 4;\n"
        + "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r1];\n"
        + MBARRIER_WAIT
        + "xor.b32 %r3, %r2, 4;\nld.shared.u32 %r4, [%r3];\n"
        + store_words("%p1", ["%r4"])
    )
    run_threads(body, [source, out], schedule=seed).check()
    assert out.tolist() == [t ^ 1 for t in range(32)]


# ------------------------------------------------------------------------------------------------ blocks that wait for each other

SUM_BLOCKS, SUM_TILES, SUM_ELEMENTS = 12, 5, 128
RESIDENT = [1, 2, 7, None]


def expected_sums() -> np.ndarray:
    """accumulate.cuh in plain float32: blocks add in the order of their tickets."""
    sums, i = np.zeros((SUM_TILES, SUM_ELEMENTS), np.float32), np.arange(SUM_ELEMENTS)
    for block in range(SUM_BLOCKS):
        for tile in range(SUM_TILES):
            if (block + 2 * tile) % 3 != 0:
                sums[tile] += np.float32(1) / (1 + (block * 7 + tile * 5 + i) % 23).astype(np.float32)
    return sums


def run_accumulate(entry: str, seed: int, resident: int | None) -> tuple[Result, np.ndarray]:
    """Launched twice, since the first launch must leave the counters as it found them; the reports of the first launch that has any."""
    architecture = "90" if entry.startswith("BULK") else "80"
    module = compiled(f"kernels/accumulate_sm{architecture}.cu", COMPUTE[architecture])
    schedule = replace(Schedule.of_seed(seed), resident_blocks=resident, ordered_additions=True)
    counters = np.zeros(2 + SUM_TILES, np.uint32)
    for _ in range(2):
        sums, out = np.zeros((SUM_TILES, SUM_ELEMENTS), np.float32), np.full((SUM_TILES, SUM_ELEMENTS), np.nan, np.float32)
        result = module.launch(entry, (SUM_BLOCKS,), (64,), 0, [sums, out, counters, SUM_TILES], schedule)
        if result.reports:
            break
    return result, out


@needs_nvcc
@pytest.mark.parametrize("resident", RESIDENT)
@pytest.mark.parametrize("entry", ["LOAD_AND_STORE", "ATOMIC", "BULK"])
def test_ordered_sums_are_exact(entry: str, resident: int | None) -> None:
    for seed in range(9):
        result, out = run_accumulate(entry, seed, resident)
        result.check()
        assert np.array_equal(out, expected_sums())


# What must be among the reports, however many blocks are resident; NO_TICKET is right when all of them are.
BUGS_BETWEEN_BLOCKS = {
    "LOAD_AND_STORE_NO_ACQUIRE": "global-race",
    "LOAD_AND_STORE_NO_RELEASE": "global-race",
    "LOAD_AND_STORE_NO_BARRIER_BEFORE_RELEASE": "global-race",
    "LOAD_AND_STORE_SKIPPED_TILE_NOT_COUNTED": "livelock",
    "LOAD_AND_STORE_SEMAPHORES_NOT_RESET": "livelock",
    "LOAD_AND_STORE_NO_TICKET": "livelock",
    "ATOMIC_NO_ACQUIRE": "unordered-addition",
    "ATOMIC_NO_RELEASE": "unordered-addition",
    "ATOMIC_NO_BARRIER_BEFORE_RELEASE": "unordered-addition",
    "BULK_NO_ACQUIRE": "unordered-addition",
    "BULK_NO_RELEASE": "unordered-addition",
    "BULK_WAIT_GROUP_READ": "global-race",
    "BULK_NO_PROXY_FENCE": "missing-proxy-fence",
    "BULK_SKIPPED_TILE_NOT_COUNTED": "livelock",
    "BULK_SEMAPHORES_NOT_RESET": "livelock",
    "BULK_NO_TICKET": "livelock",
}


@needs_nvcc
@pytest.mark.parametrize(("bug", "kind"), BUGS_BETWEEN_BLOCKS.items(), ids=str)
def test_seeded_bug_between_blocks_is_caught(bug: str, kind: str) -> None:
    for resident in RESIDENT:
        for seed in (0, 1, 2):
            result, out = run_accumulate(bug, seed, resident)
            if bug.endswith("NO_TICKET") and resident is None:
                result.check()
                assert np.array_equal(out, expected_sums())
            elif not bug.endswith("NO_TICKET") or seed == 0:  # other orders of the blocks may be in its favour
                assert kind in result.kinds, (resident, seed)


@needs_nvcc
def test_every_seeded_bug_between_blocks_is_in_the_table() -> None:
    entries = {entry for a in COMPUTE for entry in compiled(f"kernels/accumulate_sm{a}.cu", COMPUTE[a]).entries}
    assert entries == {*BUGS_BETWEEN_BLOCKS, "LOAD_AND_STORE", "ATOMIC", "BULK"}


@needs_nvcc
def test_report_of_blocks_that_cannot_become_resident() -> None:
    result, _ = run_accumulate("BULK_NO_TICKET", 0, 2)
    (livelock,) = result.reports
    assert "polls argument 2+" in livelock.message
    assert "block (0, 0, 0): 1 threads poll argument 2+" in livelock.message
    assert "63 threads wait: barrier at accumulate.cuh:" in livelock.message
    assert "10 of 12 blocks have not started and cannot become resident before one of these ends" in livelock.message


# Block 0 writes 128 bytes by all threads and thread 0 raises a flag; block 1 polls the flag and its threads read. %p0: data, %p1: flag.
SEND = "mul.wide.u32 %d0, %t, 4;\nadd.u64 %d0, %d0, %p0;\nmov.u32 %r9, %ctaid.x;\n"
SEND += "setp.ne.u32 %q0, %t, 0;\nsetp.ne.u32 %q1, %r9, 0;\n@%q1 bra OTHER;\n"
RAISE = "st.global.u32 [%d0], %t;\nbar.sync 0;\n@%q0 bra END;\n{raise_flag}\nbra END;\n"
POLL = "OTHER:\n@%q0 bra READ;\n{poll}\nsetp.eq.u32 %q2, %r1, 0;\n@%q2 bra OTHER;\n{after_poll}\nREAD: bar.sync 0;\n{read}\nEND:\n"
READ = "ld.global.u32 %r2, [%d0];"
FENCE, RAISE_RELAXED, POLL_RELAXED = "fence.acq_rel.gpu;", "st.relaxed.gpu.global.u32 [%p1], 1;", "ld.relaxed.gpu.global.u32 %r1, [%p1];"
RAISE_RELEASE, POLL_ACQUIRE = "st.release.gpu.global.u32 [%p1], 1;", "ld.acquire.gpu.global.u32 %r1, [%p1];"
BULK_READ = (
    MBARRIER.format(count=1).replace("@%q0 ", "@!%q0 ").replace("setp.eq.u32 %q0, %t, 0;", "")
    + "@%q0 bra END;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 128;\n"
    + "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%p0], 128, [%r1];\n"
    + MBARRIER_WAIT
)
MESSAGES = {
    # raise_flag, poll, after_poll, read, report
    "release and acquire": (RAISE_RELEASE, POLL_ACQUIRE, "", READ, None),
    "fences": (FENCE + RAISE_RELAXED, POLL_RELAXED, FENCE, READ, None),
    "membar and volatile": ("membar.gl;\nst.volatile.global.u32 [%p1], 1;", "ld.volatile.global.u32 %r1, [%p1];", "membar.gl;", READ, None),
    "atomics": ("red.release.gpu.global.add.u32 [%p1], 1;", "atom.acquire.gpu.global.or.b32 %r1, [%p1], 0;", "", READ, None),
    "scope of the system": ("st.release.sys.global.u32 [%p1], 1;", "ld.acquire.sys.global.u32 %r1, [%p1];", "", READ, None),
    "no release": (RAISE_RELAXED, POLL_ACQUIRE, "", READ, "global-race"),
    "no acquire": (RAISE_RELEASE, POLL_RELAXED, "", READ, "global-race"),
    "fence after the flag": (RAISE_RELAXED + FENCE, POLL_ACQUIRE, "", READ, "global-race"),
    "fence before the poll": (RAISE_RELEASE, FENCE + POLL_RELAXED, "", READ, "global-race"),
    "scope of a block": ("st.release.cta.global.u32 [%p1], 1;", POLL_ACQUIRE, "", READ, "global-race"),
    "fence of a block": ("fence.acq_rel.cta;" + RAISE_RELAXED, POLL_ACQUIRE, "", READ, "global-race"),
    "plain flag": (FENCE + "st.global.u32 [%p1], 1;", POLL_ACQUIRE, "", READ, "global-race"),
    "overwritten": (RAISE_RELEASE, POLL_ACQUIRE, "", "st.global.u32 [%d0], %t;", None),
    "atomic after a write": (RAISE_RELAXED, POLL_RELAXED, "", "red.global.add.u32 [%d0], %t;", "global-race"),
    "bulk load": (RAISE_RELEASE, POLL_ACQUIRE, "fence.proxy.async;", BULK_READ, None),
    "bulk load without a proxy fence": (RAISE_RELEASE, POLL_ACQUIRE, "", BULK_READ, "missing-proxy-fence"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_message_from_block_to_block(case: str) -> None:
    raise_flag, poll, after_poll, read, kind = MESSAGES[case]
    body = SEND + RAISE.format(raise_flag=raise_flag) + POLL.format(poll=poll, after_poll=after_poll, read=read)
    for resident in (1, 2):
        for seed in (0, 1, 2) if resident == 2 else (0,):
            schedule = replace(Schedule.of_seed(seed), resident_blocks=resident)
            data, flag = np.zeros(32, np.uint32), np.zeros(1, np.uint32)
            result = run_threads(body, [data, flag], grid=2, schedule=schedule)
            assert result.kinds == ([] if kind is None else [kind]), result.reports


def test_overwriting_what_another_block_may_still_read() -> None:
    """Reads are kept once some block has written the array."""
    body = "mov.u32 %r9, %ctaid.x;\nsetp.eq.u32 %q0, %r9, 0;\n@%q0 st.global.u32 [%p0+4], 1;\n"
    body += "setp.eq.u32 %q0, %r9, 1;\n@%q0 ld.global.u32 %r0, [%p0];\nsetp.eq.u32 %q0, %r9, 2;\n@%q0 st.global.u32 [%p0], 1;\n"
    (report,) = run_threads(body, [np.zeros(2, np.uint32)], threads=1, grid=3).reports
    assert report.kind == "global-race"
    assert "writes argument 0+0, not ordered after the read by thread 0" in report.message


def test_races_after_many_writes() -> None:
    """More accesses than are remembered one by one: those that no byte names any more are dropped."""
    body = "mov.u32 %r9, %ctaid.x;\nsetp.eq.u32 %q0, %r9, 1;\nmul.wide.u32 %d0, %t, 4;\nadd.u64 %d0, %d0, %p0;\n@%q0 bra READ;\n"
    body += "mov.u32 %r0, 0;\nLOOP: st.global.u32 [%d0], %r0;\nbar.sync 0;\nadd.u32 %r0, %r0, 1;\n"
    body += "setp.lt.u32 %q0, %r0, 2500;\n@%q0 bra LOOP;\nbra END;\nREAD: ld.global.u32 %r1, [%d0];\nEND:\n"
    (report,) = run_threads(body, [np.zeros(128, np.uint32)], threads=128, grid=2).reports
    assert (report.kind, report.count) == ("global-race", 128)


@pytest.mark.parametrize("ordered", [False, True])
def test_atomics_of_several_blocks(ordered: bool) -> None:
    """Integers add up to the same in any order; floats only nearly."""
    schedule = replace(Schedule.of_seed(1), resident_blocks=None, ordered_additions=ordered)
    total, sums = np.zeros(1, np.uint32), np.zeros(1, np.float32)
    run_threads("red.global.add.u32 [%p0], 1;", [total], grid=20, schedule=schedule).check()
    assert total == 20 * 32
    result = run_threads("red.global.add.f32 [%p0], 0f3F800000;", [sums], grid=20, schedule=schedule)
    assert (result.kinds, sums[0]) == (["unordered-addition"] if ordered else [], 20 * 32)


def test_too_many_resident_threads() -> None:
    with pytest.raises(LaunchError, match="100 resident blocks of 1024 threads"):
        run_threads("", [], threads=1024, grid=100, schedule=Schedule(resident_blocks=None))


BULK_TYPES = {"f32": np.float32, "f16": np.float16, "u32": np.uint32, "s32": np.int32, "bf16": np.uint16}


@pytest.mark.parametrize("kind", BULK_TYPES)
def test_bulk_addition(kind: str) -> None:
    """Twice the same addition: of the words that shared memory is filled with by plain stores."""
    dtype = BULK_TYPES[kind]
    values = np.arange(128 // dtype().itemsize).astype(dtype)
    if kind == "bf16":
        values = to_bits(values.astype(np.float32), torch.bfloat16)
    added = values.copy()
    add = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.{'noftz.' if dtype().itemsize == 2 else ''}{kind} [%p1], [%r0], 128;\n"
    body = (
        "mov.u32 %r0, smem;\n"
        + ptx_text.copy_words("%r0", "%p0", "32", 32)
        + "\nfence.proxy.async.shared::cta;\nbar.sync 0;\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra END;\n"
        + (add + "cp.async.bulk.commit_group;\n") * 2
        + "cp.async.bulk.wait_group 0;\nEND:\n"
    )
    for seed in range(3):
        added[:] = values
        run_threads(body, [values, added], schedule=seed).check()
        if kind == "bf16":
            got, before = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).float().numpy() for x in (added, values))
        else:
            got, before = added, values
        assert np.array_equal(got, 3 * before)


BULK_ADD = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%p0], [%r0], 16;\ncp.async.bulk.commit_group;\n"
WRITTEN = "mov.u32 %r0, smem;\nst.shared.v4.u32 [%r0], {%t, %t, %t, %t};\nfence.proxy.async.shared::cta;\n"
BULK_MISUSE = {
    "misaligned": WRITTEN + BULK_ADD.replace("[%r0]", "[%r0+8]"),
    "misaligned ": WRITTEN + BULK_ADD.replace(", 16;", ", 8;"),
    "smem-oob": WRITTEN + BULK_ADD.replace("[%r0]", "[%r0+1024]"),
    "global-oob": WRITTEN + BULK_ADD.replace("[%p0]", "[%p0+16]"),
    "missing-proxy-fence": WRITTEN.replace("fence.proxy.async.shared::cta;", "") + BULK_ADD + "cp.async.bulk.wait_group.read 0;",
    "race": WRITTEN + BULK_ADD + "st.shared.u32 [%r0], %t;\ncp.async.bulk.wait_group.read 0;",
    "exit-pending": WRITTEN + BULK_ADD,
}


@pytest.mark.parametrize("kind", BULK_MISUSE)
def test_misused_bulk_addition(kind: str) -> None:
    for seed in range(3):
        result = run_threads(BULK_MISUSE[kind], [np.zeros(4, np.float32)], threads=1, schedule=seed)
        assert result.kinds == [kind.strip()], result.reports


def test_bulk_addition_lands_by_the_end_of_the_launch() -> None:
    """Shared memory may be used again after wait_group.read, and the addition is still that of what it held before."""
    sums = np.zeros(4, np.float32)
    reused = "cp.async.bulk.wait_group.read 0;\nst.shared.v4.u32 [%r0], {-1, -1, -1, -1};"
    for seed in range(3):
        run_threads(WRITTEN.replace("%t", "0x3F800000") + BULK_ADD + reused, [sums], threads=1, schedule=seed).check()
    assert sums.tolist() == [3] * 4


# ------------------------------------------------------------------------------------------------ reports and refusals

REPORTS = {
    "smem-oob": "mov.u32 %r0, smem;\nst.shared.u32 [%r0+1024], %t;",
    "misaligned": "mov.u32 %r0, smem;\nst.shared.u32 [%r0+2], %t;",
    "global-oob": "st.global.u32 [%p0+128], %t;",
    "local-oob": ".local .align 4 .b8 mine[16];\nmov.u64 %d0, mine;\nst.local.u32 [%d0+16], %t;",
    "uninitialized": "mov.u32 %r0, smem;\nld.shared.u32 %r1, [%r0];",
    "race": "mov.u32 %r0, smem;\nst.shared.u32 [%r0], %t;",
    "deadlock": "setp.lt.u32 %q0, %t, 16;\n@%q0 bar.sync 1, 64;",
    "divergent-collective": "setp.lt.u32 %q0, %t, 16;\n@%q0 bra LOW;\nbar.warp.sync -1;\nret;\nLOW: vote.sync.ballot.b32 %r0, 1, -1;",
    "collective": "shfl.sync.idx.b32 %r0, %t, 31, 31, 0xffff;",
    "barrier": "bar.sync 1, 31;",
    "mbarrier": "mov.u32 %r0, smem;\nmbarrier.arrive.shared::cta.b64 _, [%r0];",
    "exit-pending": "mov.u32 %r0, smem;\nmad.lo.u32 %r0, %t, 4, %r0;\ncp.async.ca.shared.global [%r0], [%p0], 4;",
    "livelock": "FOREVER: bra FOREVER;",
    "livelock ": "POLL: ld.volatile.global.u32 %r0, [%p0];\nsetp.eq.u32 %q0, %r0, 0;\n@%q0 bra POLL;",
    "trap": "trap;",
    "global-race": "mul.wide.u32 %d0, %t, 4;\nadd.u64 %d0, %d0, %p0;\nst.global.u32 [%d0], %t;",
}


@pytest.mark.parametrize("kind", REPORTS)
def test_report(kind: str) -> None:
    schedule = Schedule(report_uninitialized=kind == "uninitialized", max_instructions=10_000)
    result = run_threads(REPORTS[kind], [np.zeros(32, np.uint32)], grid=2, schedule=schedule)
    assert kind.strip() in result.kinds, result.reports
    with pytest.raises(AssertionError, match=kind.strip()):
        result.check()


def test_neighbouring_bytes_do_not_race() -> None:
    body = "mov.u32 %r0, smem;\nadd.u32 %r0, %r0, %t;\nst.shared.u8 [%r0], %t;\nld.shared.u8 %r1, [%r0];"
    run_threads(body, [], schedule=1).check()


def test_one_report_per_line_is_counted() -> None:
    (report,) = run_threads("st.global.u32 [%p0+128], %t;", [np.zeros(32, np.uint32)]).reports
    assert (report.kind, report.block, report.thread, report.count) == ("global-oob", (0, 0, 0), 0, 32)
    assert "argument 0+128, which has 128 bytes" in report.message


def test_views_and_structures_of_pointers() -> None:
    packed = torch.arange(64, dtype=torch.int32).reshape(8, 8)
    view = packed[:, 2:4]  # strided: what lies between its elements is in reach, what lies around it is not

    class Parameters(ctypes.Structure):
        _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))

    parameters = Parameters(view.data_ptr(), view.stride(0) * 4)
    ptx = (
        HEADER
        + """
.visible .entry kernel(.param .align 8 .b8 structure[16], .param .u32 row)
{
.reg .b64 %d<4>;
.reg .b32 %r<4>;
ld.param.u64 %d0, [structure];
ld.param.u64 %d1, [structure+8];
ld.param.u32 %r0, [row];
cvt.u64.u32 %d2, %r0;
mad.lo.s64 %d3, %d1, %d2, %d0;
st.global.u32 [%d3+4], -1;
ret;
}
"""
    )
    module = Module(ptx)
    module.launch("kernel", (1,), (1,), 0, [parameters, 7], buffers={"view": view}).check()
    assert packed[7].tolist() == [56, 57, 58, -1, 60, 61, 62, 63]
    (report,) = module.launch("kernel", (1,), (1,), 0, [parameters, 8], buffers={"view": view}).reports
    assert (report.kind, "view+260" in report.message) == ("global-oob", True)


def test_same_seed_same_run() -> None:
    body = "mov.u32 %r0, smem;\nshr.u32 %r1, %t, 5;\natom.shared.add.u32 %r2, [%r0], 1;\n" + store_words("%p0", ["%r2"])
    runs = []
    for seed in (4, 4, 5):
        out = np.zeros(256, np.uint32)
        run_threads("bar.sync 0;\n" + body, [out], threads=256, schedule=seed).check()
        runs.append((out - out.min()).tolist())
    assert runs[0] == runs[1] != runs[2]


def test_bad_launches() -> None:
    module = Module(HEADER + kernel("", ["u64", "u32"]) + kernel("", name="kernel_two"))
    array = np.zeros(4, np.float32)
    for entry, grid, block, shared_bytes, args, message in [
        ("kernel", (1,), (32,), 0, [array], "1 arguments for 2 parameters"),
        ("kernel", (1,), (32,), 0, [array, np.int64(1)], "argument 1 has 8 bytes, the parameter 4"),
        ("kernel", (1,), (2048,), 0, [array, 1], "2048 threads"),
        ("kernel", (1,), (32,), 228 * 1024, [array, 1], "bytes of shared memory"),
        ("kernel", (0,), (32,), 0, [array, 1], r"grid \(0, 1, 1\)"),
        ("missing", (1,), (32,), 0, [], "0 kernels match 'missing'"),
        ("ern", (1,), (32,), 0, [], "2 kernels match"),
    ]:
        with pytest.raises(LaunchError, match=message):
            module.launch(entry, grid, block, shared_bytes, args)
    module.launch("kernel", (1,), (32,), 0, [array, 1]).check()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.u32 %r0, %r1;", "frobnicate.u32: not supported"),
        ("cvt.rz.bf16x2.f32 %r0, %r1, %r2;", "cvt.rz.bf16x2.f32: .rz is not supported"),
        ("add.u32 %r0, %r1, %nothing;", "unknown operand %nothing"),
        ("bra NOWHERE;", "label NOWHERE"),
        ("call.uni outside;", "call of outside, which the module does not define"),
        ("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%r0}, {%r1}, {%r2}, {%r3};", "not supported"),
    ],
)
def test_unknown_ptx_is_refused(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        Module(HEADER + kernel(body))


def test_tensor_maps_are_refused_as_by_the_driver() -> None:
    array = np.zeros((4, 64), np.float16)
    for box, swizzle, message in [
        ((4, 64), 64, "fit the swizzle"),
        ((4, 4), 0, "multiple of 16 bytes"),
        ((300, 64), 0, "1 to 256"),
        ((4, 8), 16, "swizzle"),
    ]:
        with pytest.raises(ValueError, match=message):
            TensorMap(array, box, swizzle)
