"""What a compiled Triton kernel takes of a GPU, and what of that is not allowed."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import sass
from occupancy import room
from triton_offline import SHARED_MEMORY, Binary

OPCODES = {
    "HGMMA": r"HGMMA",  # warpgroup matrix products, sm_90
    "HMMA": r"HMMA",  # warp matrix products
    "TC5": r"UTC\w*MMA",  # tensor-memory matrix products, sm_100
    "FFMA": r"FFMA2?",
    "LDGSTS": r"LDGSTS",  # asynchronous copies to shared memory
    "EX2": r"MUFU\.EX2",
    "LDL": r"LDL",
    "STL": r"STL",
}


@dataclass
class Resources:
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # bytes per thread, stored
    shared_memory: int  # bytes
    threads: int
    blocks_per_sm: int
    limited_by: str
    warpgroup_products: int  # in the PTX, which the assembler does not replace
    local_in_hot_loops: int  # accesses to local memory
    serialised: int  # warnings that warpgroup products wait for one another
    counts: dict[str, tuple[int, int]]  # {name in OPCODES: (in the kernel, in its hot loops)}; empty when they were not counted
    instructions: tuple[int, int] = (0, 0)  # the same of all instructions


@functools.cache
def resources(binary: Binary, arch: int, *, count: bool = True) -> Resources:
    """Of a binary from offline(arch, inspect=True). Without `count` only a kernel that has local memory is disassembled."""
    stack = number(r"(\d+) bytes stack frame", binary.log)
    counts: dict[str, tuple[int, int]] = {}
    sizes = (0, 0)
    if count or stack:
        instructions, labels = sass.parse(sass.disassemble(binary.cubin))
        hot = [instruction for loop in sass.hot_loops(instructions, labels) for instruction in loop]
        sizes = len(instructions), len(hot)
        for name, pattern in OPCODES.items():
            compiled = re.compile(rf"({pattern})(\.|$)")
            everywhere, in_hot = (sum(bool(compiled.match(found.opcode)) for found in part) for part in (instructions, hot))
            counts[name] = everywhere, in_hot
    metadata = binary.metadata
    threads = threads_of(binary)
    registers = number(r"Used (\d+) registers", binary.log)
    shared_memory = metadata["shared"]
    blocks = room(arch, registers, threads, shared_memory)
    limited_by = min(blocks, key=lambda name: blocks[name])
    return Resources(
        registers=registers,
        stack=stack,
        spills=number(r"(\d+) bytes spill stores", binary.log),
        shared_memory=shared_memory,
        threads=threads,
        blocks_per_sm=blocks[limited_by],
        limited_by=limited_by,
        warpgroup_products=binary.ptx.count("wgmma.mma_async"),
        local_in_hot_loops=sum(counts[name][1] for name in ("LDL", "STL")) if counts else 0,
        serialised=len(re.findall(r"wgmma.*serializ", binary.log)),
        counts=counts,
        instructions=sizes,
    )


def number(pattern: str, log: str) -> int:
    """From the ptxas log, which must be there: a kernel without one was not checked."""
    match = re.search(pattern, log)
    if match is None:
        raise ValueError(f"{pattern!r} is not in the ptxas log: {log!r}")
    return int(match[1])


def threads_of(binary: Binary) -> int:
    """Per block; with warp specialisation more than num_warps says."""
    match = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", binary.ptx)
    return int(match[1]) if match else binary.metadata["num_warps"] * 32


def failures(found: Resources, arch: int, *, warpgroups: bool, shared_memory: int | None = None) -> list[str]:
    """Why a kernel may not be shipped; empty when it may.

    Args:
        warpgroups: its matrix products must be warpgroup products on sm_90.
        shared_memory: bytes it may take, if not all that the architecture has.
    """
    limit = SHARED_MEMORY[arch] if shared_memory is None else shared_memory
    reasons = []
    if found.spills:
        reasons.append(f"{found.spills} bytes spilled")
    if found.local_in_hot_loops:
        reasons.append(f"{found.local_in_hot_loops} local memory accesses in the hot loop")
    if found.shared_memory > limit:
        reasons.append(f"{found.shared_memory} bytes of shared memory, {limit} at most")
    if warpgroups and arch == 90 and not found.warpgroup_products:
        reasons.append("no warpgroup matrix products")
    if found.serialised:
        reasons.append("warpgroup matrix products wait for one another")
    return reasons
