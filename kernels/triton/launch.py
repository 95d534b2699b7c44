"""Launches Triton kernels, and looks up their tile sizes in tile_table.json.

kernel[grid](...) takes 15 to 25 us of Python for a kernel with fifty arguments. `launch` looks the compiled kernel up under its own key,
which contains everything Triton specializes a kernel on, and hands it directly to the driver. Kernels it has not seen before, and anything
it cannot handle, go through kernel[grid](...).
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
FAST_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")  # versions whose CompiledKernel.run takes the arguments that _run_compiled passes


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the interpreter multiplies bfloat16 numbers correctly; in Triton 3.6 to 3.9 it multiplies their bit patterns."""
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    one = TensorHandle(np.array([[0x3F80]], np.uint16), tl.bfloat16)
    nothing = TensorHandle(np.zeros((1, 1), np.float32), tl.float32)
    return bool(InterpreterBuilder().create_dot(one, one, nothing, 0, 0).data.item() == 1.0)


class Tile(NamedTuple):
    BLOCK_M: int  # query rows
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int


# The interpreter takes a few milliseconds per tile of any size. Small enough that 130 rows are several tiles, and never square.
INTERPRETER_TILES = {"plain": Tile(64, 32, 1, 1), "masked": Tile(32, 64, 1, 1), "bias": Tile(64, 32, 1, 1), "dropout": Tile(32, 64, 1, 1)}

# sm_86, 89 and 120 are one family because they all have 99 KB of shared memory per block; sm_80 has 163 KB, sm_90 and sm_100 have 227 KB.
FAMILIES = {80: "sm80", 87: "sm80", 86: "sm86", 89: "sm86", 120: "sm86", 121: "sm86", 90: "sm90", 100: "sm100", 103: "sm100"}
OTHER_FAMILY = "other"  # unknown devices: tiles that fit in 64 KB

TABLE_FILE = Path(__file__).with_name("tile_table.json")


def tile_for(kernel_name: str, dtype: torch.dtype, head_dim: int, feature_class: str) -> Tile:
    """The tile of a kernel on the current device.

    Args:
        kernel_name: forward, dkdv, dq, dbias, decode or weights.
        head_dim: padded, a power of two from 16 to 256; the larger of the query's and the value's.
        feature_class: plain (full, causal, window and lengths, by loop bounds), masked (tile lists, key_mask, bool mask), bias (float mask,
            softcap, alibi, gradient of the mask) or dropout. Features not named here are allowed in every class.
    """
    if INTERPRETED:
        return INTERPRETER_TILES[feature_class]
    return tile_table()[kernel_name, current_family(), dtype_class(dtype), head_dim, feature_class]


def dtype_class(dtype: torch.dtype) -> str:
    return "fp32" if dtype is torch.float32 else "16-bit"


def current_family() -> str:
    return _family(triton.runtime.driver.active.get_current_device())


@functools.cache
def _family(device: int) -> str:
    """The architecture family of the current device, whose index is `device`."""
    target = triton.runtime.driver.active.get_current_target()
    return FAMILIES.get(target.arch, OTHER_FAMILY) if target.backend == "cuda" else OTHER_FAMILY


@functools.cache
def tile_table() -> dict[tuple[str, str, str, int, str], Tile]:
    """{(kernel, architecture family, dtype class, head_dim, feature class): tile}"""
    table = {}
    for row, tiles in json.loads(TABLE_FILE.read_text()).items():
        kernel_name, family, dtype, head_dim = row.split()
        for feature_class, tile in tiles.items():
            table[kernel_name, family, dtype, int(head_dim), feature_class] = Tile(*tile)
    return table


class Launch:
    """A kernel with everything fixed except the memory of its tensors, so that repeated launches are as cheap as possible."""

    def __init__(self, kernel: Any, num_programs: int, numbers: tuple[int | float, ...], constants: tuple[Any, ...], tile: Tile) -> None:
        self.kernel = kernel
        self.num_programs = num_programs
        self.numbers = numbers
        self.constants = constants
        self.tile = tile
        self.fixed = (*numbers, *constants, tile.BLOCK_M, tile.BLOCK_N)
        self.compiled: dict[Any, Any] = {}  # keyed by device, plus which pointers are multiples of 16 if not all are

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        if INTERPRETED:
            _launch_through_triton(self.kernel, self.num_programs, tensors, self.numbers, self.constants, self.tile)
            return
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        low_bits = 0
        for pointer in filter(None, pointers):
            low_bits |= pointer
        key = device if low_bits % 16 == 0 else (device, *[pointer is None or pointer % 16 == 0 for pointer in pointers])
        compiled = self.compiled.get(key)
        elsewhere = compiled is not None and tensors[0].get_device() not in (device, -1)  # type: ignore[union-attr]
        if compiled is None or elsewhere or _has_hooks(self.kernel):
            compiled = launch(self.kernel, self.num_programs, tensors, self.numbers, self.constants, self.tile)
            if compiled is not None and not elsewhere:
                self.compiled[key] = compiled
            return
        _run_compiled(compiled, self.num_programs, driver.get_current_stream(device), (*pointers, *self.fixed))


