"""Hands a Problem to the compiled extension fused_attention._native (csrc/)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import dropout_threshold
from .problem import Gradients, Problem, empty_output, with_contiguous_last_dim

try:
    from fused_attention import _native
except ImportError as error:  # installed without a compiler, or on a platform that has no native kernels
    _native = None  # type: ignore[assignment]
    NOT_BUILT = f"the compiled extension is not available ({error})"

MAX_HEAD_DIM = 256
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CAUSAL = {"none": 0, "top_left": 1, "bottom_right": 2}
ABSENT = (0, 0, 0, 0)


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
    if query.shape[1] != problem.key.shape[1]:
        reasons.append("grouped-query attention is not covered")
    if problem.attn_mask is not None and problem.attn_mask.requires_grad and torch.is_grad_enabled():
        reasons.append("the gradient of attn_mask is not covered")
    if problem.layout == "varlen":
        reasons.append("packed sequences are not covered")
    if problem.mask_bits is None and (problem.window_left is not None or problem.window_right is not None):
        reasons.append("window is not covered")
    if problem.softcap is not None:
        reasons.append("softcap is not covered")
    if problem.alibi_slopes is not None:
        reasons.append("alibi_slopes is not covered")
    if problem.sinks is not None:
        reasons.append("sinks is not covered")
    if problem.scale <= 0:
        reasons.append(f"scale must be > 0, is {problem.scale}")
    return reasons


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns out (B, H, Lq, Dv) and lse (B, H, Lq) float32."""
    batch, num_heads, seqlen_q, _ = problem.query.shape
    out = empty_output(problem.query, problem.value.shape[3])
    lse = problem.query.new_empty(batch, num_heads, seqlen_q, dtype=torch.float32)
    arguments, _keep_alive = _native_arguments(problem, out, lse)
    _native.cpu_forward(*arguments)
    return out, lse


def backward(problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, gradients: Gradients) -> None:
    """Writes the gradients of query, key and value."""
    dout = with_contiguous_last_dim(dout)
    if dlse is not None:
        dlse = dlse.contiguous()
    arguments, _keep_alive = _native_arguments(problem, out, lse)
    dlse_address = 0 if dlse is None else dlse.data_ptr()
    arguments += (_strided(dout), dlse_address, _strided(gradients.query), _strided(gradients.key), _strided(gradients.value))
    _native.cpu_backward(*arguments)


def _native_arguments(problem: Problem, out: Tensor, lse: Tensor) -> tuple[tuple, tuple]:
    """The arguments that forward and backward share, and the temporaries that must outlive the call."""
    query, key_mask = problem.query, problem.key_mask
    batch, num_heads, seqlen_q, head_dim = query.shape
    attn_mask = _float_mask(problem)
    arguments = (
        torch.get_num_threads(),
        DTYPES[query.dtype],
        (batch, num_heads, seqlen_q, problem.key.shape[2], head_dim, problem.value.shape[3]),
        problem.scale,
        CAUSAL[problem.causal],
        _strided(query),
        _strided(problem.key),
        _strided(problem.value),
        _strided(out),
        lse.data_ptr(),
        ABSENT if attn_mask is None else _strided(attn_mask),
        (0, 0, 0) if key_mask is None else (key_mask.data_ptr(), *key_mask.stride()),
        0 if problem.key_lengths is None else problem.key_lengths.data_ptr(),
        0 if problem.query_lengths is None else problem.query_lengths.data_ptr(),
        dropout_threshold(problem.dropout_p),
        0 if problem.rng_state is None else problem.rng_state.data_ptr(),
    )
    return arguments, (attn_mask,)


def _strided(tensor: Tensor) -> tuple[int, int, int, int]:
    strides = tensor.stride()
    return tensor.data_ptr(), strides[0], strides[1], strides[2]


def _float_mask(problem: Problem) -> Tensor | None:
    """attn_mask as float32 with stride 0 in broadcast dims, converted at its own size, before it is broadcast."""
    mask, prepared_pairs = problem.attn_mask, problem.prepared_pairs()
    if prepared_pairs is not None:
        mask = prepared_pairs if mask is None else mask.detach().masked_fill(~prepared_pairs, -torch.inf)
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    elif mask.dtype != torch.float32:
        mask = mask.to(torch.float32)
    seqlen_k = problem.key.shape[2]
    if mask.shape[3] != seqlen_k or mask.stride(3) != 1:  # the kernels read whole rows
        mask = mask.expand(*mask.shape[:3], seqlen_k).contiguous()
    return mask.detach().expand(*problem.query.shape[:3], seqlen_k)
