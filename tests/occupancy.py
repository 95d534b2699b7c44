"""How many blocks of a kernel run on a streaming multiprocessor at once."""

from __future__ import annotations

KB = 1024
REGISTERS = 65536  # of every SM
# SM totals: (shared memory in KB, threads). A block's share of the first is 1 KB larger than it asks for, which is the system's.
SM_LIMITS = {80: (164, 2048), 86: (100, 1536), 89: (100, 1536), 90: (228, 2048), 100: (228, 2048), 120: (100, 1536)}
SYSTEM_BYTES = KB


def room(arch: int, registers: int, threads: int, shared_bytes: int) -> dict[str, int]:
    """{resource: how many blocks it has room for}; `registers` is per thread."""
    shared_kb, most_threads = SM_LIMITS[arch]
    return {
        "registers": REGISTERS // (-(-registers // 8) * 8 * threads),  # given out in eights
        "shared memory": shared_kb * KB // (shared_bytes + SYSTEM_BYTES),
        "threads": most_threads // threads,
    }


def most_registers(threads: int, blocks: int) -> int:
    """That a thread may have for so many blocks to run at once."""
    return min(255, REGISTERS // (threads * blocks) // 8 * 8)
