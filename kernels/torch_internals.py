"""The torch versions this library supports, and every private torch name it uses.

Each name is looked up here, once, with a fallback. If a name tells whether something other than plain eager mode intercepts a call, the
fallback says yes: the call then takes torch.compile's path, or the reference runs. `missing` lists the names that this torch lacks, which
costs only speed; `python -m fused_attention info` prints them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

OLDEST_TORCH = (2, 10)  # as in pyproject.toml

Function = TypeVar("Function", bound=Callable)


def release(version: str) -> tuple[int, ...]:
    """(2, 10) of "2.10.0a0+b4e4ee8"."""
    return tuple(int(part) for part in version.split(".")[:2])


def refuse_older(version: str) -> None:
    """Raises ImportError if torch is older than the oldest supported version, which pip can be told to keep."""
    if release(version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"fused_attention needs torch {oldest} or newer, this is torch {version}: pip install 'torch>={oldest}'")


refuse_older(torch.__version__)

# Whether torch's scaled_dot_product_attention keeps the memory layout of 3-D queries; older versions return contiguous results.
RESULTS_LIKE_3D_QUERIES = release(torch.__version__) >= (2, 14)

missing: list[str] = []


def _found(name: str, otherwise: Any) -> Any:
    """torch's object of this name, or `otherwise`."""
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        missing.append(f"torch.{name}")
        return otherwise


def _found_where_built_for_gpus(name: str, otherwise: Any) -> Any:
    return _found(name, otherwise) if torch.version.cuda or torch.version.hip else otherwise


# Whether anything besides eager mode intercepts a call

num_dispatch_modes: Callable[[], int] = _found("_C._len_torch_dispatch_stack", lambda: 1)
functorch_interpreter: Callable[[], object | None] = _found("_C._functorch.peek_interpreter_stack", lambda: "unknown")
# Its _current_level is -1 outside forward-mode differentiation.
forward_mode: Any = SimpleNamespace(_current_level=0)
if _found("autograd.forward_ad._current_level", None) is not None:
    forward_mode = torch.autograd.forward_ad
is_functorch_tensor: Callable[[Tensor], bool] = _found("_C._functorch.is_functorch_wrapped_tensor", lambda tensor: True)
is_torch_function_enabled: Callable[[], bool] = _found("_C._is_torch_function_enabled", lambda: True)
tracing_state: Callable[[], object | None] = _found("_C._get_tracing_state", lambda: torch.jit.is_tracing() or None)
is_zero_tensor: Callable[[Tensor], bool] = _found("Tensor._is_zerotensor", lambda tensor: True)  # one without memory
has_storage: Callable[[Tensor], bool] = _found("_C._has_storage", lambda tensor: False)
# The TorchFunctionModes of this thread, lowest first
function_modes: Callable[[], list] = _found("overrides._get_current_function_mode_stack", list)

# Faster equivalents of public functions

current_device: Callable[[], int] = _found_where_built_for_gpus("_C._cuda_getDevice", torch.cuda.current_device)
current_stream: Callable[[int], int] = _found_where_built_for_gpus(
    "_C._cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
# (backend, operation) -> "none", "ieee", "tf32" or "bf16". NOTE: torch.get_float32_matmul_precision raises after
# torch.backends.mkldnn.matmul.fp32_precision was set.
float32_precision: Callable[[str, str], str] = _found(
    "_C._get_fp32_precision_getter", lambda *_: {"high": "tf32", "medium": "bf16"}.get(torch.get_float32_matmul_precision(), "ieee")
)
# (shape, strides, dtype) -> an uninitialized tensor, by device type
allocators: dict[str, Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]] = {}
for _device, _find in (("cpu", _found), ("cuda", _found_where_built_for_gpus)):
    if _allocator := _find(f"_C._dynamo.guards._empty_strided_{_device}", None):
        allocators[_device] = _allocator


# torch.compile


def constant_of_graph(function: Function) -> Function:
    """Marks a function that torch.compile cannot trace: it calls the function while tracing and takes the result as a constant.

    This is all that torch.compiler.assume_constant_result does, after spending two seconds on importing torch._dynamo and Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def answered_once(function: Callable[[torch.device | None], Any]) -> Any:
    """Caches a function of a device. A compiled graph is for one device, so the answer is a constant there."""
    cached = functools.cache(function)

    @constant_of_graph
    @functools.wraps(function)
    def answer(device: torch.device | None) -> Any:
        return cached(device)

    answer.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return answer


def _tensor_guard(*tensors: Tensor) -> Callable[..., bool]:
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def _guards_as_expected() -> bool:
    try:
        passes = _tensor_guard(torch.empty(2, 3))
        return passes(torch.ones(2, 3)) and not passes(torch.empty(3, 2)) and not passes(torch.empty(2, 3, requires_grad=True))
    except TypeError:
        return False


TensorGuards: Any = _found("_C._dynamo.guards.TensorGuards", None)
if TensorGuards is not None and not _guards_as_expected():
    missing.append("torch._C._dynamo.guards.TensorGuards as it was")
    TensorGuards = None
# (*tensors) -> a check that other tensors match these in type, dtype, device, sizes, strides and dispatch keys; None: torch has no guards
tensor_guard: Callable[..., Callable[..., bool]] | None = None if TensorGuards is None else _tensor_guard
