"""One attention call as data: its tensors and numbers, and the memory layout of its results. `checks.py` makes it.

The fields of Problem are the single table of arguments. The operators' schemas, which tensors have a gradient, how a sharded call is split,
and the order in which the compiled extension takes addresses are derived from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

Layout = Literal["separate", "qkv", "kv", "varlen"]
# Memory layout of (B, H, L, D) results: one in which merging the heads is free, that of the query, or contiguous.
OutMemory = Literal["heads merged", "like query", "contiguous"]

Mark = TypeVar("Mark")
OptionalTensors = tuple[Tensor | None, ...]  # as in Problem.optional_tensors
Results = tuple[Tensor, Tensor, Tensor | None]  # out, lse and out_error
# What a backward operator takes first, with the schema types.
SAVED = {"dout": "Tensor", "dlse": "Tensor?", "out": "Tensor", "lse": "Tensor", "out_error": "Tensor?"}

KERNEL_NUMBERS = (2.0**-60, 2.0**20)  # the smallest and largest scale and softcap that kernels take


class TensorArgument(NamedTuple):
    """A tensor that a call may have besides query, key and value."""

    shape: str  # B sequences, Hq query heads, Hkv key heads, Lq queries, Lk keys
    dtype: str
    batch: int | None = None  # the dim that is split if the call is sharded over the batch; size 1 stands for all
    heads: int | None = None  # likewise for heads
    differentiable: bool = False
    in_extension: bool = True  # the compiled extension takes its address on every call; arguments without one come last


class Option(NamedTuple):
    """An argument that is not a tensor."""

    schema: str  # its type in torch's schemas of operators


@dataclass(slots=True)
class Problem:
    """One attention call. `inputs` are the tensors that autograd sees; `query`, `key` and `value` are views of them."""

    layout: Layout  # which tensors `inputs` holds: separate and varlen (query, key, value), qkv (qkv,), kv (query, kv)
    inputs: tuple[Tensor, ...]  # varlen: (T, H, D), sequences one after another; query, key and value then have batch 1
    query: Tensor  # (B, Hq, Lq, Dqk)
    key: Tensor  # (B, Hkv, Lk, Dqk)
    value: Tensor  # (B, Hkv, Lk, Dv)

    # bool: True = may attend; float: added to the scores
    attn_mask: Annotated[
        Tensor | None, TensorArgument("(B or 1, Hq or 1, Lq or 1, Lk or 1)", "bool or float", batch=0, heads=1, differentiable=True)
    ]
    key_mask: Annotated[Tensor | None, TensorArgument("(B, Lk)", "bool", batch=0)]
    key_lengths: Annotated[Tensor | None, TensorArgument("(B,)", "int32", batch=0)]
    query_lengths: Annotated[Tensor | None, TensorArgument("(B,)", "int32", batch=0)]
    alibi_slopes: Annotated[Tensor | None, TensorArgument("(Hq,) or (B, Hq)", "float", batch=0, heads=1, differentiable=True)]
    sinks: Annotated[Tensor | None, TensorArgument("(Hq,)", "float", heads=0, differentiable=True)]
    rng_state: Annotated[Tensor | None, TensorArgument("(2,)", "int64")]  # seed and offset of the dropout generator; None without dropout
    # Varlen only: the start of each sequence, then the end of the last one.
    cu_seqlens_q: Annotated[Tensor | None, TensorArgument("(B + 1,)", "int32")]
    cu_seqlens_k: Annotated[Tensor | None, TensorArgument("(B + 1,)", "int32")]
    # The tensors of a PreparedMask; the backward's, further down, are None if it was prepared without gradients.
    mask_bits: Annotated[Tensor | None, TensorArgument("(B or 1, Hq or 1, Lq, ceil(Lk / 32))", "int32", batch=0, heads=1)]
    row_tiles: Annotated[Tensor | None, TensorArgument("(B or 1, Hq or 1, ceil(Lq / 64), 2 + ceil(Lk / 64))", "int32", batch=0, heads=1)]
    # Of keys and values that are 8-bit numbers (quantized.py): a factor for each block of tokens.
    key_scale: Annotated[Tensor | None, TensorArgument("(B, Hkv, divisor of Lk)", "float32", batch=0, heads=1)]
    value_scale: Annotated[Tensor | None, TensorArgument("(B, Hkv, divisor of Lk)", "float32", batch=0, heads=1)]
    # The backward's tensors of a PreparedMask.
    mask_bits_transposed: Annotated[
        Tensor | None, TensorArgument("(B or 1, Hq or 1, Lk, ceil(Lq / 32))", "int32", batch=0, heads=1, in_extension=False)
    ]
    column_tiles: Annotated[
        Tensor | None, TensorArgument("(B or 1, Hq or 1, ceil(Lk / 64), 2 + ceil(Lq / 64))", "int32", batch=0, heads=1, in_extension=False)
    ]

    scale: Annotated[float, Option("float")]
    window_left: Annotated[int | None, Option("int?")]  # keys visible to the left of the diagonal; None = unlimited
    window_right: Annotated[int | None, Option("int?")]  # 0 for a causal call
    diagonal: Annotated[int, Option("SymInt")]  # the diagonal is j = i + this,
    bottom_right: Annotated[bool, Option("bool")]  # plus (keys present - queries present) per sequence
    softcap: Annotated[float | None, Option("float?")]
    dropout_p: Annotated[float, Option("float")]
    deterministic: Annotated[bool, Option("bool")]
    max_seqlen_q: Annotated[int, Option("SymInt")]  # Lq; for varlen, a bound: no sequence is longer
    max_seqlen_k: Annotated[int, Option("SymInt")]
    out_memory: Annotated[OutMemory, Option("str")]
    keeps_out_error: Annotated[bool, Option("bool")] = False  # whether the forward also returns out_error; ops.run decides

    # Equal for inputs with equal dtypes, devices, shapes and strides; None if those are not plain numbers.
    inputs_number: int | None = field(default=None, init=False)

    @property
    def batch(self) -> int:
        """The number of sequences, B."""
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The inputs, then the optional tensors that can have a gradient."""
        return (*self.inputs, self.attn_mask, self.alibi_slopes, self.sinks)

    def requires_grad(self) -> bool:
        """Whether any differentiable tensor requires a gradient."""
        return any([tensor.requires_grad for tensor in self.differentiable() if tensor is not None])  # a list: twice as fast as a generator

    def prepared_pairs(self) -> Tensor | None:
        """(B or 1, Hq or 1, Lq, Lk) bool: which query may attend to which key according to the PreparedMask; None without one."""
        return None if self.mask_bits is None else unpack_bits(self.mask_bits, self.key.shape[2])

    def op_arguments(self) -> tuple:
        """The arguments of the registered op of this layout, in the order of its schema."""
        return (*self.inputs, *self.optional_tensors(), *self.options())

    def optional_tensors(self) -> OptionalTensors:
        """The tensors in the order of TENSORS, written out because that is fast and can be traced."""
        return (
            self.attn_mask, self.key_mask, self.key_lengths, self.query_lengths, self.alibi_slopes, self.sinks, self.rng_state,
            self.cu_seqlens_q, self.cu_seqlens_k, self.mask_bits, self.row_tiles, self.key_scale, self.value_scale,
            self.mask_bits_transposed, self.column_tiles,
        )  # fmt: skip

    def options(self) -> tuple:
        """The options in the order of OPTIONS."""
        return (
            self.scale, self.window_left, self.window_right, self.diagonal, self.bottom_right, self.softcap, self.dropout_p,
            self.deterministic, self.max_seqlen_q, self.max_seqlen_k, self.out_memory, self.keeps_out_error,
        )  # fmt: skip

    def kind(self) -> tuple:
        """Equal for problems that differ only in their tensors' memory."""
        inputs = self.inputs_number or tuple([(tensor.dtype, tensor.device, tensor.shape, tensor.stride()) for tensor in self.inputs])
        optional = [None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride()) for tensor in self.optional_tensors()]
        return (self.layout, inputs, *optional, *self.options())

    @classmethod
    def from_op_arguments(cls, layout: Layout, arguments: tuple) -> Problem:
        """The inverse of `op_arguments`. The arguments were checked when the problem was first made."""
        num_inputs = NUM_INPUTS[layout]
        inputs = arguments[:num_inputs]
        return cls(layout, inputs, *split(layout, inputs), *arguments[num_inputs:])

    def with_copied_inputs(self) -> Problem:
        """The problem with contiguous copies of its inputs, each at the start of an allocation."""
        inputs = tuple([tensor.clone(memory_format=torch.contiguous_format) for tensor in self.inputs])
        return Problem.from_op_arguments(self.layout, (*inputs, *self.optional_tensors(), *self.options()))


