"""A Problem in the form the compiled extension (csrc/module.cpp) takes: plain numbers, and the addresses of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import (
    PLACE,
    TENSORS,
    Gradients,
    OptionalTensors,
    Problem,
    empty_lse,
    empty_output,
    strides,
    without_repetition,
)

try:
    from ... import _native
except ImportError as error:  # installed without a compiler, or on a platform without native kernels
    _native = None  # type: ignore[assignment]
    NOT_BUILT = f"the compiled extension is not available ({error})"
else:
    NOT_BUILT = ""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASK_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
CACHE_DTYPES = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}
UNLIMITED = 2**30  # a window side that no sequence reaches
_NUM_OPTIONAL = sum(tensor.in_extension for tensor in TENSORS.values())
NO_ADDRESSES = (0,) * _NUM_OPTIONAL  # of optional tensors


@dataclass(slots=True)
class Plain:
    """What problems that differ only in their tensors' memory have in common."""

    numbers: bytes  # an AttentionProblem (csrc/problem.h) without its addresses
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    lse_shape: tuple[int, ...]
    lse_strides: tuple[int, ...]


def plain(problem: Problem, dropout_threshold: int) -> Plain:
    out, lse = empty_output(problem), empty_lse(problem.query)
    numbers = plain_numbers(problem, out, dropout_threshold)
    return Plain(numbers, tuple(out.shape), out.stride(), tuple(lse.shape), lse.stride())


def are_as_read(optional: OptionalTensors) -> bool:
    """Whether `as_read` would convert nothing."""
    attn_mask, alibi_slopes, sinks = optional[PLACE["attn_mask"]], optional[PLACE["alibi_slopes"]], optional[PLACE["sinks"]]
    floats = [tensor for tensor in (alibi_slopes, sinks) if tensor is not None]
    return (attn_mask is None or attn_mask.dtype in MASK_DTYPES) and all(tensor.dtype is torch.float32 for tensor in floats)


def as_read(optional: OptionalTensors) -> OptionalTensors:
    """Converts to dtypes the kernels read: alibi_slopes, sinks and an attn_mask of another dtype become float32.

    Keep the result alive until the kernels have run.
    """
    attn_mask, key_mask, key_lengths, query_lengths, alibi_slopes, sinks, *others = optional
    if attn_mask is not None and attn_mask.dtype not in MASK_DTYPES:
        attn_mask = without_repetition(attn_mask).float()  # an expanded mask stays small
    alibi_slopes = None if alibi_slopes is None else alibi_slopes.float()
    sinks = None if sinks is None else sinks.float()
    return (attn_mask, key_mask, key_lengths, query_lengths, alibi_slopes, sinks, *others)


def plain_numbers(problem: Problem, out: Tensor, dropout_threshold: int) -> bytes:
    """An AttentionProblem without its addresses; the result goes to a tensor like `out`."""
    query, key, value = problem.query, problem.key, problem.value
    optional = as_read(problem.optional_tensors())
    attn_mask, alibi_slopes = optional[PLACE["attn_mask"]], optional[PLACE["alibi_slopes"]]
    mask_strides = strides(attn_mask, 4)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(problem.batch, -1)
    left, right = problem.window_left, problem.window_right
    if problem.mask_bits is not None:  # they include the window, but causal still helps: half of the scores are not needed
        left, right = None, 0 if right == 0 else None
    return _native.problem(
        dtype=DTYPES[query.dtype],
        sizes=(
            problem.batch,
            query.shape[1],
            key.shape[1],
            problem.max_seqlen_q,
            problem.max_seqlen_k,
            query.shape[3],
            value.shape[3],
        ),
        num_tokens=(0, 0) if problem.cu_seqlens_q is None else (query.shape[2], key.shape[2]),
        scale=problem.scale,
        window=(_window_side(left), _window_side(right)),
        diagonal=problem.diagonal,
        bottom_right=problem.bottom_right,
        softcap=problem.softcap or 0.0,
        dropout_threshold=dropout_threshold,
        query=strides(query, 3),
        key=strides(key, 3),
        value=strides(value, 3),
        out=strides(out, 3),
        attn_mask=mask_strides[:3],
        attn_mask_key=mask_strides[3],
        attn_mask_dtype=0 if attn_mask is None else MASK_DTYPES[attn_mask.dtype],
        key_mask=strides(problem.key_mask, 2),
        alibi_slopes=strides(slopes, 2),
        mask_bits=strides(problem.mask_bits, 3),
        row_tiles=strides(problem.row_tiles, 3),
        num_tiles=0 if problem.row_tiles is None else problem.row_tiles.shape[3] - 2,
        cache_dtype=CACHE_DTYPES.get(key.dtype, -1),
        key_scale=_scale_numbers(problem.key_scale, key),
        value_scale=_scale_numbers(problem.value_scale, value),
    )


def addresses(query: Tensor, key: Tensor, value: Tensor, optional: OptionalTensors, out: Tensor, lse: Tensor) -> tuple[int, ...]:
    """The addresses of a problem's tensors, in the order of _native.address_names(). optional: from `as_read`."""
    inputs_and_results = query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), lse.data_ptr()
    return (*inputs_and_results, *optional_addresses(optional, given(optional)))


def given(optional: OptionalTensors) -> list[int]:
    """The places of those that are tensors."""
    return [place for place, tensor in enumerate(optional[:_NUM_OPTIONAL]) if tensor is not None]


def optional_addresses(optional: OptionalTensors, places: list[int]) -> list[int]:
    """The addresses of the optional tensors, which come last in `addresses`. places: from `given`."""
    addresses = [*NO_ADDRESSES]
    for place in places:
        addresses[place] = optional[place].data_ptr()  # type: ignore[union-attr]  # it is given
    return addresses


def gradient_addresses(dout: Tensor, dlse: Tensor | None, gradients: Gradients) -> tuple[int, ...]:
    """The first five addresses that a backward pass takes, on any device."""
    return dout.data_ptr(), address(dlse), gradients.query.data_ptr(), gradients.key.data_ptr(), gradients.value.data_ptr()


def address(tensor: Tensor | None) -> int:
    """The tensor's address; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _scale_numbers(scale: Tensor | None, numbers: Tensor) -> tuple[int, ...]:
    """The strides of scales (B, Hkv, blocks), and the tokens of a block."""
    return (*strides(scale, 3), 1 if scale is None else numbers.shape[2] // max(scale.shape[2], 1))


def _window_side(side: int | None) -> int:
    return UNLIMITED if side is None else min(side, UNLIMITED)
