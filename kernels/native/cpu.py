"""Hands a Problem to the CPU kernels of the compiled extension fused_attention._native (csrc/cpu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call, empty_strided
from ..dropout import dropout_threshold
from ..problem import (
    Gradients,
    OptionalTensors,
    Problem,
    empty_lse,
    empty_output,
    strides,
    uncovered_numbers,
    with_contiguous_last_dim,
)
from ..replay import prepared
from ..torch_internals import float32_precision
from . import packed_problem
from .packed_problem import DTYPES, NO_ADDRESSES, NOT_BUILT, Plain, _native, address, optional_addresses

MAX_HEAD_DIM = 256
MAX_QUERIES_OF_QUANTIZED = 2  # kFewRows in csrc/cpu/mask.h
KEEPS_OUT_ERROR = (torch.bfloat16, torch.float16)
# How precise torch's CPU may multiply float32 matrices after set_float32_matmul_precision("high") or ("medium").
REDUCED_PRECISION = ("tf32", "bf16")
MAX_KEYS_WITH_WEIGHTS = 512  # for weights together with the output: one block of keys
LEAST_MASK_TASKS, HEADS_OF_MASK_PART, MOST_MASK_PARTS = 2, 32, 16  # see _mask_parts


def status() -> str | None:
    """None if the CPU kernels can run on this machine, else the reason why not."""
    return NOT_BUILT if _native is None else None


def instruction_sets() -> tuple[str, list[str]]:
    """The instruction set in use, and all that this machine can run, best first."""
    return _native.cpu_isa(), _native.cpu_isas()


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the CPU kernels cannot run this problem here; empty if they can."""
    query = problem.query
    reasons = []
    if _native is None:
        reasons.append(NOT_BUILT)
    if query.device.type != "cpu":
        reasons.append(f"the tensors are on {query.device}, not on the CPU")
    return reasons + uncovered(problem)


def uncovered(problem: Problem) -> list[str]:
    """What the kernels do not support on any machine."""
    query = problem.query
    reasons = []
    if query.dtype not in DTYPES:
        reasons.append(f"dtype {query.dtype} is not covered (float32, bfloat16 and float16 are)")
    if query.shape[3] > MAX_HEAD_DIM or problem.value.shape[3] > MAX_HEAD_DIM:
        reasons.append(f"head_dim {max(query.shape[3], problem.value.shape[3])} is above {MAX_HEAD_DIM}")
    if problem.key_scale is not None and problem.max_seqlen_q > MAX_QUERIES_OF_QUANTIZED:
        reasons.append(f"8-bit keys and values are covered for at most {MAX_QUERIES_OF_QUANTIZED} queries, not for {problem.max_seqlen_q}")
    reasons += uncovered_numbers(problem)
    return reasons


def prepare(problem: Problem) -> Call:
    """The forward pass for all problems that differ from this one only in their tensors' memory."""
    plain = prepared(_plain, problem)
    numbers, out_shape, out_strides, lse_shape, lse_strides = (
        plain.numbers, plain.out_shape, plain.out_strides, plain.lse_shape, plain.lse_strides,
    )  # fmt: skip
    dtype, float32, empty = problem.query.dtype, torch.float32, empty_strided(problem.query)
    with_bf16x3 = _native.with_bf16x3(numbers) if _may_split(dtype) else None
    run, num_threads, as_read = _native.cpu_forward, torch.get_num_threads, packed_problem.as_read
    is_packed, converts = problem.cu_seqlens_q is not None, not packed_problem.are_as_read(problem.optional_tensors())
    places = packed_problem.given(problem.optional_tensors())
    keeps_out_error = problem.keeps_out_error

    def call(query: Tensor, key: Tensor, value: Tensor, optional: OptionalTensors, needs_lse: bool) -> Tensor | tuple[Tensor, ...]:
        out, lse = empty(out_shape, out_strides, dtype), empty(lse_shape, lse_strides, float32)
        out_error = empty(out_shape, out_strides, dtype) if keeps_out_error else None
        if is_packed:
            out.zero_()
            lse.fill_(-torch.inf)
        if converts:
            optional = as_read(optional)
        run(
            numbers if with_bf16x3 is None or not _splits() else with_bf16x3,
            num_threads(),
            0 if out_error is None else out_error.data_ptr(),
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            optional_addresses(optional, places) if places else NO_ADDRESSES,
        )
        if out_error is not None:
            return out, lse, out_error
        return (out, lse) if needs_lse else out

    return call


