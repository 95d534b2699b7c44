"""Checks the arguments of an attention call and normalizes them into one Problem; every input error is raised here.

It looks only at shapes, dtypes, devices and strides, never at tensor values: no device synchronization, no graph break.
"""

from __future__ import annotations

import itertools
import math
import numbers
import operator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from .problem import INPUTS, Layout, OutMemory, PreparedMask, Problem, holds, split, with_contiguous_last_dim, without_repetition
from .quantized import CACHE_DTYPES
from .torch_internals import is_functorch_tensor, is_torch_function_enabled, num_dispatch_modes, tracing_state

MAX_DIAGONAL = 2**29  # sums with it fit an int32

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FLOAT32 = torch.finfo(torch.float32)

MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")


def make_problem(
    layout: Layout,
    inputs: tuple[Tensor, ...],
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
    deterministic: bool | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    out_memory: OutMemory = "heads merged",
) -> Problem:
    """Checks every argument of `attention()`, of `attention_varlen()` if cu_seqlens_q and the next three are given, or of
    `attention_decode()` if key_scale and value_scale are, and returns the normalized problem.

    Raises:
        TypeError: a tensor argument is not a tensor, or has the wrong dtype.
        ValueError: a shape, device or value does not fit; the message names the argument, what was given and what is allowed.
        RuntimeError: torch.jit.trace is running, which would freeze shapes and options.
    """
    if tracing_state() is not None:
        raise RuntimeError("attention cannot be traced by torch.jit.trace; use torch.compile or torch.export")
    quantized = key_scale is not None or value_scale is not None
    inputs, inputs_number = _checked_inputs(layout, inputs, quantized)
    query, key, value = split(layout, inputs)
    batch, num_heads, seqlen_q, head_dim = query.shape
    seqlen_k = key.shape[2]
    device = query.device
    if layout == "varlen":
        check_no_padding("packed sequences", attn_mask=attn_mask, key_mask=key_mask, key_lengths=key_lengths)
        cu_seqlens_q = _checked_cu_seqlens("cu_seqlens_q", cu_seqlens_q, device)
        cu_seqlens_k = _checked_cu_seqlens("cu_seqlens_k", cu_seqlens_k, device, cu_seqlens_q.shape[0])
        batch = cu_seqlens_q.shape[0] - 1
        max_seqlen_q = _longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q, seqlen_q)
        max_seqlen_k = _longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k, seqlen_k)
    else:
        if not (cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k is None):
            raise TypeError("cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k are arguments of attention_varlen only")
        max_seqlen_q, max_seqlen_k = seqlen_q, seqlen_k
    if causal_bias(attn_mask) is not None:
        attn_mask, is_causal = None, _checked_causal_bias(attn_mask, is_causal, seqlen_q, seqlen_k)
    prepared = None
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        prepared = attn_mask
        _check_nothing_beside(
            key_mask=key_mask, key_lengths=key_lengths, query_lengths=query_lengths, is_causal=is_causal, window=window, diagonal=diagonal
        )
        _check_prepared(prepared, (batch, num_heads, seqlen_q, seqlen_k), device)
        attn_mask, window = prepared.bias, prepared.window
        is_causal, diagonal = False, "bottom_right" if prepared.bottom_right else prepared.diagonal
        key_mask, key_lengths, query_lengths = prepared.key_mask, prepared.key_lengths, prepared.query_lengths
    if attn_mask is not None:
        attn_mask = _checked_attn_mask(attn_mask, (batch, num_heads, seqlen_q, seqlen_k), device)
    if key_mask is not None:
        key_mask = _checked_tensor("key_mask", key_mask, device, (torch.bool,), ((batch, seqlen_k),), "(batch, seqlen_k)")
    if key_lengths is not None:
        key_lengths = _checked_lengths("key_lengths", key_lengths, device, batch)
    if query_lengths is not None:
        query_lengths = _checked_lengths("query_lengths", query_lengths, device, batch)
    if alibi_slopes is not None:
        shapes = ((num_heads,), (batch, num_heads))
        alibi_slopes = _checked_tensor("alibi_slopes", alibi_slopes, device, FLOAT_DTYPES, shapes, "(num_heads,) or (batch, num_heads)")
    if sinks is not None:
        sinks = with_contiguous_last_dim(_checked_tensor("sinks", sinks, device, FLOAT_DTYPES, ((num_heads,),), "(num_heads,)"))
    if quantized:
        key_scale, value_scale = (
            _checked_scales(name, scales, key) for name, scales in (("key_scale", key_scale), ("value_scale", value_scale))
        )
    window_left, window_right = _checked_window(window)
    offset, bottom_right = _checked_diagonal(diagonal, is_causal)
    dropout_p = _checked_dropout_p(dropout_p)
    problem = Problem(  # the fields in order: keywords would cost a microsecond
        layout,
        inputs,
        query,
        key,
        value,
        attn_mask,
        key_mask,
        key_lengths,
        query_lengths,
        alibi_slopes,
        sinks,
        _checked_rng_state(rng_state, dropout_p, device),
        cu_seqlens_q,
        cu_seqlens_k,
        None if prepared is None else saveable(prepared.mask_bits),
        None if prepared is None else saveable(prepared.row_tiles),
        key_scale,
        value_scale,
        None if prepared is None else saveable(prepared.mask_bits_transposed),
        None if prepared is None else saveable(prepared.column_tiles),
        _checked_scale(scale, head_dim, query.dtype),
        window_left,
        0 if is_causal else window_right,
        offset,
        bottom_right,
        _checked_softcap(softcap, query.dtype),
        dropout_p,
        torch.are_deterministic_algorithms_enabled() if deterministic is None else bool(deterministic),
        max_seqlen_q,
        max_seqlen_k,
        out_memory,
    )
    problem.inputs_number = inputs_number
    if prepared is not None and prepared.mask_bits_transposed is None and torch.is_grad_enabled() and problem.requires_grad():
        raise ValueError("attn_mask was prepared with gradients=False, but a gradient is asked for: leave gradients=True in prepare_mask")
    return problem