def _fields_marked(mark: type[Mark]) -> dict[str, Mark]:
    hints = get_type_hints(Problem, include_extras=True)
    marks = {name: next(iter(getattr(hint, "__metadata__", ())), None) for name, hint in hints.items()}
    return {name: found for name, found in marks.items() if isinstance(found, mark)}


TENSORS, OPTIONS = _fields_marked(TensorArgument), _fields_marked(Option)
PLACE = {name: place for place, name in enumerate(TENSORS)}  # index in optional_tensors()
DIFFERENTIABLE = {name: PLACE[name] for name, tensor in TENSORS.items() if tensor.differentiable}
NO_OPTIONAL_TENSORS: OptionalTensors = (None,) * len(TENSORS)
# The inputs of each layout, with their batch and head dims.
INPUTS: dict[Layout, dict[str, tuple[int | None, int]]] = {
    "separate": {"query": (0, 1), "key": (0, 1), "value": (0, 1)},
    "qkv": {"qkv": (0, 3)},
    "kv": {"query": (0, 1), "kv": (0, 3)},
    "varlen": {"query": (None, 1), "key": (None, 1), "value": (None, 1)},
}
NUM_INPUTS: dict[Layout, int] = {layout: len(inputs) for layout, inputs in INPUTS.items()}


@dataclass(slots=True)
class Gradients:
    """What a backward pass writes: tensors or views shaped like the problem's, with a contiguous last dim; None = not wanted."""

    query: Tensor  # (B, Hq, Lq, Dqk)
    key: Tensor  # (B, Hkv, Lk, Dqk)
    value: Tensor  # (B, Hkv, Lk, Dv)
    attn_mask: Tensor | None = None  # contiguous, with the mask's own shape and dtype, including broadcast dims
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class PreparedMask:
    """What `prepare_mask` returns, for `attn_mask` of the attention functions. B' is 1 or B, H' 1 or Hq."""

    bias: Tensor | None  # the float attn_mask, 4-D
    key_mask: Tensor | None  # (B, Lk) bool
    key_lengths: Tensor | None  # (B,) int32
    query_lengths: Tensor | None  # (B,) int32
    window: tuple[int | None, int | None]  # if causal, the right side is 0
    diagonal: int  # as in Problem
    bottom_right: bool
    shape: tuple[int, int, int, int]  # (B', H', Lq, Lk)
    mask_bits: Tensor  # (B', H', Lq, ceil(Lk / 32)) int32: bit j % 32 of word j // 32 is 1 if the query may attend to key j
    mask_bits_transposed: Tensor | None  # (B', H', Lk, ceil(Lq / 32)) int32; None without gradients, like column_tiles
    row_tiles: Tensor  # (B', H', ceil(Lq / 64), 2 + ceil(Lk / 64)) int32: see prepared_mask.tile_lists
    column_tiles: Tensor | None  # (B', H', ceil(Lk / 64), 2 + ceil(Lq / 64)) int32

    def __repr__(self) -> str:
        gradients = self.mask_bits_transposed is not None
        return f"PreparedMask(shape={self.shape}, bias={self.bias is not None}, gradients={gradients}, device='{self.mask_bits.device}')"

    def to(self, device: torch.device | str) -> PreparedMask:
        """The same mask with its tensors on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def unpack(self) -> Tensor:
        """(B', H', Lq, Lk) bool: which query may attend to which key."""
        return unpack_bits(self.mask_bits, self.shape[3])


def split(layout: Layout, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The (B, H, L, D) query, key and value views of a layout's tensors, or of their gradients."""
    if layout == "separate":
        query, key, value = inputs
        return query, key, value
    if layout == "qkv":
        query, key, value = inputs[0].permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value
    if layout == "varlen":
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in inputs)
        return query, key, value
    key, value = inputs[1].permute(2, 0, 3, 1, 4).unbind(0)
    return inputs[0], key, value