def backward(
    problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, gradients: Gradients, out_error: Tensor | None = None
) -> None:
    """Writes every requested gradient; bit-reproducible, for any number of threads."""
    dout = with_contiguous_last_dim(dout)
    if dlse is not None:
        dlse = dlse.contiguous()
    packed = problem.cu_seqlens_q is not None
    if packed:
        for gradient in (gradients.query, gradients.key, gradients.value):
            gradient.zero_()
    num_threads = torch.get_num_threads()
    key_parts = _native.cpu_key_parts(problem.max_seqlen_k)
    mask_parts, heads = _mask_parts(gradients.attn_mask, problem)
    # Where threads would find no head, each part of a head's keys is a task and writes its own part of dquery.
    dquery_parts = _zeros(key_parts, *problem.query.shape) if key_parts > 1 and heads * mask_parts < num_threads else None
    dattn_mask = _mask_gradient_parts(gradients.attn_mask, mask_parts, key_parts)
    side_shape = (problem.batch, problem.query.shape[1])
    dalibi_slopes = None if gradients.alibi_slopes is None else _zeros(*side_shape, key_parts)
    dsinks = None if gradients.sinks is None else _zeros(*side_shape)
    optional = packed_problem.as_read(problem.optional_tensors())
    gradient_addresses = (
        *packed_problem.gradient_addresses(dout, dlse, gradients),
        address(out_error),
        address(dquery_parts),
        address(dattn_mask),
        address(dalibi_slopes),
        address(dsinks),
    )
    numbers = prepared(_plain, problem).numbers
    _native.cpu_backward(
        _native.with_bf16x3(numbers) if _may_split(dout.dtype) and _splits() else numbers,
        num_threads,
        packed_problem.addresses(problem.query, problem.key, problem.value, optional, out, lse),
        gradient_addresses,
        _strides(dout, packed),
        _strides(gradients.query, packed),
        _strides(gradients.key, packed),
        _strides(gradients.value, packed),
        (0,) * 5 if dattn_mask is None else (dattn_mask.stride(0), *strides(dattn_mask[0], 4)),
        mask_parts,
        key_parts,
    )
    if dquery_parts is not None:
        torch.mul(_sum_in_order(dquery_parts), problem.scale, out=gradients.query)
    if gradients.attn_mask is not None and dattn_mask is not None and dattn_mask.data_ptr() != gradients.attn_mask.data_ptr():
        gradients.attn_mask.copy_(_sum_in_order(dattn_mask))
    if gradients.alibi_slopes is not None and dalibi_slopes is not None:
        by_batch = _sum_in_order(dalibi_slopes.movedim(2, 0))
        gradients.alibi_slopes.copy_(by_batch if gradients.alibi_slopes.dim() == 2 else _sum_over_batch(by_batch))
    if gradients.sinks is not None and dsinks is not None:
        gradients.sinks.copy_(_sum_over_batch(dsinks))


def takes_with_weights(problem: Problem) -> bool:
    """Whether `forward_with_weights` runs a problem that `unsupported_reasons` has nothing against."""
    is_packed = problem.cu_seqlens_q is not None
    return problem.query.dtype is torch.float32 and problem.key.shape[2] <= MAX_KEYS_WITH_WEIGHTS and not is_packed


