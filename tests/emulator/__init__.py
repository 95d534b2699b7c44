"""Runs CUDA kernels on the CPU: PTX, as nvcc makes it, on arrays of numpy or CPU tensors of torch.

    module = Module(compile_ptx(Path("kernel.cu"), "80"))
    result = module.launch("kernel", grid=(4, 2), block=(128,), shared_bytes=0, args=[query, out, 64, 0.125], schedule=1)
    result.check()

Every thread is a fiber, so that kernels wait, shuffle and copy asynchronously as on a GPU. A schedule says how many blocks are resident
at a time and, drawn from a seed, who runs when; asynchronous copies land as late as is legal, or earlier. What is wrong with the kernel
comes back as reports:

    race                   two accesses to shared memory, one of them a write, that no barrier orders
    in-flight-read/-write  an access to memory that an asynchronous copy is still filling
    missing-proxy-fence    plain writes that TMA or wgmma may not see, in shared memory or by another block in global memory; an mbarrier
                           that TMA may not see
    missing-wgmma-fence    wgmma without wgmma.fence
    acc-touched            registers of a wgmma used before wgmma.wait_group
    exit-pending           threads exit before their asynchronous work is done
    deadlock, livelock     who waits for what; whether blocks wait for others that cannot become resident before they end
    barrier, mbarrier, tx-count, collective, divergent-collective, setmaxnreg, tma, cp-async, wgmma    misuse of these
    smem-oob, global-oob, local-oob, misaligned    bad addresses
    global-race            accesses to global memory by two blocks, one of them a write and one of them plain, without an edge from one
                           to the other: release and acquire, or fences with strong accesses, at the scope of the GPU
    unordered-addition     float additions to the same bytes by two blocks without such an edge, when the schedule asks for a fixed order
    uninitialized          shared memory read before it is written (when the schedule asks for it)
    limit, trap, branch    more mbarriers than the detector follows; the kernel's own trap; a jump beyond its table

The edges between blocks are those of the PTX memory model, whether the blocks ran together or one after the other: that one happened to
end before another began orders nothing. Writes and additions by TMA are other blocks' to see once their thread has passed
cp.async.bulk.wait_group without .read and then released; until then they may be anywhere, and most schedules keep them back.

What it cannot show: speed, registers, what ptxas does to the PTX, rounding inside tensor cores, clusters. Of weak memory order it shows
what a race shows: loads always find the newest value, so code that is wrong in spite of strong accesses only, such as flags that two
blocks raise and read without fence.sc, looks right. Of each byte of global memory the last write and one read after it are remembered,
and reads only once the array has been written in the launch: some schedules see what others miss. Scopes of a block and of a cluster
order nothing here, and accesses to global memory by threads of one block are not compared. How many blocks a GPU has room for is for
the caller to say, by Schedule.resident_blocks: a kernel may be right with all blocks resident and wait for ever with fewer.
"""

from __future__ import annotations

import ctypes
import math
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .build import compile_ptx, find_nvcc, library, why_not_buildable

__all__ = [
    "LaunchError",
    "Module",
    "PtxError",
    "Report",
    "Result",
    "Schedule",
    "TensorMap",
    "compile_ptx",
    "find_nvcc",
    "why_not_buildable",
]

MAX_THREADS = 1024
MAX_SHARED_BYTES = 227 * 1024
MAX_RESIDENT_THREADS = 24 * 1024  # each has a stack with a guard, and Linux counts those
ORDERS = ("round_robin", "random", "priority")
DELIVERIES = ("late", "eager", "random")


class PtxError(ValueError):
    """The PTX contains something that the emulator does not understand."""


class LaunchError(ValueError):
    """A launch that a GPU would refuse too, or arguments that do not fit the kernel's parameters."""


