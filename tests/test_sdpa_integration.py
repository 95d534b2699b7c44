"""fused_sdpa: torch's scaled_dot_product_attention is ours inside the context, in this thread, compiled or not, and torch's after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fused_attention.integrations.sdpa import disable, enable, fused_sdpa
from fused_attention.kernels.torch_internals import function_modes
from fused_attention.transformer import torch_functions

INPUTS = [torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3)]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    disable()
    assert function_modes() == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call that reached our function."""
    ours, made = torch_functions.scaled_dot_product_attention, []

    def counted(*args: Any, **options: Any) -> Tensor:
        made.append(options)
        return ours(*args, **options)

    monkeypatch.setattr(torch_functions, "scaled_dot_product_attention", counted)
    return made


@pytest.mark.parametrize("function", [imported_before, F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention])
def test_calls_by_any_name_are_ours(function: Callable[..., Tensor], calls: list) -> None:
    expected = function(*INPUTS, is_causal=True)
    with fused_sdpa():
        out = function(*INPUTS, is_causal=True)
    assert calls == [{"is_causal": True}]
    assert_close(out, expected)
    gradients = [torch.autograd.grad(result.square().sum(), INPUTS) for result in (out, expected)]
    assert_close(*gradients)
    function(*INPUTS)
    assert len(calls) == 1


def test_nested_contexts_and_exceptions(calls: list) -> None:
    with fused_sdpa():
        with pytest.raises(RuntimeError), fused_sdpa():
            F.scaled_dot_product_attention(*INPUTS, attn_mask=torch.zeros(3, 3))
        F.scaled_dot_product_attention(*INPUTS)
    F.scaled_dot_product_attention(*INPUTS)
    assert len(calls) == 2


def test_errors_have_torchs_types() -> None:
    query, key, value = INPUTS
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(query, key[..., :4], value)
    with fused_sdpa(), pytest.raises(RuntimeError, match="key must have the head_dim of query, 8, got 4"):
        F.scaled_dot_product_attention(query, key[..., :4], value)


def test_another_thread_keeps_torchs(calls: list) -> None:
    def both() -> None:
        F.scaled_dot_product_attention(*INPUTS)
        enable()
        F.scaled_dot_product_attention(*INPUTS)
        disable()

    enable()
    thread = threading.Thread(target=both)
    thread.start()
    thread.join()
    assert len(calls) == 1
    F.scaled_dot_product_attention(*INPUTS)
    assert len(calls) == 2


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[Callable] = []

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_enabled_until_disabled(calls: list) -> None:
    disable()  # nothing to undo
    enable()
    enable()
    F.scaled_dot_product_attention(*INPUTS)
    with fused_sdpa():
        disable()
        F.scaled_dot_product_attention(*INPUTS)
    disable()
    F.scaled_dot_product_attention(*INPUTS)
    assert len(calls) == 2


def test_enabled_and_disabled_among_other_contexts(calls: list) -> None:
    """Contexts that open before and close after, and the other way round, and torch.set_default_device."""
    with Watching() as outer:
        enable()
        F.scaled_dot_product_attention(*INPUTS)
    assert F.scaled_dot_product_attention in outer.seen
    F.scaled_dot_product_attention(*INPUTS)
    assert len(calls) == 2
    with Watching() as inner:
        disable()
        F.scaled_dot_product_attention(*INPUTS)
    assert F.scaled_dot_product_attention in inner.seen
    assert len(calls) == 2
    torch.set_default_device("meta")
    try:
        enable()
        torch.set_default_device("cpu")
        torch.set_default_device("meta")
        F.scaled_dot_product_attention(*INPUTS)
        assert torch.empty(1).device.type == "meta"
        disable()
        assert torch.empty(1).device.type == "meta"
    finally:
        torch.set_default_device(None)
    assert len(calls) == 3


class Graphs:
    """A backend of torch.compile that keeps what each graph calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable:
        self.calls.append(" ".join(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return graph.forward


OURS = "fused_attention.attention_separate"


def test_compiled_inside_and_outside() -> None:
    graphs = Graphs()
    compiled = torch.compile(lambda *inputs: imported_before(*inputs) + 1, backend=graphs, fullgraph=True)
    expected = compiled(*INPUTS)
    for _ in range(2):  # each context is a new object
        with fused_sdpa():
            assert_close(compiled(*INPUTS), expected)
            thread = threading.Thread(target=compiled, args=INPUTS)
            thread.start()
            thread.join()
        compiled(*INPUTS)
    enable()
    compiled(*INPUTS)
    assert [OURS in graph for graph in graphs.calls] == [False, True]


def test_methods_of_tensors_in_compiled_functions() -> None:
    """Those that are Python functions and call super(), of the graph's own tensors."""
    linear, x = torch.nn.Linear(8, 8), torch.randn(3, 8)
    with fused_sdpa():
        out = torch.compile(lambda x: linear(x).unflatten(1, (2, 4)), backend="eager", fullgraph=True)(x)
    assert_close(out, linear(x).view(3, 2, 4))


def test_a_context_inside_a_compiled_function() -> None:
    def function(*inputs: Tensor) -> Tensor:
        with fused_sdpa():
            out = F.scaled_dot_product_attention(*inputs)
        return out + F.scaled_dot_product_attention(*inputs)

    graphs = Graphs()
    assert_close(torch.compile(function, backend=graphs, fullgraph=True)(*INPUTS), 2 * F.scaled_dot_product_attention(*INPUTS))
    (graph,) = graphs.calls
    assert graph.count(OURS) == graph.count("built-in function scaled_dot_product_attention") == 1


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_multi_head_attention_of_torch(train: bool, need_weights: bool) -> None:
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).train(train)
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(train):
        expected = module(x, x, x, need_weights=need_weights)
        with Watching() as watching, fused_sdpa():
            assert_close(module(x, x, x, need_weights=need_weights), expected)
        with fused_sdpa():
            graphs = Graphs()
            compiled = torch.compile(module, backend=graphs, fullgraph=train)
            assert_close(compiled(x, x, x, need_weights=need_weights), expected)
    assert F.linear in watching.seen  # the other mode sees what ours calls
    assert F.softmax not in watching.seen
    assert not train or "fused_attention.attention_qkv" in graphs.calls[0]


def test_encoder_layers_in_eval_mode() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = layer(x)
        with fused_sdpa():
            assert_close(layer(x), expected)


BACKWARD: dict[str, Callable[[Tensor], Any]] = {
    "Tensor.backward": lambda loss: loss.backward(inputs=INPUTS),
    "autograd.backward": lambda loss: torch.autograd.backward(loss, inputs=INPUTS),
    "autograd.grad": lambda loss: torch.autograd.grad(loss, INPUTS),
}


@pytest.mark.parametrize("way", BACKWARD)
def test_a_checkpoint_runs_again_in_the_backward_pass(way: str, calls: list) -> None:
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*INPUTS).square().sum(), INPUTS)
    with fused_sdpa():
        out = checkpoint(F.scaled_dot_product_attention, *INPUTS, use_reentrant=False)
        gradients = BACKWARD[way](out.square().sum())
    assert len(calls) == 2
    assert_close(gradients or tuple(tensor.grad for tensor in INPUTS), expected)
    for tensor in INPUTS:
        tensor.grad = None
