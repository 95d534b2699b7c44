"""torch.nn.functional.scaled_dot_product_attention on the fused kernels, for code that calls it and that nobody edits.

Method: a TorchFunctionMode. Modes belong to a thread, nest, end with their context whatever was raised in it, and reach the threads that
autograd runs backward passes in. torch.compile knows them: it compiles once with the mode and once without. No function of torch is
replaced, so it does not matter how a module imported scaled_dot_product_attention, or when.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..kernels.scaled_dot_product_attention import scaled_dot_product_attention
from ..kernels.torch_internals import function_modes


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
_OUR_MULTI_HEAD_ATTENTION = _copy(_TORCHS_MULTI_HEAD_ATTENTION, scaled_dot_product_attention=scaled_dot_product_attention, **_NO_MODES)
_BACKWARD = {  # they may run a checkpoint's forward pass
    function: _copy(function, **_NO_MODES) for function in (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
}
_TORCHS_ATTENTION: Callable[..., Tensor] = F.scaled_dot_product_attention


class fused_sdpa(TorchFunctionMode):
    """While the context is open, torch.nn.functional.scaled_dot_product_attention runs on the fused kernels in this thread.

        with fused_sdpa():
            loss = model(x).sum()
            loss.backward()

    Covered: calls by any name, also in modules that did `from torch.nn.functional import scaled_dot_product_attention` before; in
    torch.nn.functional.multi_head_attention_forward, so also torch.nn.MultiheadAttention with need_weights=False; in functions compiled
    by torch.compile, which are compiled anew at the first call inside the context and once more for each depth of nesting. Other threads
    keep torch's function.

    Numbers, ranks, broadcasting and errors are those of `fused_attention.scaled_dot_product_attention`: torch's, except that a query that
    may attend to nothing gives 0, never NaN.

    Not covered: what calls no Python function, such as programs of torch.jit and torch.export, or a torch.nn.TransformerEncoderLayer
    compiled in eval mode without gradients, which runs as one operator (`replace_attention` serves that one). A checkpoint of
    torch.utils.checkpoint runs its forward pass again in the backward pass, which must then be in the context too.

    While the context is open, each call of a torch function from Python takes about a microsecond longer, unless it is compiled.
    """

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _TORCHS_ATTENTION:
            func = scaled_dot_product_attention
        elif func is _TORCHS_MULTI_HEAD_ATTENTION and set(types) <= {Tensor}:  # no subclass has its own idea of the function
            func = _OUR_MULTI_HEAD_ATTENTION
        elif func in _BACKWARD and set(types) <= {Tensor}:
            with self:
                return _BACKWARD[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Thread(threading.local):
    enabled: fused_sdpa | None = None


_thread = _Thread()


def enable() -> None:
    """As if all that this thread runs until `disable()` were in `with fused_sdpa():`; a second call changes nothing."""
    if _thread.enabled is None:
        _thread.enabled = fused_sdpa()
        modes = function_modes()
        # Contexts that are open now take the highest mode with them when they close; torch.set_default_device wants the lowest place.
        place = 1 if modes and type(modes[0]).__name__ == "DeviceContext" else 0
        _replace_modes(modes, [*modes[:place], _thread.enabled, *modes[place:]])


def disable() -> None:
    """Undoes `enable()` in this thread, and nothing else: a `with fused_sdpa():` around the call stays."""
    if _thread.enabled is not None:
        modes = function_modes() or [_thread.enabled]
        _replace_modes(modes, [mode for mode in modes if mode is not _thread.enabled])
        _thread.enabled = None


def _replace_modes(modes: list[TorchFunctionMode], others: list[TorchFunctionMode]) -> None:
    """modes: all that are active in this thread, lowest first."""
    for mode in reversed(modes):
        TorchFunctionMode.__exit__(mode, None, None, None)  # takes the highest away, and does nothing else
    for mode in others:
        TorchFunctionMode.__enter__(mode)
