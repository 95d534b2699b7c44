"""The public attention functions.

Method: FlashAttention (Dao et al., arXiv 2205.14135; Dao, arXiv 2307.08691). Scores are computed in tiles with an online softmax (Milakov
and Gimelshein, arXiv 1805.02867), so the full score matrix never exists; the backward recomputes the weights from the saved log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import replay
from .checks import check_dense, check_no_padding, make_problem
from .ops import run
from .problem import Layout, PreparedMask, Problem
from .quantized import dequantized
from .routing import Explanation, choose, explain_problem, is_read
from .torch_integration.jagged import is_nested, packed_inputs
from .weights import output_and_mean_weights, weights_of


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | PreparedMask | None = None,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    is_causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    diagonal: int | str | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T + bias, masked) V, fused, forward and backward.

    In masks, True = may attend. A query that may attend to nothing gives output 0, lse -inf and zero gradients, never NaN.
    out and lse are differentiable, any number of times, in query, key, value, a float attn_mask, alibi_slopes and sinks.

    Args:
        query: (B, Hq, Lq, Dqk), float32, float64, float16 or bfloat16; any strides (a non-contiguous last dim is copied).
        key: (B, Hkv, Lk, Dqk); Hq must be a multiple of Hkv (grouped-query attention, Ainslie et al., arXiv 2305.13245).
        value: (B, Hkv, Lk, Dv).
        attn_mask: bool (True = may attend) or float (added to the scaled scores; below -1e30 masks); (Lq, Lk), or 4-D and
            broadcastable to (B, Hq, Lq, Lk). Or a PreparedMask, which holds all the masking: pass such arguments to prepare_mask instead.
        key_mask: (B, Lk) bool, True = may attend: padding in any pattern. The contents of absent keys never matter, not even NaN.
        key_lengths: (B,) int32 or int64, clamped to [0, Lk]: keys at or past the length are absent.
        query_lengths: (B,) likewise for queries: rows at or past the length give output 0, lse -inf and zero gradients.
        is_causal: True hides keys past the diagonal; by default query i sees keys j <= i, as in torch. "top_left" and "bottom_right"
            mean True with that diagonal.
        window: (left, right), how many keys are visible on each side of the diagonal; None = unlimited on that side.
        diagonal: the diagonal that is_causal, window and alibi_slopes refer to. "top_left" (the default): query i is at key i.
            "bottom_right": the last query is at the last key, per sequence if lengths are given. An int in [-2^29, 2^29]: query i is at
            key i + diagonal, for instance after that many cached keys.
        scale: factor applied to the scores, finite; default 1 / sqrt(Dqk).
        dropout_p: probability in [0, 1] of dropping a softmax weight; the others are scaled up.
        rng_state: (2,) int64 seed and offset, to replay a dropout mask; by default drawn from torch's generator.
        softcap: > 0, applies s = softcap * tanh(s / softcap) to the scaled scores (Gemma 2, arXiv 2408.00118).
        alibi_slopes: (Hq,) or (B, Hq): slope * distance to the diagonal is subtracted (Press et al., arXiv 2108.12409).
        sinks: (Hq,) logits that join the softmax but have no value (as in gpt-oss).
        return_lse: also return lse, the natural log of the softmax denominator.
        deterministic: ask for bit-reproducible gradients; None follows torch.are_deterministic_algorithms_enabled(). The CPU's always are,
            and no sequence's results depend on the rest of the batch or on the number of threads (docs/cpu-kernels.md).
        backend: None chooses one; "reference", "triton", "cuda" or "cpu" runs that one, or raises with the reasons why it cannot.

    Returns:
        out (B, Hq, Lq, Dv) in the query's dtype, a view of (B, Lq, Hq, Dv) memory ((Lq, B, Hq, Dv) for a sequence-first query), so that
        merging the heads is free; with return_lse also lse (B, Hq, Lq), float32 (float64 for float64 inputs).

    query, key and value may also be nested tensors of layout torch.jagged, (B, H, ragged L, D). They run as `attention_varlen`, and out and
    lse are then nested too. Nested sequences have no padding, so masks over keys and key_lengths are refused.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    arguments = (query, key, value, key_mask, key_lengths, is_causal, scale, backend, "attention", return_lse)
    repeatable = (
        attn_mask is query_lengths is window is diagonal is rng_state is softcap is alibi_slopes is sinks is deterministic is None
        and type(dropout_p) is float
        and dropout_p == 0.0
    )
    if repeatable:
        results = replay.repeat(arguments)
        if results is not None:
            return results
    if is_nested(query):
        check_no_padding("nested tensors", attn_mask=attn_mask, key_mask=key_mask, key_lengths=key_lengths)
        queries, keys, values = packed_inputs(query, key, value)
        out, lse = attention_varlen(
            queries.values,
            keys.values,
            values.values,
            queries.offsets,
            keys.offsets,
            queries.max_seqlen,
            keys.max_seqlen,
            query_lengths=query_lengths,
            is_causal=is_causal,
            window=window,
            diagonal=diagonal,
            scale=scale,
            dropout_p=dropout_p,
            rng_state=rng_state,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=True,
            deterministic=deterministic,
            backend=backend,
        )
        nested_out = queries.nested(out)
        return (nested_out, queries.nested(lse.transpose(0, 1).contiguous())) if return_lse else nested_out
    problem = make_problem(
        "separate",
        autocast_inputs(query, key, value),
        attn_mask=attn_mask,
        key_mask=key_mask,
        key_lengths=key_lengths,
        query_lengths=query_lengths,
        is_causal=is_causal,
        window=window,
        diagonal=diagonal,
        scale=scale,
        dropout_p=dropout_p,
        rng_state=rng_state,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        deterministic=deterministic,
    )
    return _run(problem, backend, return_lse, arguments if repeatable else None)


def attention_qkv_packed(
    qkv: Tensor, *, return_lse: bool = False, backend: str | None = None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention on one packed projection, with one packed gradient; `options` are those of `attention`.

    qkv: (B, L, 3, H, D). Returns out (B, H, L, D), and lse (B, H, L) if requested. With separate views of the buffer, autograd would
    zero-fill three gradients and add them up.
    """
    return _run(make_problem("qkv", autocast_inputs(qkv), **options), backend, return_lse)