_PACKED_SHAPES = {"qkv": "(batch, seqlen, 3, num_heads, head_dim)", "kv": "(batch, seqlen_k, 2, num_heads, head_dim)"}


MAX_ACCEPTED = 4096
# A number for each description of inputs that passed _check_inputs, which costs more than a small launch. Later lookups use the number,
# which is cheaper to hash than the description. Numbers are never reused.
_accepted: dict[tuple | None, int] = {}
_numbers = itertools.count(1)


def _checked_inputs(layout: Layout, inputs: tuple[Tensor, ...], quantized: bool) -> tuple[tuple[Tensor, ...], int | None]:
    """Returns the inputs, copied if the last dim is not contiguous, and their number. quantized: keys and values are 8-bit numbers."""
    description = _description(layout, inputs, quantized)
    number = _accepted.get(description)
    if number is not None:
        return inputs, number
    checked = _check_inputs(layout, inputs, quantized)
    if description is None or not all(map(operator.is_, checked, inputs)):
        return checked, None
    if len(_accepted) >= MAX_ACCEPTED:
        _accepted.clear()
    return inputs, _accepted.setdefault(description, next(_numbers))


def _description(layout: Layout, inputs: tuple[Tensor, ...], quantized: bool) -> tuple | None:
    """Everything _check_inputs looks at; None if an input may not be one fixed, dense tensor."""
    if torch.compiler.is_compiling():
        return None
    for tensor in inputs:
        if (type(tensor) is not Tensor and type(tensor) is not Parameter) or tensor.layout is not torch.strided or tensor.is_nested:
            return None
    return (layout, quantized, *[(tensor.dtype, tensor.device, tensor.shape, tensor.stride()) for tensor in inputs])


