"""replace_attention turns the torch.nn.MultiheadAttention modules of an existing model into MultiHeadAttention, restore_attention
turns them back, and attention_calls counts which of them run.
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


@dataclass
class ReplacementReport:
    """What replace_attention did, by qualified module name. "" is the model itself; a shared module appears under its first name.

    replaced: the modules it turned into MultiHeadAttention.
    left: the modules it left alone although they are attention, or look like it, and why.
    """

    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} attention modules, left {len(self.left)}"]
        lines += [f"  replaced {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"  left {name or '(the model itself)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def replace_attention(model: torch.nn.Module) -> ReplacementReport:
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

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: a module is configured in a way MultiHeadAttention does not support; nothing was changed.
    """
    _check_model(model)
    report = ReplacementReport()
    to_replace = []
    for name, module in model.named_modules():
        if not _is_attention(module):
            function = _attention_function_called_by(module.__class__)
            if function is not None:
                report.left[name] = f"is a {type(module).__qualname__}, which calls {function} itself"
            continue
        reason = _reason_to_leave(module)
        if reason is not None:
            report.left[name] = reason
            continue
        problem = _unsupported_configuration(module)
        if problem is not None:
            raise ValueError(f"{name or 'model'} cannot be replaced: {problem}; nothing was changed")
        report.replaced.append(name)
        to_replace.append(module)

    for module in to_replace:
        module.__class__ = MultiHeadAttention
        module._take_torchs_place()
    return report


def restore_attention(model: torch.nn.Module) -> list[str]:
    """Turns every module in `model` of exactly class MultiHeadAttention, swapped or built as one, into torch.nn.MultiheadAttention.

    Parameters, hooks and references are kept, as in `replace_attention`. Code that looks for exactly that class, such as
    torch.ao's static quantization and Opacus's ModuleValidator, will find it.

    Returns:
        the qualified names of the modules; "" is the model itself.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_model(model)
    ours = {name: module for name, module in model.named_modules() if type(module) is MultiHeadAttention}
    for module in ours.values():
        module._leave_torchs_place()
        module.__class__ = torch.nn.MultiheadAttention  # type: ignore[assignment]
    return list(ours)


@contextlib.contextmanager
def attention_calls(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Counts how often each MultiHeadAttention in `model` runs while the context is open, by qualified name.

        with attention_calls(model) as calls:
            model(x)
        never_ran = [name for name, count in calls.items() if count == 0]

    If a model reads an attention module's weights instead of calling it, the count stays 0. Code already compiled by
    torch.compile does not run the counting hooks, so count before compiling the model.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: there is no MultiHeadAttention in model, or model is compiled.
    """
    _check_model(model)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, MultiHeadAttention)}
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


def _reason_to_leave(module: torch.nn.Module) -> str | None:
    if isinstance(module, MultiHeadAttention):
        return "is a MultiHeadAttention already"
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit.script"
    if parametrize.is_parametrized(module):
        parametrizations = module.get_submodule("parametrizations")
        return f"has parametrizations on {', '.join(name for name, _ in parametrizations.named_children())}"
    if type(module) is not torch.nn.MultiheadAttention:
        return f"is a subclass, {type(module).__module__}.{type(module).__qualname__}, which may compute something else"
    if "forward" in module.__dict__:
        return "has its forward overridden on the instance"
    out_proj = module.out_proj
    if out_proj._forward_hooks or out_proj._forward_pre_hooks:
        return "its out_proj has forward hooks, which torch never calls and MultiHeadAttention would"
    if type(out_proj).forward is not torch.nn.Linear.forward or "forward" in out_proj.__dict__:
        return f"its out_proj is a {type(out_proj).__qualname__}, whose forward torch never calls and MultiHeadAttention would"
    return None


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
    for base in kind.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        for method in vars(base).values():
            method = getattr(method, "__func__", method)  # unwraps a staticmethod or classmethod
            if not isinstance(method, FunctionType):
                continue
            names = _names_in(method.__code__)
            called = [method.__globals__.get(name) for name in names]
            for function in called:
                if isinstance(function, FunctionType) and not function.__module__.startswith("torch."):
                    names = names | _names_in(function.__code__)
            for name in _ATTENTION_FUNCTIONS:
                if name in names:
                    return name
    return None


def _names_in(code: CodeType) -> frozenset[str]:
    """The names of globals and attributes in a function and the functions inside it."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)
