"""The plain Triton kernels as compiled: the emulator runs the PTX that the host code launches, and the accuracy rule judges the results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_accurate, assert_lse_accurate, exact_and_eager, saved_rounding
from attention_calls import build
from emulator import Module, Schedule, why_not_buildable
from torch.overrides import TorchFunctionMode

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("these tests compile kernels", allow_module_level=True)

from triton_offline import SHARED_MEMORY, Launch, offline  # noqa: E402
from triton_resources import threads_of  # noqa: E402

from fused_attention.kernels.ops import forward  # noqa: E402
from fused_attention.kernels.problem import Gradients  # noqa: E402
from fused_attention.kernels.triton import backend as triton_backend  # noqa: E402

pytestmark = pytest.mark.skipif(why_not_buildable() is not None, reason=str(why_not_buildable()))

CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": "top_left"},
    "float16, causal bottom-right, grouped heads": {"dtype": torch.float16, "is_causal": "bottom_right", "sizes": (1, 2, 1)},
}
# A rest in both directions, and a key block that every tile of rows sees wholly.
PLAIN = {"dtype": torch.bfloat16, "head_dims": (64, 64), "seqlens": (140, 135), "sizes": (1, 1, 1)}


class Emulated(TorchFunctionMode):
    """Runs launches in the emulator; they may touch the tensors whose address the host code asked for."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.addressed: list[torch.Tensor] = []
        self.launched: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.Tensor.data_ptr:
            self.addressed.append(args[0])
        return function(*args, **(kwargs or {}))

    def execute(self, launched: Launch) -> None:
        binary = launched.binary
        assert binary.metadata["shared"] <= SHARED_MEMORY[self.arch]
        assert not binary.metadata["global_scratch_size"]
        arguments = [value for _, value in launched.parameters()]
        scratch = [None, None]  # of the compiler and of its profiler
        Module(binary.ptx).launch(
            binary.name,
            (launched.num_programs,),
            (threads_of(binary),),
            binary.metadata["shared"],
            [*arguments, *scratch],
            Schedule(strict_proxy=False),  # Triton fences in other threads than those that wrote
            {f"{tensor.dtype} {tuple(tensor.shape)} #{i}": tensor for i, tensor in enumerate(self.addressed)},
        ).check()
        self.launched.append(binary.name)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward(name: str, arch: int, poisoned_memory: None) -> None:
    problem, dout, _ = build(PLAIN | CALLS[name], "cpu")
    exact, eager = exact_and_eager(problem, dout, None)
    gradients = Gradients(*map(torch.empty_like, (problem.query, problem.key, problem.value)))
    emulated = Emulated(arch)
    with offline(arch, execute=emulated.execute), emulated:
        out, lse = forward(triton_backend, problem)
        triton_backend.backward(problem, out, lse, dout, None, gradients)
    assert emulated.launched == ["attention_forward", "attention_delta", "attention_dkdv", "attention_dq"]
    assert_accurate("out", "out", out, eager["out"], exact["out"])
    assert_lse_accurate(lse, exact["lse"])
    rounding = saved_rounding(problem, dout, exact)
    for tensor in ("query", "key", "value"):
        assert_accurate(tensor, "gradient", getattr(gradients, tensor), eager[tensor], exact[tensor], rounding[tensor])