def _check_inputs(layout: Layout, inputs: tuple[Tensor, ...], quantized: bool) -> tuple[Tensor, ...]:
    names = tuple(INPUTS[layout])
    dims, shape_words = (3, "(num_tokens, num_heads, head_dim)") if layout == "varlen" else (4, "(batch, num_heads, seqlen, head_dim)")
    first = inputs[0]
    for name, tensor in zip(names, inputs, strict=True):
        check_dense(name, tensor)
        _check_dtype(name, tensor.dtype, quantized and name != "query")
        leader = "key" if quantized and name == "value" else name if quantized else names[0]
        if tensor.dtype != (wanted := inputs[names.index(leader)].dtype):
            raise TypeError(f"{name} must have the dtype of {leader}, {wanted}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {names[0]}, {first.device}, got {tensor.device}")
        if name in _PACKED_SHAPES:
            if tensor.dim() != 5 or tensor.shape[2] != len(name):
                raise ValueError(f"{name} must have shape {_PACKED_SHAPES[name]}, got {tuple(tensor.shape)}")
        elif tensor.dim() != dims:
            raise ValueError(f"{name} must have shape {shape_words}, got {tuple(tensor.shape)}")
    inputs = tuple(with_contiguous_last_dim(tensor) for tensor in inputs)
    query, key, value = split(layout, inputs)
    if query.shape[3] == 0 or value.shape[3] == 0:
        raise ValueError(f"head_dim must be at least 1, got query {tuple(query.shape)} and value {tuple(value.shape)}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have the head_dim of query, {query.shape[3]}, got {key.shape[3]}")
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have the batch size of query, {query.shape[0]}, got {key.shape[0]}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must have the batch, heads and length of key, {tuple(key.shape[:3])}, got {tuple(value.shape[:3])}")
    num_heads, num_heads_kv = query.shape[1], key.shape[1]
    if num_heads != num_heads_kv and (num_heads_kv == 0 or num_heads % num_heads_kv != 0):
        raise ValueError(f"the {num_heads} heads of query must be a multiple of the {num_heads_kv} heads of key and value")
    return inputs


def _check_dtype(name: str, dtype: torch.dtype, quantized: bool) -> None:
    """quantized: the tensor holds 8-bit numbers."""
    if quantized and dtype not in CACHE_DTYPES:
        raise TypeError(f"{name} must be int8, float8_e4m3fn or float8_e5m2 beside key_scale and value_scale, got {dtype}")
    if not quantized and dtype not in FLOAT_DTYPES:
        hint = ": 8-bit keys and values are for attention_decode, with key_scale and value_scale" if dtype in CACHE_DTYPES else ""
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {dtype}{hint}")


def _checked_scales(name: str, scales: Tensor | None, key: Tensor) -> Tensor:
    """key: (B, Hkv, Lk, D), the 8-bit keys."""
    check_dense(name, scales)  # type: ignore[arg-type]  # None is refused by name
    assert scales is not None
    batch, num_heads, seqlen_k, _ = key.shape
    blocks = scales.shape[2] if scales.dim() == 3 else 0
    fits = scales.dim() == 3 and (seqlen_k == 0 if blocks == 0 else seqlen_k % blocks == 0)
    if not fits:
        raise ValueError(
            f"{name} must have shape (batch, num_heads_kv, blocks), the same number of the {seqlen_k} tokens in each block, "
            f"got {tuple(scales.shape)}"
        )
    shape = batch, num_heads, blocks
    return _checked_tensor(name, scales, key.device, (torch.float32,), (shape,), "(batch, num_heads_kv, blocks)")


def check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one, ' if tensor.is_nested else ''}layout {tensor.layout}")
    if type(tensor) is not Tensor and type(tensor) is not Parameter and _overrides_functions(type(tensor)):
        raise TypeError(f"{name} must be a plain tensor, got a {type(tensor).__name__}, which has its own idea of torch's functions")


