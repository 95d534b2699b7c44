"""The specification of attention in plain PyTorch: any device, any floating dtype, differentiable any number of times.

Numbered like the formula:
  1. absent keys and queries are zeroed, so that garbage in them cannot leak
  2. s = scale * Q K^T
  3. s = softcap * tanh(s / softcap)
  4. s = s + attn_mask - alibi_slope * |j - i - offset|
  5. masked pairs become -inf
  6. P = softmax(s), with exp(sink) added to the denominator; lse = log of the denominator
  7. dropout on P
  8. out = P V
Scores and softmax are float32 (float64 for float64 inputs). 8-bit keys and values are multiplied by their scales first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import dropout_factors
from .problem import Problem, holds, in_output_memory
from .quantized import dequantized

MASKED_BELOW = -1e30  # a float mask value below this masks; Hugging Face masks with finfo.min


def status() -> str | None:
    """None: it runs everywhere."""
    return None


def uncovered(problem: Problem) -> list[str]:
    """Empty: it covers everything."""
    return []


unsupported_reasons = uncovered


def attention_reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns out (B, Hq, Lq, Dv) in the query's dtype and memory order, and lse (B, Hq, Lq), float32 (float64 for float64 inputs)."""
    query = problem.query
    if problem.key_scale is not None:
        return attention_reference(dequantized(problem, torch.promote_types(query.dtype, torch.float32)))
    if problem.cu_seqlens_q is not None:
        out, lse = attention_reference(padded(problem))
        out = unpadded(out, problem.cu_seqlens_q, query.shape[2], 0.0)
        return in_output_memory(problem, out), unpadded(lse[..., None], problem.cu_seqlens_q, query.shape[2], -torch.inf).squeeze(-1)
    with without_autocast(query):
        scores = masked_scores(problem)
        queries_present, keys_present = present(problem)
        value = problem.value.to(scores.dtype).masked_fill(~keys_present[:, None, :, None], 0.0)  # 1.
        no_keys = holds(scores.shape[-1] == 0)
        row_max = scores.new_full((*scores.shape[:3], 1), -torch.inf) if no_keys else scores.detach().amax(-1, keepdim=True)
        if problem.sinks is not None:
            sinks = problem.sinks.to(scores.dtype)[None, :, None, None]
            row_max = torch.maximum(row_max, sinks.detach())
        row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
        weights = torch.exp(scores - row_max)  # 6.
        row_sum = weights.sum(-1, keepdim=True)
        if problem.sinks is not None:
            row_sum = row_sum + torch.exp(sinks - row_max)
        empty = (row_sum == 0) | ~queries_present[:, None, :, None]
        row_sum = row_sum.masked_fill(empty, 1.0)
        weights = weights / row_sum
        lse = (row_max + torch.log(row_sum)).masked_fill(empty, -torch.inf).squeeze(-1)
        if problem.dropout_p > 0.0:
            weights = weights * dropout(problem, 0, query.shape[1]).to(weights.dtype)  # 7.
        out = (weights @ repeat_heads(value, query.shape[1])).masked_fill(empty, 0.0)  # 8.; empty rows get no gradient, not even NaN
        return in_output_memory(problem, out.to(query.dtype)), lse


def padded(problem: Problem) -> Problem:
    """Packed sequences as a batch of padded ones, (B, H, max_seqlen, D), with their lengths."""
    assert problem.cu_seqlens_q is not None
    assert problem.cu_seqlens_k is not None
    index_q = _rows_of_sequences(problem.cu_seqlens_q, problem.query.shape[2], problem.max_seqlen_q)
    index_k = _rows_of_sequences(problem.cu_seqlens_k, problem.key.shape[2], problem.max_seqlen_k)
    tensors = ((problem.query, index_q), (problem.key, index_k), (problem.value, index_k))
    query, key, value = (F.pad(tensor[0], (0, 0, 0, 1))[:, index].transpose(0, 1) for tensor, index in tensors)
    lengths_q = (index_q < problem.query.shape[2]).sum(1, dtype=torch.int32)
    if problem.query_lengths is not None:
        lengths_q = torch.minimum(lengths_q, problem.query_lengths)
    return replace(
        problem,
        layout="separate",
        inputs=(query, key, value),
        query=query,
        key=key,
        value=value,
        query_lengths=lengths_q,
        key_lengths=(index_k < problem.key.shape[2]).sum(1, dtype=torch.int32),
        cu_seqlens_q=None,
        cu_seqlens_k=None,
    )


def _rows_of_sequences(cu_seqlens: Tensor, num_rows: int, max_seqlen: int) -> Tensor:
    """(B, max_seqlen) int64: the row indices of each sequence, num_rows past its end."""
    starts = cu_seqlens.clamp(0, num_rows).long()
    rows = starts[:-1, None] + torch.arange(max_seqlen, device=cu_seqlens.device)
    return torch.where(rows < starts[1:, None], rows, num_rows)


def unpadded(tensor: Tensor, cu_seqlens: Tensor, num_rows: int, fill: float) -> Tensor:
    """(B, H, max_seqlen, D) -> (1, H, num_rows, D), with `fill` in rows that belong to no sequence."""
    batch, _, max_seqlen, _ = tensor.shape
    starts = cu_seqlens.clamp(0, num_rows).long()
    rows = torch.arange(num_rows, device=tensor.device)
    sequence = torch.searchsorted(starts[1:], rows, right=True)
    place = rows - starts[sequence]
    belongs = (sequence < batch) & (place >= 0) & (place < max_seqlen)
    index = torch.where(belongs, sequence * max_seqlen + place, batch * max_seqlen)
    return F.pad(tensor.transpose(0, 1).flatten(1, 2), (0, 0, 0, 1), value=fill)[:, index][None]