def unpack_bits(bits: Tensor, length: int) -> Tensor:
    """(..., ceil(length / 32)) int32 -> (..., length) bool: bit i % 32 of word i // 32."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).bool().flatten(-2)[..., :length]


def empty_output(problem: Problem) -> Tensor:
    """Uninitialized (B, Hq, Lq, Dv) output, in the memory layout the problem asks for."""
    query = problem.query
    shape = (*query.shape[:3], problem.value.shape[3])
    strides, stride = [0, 0, 0, 1], shape[3]
    for dim in reversed(_order(problem)):
        strides[dim] = stride
        stride = stride * shape[dim]
    return query.new_empty_strided(shape, tuple(strides))


def empty_lse(query: Tensor) -> Tensor:
    """Uninitialized (B, Hq, Lq) float32."""
    batch, num_heads, seqlen_q, _ = query.shape
    # Tuples and strides: torch takes a quarter longer to parse the arguments of torch.empty, and even longer for a torch.Size.
    return query.new_empty_strided((batch, num_heads, seqlen_q), (num_heads * seqlen_q, seqlen_q, 1), dtype=torch.float32)


def in_output_memory(problem: Problem, out: Tensor) -> Tensor:
    """`out` in the memory layout of `empty_output`."""
    order = _order(problem)
    back = [order.index(dim) for dim in range(3)]
    return out.permute(*order, 3).contiguous().permute(*back, 3)


def _order(problem: Problem) -> tuple[int, ...]:
    """The batch, head and row dims of the output, longest stride first."""
    strides = problem.query.stride()
    if problem.out_memory == "heads merged":
        is_sequence_first = holds(strides[0] < strides[2]) and strides[0] > 0 and problem.query.shape[0] > 1
        return (2, 0, 1) if is_sequence_first else (0, 2, 1)
    order = [0, 1, 2]
    if problem.out_memory == "like query":
        for i in (0, 1, 0):  # swap neighbors in the wrong order; an expanded dim, whose stride says nothing, stays
            if holds(strides[order[i]] < strides[order[i + 1]]) and strides[order[i]] > 0:
                order[i], order[i + 1] = order[i + 1], order[i]
    return tuple(order)


def holds(condition: bool) -> bool:
    """A condition on sizes; False if torch.compile is tracing and it depends on tensor values."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # lazy: only torch.compile is sure to have imported it

    return guard_or_false(condition)


