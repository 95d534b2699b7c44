"""Import this first in a test file whose Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors.

Without TRITON_INTERPRET=1 the importing test file is skipped: a process either interprets kernels or compiles them.

The interpreter of triton 3.6 to 3.9 keeps bfloat16 as uint16 bit patterns, multiplies and adds these patterns, and truncates when it casts
to bfloat16. The patches below make tl.dot, arithmetic and casts of bfloat16 right; reductions and unary functions of it stay wrong, which
is why the kernels only load it, cast it to float32, feed it to tl.dot and store it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("these tests run with TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Bit patterns, rounded to nearest, ties to even."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded.astype(np.uint16)).astype(np.uint16)


def is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(bfloat16_to_float32(handle.data), tl.float32) if is_bfloat16(handle) else handle


original_dot = InterpreterBuilder.create_dot
original_cast = InterpreterBuilder.cast_impl
original_binary_op = InterpreterBuilder.binary_op
original_patch_tensor = interpreter._patch_lang_tensor


def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *others: Any) -> TensorHandle:
    return original_dot(self, widened(a), widened(b), *others)


def cast_impl(self: InterpreterBuilder, source: TensorHandle, to: Any) -> TensorHandle:
    if is_bfloat16(source) == (to.scalar == tl.bfloat16):
        return original_cast(self, source, to)
    if is_bfloat16(source):
        return original_cast(self, widened(source), to)
    return TensorHandle(float32_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)


def binary_op(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
    if not (is_bfloat16(left) and is_bfloat16(right)):
        return original_binary_op(self, left, right, op)
    result = op(widened(left).data, widened(right).data)
    if result.dtype == bool:
        return TensorHandle(result, tl.int1)
    return TensorHandle(float32_to_bfloat16(result), tl.bfloat16)


def patch_tensor(tensor: type, *scope: Any) -> Any:
    result = original_patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.squeeze())  # type: ignore[attr-defined]
    return result


InterpreterBuilder.create_dot = create_dot
InterpreterBuilder.cast_impl = cast_impl
InterpreterBuilder.binary_op = binary_op
if triton.__version__.startswith("3.6."):  # its range(tensor) fails with numpy >= 2.4
    interpreter._patch_lang_tensor = patch_tensor
