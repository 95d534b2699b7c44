"""The parameters of the Triton kernels: named groups of pointers, strides, sizes and constants.

Triton's launcher would type a stride in a tuple by its value, and recompile the kernel when that type changes. So `kernel` generates the
function that is launched. It takes every member of every group as a separate parameter, with the type given here, builds the groups and
calls the kernel, which the compiler inlines.
"""

# No postponed annotations: `kernel` reads the groups' annotations.

import inspect
import linecache
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_args

import triton
import triton.language as tl


class Kind(NamedTuple):
    """How Triton takes a parameter."""

    place: int  # pointers come first, then numbers, then constexprs
    type: str = ""  # if empty, Triton takes the type of the value, and compiles in a 1
    specialised: bool = True  # on being a multiple of 16


Pointer = Annotated[Any, Kind(0)]  # or None if absent, which is decided at compile time
Stride = Annotated[Any, Kind(1, "tl.int64")]  # tells Triton how wide a load may be
LooseStride = Annotated[Any, Kind(1, "tl.int64", specialised=False)]
LastStride = Annotated[Any, Kind(1)]  # of a last dim, usually 1
Size = Annotated[Any, Kind(1, "tl.int32", specialised=False)]
Number = Annotated[Any, Kind(1, "tl.float32")]
KINDS = {  # of a kernel's own parameters
    inspect.Parameter.empty: Pointer,
    tl.int64: Stride,
    tl.int32: Size,
    tl.float32: Number,
    tl.constexpr: Annotated[Any, Kind(2, "tl.constexpr")],
}


class Rows(NamedTuple):
    """A tensor (B, H, L, D), or packed sequences (H, T, D), whose last dim is contiguous."""

    data: Pointer
    stride_batch: Stride
    stride_head: Stride
    stride_row: Stride


class RowNumbers(NamedTuple):
    """A tensor (B, H, L) or (H, T) whose last dim is contiguous."""

    data: Pointer
    stride_batch: LooseStride
    stride_head: LooseStride


class AttnMask(NamedTuple):
    """A bool mask as bytes or a float mask, broadcastable to (B, H, Lq, Lk)."""

    data: Pointer
    stride_batch: Stride
    stride_head: Stride
    stride_row: Stride
    stride_key: LastStride
    IS_BOOL: tl.constexpr


class KeyMask(NamedTuple):
    """(B, Lk) bytes."""

    data: Pointer
    stride_batch: LooseStride
    stride_key: LastStride


class Slopes(NamedTuple):
    """(B or 1, H)."""

    data: Pointer
    stride_batch: LooseStride
    stride_head: LooseStride


class MaskBits(NamedTuple):
    """The bits of a PreparedMask: (B or 1, H or 1, Lq, ceil(Lk / 32)) int32, or the transposed ones."""

    data: Pointer
    stride_batch: LooseStride
    stride_head: LooseStride
    stride_line: LooseStride


class Tiles(NamedTuple):
    """row_tiles or column_tiles, see mask.py."""

    data: Pointer
    stride_batch: LooseStride
    stride_head: LooseStride
    stride_line: LooseStride
    num_tiles: Size  # that a line has room for


class Sizes(NamedTuple):
    """Sequence lengths: of the longest, of all packed ones together, and of each, (B,) or (B + 1,) int32."""

    query_lengths: Pointer
    key_lengths: Pointer
    cu_seqlens_q: Pointer
    cu_seqlens_k: Pointer
    seqlen_q: Size
    seqlen_k: Size
    num_tokens_q: Size
    num_tokens_k: Size
    num_heads: Size
    heads_per_group: Size


class Splits(NamedTuple):
    """The key splits in decoding: where the results of each are, and how many there are."""

    stride_out: Stride
    stride_lse: LooseStride
    count: Size


class Window(NamedTuple):
    """Key j is seen from row i if -left <= j - (i + diagonal) <= right."""

    left: Size
    right: Size
    diagonal: Size
    HAS_LEFT: tl.constexpr
    HAS_RIGHT: tl.constexpr
    BOTTOM_RIGHT: tl.constexpr  # the diagonal counts from the last row and key


class Scores(NamedTuple):
    """Score = scale * product, with scale in log2 units; or softcap * tanh(scale * product), with only softcap in log2 units."""

    scale: Number
    softcap: Number
    HAS_SOFTCAP: tl.constexpr


class Dropout(NamedTuple):
    rng_state: Pointer  # (2,) int64: seed and offset
    threshold: Size  # out of 65536


def kernel(function: Callable) -> Any:
    """triton.jit for a kernel whose parameters are groups and KINDS."""
    members: list[tuple[str, Kind]] = []
    groups = []  # the arguments of the kernel
    scope = {"tl": tl, "kernel": triton.jit(function), "__name__": function.__module__}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        group = parameter.annotation
        if hasattr(group, "_fields"):
            names = {member: f"{name}_{member}" for member in group._fields}
            members += [(names[member], _kind(group.__annotations__[member])) for member in group._fields]
            groups.append(f"{group.__name__}({', '.join(names.values())})")
            scope[group.__name__] = group
        else:
            members.append((name, _kind(group)))
            groups.append(name)
    members.sort(key=lambda member: member[1].place)
    parameters = [f"{name}: {kind.type}" if kind.type else name for name, kind in members]
    source = f"def {function.__name__}({', '.join(parameters)}):\n    kernel({', '.join(groups)})\n"
    file = f"<{function.__module__}.{function.__name__}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # Triton reads the source from here
    exec(compile(source, file, "exec"), scope)
    return triton.jit(scope[function.__name__], do_not_specialize=[name for name, kind in members if not kind.specialised])


def _kind(annotation: Any) -> Kind:
    return get_args(KINDS.get(annotation, annotation))[1]