def with_contiguous_last_dim(tensor: Tensor) -> Tensor:
    return tensor if has_contiguous_last_dim(tensor) else tensor.contiguous()


def has_contiguous_last_dim(tensor: Tensor) -> bool:
    return tensor.shape[-1] == 1 or tensor.stride(-1) == 1


def strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """The first `dims` strides, with 0 for dims of size 1, which broadcast."""
    if tensor is None:
        return (0,) * dims
    return tuple([0 if size == 1 else stride for size, stride in zip(tensor.shape[:dims], tensor.stride()[:dims], strict=True)])


def without_repetition(tensor: Tensor) -> Tensor:
    """The tensor with its expanded dims back at size 1."""
    return tensor[tuple([slice(1) if stride == 0 else slice(None) for stride in tensor.stride()])]


def uncovered_numbers(problem: Problem) -> list[str]:
    """Why no kernel takes the scale or the softcap, if it is out of range.

    Kernels keep them, their product with log2(e) and their quotient in float32, and find a row's maximum before scaling.
    """
    smallest, largest = KERNEL_NUMBERS
    reasons = []
    if not smallest <= problem.scale <= largest:
        reasons.append(f"scale must be in [2^-60, 2^20], is {problem.scale}")
    if problem.softcap is not None and not smallest <= problem.softcap <= largest:
        reasons.append(f"softcap must be in [2^-60, 2^20], is {problem.softcap}")
    return reasons