def forward_with_weights(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the weights after dropout averaged over heads (B, Lq, Lk), computed together."""
    plain = prepared(_plain, problem)
    out, lse = empty_output(problem), empty_lse(problem.query)
    weights = problem.query.new_empty(problem.query.shape[0], problem.query.shape[2], problem.key.shape[2])
    optional = packed_problem.as_read(problem.optional_tensors())
    addresses = packed_problem.addresses(problem.query, problem.key, problem.value, optional, out, lse)
    _native.cpu_forward_with_weights(plain.numbers, torch.get_num_threads(), addresses, weights.data_ptr())
    return out, lse, weights


def attention_weights(problem: Problem, lse: Tensor, average_heads: bool) -> Tensor:
    """The weights after dropout (B, Hq, Lq, Lk), or their mean over heads (B, Lq, Lk), without storing the weights of each head."""
    batch, num_heads, seqlen_q, _ = problem.query.shape
    weights = problem.query.new_empty(batch, 1 if average_heads else num_heads, seqlen_q, problem.key.shape[2])
    lse = lse.contiguous()
    optional = packed_problem.as_read(problem.optional_tensors())
    numbers = packed_problem.plain_numbers(problem, weights, dropout_threshold(problem.dropout_p))
    addresses = packed_problem.addresses(problem.query, problem.key, problem.value, optional, weights, lse)
    _native.cpu_weights(numbers, torch.get_num_threads(), addresses, average_heads)
    return weights[:, 0] if average_heads else weights


def _may_split(dtype: torch.dtype) -> bool:
    """Whether this machine has kernels that split numbers of this dtype into two of bfloat16."""
    return dtype is torch.float32 and _native.cpu_has_bf16x3()


def _splits() -> bool:
    """Whether torch's setting allows it now."""
    return float32_precision("mkldnn", "matmul") in REDUCED_PRECISION


def _mask_parts(gradient: Tensor | None, problem: Problem) -> tuple[int, int]:
    """How many parts the gradient of attn_mask is summed in, over the heads that share a slice of the mask; and how many slices there are,
    or key heads if there is no such gradient.

    Parts keep threads busy, and each costs two more passes over the gradient. How many there are must not depend on the number of threads,
    because sums would; and if each sequence has its own slices, nor on the batch, so these have one.
    """
    heads = problem.batch * problem.key.shape[1]
    if gradient is None:
        return 1, heads
    slices = gradient.shape[0] * (problem.key.shape[1] if gradient.shape[1] > 1 else 1)
    if gradient.shape[0] == problem.batch:
        return 1, slices
    sharing = heads // slices
    return max(min(max(LEAST_MASK_TASKS // slices, sharing // HEADS_OF_MASK_PART), sharing, MOST_MASK_PARTS), 1), slices


def _mask_gradient_parts(gradient: Tensor | None, mask_parts: int, key_parts: int) -> Tensor | None:
    """Zeros (parts, B or 1, Hq or 1, Lq or 1, Lk or 1) float32, to be summed over the parts; one part may be the gradient itself."""
    if gradient is None:
        return None
    parts = mask_parts * (key_parts if gradient.shape[3] == 1 else 1)
    if parts == 1 and gradient.dtype == torch.float32:
        return gradient.zero_()[None]
    return _zeros(parts, *gradient.shape)


def _sum_in_order(parts: Tensor) -> Tensor:
    """The sum over dim 0 of (parts, ...), at least one, in the place of the first. torch.sum's order depends on the number of threads."""
    for part in parts[1:]:
        parts[0].add_(part)
    return parts[0]


def _sum_over_batch(gradients: Tensor) -> Tensor:
    """The same of (B, Hq), where B may be 0 or many."""
    return gradients.cumsum(0)[-1] if gradients.shape[0] > 0 else gradients.new_zeros(gradients.shape[1])


def _plain(problem: Problem) -> Plain:
    return packed_problem.plain(problem, dropout_threshold(problem.dropout_p))


def _strides(tensor: Tensor, packed: bool) -> tuple[int, int, int]:
    """A faster packed_problem.strides for a tensor without broadcast dims. packed: one batch element holds all sequences."""
    batch, head, row, _ = tensor.stride()
    return 0 if packed else batch, head, row


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32)
