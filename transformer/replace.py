"""replace_attention turns the torch.nn.MultiheadAttention modules of an existing model into MultiHeadAttention and, if asked, serves the
attention functions that other modules call; restore_attention undoes both, and attention_calls counts which of the modules run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.nn.utils import parametrize

from ..kernels.checks import FLOAT_DTYPES
from .attention import MultiHeadAttention
from .torch_functions import Serving, start_serving, stop_serving


@dataclass
class ReplacementReport:
    """What replace_attention did, by qualified module name. "" is the model itself; a shared module appears under its first name.

    replaced: the modules it turned into MultiHeadAttention.
    functional: the modules whose calls of torch's attention functions it serves.
    left: the modules it left alone although they are attention, or look like it, and why.
    """

    replaced: list[str] = field(default_factory=list)
    functional: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        served = f"served the functions of {len(self.functional)}, " if self.functional else ""
        lines = [f"replaced {len(self.replaced)} attention modules, {served}left {len(self.left)}"]
        lines += [f"  replaced {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"  served the functions of {name or '(the model itself)'}" for name in self.functional]
        lines += [f"  left {name or '(the model itself)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def replace_attention(model: torch.nn.Module, functional: bool = False) -> ReplacementReport:
    """Swaps every module in `model` of exactly class torch.nn.MultiheadAttention, or `model` itself, for MultiHeadAttention.

    The swap changes the class of each module object and adds a forward pre-hook that does nothing, which keeps torch's
    encoder layers from bypassing the module. So parameters (existing optimizers still train them), buffers, hooks and
    their handles, requires_grad, dtype, device, the training flag and every reference to the module are unchanged; a
    module used in several places stays shared; the state_dict keeps its keys. `restore_attention` undoes it.

    Left alone and reported: subclasses of torch.nn.MultiheadAttention, modules with parametrizations on their own
    parameters, modules whose forward is overridden on the instance, scripted modules, and modules whose out_proj has
    forward hooks or its own forward, which torch never calls, so running them would change the output.

    Also reported: modules of other classes whose code calls torch.nn.functional.scaled_dot_product_attention or
    multi_head_attention_forward, in a method or in a function that a method calls by name.

    Args:
        functional: serve those that would be left where possible: while their forward runs, calls of these two functions go
            to the fused kernels, as in `fused_attention.integrations.sdpa.fused_sdpa`. The class of each becomes a subclass of
            its own, of the same name; torch's encoder layers call a served attention in every mode. Still left are modules
            that are parametrized, scripted, or whose forward is overridden on the instance.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: a module is configured in a way MultiHeadAttention does not support; nothing was changed.
    """
    _check_model(model)
    report = ReplacementReport()
    to_replace, to_serve = [], []
    for name, module in model.named_modules():
        if not _is_attention(module) and _attention_function_called_by(module.__class__) is None:
            continue
        reason = _reason_not_to_replace(module)
        if reason is None:
            problem = _unsupported_configuration(module)
            if problem is not None:
                raise ValueError(f"{name or 'model'} cannot be replaced: {problem}; nothing was changed")
            report.replaced.append(name)
            to_replace.append(module)
        elif not _can_be_served(module):
            report.left[name] = reason
        elif functional:
            report.functional.append(name)
            to_serve.append(module)
        else:
            report.left[name] = f"{reason}; functional=True serves it"

    for module in to_replace:
        module.__class__ = MultiHeadAttention
        module._take_torchs_place()
    for module in to_serve:
        start_serving(module)
    return report


def restore_attention(model: torch.nn.Module) -> list[str]:
    """Turns every module in `model` of exactly class MultiHeadAttention, swapped or built as one, into torch.nn.MultiheadAttention,
    and leaves the functions that others call to torch.

    Parameters, hooks and references are kept, as in `replace_attention`. Code that looks for exactly that class, such as
    torch.ao's static quantization and Opacus's ModuleValidator, will find it.

    Returns:
        the qualified names of the modules; "" is the model itself.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_model(model)
    restored = []
    for name, module in model.named_modules():
        if type(module) is MultiHeadAttention:
            module._leave_torchs_place()
            module.__class__ = torch.nn.MultiheadAttention  # type: ignore[assignment]
        elif Serving in type(module).__bases__:
            stop_serving(module)
        else:
            continue
        restored.append(name)
    return restored