@dataclass(frozen=True)
class Schedule:
    """Who runs when: the order of warps and blocks, and when loads by TMA land. Deterministic."""

    seed: int = 0
    order: str = "round_robin"  # which warp runs next: round_robin, random, priority; the last two also interrupt warps
    delivery: str = "late"  # late, eager, random
    check_races: bool = True
    strict_proxy: bool = True  # a writer must itself fence before the barrier; False: any fence on the path will do
    report_uninitialized: bool = False
    resident_blocks: int | None = 1  # at the same time; None: all
    ordered_additions: bool = False  # blocks must add floats to the same bytes in a fixed order, so that results repeat bit for bit
    max_instructions: int = 100_000_000  # by one thread, before it counts as a livelock; 0: no limit

    @classmethod
    def of_seed(cls, seed: int) -> Schedule:
        """Seeds 0 to 8 give every combination of order and delivery; 0, 1 and 2 give each of them once."""
        return cls(seed, ORDERS[seed % 3], DELIVERIES[(seed + seed // 3) % 3])


@dataclass(frozen=True)
class Report:
    kind: str
    message: str
    where: str  # file:line
    block: tuple[int, int, int]
    thread: int  # -1: the block as a whole
    count: int  # findings of this kind at this line

    def __str__(self) -> str:
        who = f"block {self.block}" + (f" thread {self.thread}" if self.thread >= 0 else "")
        return f"[{self.kind}] {self.where}, {who}: {self.message}" + (f" ({self.count} times)" if self.count > 1 else "")


@dataclass(frozen=True)
class Result:
    reports: list[Report]
    counts: dict[str, int]  # instructions, switches, mma, ldmatrix, shuffles, cp_async, wgmma, tma, ..., bank_conflicts
    seconds: float

    @property
    def kinds(self) -> list[str]:
        return sorted({report.kind for report in self.reports})

    def check(self) -> Result:
        if self.reports:
            raise AssertionError("the emulator reports:\n" + "\n".join(map(str, self.reports)))
        return self


class TensorMap:
    """What cuTensorMapEncodeTiled makes: a box of an array with contiguous last dimension, for TMA. Sides in the array's order."""

    def __init__(self, array: Any, box: Sequence[int], swizzle: int = 0) -> None:
        address, shape, strides, item_bytes = _layout(array)
        if strides[-1] != item_bytes:
            raise ValueError("the last dimension of a tensor map's array must be contiguous")
        if len(box) != len(shape):
            raise ValueError(f"a box of {len(box)} sides for an array of {len(shape)} dimensions")
        self.array = array
        storage = (ctypes.c_char * 192)()
        start = -ctypes.addressof(storage) % 64
        rank = len(shape)
        refusal = _library().emulator_encode_tensor_map(
            ctypes.byref(storage, start),
            item_bytes,
            rank,
            address,
            (ctypes.c_uint64 * rank)(*reversed(shape)),
            (ctypes.c_uint64 * max(rank - 1, 1))(*reversed(strides[:-1])),
            (ctypes.c_uint32 * rank)(*reversed(box)),
            swizzle,
        )
        if refusal is not None:
            raise ValueError(f"tensor map of shape {tuple(shape)}, strides {tuple(strides)}, box {tuple(box)}: {refusal.decode()}")
        self.data = bytes(storage)[start : start + 128]


class Module:
    """A PTX module, ready to launch."""

    def __init__(self, ptx: str) -> None:
        self._handle = _library().emulator_parse(ptx.encode())
        if not self._handle:
            raise PtxError(_library().emulator_last_error().decode())
        weakref.finalize(self, _library().emulator_free, self._handle)
        self.entries: list[str] = _library().emulator_entries(self._handle).decode().split()

    def find_entry(self, name: str) -> str:
        """The kernel of that name, or the only one whose (mangled) name contains it."""
        found = [entry for entry in self.entries if entry == name] or [entry for entry in self.entries if name in entry]
        if len(found) != 1:
            raise LaunchError(f"{len(found)} kernels match {name!r}; the module has {', '.join(self.entries)}")
        return found[0]

    def launch(
        self,
        entry: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        args: Sequence[Any],
        schedule: Schedule | int = 0,
        buffers: Mapping[str, Any] | None = None,
        registers: int = 0,
    ) -> Result:
        """Runs a kernel to its end, which is when its memory may be looked at.

        args: one per parameter. Arrays and tensors are passed as pointers to their first element; None is a null pointer; int and float
        take the parameter's size; TensorMap, bytes and ctypes structures are passed by value.
        buffers: arrays that the kernel reaches in other ways, such as pointers inside a structure; names for the reports.
        schedule: a Schedule, or the seed of one.
        registers: per thread at launch, which setmaxnreg redistributes; 0: not checked.
        """
        name = self.find_entry(entry).encode()
        lib = _library()
        grid, block = (tuple(sizes) + (1,) * (3 - len(sizes)) for sizes in (grid, block))
        max_threads = lib.emulator_max_threads(self._handle, name) or MAX_THREADS
        shared_in_all = shared_bytes + lib.emulator_static_shared_bytes(self._handle)
        if len(grid) != 3 or len(block) != 3 or min(grid + block) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise LaunchError(f"{entry}: grid {grid}, block {block}")
        if math.prod(block) > max_threads:
            raise LaunchError(f"{entry}: {math.prod(block)} threads in a block, at most {max_threads} are allowed")
        if shared_in_all > MAX_SHARED_BYTES or shared_bytes < 0:
            raise LaunchError(f"{entry}: {shared_in_all} bytes of shared memory, at most {MAX_SHARED_BYTES} are allowed")
        if len(args) != lib.emulator_num_parameters(self._handle, name):
            raise LaunchError(f"{entry}: {len(args)} arguments for {lib.emulator_num_parameters(self._handle, name)} parameters")

        lib.emulator_clear_buffers()
        values = []
        for i, arg in enumerate(args):
            size = lib.emulator_parameter_bytes(self._handle, name, i)
            value = _parameter_value(arg, size)
            if len(value) != size:
                raise LaunchError(f"{entry}: argument {i} has {len(value)} bytes, the parameter {size}")
            values.append(ctypes.create_string_buffer(value, size))
            _add_buffer(arg, f"argument {i}")
        for buffer_name, array in (buffers or {}).items():
            _add_buffer(array, buffer_name)
        if isinstance(schedule, int):
            schedule = Schedule.of_seed(schedule)
        resident = min(math.prod(grid), schedule.resident_blocks or math.prod(grid))
        if resident < 1 or resident * math.prod(block) > max(MAX_RESIDENT_THREADS, math.prod(block)):
            raise LaunchError(f"{entry}: {resident} resident blocks of {math.prod(block)} threads, at most {MAX_RESIDENT_THREADS} in all")
        arguments = _LaunchArguments(
            grid=(ctypes.c_uint32 * 3)(*grid),
            block=(ctypes.c_uint32 * 3)(*block),
            shared_bytes=shared_bytes,
            seed=schedule.seed,
            max_instructions=schedule.max_instructions,
            order=ORDERS.index(schedule.order),
            delivery=DELIVERIES.index(schedule.delivery),
            check_races=schedule.check_races,
            strict_proxy=schedule.strict_proxy,
            report_uninitialized=schedule.report_uninitialized,
            ordered_additions=schedule.ordered_additions,
            registers_per_thread=registers,
            resident_blocks=resident,
        )
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        start = time.perf_counter()
        lib.emulator_launch(self._handle, name, ctypes.byref(arguments), pointers)
        seconds = time.perf_counter() - start
        return Result([_report(i) for i in range(lib.emulator_num_reports())], _counts(), seconds)


class _LaunchArguments(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("max_instructions", ctypes.c_uint64),
        ("order", ctypes.c_int32),
        ("delivery", ctypes.c_int32),
        ("check_races", ctypes.c_int32),
        ("strict_proxy", ctypes.c_int32),
        ("report_uninitialized", ctypes.c_int32),
        ("ordered_additions", ctypes.c_int32),
        ("registers_per_thread", ctypes.c_int32),
        ("resident_blocks", ctypes.c_uint32),
    )


class _ReportData(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char_p),
        ("message", ctypes.c_char_p),
        ("where", ctypes.c_char_p),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_int32),
        ("count", ctypes.c_uint64),
    )


_COUNTS = [
    "instructions",
    "switches",
    "mma",
    "ldmatrix",
    "shuffles",
    "cp_async",
    "wgmma",
    "tma",
    "shared_reads",
    "shared_writes",
    "bank_conflicts",
]


class _Counts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in _COUNTS)


