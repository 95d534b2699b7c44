"""replace_attention: turns the torch.nn.MultiheadAttention modules of an existing model into MultiHeadAttention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.utils import parametrize

from fused_attention.kernels.problem import FLOAT_DTYPES
from fused_attention.transformer.attention import MultiHeadAttention


@dataclass
class ReplacementReport:
    """What replace_attention did, by qualified module name: "" is the model itself, a shared module has its first name.

    replaced: the modules that it made MultiHeadAttention.
    left: the attention modules that it did not touch, and why.
    nested_tensor_off: the torch.nn.TransformerEncoder modules that no longer turn padded input into nested tensors.
    """

    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    nested_tensor_off: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} attention modules, left {len(self.left)}"]
        lines += [f"  replaced {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"  left {name or '(the model itself)'}: {reason}" for name, reason in self.left.items()]
        lines += [f"  nested tensors off in {name or '(the model itself)'}" for name in self.nested_tensor_off]
        return "\n".join(lines)


def replace_attention(model: torch.nn.Module) -> ReplacementReport:
    """Swaps every exact torch.nn.MultiheadAttention in `model`, or `model` itself if it is one, for MultiHeadAttention.

    The swap changes the class of each module object and nothing else. So parameters (an optimizer built before still
    trains them), buffers, hooks and their handles, requires_grad, dtype, device, the training flag and every reference
    to the module stay as they are; a module used in several places stays shared; the state_dict keeps its keys.

    Left as they are and reported: subclasses of torch.nn.MultiheadAttention, modules with parametrizations on their own
    parameters, modules whose forward is overridden on the instance, scripted modules, and modules whose out_proj has
    forward hooks or a forward of its own, which torch never calls: running them would change the output.

    torch.nn.TransformerEncoder in eval mode without grad turns padded input into nested tensors, for a kernel that
    bypasses its layers' attention. That is switched off in the encoders that hold a MultiHeadAttention.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: a module is configured in a way MultiHeadAttention does not support; nothing has been changed then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

    report = ReplacementReport()
    to_replace = []
    for name, module in model.named_modules():
        if not _is_attention(module):
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
        module._keep_forward_in_use()

    for name, encoder in _encoders(model):
        if any(isinstance(module, MultiHeadAttention) for module in encoder.modules()):
            encoder.enable_nested_tensor = encoder.use_nested_tensor = False
            report.nested_tensor_off.append(name)
    return report


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


def _encoders(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.TransformerEncoder]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.TransformerEncoder) and not isinstance(module, torch.jit.ScriptModule):
            yield name, module
