"""The attention weights of a whole forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .generate import evaluating
from .layers import CrossAttention, SelfAttention


def weights_in_forward(model: nn.Module, modules: Iterable[nn.Module], *inputs: Tensor) -> dict[nn.Module, Tensor]:
    """What each of these attention modules of `model` weighs its values with during model(*inputs), without dropout and gradients."""
    weights: dict[nn.Module, Tensor] = {}

    def keep_weights(module: SelfAttention | CrossAttention, args: tuple, options: dict[str, Any]) -> None:
        weights[module] = module.weights(*(arg for arg in args if arg is not None), **options)

    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(_pre_hook(module, keep_weights))
        model(*inputs)
    return weights


@contextmanager
def _pre_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