def _library() -> ctypes.CDLL:
    lib = library()
    if lib.emulator_parse.restype is not ctypes.c_void_p:
        handle, name, u32, u64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint64
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "last_error": (name, []),
            "parse": (handle, [name]),
            "free": (None, [handle]),
            "entries": (name, [handle]),
            "num_parameters": (ctypes.c_int, [handle, name]),
            "parameter_bytes": (u32, [handle, name, ctypes.c_int]),
            "max_threads": (u32, [handle, name]),
            "static_shared_bytes": (u32, [handle]),
            "clear_buffers": (None, []),
            "add_buffer": (None, [u64, u64, name]),
            "encode_tensor_map": (name, [ctypes.c_void_p, u32, u32, u64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, u32]),
            "launch": (None, [handle, name, ctypes.c_void_p, ctypes.c_void_p]),
            "num_reports": (ctypes.c_int, []),
            "report": (_ReportData, [ctypes.c_int]),
            "counts": (_Counts, []),
        }
        for function, (result, arguments) in signatures.items():
            getattr(lib, f"emulator_{function}").restype = result
            getattr(lib, f"emulator_{function}").argtypes = arguments
    return lib


def _layout(array: Any) -> tuple[int, list[int], list[int], int]:
    """Address, shape, strides in bytes and bytes per element of a numpy array or torch tensor."""
    if hasattr(array, "data_ptr"):
        if array.device.type != "cpu":
            raise LaunchError(f"a tensor on {array.device}; the emulator works on the CPU")
        size = array.element_size()
        return array.data_ptr(), list(array.shape), [stride * size for stride in array.stride()], size
    return array.ctypes.data, list(array.shape), list(array.strides), array.itemsize


