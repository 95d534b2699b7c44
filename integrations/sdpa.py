"""torch.nn.functional.scaled_dot_product_attention on the fused kernels: `fused_sdpa` in a context, `enable` and `disable` for a thread."""

from __future__ import annotations

import threading

from torch.overrides import TorchFunctionMode

from ..kernels.torch_internals import function_modes
from ..transformer.torch_functions import fused_sdpa

__all__ = ["disable", "enable", "fused_sdpa"]


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