def launch(
    kernel: Any,
    num_programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    tile: Tile,
) -> Any:
    """Runs a kernel on the current stream of tensors[0]'s device; returns the compiled kernel if it can be reused unchanged.

    Its parameters are, in this order, pointers (tensors), numbers, constexprs (constants) and the constexprs BLOCK_M and BLOCK_N. Triton
    compiles in a number that is 1 only if its parameter has no type.
    """
    if INTERPRETED:
        _launch_through_triton(kernel, num_programs, tensors, numbers, constants, tile)
        return None
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    tensors_device = tensors[0].get_device()  # type: ignore[union-attr]  # -1 on the CPU, in tests
    if tensors_device not in (device, -1):
        with torch.cuda.device(tensors_device):
            launch(kernel, num_programs, tensors, numbers, constants, tile)
        return None  # not compiled for the current device
    cache = _caches.get(id(kernel)) or _new_cache(kernel, tensors, numbers, constants)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    key = _specialisation(cache, device, tensors, pointers, numbers, constants, tile)
    compiled = cache.compiled.get(key)
    if compiled is None or _has_hooks(kernel):
        compiled = _launch_through_triton(kernel, num_programs, tensors, numbers, constants, tile)
        if compiled is None or not _takes_fast_launches(compiled):
            return None
        cache.compiled[key] = compiled
        return compiled
    stream = driver.get_current_stream(device)
    _run_compiled(compiled, num_programs, stream, (*pointers, *numbers, *constants, tile.BLOCK_M, tile.BLOCK_N))
    return compiled


def _launch_through_triton(kernel: Any, num_programs: int, tensors: tuple, numbers: tuple, constants: tuple, tile: Tile) -> Any:
    block_m, block_n, num_warps, num_stages = tile
    arguments = (*tensors, *numbers, *constants, block_m, block_n)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}  # a * b + c as one instruction
    return kernel[(num_programs,)](*arguments, **options)


def _run_compiled(compiled: Any, num_programs: int, stream: int, arguments: tuple) -> None:
    """The last step of JITFunction.run in FAST_VERSIONS, without hooks. Pointers may be ints."""
    compiled.run(num_programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


class _Cache(NamedTuple):
    """The compiled versions of one kernel."""

    kernel: Any  # kept alive, so that its id is not reused
    specialised: tuple[int, ...]  # positions of the integers that Triton specializes on divisibility by 16
    untyped: tuple[int, ...]  # positions of the numbers without a type: Triton compiles in the value's type, and a 1
    compiled: dict[tuple, Any]


_caches: dict[int, _Cache] = {}  # by id: hashing a kernel hashes its source


def _new_cache(kernel: Any, tensors: tuple, numbers: tuple, constants: tuple) -> _Cache:
    num_arguments = len(tensors) + len(numbers) + len(constants) + 2
    if len(kernel.params) != num_arguments:
        raise TypeError(f"{kernel.__name__} has {len(kernel.params)} parameters, got {num_arguments} arguments")
    parameters = kernel.params[len(tensors) : len(tensors) + len(numbers)]
    untyped = [place for place, parameter in enumerate(parameters) if not parameter.annotation_type]
    specialised = [
        place
        for place, parameter in enumerate(parameters)
        if not parameter.do_not_specialize and parameter.annotation_type.startswith(("i", "u"))
    ]
    return _caches.setdefault(id(kernel), _Cache(kernel, tuple(specialised), tuple(untyped), {}))


def _specialisation(
    cache: _Cache, device: int, tensors: tuple, pointers: list[int | None], numbers: tuple, constants: tuple, tile: Tile
) -> tuple:
    """Everything Triton compiles into a kernel: calls that differ in any of it need different code."""
    return (
        device,
        tile,
        constants,
        tuple([None if tensor is None else tensor.dtype for tensor in tensors]),
        tuple([pointer is None or pointer % 16 == 0 for pointer in pointers]),
        tuple([numbers[place] % 16 == 0 for place in cache.specialised]),
        tuple([_value_class(numbers[place]) for place in cache.untyped]),
    )


def _value_class(number: int | float) -> tuple:
    """What Triton specializes on for a number whose parameter has no type: its type, divisibility by 16, and whether it is 1."""
    return type(number), number == 1, number % 16 == 0, number.bit_length() // 32 if isinstance(number, int) else 0


def _has_hooks(kernel: Any) -> bool:
    """Whether a profiler wants to see launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _takes_fast_launches(compiled: Any) -> bool:
    return _knows_this_triton() and compiled.metadata.target.backend == "cuda"


@functools.cache
def _knows_this_triton() -> bool:
    if triton.__version__.startswith(FAST_VERSIONS):
        return True
    warnings.warn(f"triton {triton.__version__} is newer than this library knows: kernels launch more slowly", stacklevel=2)
    return False