def masked_scores(problem: Problem, first_head: int = 0, last_head: int | None = None) -> Tensor:
    """Steps 1 to 5 for a range of query heads: (B, heads, Lq, Lk) scores in float32 or float64, -inf where masked."""
    query, num_heads = problem.query, problem.query.shape[1]
    heads = slice(first_head, num_heads if last_head is None else last_head)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    queries_present, keys_present = present(problem)
    query = query[:, heads].to(dtype).masked_fill(~queries_present[:, None, :, None], 0.0)  # 1.
    key = repeat_heads(problem.key, num_heads)[:, heads].to(dtype).masked_fill(~keys_present[:, None, :, None], 0.0)
    scores = problem.scale * (query @ key.transpose(-1, -2))  # 2.
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)  # 3.
    if problem.attn_mask is not None and problem.attn_mask.dtype != torch.bool:
        bias = of_heads(problem.attn_mask, heads)
        scores = scores + bias.masked_fill(bias < MASKED_BELOW, 0.0).to(dtype)  # 4.
    if problem.alibi_slopes is not None:
        slopes = problem.alibi_slopes.to(dtype)
        slopes = (slopes if slopes.dim() == 2 else slopes[None])[:, heads]
        scores = scores - slopes[:, :, None, None] * key_minus_diagonal(problem).abs()
    return scores.masked_fill(~allowed_pairs(problem, heads), -torch.inf)  # 5.


def allowed_pairs(problem: Problem, heads: slice = slice(None)) -> Tensor:
    """Which query may attend to which key: (B, heads or 1, Lq, Lk) bool."""
    queries_present, keys_present = present(problem)
    allowed = (queries_present[:, :, None] & keys_present[:, None, :])[:, None]
    if problem.attn_mask is not None:
        mask = of_heads(problem.attn_mask, heads)
        allowed = allowed & (mask if mask.dtype == torch.bool else ~(mask < MASKED_BELOW))
    prepared_pairs = problem.prepared_pairs()
    if prepared_pairs is not None:
        allowed = allowed & of_heads(prepared_pairs, heads)
    distance = key_minus_diagonal(problem)  # (B, 1, Lq, Lk)
    if problem.window_left is not None:
        allowed = allowed & (distance >= -problem.window_left)
    if problem.window_right is not None:
        allowed = allowed & (distance <= problem.window_right)
    return allowed


def of_heads(mask: Tensor, heads: slice) -> Tensor:
    return mask[:, heads] if mask.shape[1] > 1 else mask


def present(problem: Problem) -> tuple[Tensor, Tensor]:
    """Which queries (B, Lq) and keys (B, Lk) exist."""
    batch, _, seqlen_q, _ = problem.query.shape
    seqlen_k, device = problem.key.shape[2], problem.query.device
    queries = torch.ones(batch, seqlen_q, dtype=torch.bool, device=device)
    keys = torch.ones(batch, seqlen_k, dtype=torch.bool, device=device)
    if problem.query_lengths is not None:
        queries = torch.arange(seqlen_q, device=device) < problem.query_lengths[:, None]
    if problem.key_lengths is not None:
        keys = torch.arange(seqlen_k, device=device) < problem.key_lengths[:, None]
    if problem.key_mask is not None:
        keys = keys & problem.key_mask
    return queries, keys


def key_minus_diagonal(problem: Problem) -> Tensor:
    """j - i - offset, int64, (B or 1, 1, Lq, Lk): 0 on the diagonal that causal, window and alibi refer to."""
    seqlen_q, seqlen_k, device = problem.query.shape[2], problem.key.shape[2], problem.query.device
    distance = torch.arange(seqlen_k, device=device)[None, :] - torch.arange(seqlen_q, device=device)[:, None]
    distance = distance[None, None]
    offset = diagonal_offset(problem)
    return distance - (offset.view(-1, 1, 1, 1) if isinstance(offset, Tensor) else offset)


def diagonal_offset(problem: Problem) -> Tensor | int:
    """The diagonal is j = i + this; (B,) if the sequences have their own lengths."""
    if not problem.bottom_right:
        return problem.diagonal
    seqlen_q, seqlen_k = problem.query.shape[2], problem.key.shape[2]
    lengths_k = problem.key_lengths.clamp(0, seqlen_k) if problem.key_lengths is not None else seqlen_k
    lengths_q = problem.query_lengths.clamp(0, seqlen_q) if problem.query_lengths is not None else seqlen_q
    return problem.diagonal + lengths_k - lengths_q


def dropout(problem: Problem, first_head: int, last_head: int) -> Tensor:
    batch, num_heads, seqlen_q, _ = problem.query.shape
    indices = torch.arange(batch * num_heads, device=problem.query.device).view(batch, num_heads)[:, first_head:last_head]
    factors = dropout_factors(problem.rng_state, problem.dropout_p, indices.reshape(-1), seqlen_q, problem.key.shape[2])
    return factors.view(batch, last_head - first_head, seqlen_q, problem.key.shape[2])


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    # Only if autocast is on: an exported program that contains such a region cannot be loaded.
    device = tensor.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # autocast rejects the meta device
    return torch.autocast(device, enabled=False) if on else nullcontext()


def repeat_heads(tensor: Tensor, num_heads: int) -> Tensor:
    return tensor if tensor.shape[1] == num_heads else tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1)
