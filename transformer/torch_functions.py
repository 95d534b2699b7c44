"""torch's attention functions on the fused kernels, for code that calls them and that nobody edits.

Method: a TorchFunctionMode. Modes belong to a thread, nest, end with their context whatever was raised in it, and reach the threads that
autograd runs backward passes in. torch.compile knows them: it compiles once with the mode and once without. No function of torch is
replaced, so it does not matter how a module imported scaled_dot_product_attention, or when.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..kernels.scaled_dot_product_attention import scaled_dot_product_attention
from ..kernels.torch_internals import tracing_state
from .attention import MultiHeadAttention, allow_bypass, prevent_bypass


class _Parameters:
    """What MultiHeadAttention's forward reads of its module, from the arguments of a call."""

    batch_first = False
    forward: ClassVar[Any] = MultiHeadAttention.forward
    _project: ClassVar[Any] = MultiHeadAttention._project
    _separate_projections: ClassVar[Any] = MultiHeadAttention._separate_projections
    _num_extra_keys: ClassVar[Any] = MultiHeadAttention._num_extra_keys
    _append_keys: ClassVar[Any] = MultiHeadAttention._append_keys

    def __init__(self, **parameters: Any) -> None:
        for name, value in parameters.items():  # torch.compile of torch 2.10 cannot trace self.__dict__.update
            setattr(self, name, value)


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: None = None,
    static_v: None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.functional.multi_head_attention_forward as MultiHeadAttention computes it: sequence first, True = blocked.

    Shapes, results and errors are those of `MultiHeadAttention.forward`, the attention weights included.

    Raises:
        AssertionError: embed_dim_to_check is not a multiple of num_heads; only one of bias_k and bias_v is given.
    """
    if embed_dim_to_check % num_heads:
        raise AssertionError(f"embed_dim {embed_dim_to_check} not divisible by num_heads {num_heads}")
    if (bias_k is None) != (bias_v is None):
        raise AssertionError("bias_k and bias_v must be set together")
    parameters = _Parameters(
        embed_dim=embed_dim_to_check,
        num_heads=num_heads,
        head_dim=embed_dim_to_check // num_heads,
        in_proj_weight=None if use_separate_proj_weight else in_proj_weight,
        in_proj_bias=in_proj_bias,
        q_proj_weight=q_proj_weight,
        k_proj_weight=k_proj_weight,
        v_proj_weight=v_proj_weight,
        bias_k=bias_k,
        bias_v=bias_v,
        add_zero_attn=add_zero_attn,
        dropout=dropout_p,
        training=training,
        out_proj=functools.partial(F.linear, weight=out_proj_weight, bias=out_proj_bias),
    )
    return parameters.forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)


def _copy(function: Any, **names: Any) -> Callable[..., Any]:
    """A copy of a Python function that sees other objects under these global names."""
    known = {**function.__globals__, **names}
    del known["__name__"]  # torch.compile would look names up in the module instead
    copy = FunctionType(function.__code__, known, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# torch hands these functions to the mode and runs them outside of it, so the mode would not see the calls that they make. The copies do not
# look for modes again.
_NO_MODES = {"has_torch_function": lambda _: False, "has_torch_function_unary": lambda _: False}
_TORCHS_MULTI_HEAD_ATTENTION = F.multi_head_attention_forward
_WITH_OUR_ATTENTION = _copy(_TORCHS_MULTI_HEAD_ATTENTION, scaled_dot_product_attention=scaled_dot_product_attention, **_NO_MODES)
_BACKWARD = {  # they may run a checkpoint's forward pass
    function: _copy(function, **_NO_MODES) for function in (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
}
_TORCHS_ATTENTION: Callable[..., Tensor] = F.scaled_dot_product_attention


class fused_sdpa(TorchFunctionMode):
    """While the context is open, torch.nn.functional's attention functions run on the fused kernels in this thread.

        with fused_sdpa():
            loss = model(x).sum()
            loss.backward()

    Covered: calls by any name, also in modules that did `from torch.nn.functional import scaled_dot_product_attention` before;
    torch.nn.functional.multi_head_attention_forward, so also torch.nn.MultiheadAttention, with and without weights; functions compiled by
    torch.compile, which are compiled anew at the first call inside the context and once more for each depth of nesting. Other threads keep
    torch's functions.

    Numbers, ranks, broadcasting and errors are those of `fused_attention.scaled_dot_product_attention` and `MultiHeadAttention`: torch's,
    except that a query that may attend to nothing gets 0 from every key, never NaN.

    Not covered: what calls no Python function, such as programs of torch.jit and torch.export, or a torch.nn.TransformerEncoderLayer
    compiled in eval mode without gradients, which runs as one operator (`replace_attention` serves that one). A checkpoint of
    torch.utils.checkpoint runs its forward pass again in the backward pass, which must then be in the context too.

    While the context is open, each call of a torch function from Python takes about a microsecond longer, unless it is compiled.
    """

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _TORCHS_ATTENTION:
            func = scaled_dot_product_attention
        elif func is _TORCHS_MULTI_HEAD_ATTENTION and set(types) <= {Tensor}:  # no subclass has its own idea of the function
            static = kwargs.get("static_k") is not None or kwargs.get("static_v") is not None
            func = _WITH_OUR_ATTENTION if static or tracing_state() is not None else multi_head_attention_forward
        elif func in _BACKWARD and set(types) <= {Tensor}:
            with self:
                return _BACKWARD[func](*args, **kwargs)
        elif func is Tensor.unflatten and torch.compiler.is_compiling() and set(types) <= {Tensor}:
            return args[0].unflatten(*args[1:], **kwargs)  # torch.compile cannot trace the super() of Tensor.unflatten
        return func(*args, **kwargs)


class Serving:
    """Marks the classes of modules whose forward runs in `fused_sdpa`."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Names the module's own class, since pickle finds none that is made at run time."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        make, arguments, *state = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, arguments = _new_serving, (_served(arguments[0]), *arguments[1:])
        return make, arguments, *state


def start_serving(module: torch.nn.Module) -> None:
    """While its forward runs, the module's calls of torch's attention functions go to the fused kernels."""
    kind: Any = type(module)
    module.__class__ = _serving(kind)
    if isinstance(module, torch.nn.MultiheadAttention):
        prevent_bypass(module)


def stop_serving(module: torch.nn.Module) -> None:
    """Undoes `start_serving`."""
    module.__class__ = _served(module.__class__)
    if isinstance(module, torch.nn.MultiheadAttention):
        allow_bypass(module)


@functools.cache
def _serving(kind: Any) -> Any:
    is_attention = issubclass(kind, torch.nn.MultiheadAttention)

    @functools.wraps(kind.forward)
    def forward(self: torch.nn.Module, *args: Any, **options: Any) -> Any:
        if is_attention and any(isinstance(arg, Tensor) and arg.is_nested for arg in args):
            return kind.forward(self, *args, **options)  # of torch.nn.TransformerEncoder, refused by torch's attention in a mode
        with fused_sdpa():
            return kind.forward(self, *args, **options)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    make: Any = type(kind)
    return make(kind.__name__, (kind, Serving), {**names, "forward": forward})


def _served(serving: type) -> Any:
    kind, _ = serving.__bases__
    return kind


def _new_serving(kind: Any, *arguments: Any) -> torch.nn.Module:
    serving = _serving(kind)
    return serving.__new__(serving, *arguments)