def _overrides_functions(kind: type[Tensor]) -> bool:
    """Whether tensors of this type intercept calls of torch's functions, so that their memory may not hold their values."""
    if kind.__torch_function__ is Parameter.__torch_function__ or not is_torch_function_enabled():
        return False
    return getattr(kind.__torch_function__, "__func__", None) is not Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def causal_bias(mask: object) -> Literal["top_left", "bottom_right"] | None:
    """The diagonal that a torch.nn.attention.bias.CausalBias, which holds no values, stands for; None for anything else."""
    kind = type(mask)
    if kind is Tensor or kind.__name__ != "CausalBias" or kind.__module__ != "torch.nn.attention.bias":
        return None
    if mask.variant.name == "UPPER_LEFT" or mask.seq_len_q == mask.seq_len_kv:  # type: ignore[attr-defined]
        return "top_left"
    return "bottom_right"


def _checked_tensor(
    name: str,
    tensor: Tensor,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    shapes: tuple[tuple[int, ...], ...],
    shape_words: str,
) -> Tensor:
    check_dense(name, tensor)
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of query, {device}, got {tensor.device}")
    if not any(_same_shape(tensor.shape, shape) for shape in shapes):
        allowed = " or ".join(str(tuple(int(n) for n in shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {shape_words} = {allowed}, got {tuple(tensor.shape)}")
    return saveable(tensor)


def saveable(tensor: MaybeTensor) -> MaybeTensor:
    """Copies a tensor made under torch.inference_mode if a backward pass may need it: autograd cannot save such tensors, because they
    have no version counter. Returns anything else unchanged.
    """
    if tensor is None or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return without_repetition(tensor).clone().expand(tensor.shape)


def _same_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Compares number by number: torch.compile cannot compare tuples that hold symbols."""
    return len(shape) == len(expected) and all(size == wanted for size, wanted in zip(shape, expected, strict=True))


def _checked_lengths(name: str, lengths: Tensor, device: torch.device, batch: int) -> Tensor:
    return _as_int32(_checked_tensor(name, lengths, device, (torch.int32, torch.int64), ((batch,),), "(batch,)"))


def _as_int32(lengths: Tensor) -> Tensor:
    if lengths.dtype is torch.int64:
        limits = torch.iinfo(torch.int32)
        lengths = lengths.clamp(limits.min, limits.max).to(torch.int32)  # not wrapped: 2**32 is long, not 0
    return lengths.contiguous()


def _checked_cu_seqlens(name: str, cu_seqlens: Tensor | None, device: torch.device, length: int | None = None) -> Tensor:
    """length: the required number of entries, that of the queries; None = any number, at least 1."""
    check_dense(name, cu_seqlens)  # type: ignore[arg-type]  # None is refused by name
    assert cu_seqlens is not None
    if length is None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"{name} must have shape (batch + 1,), got {tuple(cu_seqlens.shape)}")
        length = cu_seqlens.shape[0]
    return _as_int32(_checked_tensor(name, cu_seqlens, device, (torch.int32, torch.int64), ((length,),), "(batch + 1,)"))


MAX_WASTE = 4  # rows that a length bound may imply, per token


def _longest(name: str, given: int | Tensor | None, cu_seqlens: Tensor, num_tokens: int) -> int:
    """The length bound that determines costs: at most the number of tokens, and close to the longest sequence if that can be read."""
    least = min if torch.compiler.is_dynamo_compiling() else torch.sym_min  # Dynamo turns min into sym_min, but not for plain numbers
    bound = num_tokens if given is None else least(checked_seqlen(name, given), num_tokens)
    if torch.compiler.is_compiling() or (cu_seqlens.shape[0] - 1) * bound <= MAX_WASTE * num_tokens or not _is_readable(cu_seqlens):
        return bound
    return min(bound, int(cu_seqlens.diff().max().clamp(min=0)))


def _is_readable(tensor: Tensor) -> bool:
    """Whether eager Python may read the values without waiting for a GPU."""
    if type(tensor) is not Tensor or tensor.device.type != "cpu":
        return False
    return num_dispatch_modes() == 0 and not is_functorch_tensor(tensor)


def is_integer(value: object) -> bool:
    """Whether it is an int of Python, NumPy or torch (SymInt, or a 0-dim integer tensor); a bool does not count."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype is not torch.bool and not value.is_floating_point() and not value.is_complex()
    return not isinstance(value, bool) and isinstance(value, (int, torch.SymInt, numbers.Integral))


def as_int(integer: Any) -> int:
    """Something that is_integer as a Python int, or the SymInt it is; a tensor is read."""
    return integer if isinstance(integer, (int, torch.SymInt)) else int(integer)  # type: ignore[return-value]  # a SymInt passes for one


def checked_integer(name: str, value: Any) -> int:
    if not is_integer(value):
        given = f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int, got {given}")
    return as_int(value)


def checked_seqlen(name: str, seqlen: int | Tensor | None) -> int:
    seqlen = checked_integer(name, seqlen)
    if holds(seqlen < 0):
        raise ValueError(f"{name} must be >= 0, got {seqlen}")
    return seqlen


def check_no_padding(what: str, **arguments: object) -> None:
    for name, argument in arguments.items():
        if argument is not None:
            raise ValueError(f"{name} must be None for {what}, whose offsets say where each sequence starts and ends")


def _checked_causal_bias(mask: Any, is_causal: bool | str, seqlen_q: int, seqlen_k: int) -> str:
    """The is_causal argument that a CausalBias stands for."""
    bias = causal_bias(mask)
    assert bias is not None
    if is_causal is not False:
        raise ValueError("is_causal must not be given beside an attn_mask that is a CausalBias")
    if bias == "bottom_right" and (mask.seq_len_q, mask.seq_len_kv) != (seqlen_q, seqlen_k):
        sizes = f"{mask.seq_len_q} queries and {mask.seq_len_kv} keys"
        raise ValueError(f"attn_mask is a CausalBias of {sizes}, but there are {seqlen_q} and {seqlen_k}")
    return bias


def _check_prepared(mask: object, full_shape: tuple[int, int, int, int], device: torch.device) -> None:
    if not isinstance(mask, PreparedMask):
        raise TypeError(f"attn_mask must be a torch.Tensor or a PreparedMask, got {type(mask).__name__}")
    if mask.mask_bits.device != device:
        raise ValueError(f"attn_mask must be on the device of query, {device}, got {mask.mask_bits.device}: PreparedMask.to moves it")
    fits = all(size == full or (size == 1 and dim < 2) for dim, (size, full) in enumerate(zip(mask.shape, full_shape, strict=True)))
    if not fits:
        raise ValueError(
            "attn_mask must have been prepared for (1 or batch, 1 or num_heads, seqlen_q, seqlen_k) of "
            f"{tuple(int(n) for n in full_shape)}, it is for {mask.shape}"
        )


def _check_nothing_beside(**masks: object) -> None:
    for name, argument in masks.items():
        if argument is not None and argument is not False:
            raise ValueError(f"{name} must not be given beside a PreparedMask: give it to prepare_mask")


def _checked_attn_mask(mask: Tensor, full_shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    check_dense("attn_mask", mask)
    if mask.dtype is not torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"attn_mask must be bool (True = may attend) or floating point (added to the scores), got {mask.dtype}")
    if mask.device != device:
        raise ValueError(f"attn_mask must be on the device of query, {device}, got {mask.device}")
    if mask.dim() == 3:
        raise ValueError(
            f"attn_mask with 3 dims {tuple(mask.shape)} is ambiguous: write attn_mask[:, None] for one mask per batch element, "
            "attn_mask[None] for one per head"
        )
    if mask.dim() == 2:
        mask = mask[None, None]
    if mask.dim() != 4 or not all(size == full or size == 1 for size, full in zip(mask.shape, full_shape, strict=True)):
        raise ValueError(
            "attn_mask must have shape (seqlen_q, seqlen_k), or 4 dims that broadcast to (batch, num_heads, seqlen_q, seqlen_k) = "
            f"{tuple(int(n) for n in full_shape)}, got {tuple(mask.shape)}"
        )
    return saveable(mask)


def _checked_number(name: str, given: float | Tensor) -> float:
    value = as_number(name, given)
    if not -math.inf < value < math.inf:  # not math.isfinite: torch.compile may hold the number as a symbol
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def as_number(name: str, given: float | Tensor) -> float:
    """Accepts a Python or NumPy number, or a 0-dim tensor without a gradient, which is read."""
    if type(given) is float:
        return given
    if isinstance(given, Tensor):
        if given.dim() != 0 or given.dtype is torch.bool or given.is_complex():
            raise TypeError(f"{name} must be a number, got a tensor of shape {tuple(given.shape)} and dtype {given.dtype}")
        if given.requires_grad:
            raise TypeError(f"{name} has no gradient, but the tensor given for it requires one")
        given = given.item()
    elif isinstance(given, bool) or not isinstance(given, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(given).__name__}")
    return float(given)


def _checked_scale(scale: float | Tensor | None, head_dim: int, dtype: torch.dtype) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    scale = _checked_number("scale", scale)
    _check_representable("scale", abs(scale), 0.0, dtype)
    return scale


def _checked_softcap(softcap: float | Tensor | None, dtype: torch.dtype) -> float | None:
    if softcap is None:
        return None
    softcap = _checked_number("softcap", softcap)
    if softcap <= 0:
        raise ValueError(f"softcap must be > 0, got {softcap}")
    _check_representable("softcap", softcap, FLOAT32.tiny, dtype)
    return softcap


def _checked_dropout_p(dropout_p: float | Tensor) -> float:
    dropout_p = _checked_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    return dropout_p


def _check_representable(name: str, size: float, smallest: float, dtype: torch.dtype) -> None:
    if dtype is not torch.float64 and not smallest <= size <= FLOAT32.max:
        raise ValueError(f"the size of {name} must be in [{smallest:.3g}, {FLOAT32.max:.3g}] where scores are float32, got {size}")


def _checked_window(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right), got {window!r}")
    for name, side in zip(("left", "right"), window, strict=True):
        if side is not None and (not is_integer(side) or side < 0):
            raise ValueError(f"window {name} must be None (unlimited) or an int >= 0, got {side!r}")
    left, right = (None if side is None else as_int(side) for side in window)
    return left, right


def _checked_diagonal(diagonal: int | str | None, is_causal: bool | str) -> tuple[int, bool]:
    """Returns the diagonal's offset, and whether it counts from the bottom right."""
    if not isinstance(is_causal, bool):
        if is_causal != "top_left" and is_causal != "bottom_right":
            raise ValueError(f"is_causal must be False, True, 'top_left' or 'bottom_right', got {is_causal!r}")
        if diagonal is not None and diagonal != is_causal:
            raise ValueError(f"diagonal must be None beside is_causal={is_causal!r}, which says where it runs, got {diagonal!r}")
        diagonal = is_causal
    if diagonal is None:
        return 0, False
    if isinstance(diagonal, str):
        if diagonal not in ("top_left", "bottom_right"):
            raise ValueError(f"diagonal must be None, 'top_left', 'bottom_right' or an int, got {diagonal!r}")
        return 0, diagonal == "bottom_right"
    offset = checked_integer("diagonal", diagonal)
    if holds(offset < -MAX_DIAGONAL) or holds(offset > MAX_DIAGONAL):
        raise ValueError(f"diagonal must be in [-2^29, 2^29], got {offset}")
    return offset, False


def _checked_rng_state(rng_state: Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    if rng_state is not None:
        rng_state = _checked_tensor("rng_state", rng_state, device, (torch.int64,), ((2,),), "(2,)").contiguous()
    if not 0.0 < dropout_p < 1.0:
        return None
    if rng_state is None:
        return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)  # torch.compile does not take Tensor.random_
    return rng_state