@contextlib.contextmanager
def attention_calls(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Counts how often each MultiHeadAttention in `model`, and each module that `replace_attention` serves, runs while the context is
    open, by qualified name.

        with attention_calls(model) as calls:
            model(x)
        never_ran = [name for name, count in calls.items() if count == 0]

    If a model reads an attention module's weights instead of calling it, the count stays 0. Code already compiled by
    torch.compile does not run the counting hooks, so count before compiling the model.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: there is no such module in model, or model is compiled.
    """
    _check_model(model)
    kinds = (MultiHeadAttention, Serving)
    modules: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not modules:
        raise ValueError("model has no MultiHeadAttention whose calls could be counted")
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError("model is compiled, and compiled code does not run the hooks that count: ask the model that was compiled")
    calls = dict.fromkeys(modules, 0)

    def count(name: str, *_: Any) -> None:
        calls[name] += 1

    handles = [module.register_forward_pre_hook(functools.partial(count, name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _check_model(model: torch.nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _is_attention(module: torch.nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule) and module.original_name == "MultiheadAttention"
    return scripted or isinstance(module, torch.nn.MultiheadAttention)


def _reason_not_to_replace(module: torch.nn.Module) -> str | None:
    """module: an attention, or one that calls torch's attention functions."""
    reason = _reason_not_to_change(module)
    kind: Any = type(module)
    if not _is_attention(module):
        calls = f"is a {kind.__qualname__}, which calls {_attention_function_called_by(kind)} itself"
        return f"{calls}, and {reason}" if reason else calls
    if reason is not None:
        return reason
    if kind is not torch.nn.MultiheadAttention:
        return f"is a subclass, {kind.__module__}.{kind.__qualname__}, which may compute something else"
    out_proj: Any = module.out_proj
    if out_proj._forward_hooks or out_proj._forward_pre_hooks:
        return "its out_proj has forward hooks, which torch never calls and MultiHeadAttention would"
    if type(out_proj).forward is not torch.nn.Linear.forward or "forward" in out_proj.__dict__:
        return f"its out_proj is a {type(out_proj).__qualname__}, whose forward torch never calls and MultiHeadAttention would"
    return None


def _reason_not_to_change(module: torch.nn.Module) -> str | None:
    """Why the class of this module must stay as it is."""
    if isinstance(module, MultiHeadAttention):
        return "is a MultiHeadAttention already"
    if isinstance(module, Serving):
        return "is served already"
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit.script"
    if parametrize.is_parametrized(module):
        parametrizations = module.get_submodule("parametrizations")
        return f"has parametrizations on {', '.join(name for name, _ in parametrizations.named_children())}"
    if "forward" in module.__dict__:
        return "has its forward overridden on the instance"
    return None


def _can_be_served(module: torch.nn.Module) -> bool:
    """module: an attention, or one that calls torch's attention functions."""
    kind: Any = type(module)
    return _reason_not_to_change(module) is None and (_attention_function_called_by(kind) is not None or _runs_torchs_forward(kind))


def _unsupported_configuration(module: torch.nn.MultiheadAttention) -> str | None:
    for name, parameter in module.named_parameters():
        if parameter.dtype not in FLOAT_DTYPES:
            return f"{name} is {parameter.dtype}, allowed are {', '.join(str(dtype) for dtype in FLOAT_DTYPES)}"
    if not 0.0 <= module.dropout <= 1.0:
        return f"dropout is {module.dropout}, allowed is 0 to 1"
    if (module.bias_k is None) != (module.bias_v is None):
        return "only one of bias_k and bias_v is set"
    return None


_ATTENTION_FUNCTIONS = ("scaled_dot_product_attention", "multi_head_attention_forward")


@functools.cache
def _attention_function_called_by(kind: type[torch.nn.Module]) -> str | None:
    """The torch attention function that a method of the class calls, directly or in a function it calls by name."""
    for method in _own_methods(kind):
        names = _names_in(method.__code__)
        called = [method.__globals__.get(name) for name in names]
        for function in called:
            if isinstance(function, FunctionType) and not function.__module__.startswith("torch."):
                names = names | _names_in(function.__code__)
        for name in _ATTENTION_FUNCTIONS:
            if name in names:
                return name
    return None


def _runs_torchs_forward(kind: type[torch.nn.Module]) -> bool:
    """Whether a subclass of torch.nn.MultiheadAttention has its forward or calls it."""
    forward = torch.nn.MultiheadAttention.forward
    return kind.forward is forward or any({"super", "forward"} <= _names_in(method.__code__) for method in _own_methods(kind))


def _own_methods(kind: type[torch.nn.Module]) -> Iterator[FunctionType]:
    """The methods of a class and its bases, without torch's."""
    for base in kind.__mro__:
        if base.__module__.split(".")[0] not in ("torch", "builtins"):
            for method in vars(base).values():
                method = getattr(method, "__func__", method)  # unwraps a staticmethod or classmethod
                if isinstance(method, FunctionType):
                    yield method


def _names_in(code: CodeType) -> frozenset[str]:
    """The names of globals and attributes in a function and the functions inside it."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)
