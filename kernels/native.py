"""Hands a Problem to the CPU kernels of the compiled extension fused_attention._native (csrc/cpu)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import repeated
from .dropout import dropout_threshold
from .problem import Gradients, Problem, empty_lse, empty_output, with_contiguous_last_dim
from .repeated import Repeat

try:
    from fused_attention import _native
except ImportError as error:  # installed without a compiler, or on a platform that has no native kernels
    _native = None  # type: ignore[assignment]
    NOT_BUILT = f"the compiled extension is not available ({error})"

MAX_HEAD_DIM = 256
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASK_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
CAUSAL = {"none": 0, "top_left": 1, "bottom_right": 2}
UNLIMITED = 2**30  # a window side that no sequence reaches
MIN_SPLIT_KEYS = 128  # of a head whose backward pass is split over its keys

Strided = tuple[int, int, int, int]
ABSENT: Strided = (0, 0, 0, 0)


def status() -> str | None:
    """None when the CPU kernels can run on this machine, else the reason why not."""
    return NOT_BUILT if _native is None else None


def instruction_sets() -> tuple[str, list[str]]:
    """The instruction set in use, and every one that this machine can run, best first."""
    return _native.cpu_isa(), _native.cpu_isas()


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the CPU kernels cannot run this problem; empty when they can."""
    query = problem.query
    reasons = []
    if _native is None:
        reasons.append(NOT_BUILT)
    if query.device.type != "cpu":
        reasons.append(f"the tensors are on {query.device}, not on the CPU")
    if query.dtype not in DTYPES:
        reasons.append(f"dtype {query.dtype} is not covered (float32, bfloat16 and float16 are)")
    if query.shape[3] > MAX_HEAD_DIM or problem.value.shape[3] > MAX_HEAD_DIM:
        reasons.append(f"head_dim {max(query.shape[3], problem.value.shape[3])} is above {MAX_HEAD_DIM}")
    if problem.scale <= 0:
        reasons.append(f"scale must be > 0, is {problem.scale}")
    return reasons


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) float32; packed sequences have B = 1 there and rows of none are 0."""
    out = empty_output(problem.query, problem.value.shape[3])
    lse = empty_lse(problem.query)
    if problem.cu_seqlens_q is not None:
        out.zero_()
        lse.fill_(-torch.inf)
    arguments, _keep_alive = _native_arguments(problem, out, lse)
    _native.cpu_forward(torch.get_num_threads(), arguments)
    if problem.repeatable:
        problem.repeat = _repeat(arguments, out, lse)
    return out, lse


def _repeat(arguments: tuple, out: Tensor, lse: Tensor) -> Repeat:
    """`forward` of calls like this one, of which only query, key, value, key_mask and key_lengths differ."""
    native_problem, run, num_threads = _native.cpu_problem(arguments), _native.cpu_repeat, torch.get_num_threads
    out_shape, out_stride, lse_shape, lse_stride = tuple(out.shape), out.stride(), tuple(lse.shape), lse.stride()
    dtype, float32, empty = out.dtype, torch.float32, repeated.empty_strided(out)

    def repeat(
        query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, key_lengths: Tensor | None, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = empty(out_shape, out_stride, dtype), empty(lse_shape, lse_stride, float32)
        mask = 0 if key_mask is None else key_mask.data_ptr()
        lengths = 0 if key_lengths is None else key_lengths.data_ptr()
        outputs = out.data_ptr(), lse.data_ptr()
        run(native_problem, num_threads(), query.data_ptr(), key.data_ptr(), value.data_ptr(), *outputs, mask, lengths)
        return out, lse

    return repeat


def backward(problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, gradients: Gradients) -> None:
    """Writes every gradient asked for; bit for bit the same in every run with as many threads."""
    dout = with_contiguous_last_dim(dout)
    if dlse is not None:
        dlse = dlse.contiguous()
    packed = problem.cu_seqlens_q is not None
    if packed:
        for gradient in (gradients.query, gradients.key, gradients.value):
            gradient.zero_()
    num_threads = torch.get_num_threads()
    splits = _key_splits(problem, num_threads)
    dquery_parts = _zeros(splits, *problem.query.shape) if splits > 1 else None
    dattn_mask = _mask_gradient_parts(gradients.attn_mask, problem, splits, num_threads)
    side_shape = (problem.batch, problem.query.shape[1], splits)
    dalibi_slopes = None if gradients.alibi_slopes is None else _zeros(*side_shape)
    dsinks = None if gradients.sinks is None else _zeros(*side_shape)
    arguments, _keep_alive = _native_arguments(problem, out, lse)
    _native.cpu_backward(
        num_threads,
        arguments,
        _strided(dout, packed),
        _address(dlse),
        _strided(gradients.query, packed),
        _strided(gradients.key, packed),
        _strided(gradients.value, packed),
        splits,
        _address(dquery_parts),
        _mask_gradient_arguments(dattn_mask, splits),
        _address(dalibi_slopes),
        _address(dsinks),
    )
    if dquery_parts is not None:
        gradients.query.copy_(dquery_parts.sum(0))
    if gradients.attn_mask is not None and dattn_mask is not None and dattn_mask.data_ptr() != gradients.attn_mask.data_ptr():
        gradients.attn_mask.copy_(dattn_mask.sum(0))
    if gradients.alibi_slopes is not None and dalibi_slopes is not None:
        by_batch = dalibi_slopes.sum(2)
        gradients.alibi_slopes.copy_(by_batch if gradients.alibi_slopes.dim() == 2 else by_batch.sum(0))
    if gradients.sinks is not None and dsinks is not None:
        gradients.sinks.copy_(dsinks.sum((0, 2)))


def attention_weights(problem: Problem, lse: Tensor, average_heads: bool) -> Tensor:
    """The weights after dropout (B, Hq, Lq, Lk), or their mean over heads (B, Lq, Lk), which never holds those of single heads."""
    batch, num_heads, seqlen_q, _ = problem.query.shape
    weights = problem.query.new_empty(batch, 1 if average_heads else num_heads, seqlen_q, problem.key.shape[2])
    arguments, _keep_alive = _native_arguments(problem, weights, lse.contiguous())
    _native.cpu_weights(torch.get_num_threads(), arguments, average_heads)
    return weights[:, 0] if average_heads else weights


def _key_splits(problem: Problem, num_threads: int) -> int:
    """Into how many ranges the keys of a head are split: two for each thread that would have no head of its own."""
    heads = problem.batch * problem.key.shape[1]
    if heads == 0 or heads >= num_threads:
        return 1
    return max(1, min(-(-2 * num_threads // heads), problem.max_seqlen_k // MIN_SPLIT_KEYS))


def _mask_gradient_parts(gradient: Tensor | None, problem: Problem, splits: int, num_threads: int) -> Tensor | None:
    """Zeros (parts, B or 1, Hq or 1, Lq or 1, Lk or 1) float32, to be summed over the parts; one part may be the gradient itself.

    Heads that share a slice of the mask are dealt to as many parts as keep every thread busy.
    """
    if gradient is None:
        return None
    batch, num_heads_kv = problem.batch, problem.key.shape[1]
    slices = gradient.shape[0] * (num_heads_kv if gradient.shape[1] > 1 else 1)
    sharing = max(batch * num_heads_kv // max(slices, 1), 1)
    parts = min(sharing, -(-num_threads // max(slices * splits, 1)))
    if gradient.shape[3] == 1:
        parts *= splits
    if parts == 1 and gradient.dtype == torch.float32:
        return gradient.zero_()[None]
    return _zeros(parts, *gradient.shape)


def _mask_gradient_arguments(parts: Tensor | None, splits: int) -> tuple[int, ...]:
    if parts is None:
        return (0, 1, 0, 0, 0, 0, 0)
    strides = [0 if size == 1 else stride for size, stride in zip(parts.shape[1:], parts.stride()[1:], strict=True)]
    return parts.data_ptr(), parts.shape[0] // (splits if parts.shape[4] == 1 else 1), parts.stride(0), *strides


def _native_arguments(problem: Problem, out: Tensor, lse: Tensor) -> tuple[tuple, tuple | None]:
    """The arguments that forward and backward share (csrc/module.cpp), and the temporaries that must outlive the call."""
    query, value = problem.query, problem.value
    _, num_heads, _, head_dim = query.shape
    _, num_heads_kv, _, head_dim_v = value.shape
    prepared = problem.mask_bits is not None  # its bits know the window already
    packed = problem.cu_seqlens_q is not None
    side_tensors, keep_alive = _side_arguments(problem)
    arguments = (
        (problem.batch, num_heads, num_heads_kv, problem.max_seqlen_q, problem.max_seqlen_k, head_dim, head_dim_v),
        (
            DTYPES[query.dtype],
            problem.scale,
            problem.softcap or 0.0,
            CAUSAL[problem.causal],
            UNLIMITED if prepared or problem.window_left is None else min(problem.window_left, UNLIMITED),
            UNLIMITED if prepared or problem.window_right is None else min(problem.window_right, UNLIMITED),
            dropout_threshold(problem.dropout_p),
        ),
        _strided(query, packed),
        _strided(problem.key, packed),
        _strided(value, packed),
        _strided(out, packed),
        lse.data_ptr(),
        _address(problem.rng_state),
        side_tensors,
    )
    return arguments, keep_alive


def _side_arguments(problem: Problem) -> tuple[tuple | None, tuple | None]:
    """Masks, lengths and biases, None when there are none, and the temporaries that must outlive the call."""
    key_mask = problem.key_mask
    given = (problem.attn_mask, key_mask, problem.key_lengths, problem.query_lengths, problem.alibi_slopes, problem.sinks)
    if all([tensor is None for tensor in given]) and problem.cu_seqlens_q is None and problem.mask_bits is None:
        return None, None
    attn_mask, alibi_slopes, sinks = problem.as_native_kernels_take_them(MASK_DTYPES)
    mask_strides = _strides(attn_mask)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(problem.batch, -1)
    arguments = (
        ((_address(attn_mask), *mask_strides[:3]), mask_strides[3], 0 if attn_mask is None else MASK_DTYPES[attn_mask.dtype]),
        (0, 0, 0) if key_mask is None else (key_mask.data_ptr(), *key_mask.stride()),
        (
            _address(problem.key_lengths),
            _address(problem.query_lengths),
            _address(problem.cu_seqlens_q),
            _address(problem.cu_seqlens_k),
            problem.query.shape[2],
            problem.key.shape[2],
        ),
        ((0, 0, 0) if slopes is None else (slopes.data_ptr(), *slopes.stride()), _address(sinks)),
        (
            (_address(problem.mask_bits), *_strides(problem.mask_bits)[:3]),
            (_address(problem.row_tiles), *_strides(problem.row_tiles)[:3]),
            0 if problem.row_tiles is None else problem.row_tiles.shape[3] - 2,
        ),
    )
    return arguments, (attn_mask, slopes, sinks)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strided(tensor: Tensor, packed: bool) -> Strided:
    """packed: the sequences are all in one batch element."""
    batch, head, row, _ = tensor.stride()
    return tensor.data_ptr(), 0 if packed else batch, head, row


def _strides(tensor: Tensor | None) -> Strided:
    """0 in dims of size 1, which may stand for any number of lines."""
    if tensor is None:
        return ABSENT
    batch, head, row, last = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return batch, head, row, last
