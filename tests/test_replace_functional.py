"""replace_attention(functional=True): modules that call torch's attention functions compute as before, on the fused kernels."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attention import MultiHeadAttention, attention_calls, replace_attention, restore_attention

EMBED, HEADS = 16, 2


class Projected(nn.Module):
    """Linear layers of q, k, v and out, as CLIP's pooling and fairseq's attention have them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(EMBED, EMBED) for _ in range(4))


class CallsMultiHeadAttention(Projected):
    def forward(self, x: Tensor, need_weights: bool = True) -> Tensor:
        y = x.transpose(0, 1)
        biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        out, weights = F.multi_head_attention_forward(
            *(y[:1], y, y, EMBED, HEADS, None, biases, None, None, False, 0.0, self.out.weight, self.out.bias),
            training=self.training,
            need_weights=need_weights,
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
        )
        return out.sum(0) + weights @ torch.linspace(-1, 1, x.shape[1]) if need_weights else out.sum(0)


class CallsScaledDotProductAttention(Projected):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*(layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))))

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Doubled(nn.MultiheadAttention):
    """Calls torch's forward."""

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = super().forward(*args, **options)
        return 2 * output, weights


class Named(nn.MultiheadAttention):
    """Has torch's forward."""


class Attends(nn.Module):
    """With a module of the interface of torch.nn.MultiheadAttention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        output, weights = self.attention(x, x, x)
        return output + (weights @ torch.linspace(-1, 1, x.shape[1])).unsqueeze(2)


def adapted() -> nn.MultiheadAttention:
    """torch never calls its out_proj, so replacing it would change the output."""
    attention = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    attention.out_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    return attention


MODELS: dict[str, Callable[[], nn.Module]] = {
    "multi_head_attention_forward": CallsMultiHeadAttention,
    "scaled_dot_product_attention": CallsScaledDotProductAttention,
    "super().forward": lambda: Attends(Doubled(EMBED, HEADS, batch_first=True)),
    "torch's forward": lambda: Attends(Named(EMBED, HEADS, batch_first=True)),
    "hooks that torch never calls": lambda: Attends(adapted()),
}
MODES = {
    "train": lambda model: (model.train(), torch.enable_grad()),
    "eval": lambda model: (model.eval(), torch.enable_grad()),
    "no_grad": lambda model: (model.eval(), torch.no_grad()),
    "inference_mode": lambda model: (model.eval(), torch.inference_mode()),
}


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def assert_served(model: Callable[..., Any], *inputs: Tensor) -> None:
    with Operators() as operators:
        model(*inputs)
    assert any(name.startswith("fused_attention::") for name in operators.names)
    assert not any("softmax" in name or "scaled_dot_product" in name or "native_multi" in name for name in operators.names)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_served_modules_compute_as_before(name: str, mode: str) -> None:
    theirs = MODELS[name]()
    ours = copy.deepcopy(theirs)
    report = replace_attention(ours, functional=True)
    assert len(report.functional) == 1
    assert not report.replaced
    assert not report.left
    assert f"served the functions of {report.functional[0]}" in str(report) or report.functional == [""]
    x = torch.randn(2, 5, EMBED)
    with MODES[mode](theirs)[1], MODES[mode](ours)[1]:
        output, expected = ours(x), theirs(x)
        assert_close(output, expected)
        if expected.requires_grad:
            gradients, expected_gradients = (
                torch.autograd.grad(result.square().sum(), list(model.parameters()))
                for model, result in ((ours, output), (theirs, expected))
            )
            assert_close(gradients, expected_gradients)
        assert_served(ours, x)


@pytest.mark.parametrize("name", MODELS)
def test_all_about_the_module_survives(name: str) -> None:
    model = MODELS[name]()
    (module,) = (model.attention if isinstance(model, Attends) else model,)
    kind, signature, state, hooks = type(module), inspect.signature(module.forward), model.state_dict(), len(module._forward_pre_hooks)
    replace_attention(model, functional=True)
    assert isinstance(module, kind)
    assert (type(module).__name__, type(module).__module__) == (kind.__name__, kind.__module__)
    assert inspect.signature(module.forward) == signature
    assert_close(model.state_dict(), state)
    assert all(theirs is ours for theirs, ours in zip(state.values(), model.state_dict().values(), strict=True)) or state
    assert replace_attention(model, functional=True).functional == []
    assert len(restore_attention(model)) == 1
    assert type(module) is kind
    assert len(module._forward_pre_hooks) == hooks
    with pytest.raises(AssertionError):
        assert_served(model, torch.randn(2, 5, EMBED))


@pytest.mark.parametrize("name", [name for name in MODELS if "hooks" not in name])  # a lambda cannot be pickled
@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle", "oldest pickle"])
def test_copies_are_served(way: str, name: str) -> None:
    model = MODELS[name]()
    replace_attention(model, functional=True)
    x = torch.randn(2, 5, EMBED)
    expected = model(x)
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda module: pickle.loads(pickle.dumps(module)),
        "oldest pickle": lambda module: pickle.loads(pickle.dumps(module, 0)),
    }
    clone = ways[way](model)
    assert_close(clone(x), expected)
    assert_served(clone, x)
    with attention_calls(clone) as calls:
        clone(x)
    assert list(calls.values()) == [1]
    assert len(restore_attention(clone)) == 1
    assert_close(clone(x), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "no_grad"])
@pytest.mark.parametrize("name", ["multi_head_attention_forward", "scaled_dot_product_attention", "super().forward"])
def test_compiled_in_one_graph(name: str, training: bool) -> None:
    torch._dynamo.reset()
    model = MODELS[name]().train(training)
    x = torch.randn(2, 5, EMBED)
    expected = model(x)
    replace_attention(model, functional=True)
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.set_grad_enabled(training):
        assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), expected)
        assert any(name.startswith("fused_attention.attention_") for name in called)


def test_exported() -> None:
    model = CallsMultiHeadAttention().eval()
    x = torch.randn(2, 5, EMBED)
    expected = model(x)
    replace_attention(model, functional=True)
    program = torch.export.export(model, (x,))
    assert "fused_attention.attention_" in str(program.graph)
    assert_close(program.module()(x), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_torchs_encoder_does_not_bypass_a_served_attention(padded: bool) -> None:
    """Not in eval mode without gradients either, where torch's layer hands a subclass's weights to its own kernel."""
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True)
    layer.self_attn = Doubled(EMBED, HEADS, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x, padding = torch.randn(2, 5, EMBED), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    masks = {"src_key_padding_mask": padding} if padded else {}
    expected = model(x, **masks)
    replace_attention(model, functional=True)
    model.eval()
    with torch.no_grad(), attention_calls(model) as calls:
        output = model(x, **masks)
    assert calls == {"layers.0.self_attn": 1, "layers.1.self_attn": 1}
    assert_close(output[~padding], expected[~padding])


def test_exceptions_leave_torchs_functions_in_place() -> None:
    model = CallsScaledDotProductAttention()
    replace_attention(model, functional=True)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, EMBED + 1))
    q = torch.randn(1, 1, 3, 8)
    with Operators() as operators:
        F.scaled_dot_product_attention(q, q, q)
    assert not any(name.startswith("fused_attention::") for name in operators.names)


class ComputesItself(nn.MultiheadAttention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.softmax(query @ key.transpose(-2, -1), -1) @ value, None


def test_what_cannot_be_served_is_left_and_named() -> None:
    parametrized, overridden = nn.MultiheadAttention(EMBED, HEADS), CallsScaledDotProductAttention()
    nn.utils.parametrizations.weight_norm(parametrized, "in_proj_weight")
    overridden.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {
            "parametrized": parametrized,
            "overridden": overridden,
            "itself": ComputesItself(EMBED, HEADS),
            "ours": MultiHeadAttention(EMBED, HEADS),
            "plain": nn.MultiheadAttention(EMBED, HEADS),
            "served": CallsScaledDotProductAttention(),
            "linear": nn.Linear(EMBED, EMBED),
        }
    )
    kinds = {name: type(module) for name, module in model.items()}
    plain = copy.deepcopy(model)
    left = replace_attention(plain).left
    assert "functional=True serves it" in left["served"]
    assert not any("functional=True" in left[name] for name in ("parametrized", "overridden", "itself", "ours"))
    report = replace_attention(model, functional=True)
    assert report.replaced == ["plain"]
    assert report.functional == ["served"]
    assert report.left.keys() == {"parametrized", "overridden", "itself", "ours"}
    assert all(type(model[name]) is kinds[name] for name in report.left)
    assert "which calls scaled_dot_product_attention itself, and has its forward overridden" in report.left["overridden"]
    assert "has parametrizations on in_proj_weight" in report.left["parametrized"]
    assert sorted(restore_attention(model)) == ["ours", "plain", "served"]
    assert {name: type(module) for name, module in model.items()} == kinds | {"ours": nn.MultiheadAttention}