def _add_buffer(arg: Any, name: str) -> None:
    array = arg.array if isinstance(arg, TensorMap) else arg
    if not hasattr(array, "shape") or not (hasattr(array, "data_ptr") or hasattr(array, "ctypes")):
        return
    address, shape, strides, item_bytes = _layout(array)
    if 0 in shape:
        return
    steps = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    low, high = sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps)
    _library().emulator_add_buffer(address + low, high - low + item_bytes, name.encode())


def _parameter_value(arg: Any, size: int) -> bytes:
    if arg is None:
        return bytes(size)
    if isinstance(arg, TensorMap):
        return arg.data
    if isinstance(arg, (bytes, ctypes.Structure)):
        return bytes(arg)
    if isinstance(arg, (bool, int)):
        return (int(arg) % (1 << 8 * size)).to_bytes(size, "little")
    if isinstance(arg, float):
        return bytes(ctypes.c_float(arg)) if size == 4 else bytes(ctypes.c_double(arg))
    if hasattr(arg, "tobytes") and getattr(arg, "shape", None) == () and not hasattr(arg, "ctypes"):
        return bytes(arg.tobytes())
    return bytes(ctypes.c_uint64(_layout(arg)[0]))


def _report(i: int) -> Report:
    data = _library().emulator_report(i)
    return Report(data.kind.decode(), data.message.decode(), data.where.decode(), tuple(data.block), data.thread, data.count)


def _counts() -> dict[str, int]:
    data = _library().emulator_counts()
    return {name: getattr(data, name) for name in _COUNTS}
