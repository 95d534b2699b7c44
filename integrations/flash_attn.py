"""The functions of flash-attn 2.8 on the fused kernels, for code that imports flash_attn on machines without it.

Signatures and meanings follow the documentation of flash_attn.flash_attn_interface (github.com/Dao-AILab/flash-attention): tensors are
(batch, seqlen, num_heads, head_dim), and causal, window_size and alibi_slopes count from the bottom right, so the last query is at the
last key. What is different:

- Also on CPUs, and for float32 and float64; any head_dim; dropout together with a softcap.
- lse is -inf, not +inf, for a query that may attend to nothing (its output is 0 in both).
- The third result of return_attn_probs is None without dropout, and refused with dropout over packed sequences.
- flash_attn_with_kvcache does not apply rotary embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import attention, attention_kv_packed, attention_qkv_packed, attention_varlen, attention_weights
from ..kernels.checks import as_number, check_dense, checked_integer

Result = Tensor | tuple[Tensor, Tensor, Tensor | None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention, differentiable in q, k, v and alibi_slopes.

    Args:
        q: (B, Lq, Hq, D).
        k: (B, Lk, Hk, D), where Hq is a multiple of Hk.
        v: (B, Lk, Hk, Dv).
        softmax_scale: default 1 / sqrt(D).
        window_size: (left, right), the keys that are visible on each side of the diagonal; -1 = unlimited.
        softcap: 0 = none.
        alibi_slopes: (Hq,) or (B, Hq): slope * distance to the diagonal is subtracted.
        return_attn_probs: return (out, lse, weights). weights is None without dropout; else (B, Hq, Lq, Lk), negative where dropped.

    Returns:
        out (B, Lq, Hq, Dv), contiguous; lse (B, Hq, Lq), float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    query, key, value = _heads_first(q=q, k=k, v=v)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    rng_state = _rng_state(dropout_p, q) if return_attn_probs else None
    drop: dict[str, Any] = {"dropout_p": dropout_p, "rng_state": rng_state}
    results = attention(query, key, value, **options, **drop, return_lse=return_attn_probs, deterministic=deterministic or None)
    if not return_attn_probs:
        return results.transpose(1, 2)  # type: ignore[union-attr]  # without lse
    out, lse = results
    return out.transpose(1, 2), lse, _signed_weights(query, key, lse, options, drop)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` on one (B, L, 3, H, D) tensor, with one gradient."""
    _check_dims("qkv", qkv, "(batch, seqlen, 3, num_heads, head_dim)")
    if return_attn_probs:
        q, k, v = qkv.unbind(2)
        return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, True)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    out = attention_qkv_packed(qkv, **options, dropout_p=dropout_p, deterministic=deterministic or None)
    return out.transpose(1, 2)  # type: ignore[union-attr]  # without lse


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` on q (B, Lq, Hq, D) and one (B, Lk, 2, Hk, D) tensor, with one gradient for keys and values."""
    _check_dims("kv", kv, "(batch, seqlen_k, 2, num_heads, head_dim)")
    if return_attn_probs:
        k, v = kv.unbind(2)
        return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, True)
    (query,) = _heads_first(q=q)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    out = attention_kv_packed(query, kv, **options, dropout_p=dropout_p, deterministic=deterministic or None)
    return out.transpose(1, 2)  # type: ignore[union-attr]  # without lse


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` on sequences packed one after another, each of which attends to itself or to its own keys.

    Args:
        q: (Tq, Hq, D), the tokens of all sequences.
        k: (Tk, Hk, D).
        v: (Tk, Hk, Dv).
        cu_seqlens_q: (B + 1,) int32: the start of each sequence in q, then the end of the last one.
        cu_seqlens_k: (B + 1,) likewise for k and v.
        max_seqlen_q: at least the length of the longest sequence in q.
        max_seqlen_k: likewise for k.
        return_attn_probs: return (out, lse, None); not with dropout.
        block_table: must be None: keys in pages are taken by flash_attn_with_kvcache only.

    Returns:
        out (Tq, Hq, Dv), contiguous; lse (Hq, Tq), float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if block_table is not None:
        raise ValueError("block_table must be None: keys in pages are taken by flash_attn_with_kvcache only")
    if return_attn_probs and dropout_p:
        raise ValueError("return_attn_probs must be False for packed sequences with dropout")
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        _check_dims(name, tensor, "(num_tokens, num_heads, head_dim)")
    results = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        **_options(softmax_scale, causal, window_size, softcap, alibi_slopes),
        dropout_p=dropout_p,
        return_lse=return_attn_probs,
        deterministic=deterministic or None,
    )
    return (*results, None) if return_attn_probs else results


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` on one (T, 3, H, D) tensor."""
    _check_dims("qkv", qkv, "(num_tokens, 3, num_heads, head_dim)")
    q, k, v = qkv.unbind(1)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` on q (Tq, Hq, D) and one (Tk, 2, Hk, D) tensor."""
    _check_dims("kv", kv, "(num_tokens, 2, num_heads, head_dim)")
    k, v = kv.unbind(1)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache, to which k and v are first appended in place; no gradient.

    Args:
        q: (B, Lq, Hq, D).
        k_cache: (B or more, Lk, Hk, D), or (num_blocks, block_size, Hk, D) with a block_table.
        v_cache: likewise (.., Dv).
        k: (B, Lnew, Hk, D): keys to write into the cache from position cache_seqlens on.
        v: (B, Lnew, Hk, Dv).
        rotary_cos, rotary_sin: must be None: apply the embedding to q and k before.
        cache_seqlens: (B,) int32 or one int: how many keys the cache holds, without k. None: it is full; not with k.
        cache_batch_idx: (B,) int: which row of the cache each sequence has; the rows are copied. None: the first B rows.
        cache_leftpad: (B,) int: the position of the first key; those before it are absent.
        block_table: (B, blocks per sequence) int: which blocks hold each sequence; the blocks are copied. Not with cache_batch_idx.
        rotary_interleaved: without meaning, as there is no rotary embedding.
        num_splits: without meaning: the kernels split the keys as they see fit.

    Returns:
        out (B, Lq, Hq, Dv), contiguous; with return_softmax_lse also lse (B, Hq, Lq), float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    for name, tensor in {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}.items():
        if tensor is not None:
            raise ValueError(f"{name} must be None: apply the rotary embedding to q and k before")
    for name, tensor in {"q": q, "k_cache": k_cache, "v_cache": v_cache}.items():
        _check_dims(name, tensor, "(batch, seqlen, num_heads, head_dim)")
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("cache_batch_idx must be None beside a block_table, which says where each sequence is")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"v_cache must have the sizes of k_cache, {tuple(k_cache.shape[:3])}, got {tuple(v_cache.shape[:3])}")
    batch = q.shape[0]
    for name, index in {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}.items():
        if index is not None:
            _check_integers(name, index, (batch,))
    if block_table is not None:
        check_dense("block_table", block_table)
        _check_integers("block_table", block_table, (batch, *block_table.shape[-1:]))
    elif cache_batch_idx is None and k_cache.shape[0] < batch:
        raise ValueError(f"k_cache must have at least the batch size of q, {batch}, got {k_cache.shape[0]}")
    lengths = _cache_lengths(cache_seqlens, batch, q.device)
    if k is not None or v is not None:
        if k is None or v is None:
            raise ValueError("k and v must be given together")
        if lengths is None:
            raise ValueError("cache_seqlens must be given beside k and v: it says where they go")
        _append(k_cache, v_cache, k, v, lengths, cache_batch_idx, block_table)
        lengths = lengths + k.shape[1]
    key, value = (_rows_of(cache, batch, cache_batch_idx, block_table).transpose(1, 2) for cache in (k_cache, v_cache))
    key_mask = None if cache_leftpad is None else torch.arange(key.shape[2], device=q.device) >= cache_leftpad[:, None]
    results = attention(
        q.transpose(1, 2),
        key,
        value,
        key_mask=key_mask,
        key_lengths=lengths,
        **_options(softmax_scale, causal, window_size, softcap, alibi_slopes),
        return_lse=return_softmax_lse,
    )
    if return_softmax_lse:
        return results[0].transpose(1, 2), results[1]
    return results.transpose(1, 2)  # type: ignore[union-attr]  # without lse


def _append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None
) -> None:
    """Writes k and v into the caches, from position lengths (B,) on."""
    batch, new = lengths.shape[0], k.shape[1]
    for name, tensor, cache in (("k", k, k_cache), ("v", v, v_cache)):
        _check_dims(name, tensor, "(batch, seqlen_new, num_heads, head_dim)")
        expected = (batch, new, *cache.shape[2:])
        if tensor.shape != expected or tensor.dtype != cache.dtype:
            raise ValueError(f"{name} must be {expected} of {cache.dtype} like its cache, got {tuple(tensor.shape)} of {tensor.dtype}")
    block_size = k_cache.shape[1]
    capacity = block_size if block_table is None else block_size * block_table.shape[1]
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and batch and int(lengths.max()) + new > capacity:
        raise ValueError(f"k does not fit into the cache of {capacity} keys: cache_seqlens is {int(lengths.max())}, and k has {new} more")
    positions = lengths.long()[:, None] + torch.arange(new, device=lengths.device)  # (B, Lnew)
    if block_table is not None:
        rows = block_table.long().gather(1, positions // block_size)
        positions = positions % block_size
    elif cache_batch_idx is not None:
        rows = cache_batch_idx.long()[:, None]
    else:
        rows = torch.arange(batch, device=lengths.device)[:, None]
    k_cache[rows, positions] = k
    v_cache[rows, positions] = v


def _rows_of(cache: Tensor, batch: int, cache_batch_idx: Tensor | None, block_table: Tensor | None) -> Tensor:
    """(B, Lk, Hk, D): the keys or values of each sequence, a view of the cache if possible."""
    if block_table is not None:
        blocks = block_table.long().clamp(0, cache.shape[0] - 1)  # entries past a sequence's end may be anything
        return cache[blocks].flatten(1, 2)
    return cache[:batch] if cache_batch_idx is None else cache[cache_batch_idx.long()]


def _cache_lengths(cache_seqlens: int | Tensor | None, batch: int, device: torch.device) -> Tensor | None:
    if cache_seqlens is None:
        return None
    if isinstance(cache_seqlens, Tensor):
        _check_integers("cache_seqlens", cache_seqlens, (batch,))
        return cache_seqlens
    length = checked_integer("cache_seqlens", cache_seqlens)
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    check_dense(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _heads_first(**tensors: Tensor) -> list[Tensor]:
    """(B, L, H, D) -> (B, H, L, D) views."""
    for name, tensor in tensors.items():
        _check_dims(name, tensor, "(batch, seqlen, num_heads, head_dim)")
    return [tensor.transpose(1, 2) for tensor in tensors.values()]


def _check_dims(name: str, tensor: Tensor, words: str) -> None:
    check_dense(name, tensor)
    sizes = words.strip("()").split(", ")
    fits = len(sizes) == tensor.dim() and all(int(size) == tensor.shape[dim] for dim, size in enumerate(sizes) if size.isdigit())
    if not fits:
        raise ValueError(f"{name} must have shape {words}, got {tuple(tensor.shape)}")


def _options(
    softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None
) -> dict[str, Any]:
    """The same in the words of `attention`."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    left, right = (checked_integer("window_size", side) for side in window_size)
    window = None if left < 0 and right < 0 else (None if left < 0 else left, None if right < 0 else right)
    # A diagonal that nothing counts from is left out: such calls are repeated faster.
    return {
        "scale": softmax_scale,
        "is_causal": "bottom_right" if causal else False,
        "window": window,
        "diagonal": None if window is None and alibi_slopes is None else "bottom_right",
        "softcap": None if as_number("softcap", softcap) <= 0.0 else softcap,
        "alibi_slopes": alibi_slopes,
    }


def _rng_state(dropout_p: float, like: Tensor) -> Tensor | None:
    return torch.randint(2**63 - 1, (2,), device=like.device) if dropout_p else None


def _signed_weights(query: Tensor, key: Tensor, lse: Tensor, options: dict[str, Any], drop: dict[str, Any]) -> Tensor | None:
    """(B, Hq, Lq, Lk): the weights before dropout, negative where dropped; None without dropout."""
    if not drop["dropout_p"]:
        return None
    with torch.no_grad():
        weights = attention_weights(query, key, lse, **options)
        return torch.where(attention_weights(query, key, lse, **options, **drop) > 0, weights, -weights)