def attention_kv_packed(
    query: Tensor, kv: Tensor, *, return_lse: bool = False, backend: str | None = None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-attention on a query and one packed key-value projection; `options` are those of `attention`.

    query: (B, H, Lq, D); kv: (B, Lk, 2, H, D). Returns out (B, H, Lq, D), and lse (B, H, Lq) if requested.
    """
    return _run(make_problem("kv", autocast_inputs(query, kv), **options), backend, return_lse)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    *,
    query_lengths: Tensor | None = None,
    is_causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    diagonal: int | str | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` on B sequences packed one after another without padding; each attends only to itself (or to its own keys).

    The diagonal, windows, slopes, dropout and lengths are relative to each sequence. Differentiable like `attention`.

    Args:
        query: (Tq, Hq, Dqk), the tokens of all sequences.
        key: (Tk, Hkv, Dqk).
        value: (Tk, Hkv, Dv).
        cu_seqlens_q: (B + 1,) int32 or int64, ascending: the start of each sequence in `query`, then the end of the last one. Tokens
            before the first start or past the last end belong to no sequence: output 0, lse -inf and zero gradients.
        cu_seqlens_k: (B + 1,) likewise for `key` and `value`.
        max_seqlen_q: at least the length of the longest sequence; tokens of a sequence past it are ignored. A loose bound costs little,
            because costs follow the tokens, but a tight one launches the least on a GPU. A 0-dim tensor is read, which waits for its GPU.
            None: no known bound.
        max_seqlen_k: likewise for the keys.
        query_lengths: (B,): rows of a sequence at or past its length give output 0, lse -inf and zero gradients.
        alibi_slopes: (Hq,) or (B, Hq).

    The other arguments are those of `attention`.

    Returns:
        out (Tq, Hq, Dv) in the query's dtype, contiguous; with return_lse also lse (Hq, Tq), float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    problem = make_problem(
        "varlen",
        autocast_inputs(query, key, value),
        query_lengths=query_lengths,
        is_causal=is_causal,
        window=window,
        diagonal=diagonal,
        scale=scale,
        dropout_p=dropout_p,
        rng_state=rng_state,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        deterministic=deterministic,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    out, lse = run(problem, choose(problem, backend))
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_lengths: Tensor,
    *,
    key_mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` from the newest tokens to a cache that already holds them, causal from the bottom right; forward only.

    The last query is at the last key of its sequence: query i of Lq sees the keys up to key_lengths - Lq + i.

    Args:
        query: (B, Hq, Lq, Dqk), usually Lq = 1.
        key_cache: (B, Hkv, Lk, Dqk); contents at or past a sequence's length never matter.
        value_cache: (B, Hkv, Lk, Dv).
        key_lengths: (B,) int32 or int64: how many keys each sequence has so far, including those of `query`.
        key_scale: (B, Hkv, blocks) float32, with a cache of int8, float8_e4m3fn or float8_e5m2, as `quantize_kv` returns both: what a key
            is to be multiplied by. Each of the blocks is Lk / blocks tokens. The CPU's kernels read such caches in place, with up to two
            queries; otherwise a copy in the query's dtype is made first.
        value_scale: the same for the values; its blocks may have another size.

    The other arguments are those of `attention`.

    Returns:
        out (B, Hq, Lq, Dv), and lse (B, Hq, Lq) if requested, as from `attention`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: grad mode is on and a tensor requires a gradient, as in torch's functions with out=.
    """
    arguments = (query, key_cache, value_cache, key_mask, key_lengths, "bottom_right", scale, backend, "attention_decode", return_lse)
    repeatable = window is softcap is alibi_slopes is sinks is key_scale is value_scale is None
    if repeatable:
        results = replay.repeat(arguments)
        if results is not None:
            return results
    check_dense("key_lengths", key_lengths)
    problem = make_problem(
        "separate",
        autocast_inputs(query, key_cache, value_cache),
        key_mask=key_mask,
        key_lengths=key_lengths,
        is_causal="bottom_right",
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    scales = [tensor for tensor in (key_scale, value_scale) if tensor is not None]
    if torch.is_grad_enabled() and (problem.requires_grad() or any([tensor.requires_grad for tensor in scales])):
        raise RuntimeError(
            "attention_decode has no gradient, but a tensor requires one: call it under torch.no_grad(), or call attention()"
        )
    if scales and not is_read(problem, backend):
        problem = dequantized(problem, problem.query.dtype)
    return _run(problem, backend, return_lse, arguments if repeatable else None)


def attention_weights(
    query: Tensor, key: Tensor, lse: Tensor, *, average_heads: bool = False, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """The weights that `attention` multiplied with the values, after dropout, from the lse it returned.

    Args:
        query: (B, Hq, Lq, Dqk).
        key: (B, Hkv, Lk, Dqk).
        lse: (B, Hq, Lq), from `attention(..., return_lse=True)` with the same masks and options.
        average_heads: return the mean over heads, without storing the weights of each head unless a gradient is needed.
        dropout_p: with the `rng_state` given to `attention`, replays its dropout mask.
        options: the masks and options of `attention`.

    Returns:
        (B, Hq, Lq, Lk), or (B, Lq, Lk) with average_heads, in the query's dtype. Differentiable in query, key, lse and a float mask.

    Raises:
        TypeError, ValueError: an argument does not fit, or there is dropout without rng_state.
    """
    query, key = autocast_inputs(query, key)
    problem = make_problem("separate", (query, key, key), dropout_p=dropout_p, **options)
    if 0.0 < dropout_p < 1.0 and options.get("rng_state") is None:
        raise ValueError("rng_state must be given when dropout_p > 0: the one that was passed to attention()")
    if not isinstance(lse, Tensor) or not lse.is_floating_point():
        raise TypeError(f"lse must be a floating-point torch.Tensor, got {lse.dtype if isinstance(lse, Tensor) else type(lse).__name__}")
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse must have shape (batch, num_heads, seqlen_q) = {tuple(query.shape[:3])}, got {tuple(lse.shape)}")
    if lse.device != query.device:
        raise ValueError(f"lse must be on the device of query, {query.device}, got {lse.device}")
    return weights_of(problem, lse, average_heads)


def attention_with_weights(layout: Layout, inputs: tuple[Tensor, ...], *, average_heads: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """out of `attention`, or of its packed forms, and its `attention_weights`, from one kernel where there is one.

    layout: "separate", "qkv" or "kv", of inputs. With dropout, options must hold rng_state.
    """
    problem = make_problem(layout, autocast_inputs(*inputs), **options)
    backend = choose(problem, None)
    together = output_and_mean_weights(problem, backend) if average_heads else None
    if together is not None:
        return together
    out, lse = run(problem, backend)
    return out, attention_weights(problem.query, problem.key, lse, average_heads=average_heads, **options)


def explain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Explanation:
    """Returns the backend `attention` would choose for these arguments, and every reason why the others would not run.

    With cu_seqlens_q among the options, it explains `attention_varlen`.
    """
    options.pop("return_lse", None)
    options.pop("backend", None)
    if options.get("rng_state") is None and isinstance(query, Tensor):  # explaining must not advance torch's generator
        options["rng_state"] = torch.zeros(2, dtype=torch.int64, device=query.device)
    layout: Layout = "varlen" if "cu_seqlens_q" in options else "separate"
    return explain_problem(make_problem(layout, autocast_inputs(query, key, value), **options))


def _run(
    problem: Problem, backend: str | None, return_lse: bool, arguments: replay.Arguments | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    out, lse = run(problem, choose(problem, backend), arguments)
    return (out, lse) if return_lse else out


def autocast_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Casts to the autocast dtype, as torch does for its own attention; float64 is left alone."""
    first = inputs[0]
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return inputs
    dtype = torch.get_autocast_dtype(first.device.type)
    half_or_single = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in half_or_single else tensor for tensor in inputs)
