"""PTX written by hand, for tests that must not depend on what nvcc makes of CUDA C++."""

from __future__ import annotations

from collections.abc import Sequence

HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];\n"


def kernel(body: str, parameters: Sequence[str] = (), name: str = "kernel") -> str:
    """A kernel with 64-bit parameters p0, p1, ... of the given types, loaded into %p0, %p1, ...; %t is the thread."""
    declared = ", ".join(f".param .{kind} p{i}" for i, kind in enumerate(parameters))
    loads = "\n".join(f".reg .b{kind[1:]} %p{i};\nld.param.{kind} %p{i}, [p{i}];" for i, kind in enumerate(parameters))
    registers = ".reg .pred %q<16>;\n.reg .b16 %h<64>;\n.reg .b32 %r<512>;\n.reg .b64 %d<64>;\n.reg .b32 %t;\nmov.u32 %t, %tid.x;"
    return f".visible .entry {name}({declared})\n{{\n{registers}\n{loads}\n{body}\nret;\n}}\n"


def vector(prefix: str, first: int, count: int) -> str:
    return "{" + ", ".join(f"%{prefix}{first + i}" for i in range(count)) + "}"


def copy_words(to: str, source: str, count: str, threads: int) -> str:
    """Copies words from global to shared memory (`to`: a 32-bit shared address), by all threads."""
    return f"""{{
.reg .pred %done;
.reg .b32 %i, %w, %a;
.reg .b64 %b;
mov.u32 %i, %t;
LOOP:
setp.ge.u32 %done, %i, {count};
@%done bra END;
mul.wide.u32 %b, %i, 4;
add.u64 %b, %b, {source};
ld.global.u32 %w, [%b];
shl.b32 %a, %i, 2;
add.u32 %a, %a, {to};
st.shared.u32 [%a], %w;
add.u32 %i, %i, {threads};
bra LOOP;
END:
}}"""


def store_words(to: str, registers: Sequence[str]) -> str:
    """Stores registers to consecutive words of global memory, one such row per thread."""
    return f"mul.wide.u32 %d60, %t, {4 * len(registers)};\nadd.u64 %d60, %d60, {to};\n" + "\n".join(
        f"st.global.u32 [%d60+{4 * i}], {register};" for i, register in enumerate(registers)
    )


def load_words(source: str, registers: Sequence[str]) -> str:
    """Loads such a row back."""
    return f"mul.wide.u32 %d61, %t, {4 * len(registers)};\nadd.u64 %d61, %d61, {source};\n" + "\n".join(
        f"ld.global.u32 {register}, [%d61+{4 * i}];" for i, register in enumerate(registers)
    )


def wgmma(n: int, inputs: str, accumulator: str, *, a_in_registers: bool, transpose_a: bool, transpose_b: bool) -> str:
    """D = A B + D of m64nNk16. Parameters: shared memory's image and its number of words, descriptors of A and B, registers of A
    (if there), registers of D, and whether to keep D."""
    words = n // 4 if accumulator == "f16" else n // 2
    d = vector("r", 0, words)
    a = vector("r", 300, 4) if a_in_registers else "%d0"
    transposes = f"{int(transpose_b)}" if a_in_registers else f"{int(transpose_a)}, {int(transpose_b)}"
    rows = [f"%r{i}" for i in range(words)]
    body = f"""
mov.u32 %r400, smem;
{copy_words("%r400", "%p0", "%p1", 128)}
fence.proxy.async.shared::cta;
bar.sync 0;
cvt.u64.u32 %d2, %r400;
shr.u64 %d2, %d2, 4;
add.u64 %d0, %p2, %d2;
add.u64 %d1, %p3, %d2;
{load_words("%p4", [f"%r{300 + i}" for i in range(4)]) if a_in_registers else ""}
{load_words("%p5", rows)}
setp.ne.u32 %q0, %p6, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n{n}k16.{accumulator}.{inputs}.{inputs} {d}, {a}, %d1, %q0, 1, 1, {transposes};
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
{store_words("%p5", rows)}
"""
    return HEADER + kernel(body, ["u64", "u32", "u64", "u64", "u64", "u64", "u32"])
