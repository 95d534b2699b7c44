"""The operation as a citizen of torch: operators, compile, higher derivatives, transforms, autocast."""

from __future__ import annotations

import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_calls import watched
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fused_attention.kernels import backends, ops
from fused_attention.kernels.attention import attention, attention_kv_packed, attention_qkv_packed
from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cpu
from fused_attention.kernels.prepared_mask import prepare_mask
from fused_attention.kernels.problem import DIFFERENTIABLE, INPUTS, OPTIONS, PLACE, TENSORS, Gradients, Problem

needs_cpu_kernels = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")

QKV_OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "padding": {"key_mask": torch.arange(12) < torch.tensor([[12], [5]]), "query_lengths": torch.tensor([12, 5])},
    "bias": {"attn_mask": torch.linspace(-1, 1, 144).view(12, 12)},
    "dropout": {"dropout_p": 0.3, "rng_state": torch.tensor([3, 4])},
}


def layout_inputs(layout: str, requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = {
        "separate": [(2, 4, 12, 8)] * 3,
        "qkv": [(2, 12, 3, 4, 8)],
        "kv": [(2, 4, 12, 8), (2, 12, 2, 4, 8)],
    }[layout]
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes)


CALLS = {"separate": attention, "qkv": attention_qkv_packed, "kv": attention_kv_packed}


@pytest.mark.parametrize("layout", INPUTS)
def test_an_operators_arguments_are_the_fields_of_a_problem(layout: str) -> None:
    names = [argument.name for argument in getattr(torch.ops.fused_attention, f"attention_{layout}").default._schema.arguments]
    after_the_inputs = [field.name for field in fields(Problem) if field.init][5:]  # layout, inputs, query, key, value
    assert after_the_inputs == [*TENSORS, *OPTIONS]
    assert names == [*INPUTS[layout], *after_the_inputs, "backend"]


def test_what_is_written_out_is_in_the_order_of_the_table() -> None:
    named = [field.name for field in fields(Problem) if field.init]
    problem = Problem(*named)  # type: ignore[arg-type]  # each holds its own name
    assert problem.optional_tensors() == tuple(TENSORS)
    assert problem.options() == tuple(OPTIONS)
    assert problem.differentiable()[len(problem.inputs) :] == tuple(DIFFERENTIABLE)
    assert [field.name for field in fields(Gradients)] == ["query", "key", "value", *DIFFERENTIABLE]
    in_extension = [tensor.in_extension for tensor in TENSORS.values()]
    assert in_extension == sorted(in_extension, reverse=True)
    assert list(PLACE)[1:3] == ["key_mask", "key_lengths"]  # as replay.repeat has them


def test_exported_calls_hold_one_operator() -> None:
    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key_mask: Tensor) -> Tensor:
            return attention(query, query, query, attn_mask=prepare_mask(key_mask=key_mask, seqlen_q=query.shape[2]), backend=backend)

    backend = "cpu" if cpu.status() is None else None
    call = (torch.randn(2, 4, 12, 8), torch.rand(2, 12) > 0.3)
    exported = torch.export.export(Module(), call)
    torch.testing.assert_close(exported.module()(*call), attention(call[0], call[0], call[0], key_mask=call[1]))
    if backend is not None:
        assert [str(node.target) for node in exported.graph.nodes].count("fused_attention.attention_separate.default") == 1


@needs_cpu_kernels
@pytest.mark.parametrize("options", QKV_OPTIONS.values(), ids=QKV_OPTIONS)
@pytest.mark.parametrize("layout", CALLS)
def test_opcheck(layout: str, options: dict) -> None:
    problem = make_problem(layout, layout_inputs(layout), **options)
    torch.library.opcheck(getattr(torch.ops.fused_attention, f"attention_{layout}").default, (*problem.op_arguments(), "cpu"))


@needs_cpu_kernels
@pytest.mark.parametrize("options", QKV_OPTIONS.values(), ids=QKV_OPTIONS)
@pytest.mark.parametrize("layout", CALLS)
def test_cheap_path_operator_and_reference_agree(layout: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = layout_inputs(layout)
    results = []
    for path in ("cheap", "operator", "reference"):
        if path == "operator":
            monkeypatch.setattr(ops, "_takes_cheap_path", lambda problem: False)
        out, lse = CALLS[layout](*inputs, **options, return_lse=True, backend="reference" if path == "reference" else "cpu")
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + lse[0].sum()
        results.append((out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)))
    for cheap, operator, reference in zip(*results, strict=True):
        assert torch.equal(cheap, operator)
        torch.testing.assert_close(cheap, reference, rtol=1e-5, atol=1e-5)


@needs_cpu_kernels
@pytest.mark.parametrize("options", [QKV_OPTIONS["causal"], {"dropout_p": 0.2}], ids=["causal", "dropout drawn inside"])
@pytest.mark.parametrize("layout", CALLS)
def test_compiles_without_a_graph_break(layout: str, options: dict) -> None:
    def function(*inputs: Tensor) -> Tensor:
        return CALLS[layout](*inputs, **options).sin()

    inputs = layout_inputs(layout)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    out = compiled(*inputs)
    gradients = torch.autograd.grad(out.sum(), inputs)
    if "dropout_p" in options:
        assert out.isfinite().all()
        return
    expected = function(*inputs)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_cpu_kernels
def test_compiles_with_inductor_and_dynamic_shapes() -> None:
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, is_causal=True), fullgraph=True, dynamic=True)
    for seqlen in (7, 12, 19):
        query = torch.randn(2, 2, seqlen, 8)
        torch.testing.assert_close(compiled(query, query, query), attention(query, query, query, is_causal=True))


@needs_cpu_kernels
@pytest.mark.parametrize("options", QKV_OPTIONS.values(), ids=QKV_OPTIONS)
def test_second_derivatives_are_those_of_the_reference(options: dict) -> None:
    inputs = layout_inputs("separate")

    def second_derivative(backend: str) -> tuple[Tensor, ...]:
        out, lse = attention(*inputs, **options, return_lse=True, backend=backend)
        first = torch.autograd.grad((out**3).sum() + (lse[0] ** 2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((gradient**2).sum() for gradient in first), inputs)

    for ours, theirs in zip(second_derivative("cpu"), second_derivative("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * theirs.abs().max().item())


@needs_cpu_kernels
@pytest.mark.parametrize("path", ["cheap", "operator"])
@pytest.mark.parametrize("related", ["one tensor", "one from another"])
def test_second_derivatives_of_inputs_that_depend_on_each_other(related: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "operator":
        monkeypatch.setattr(ops, "_takes_cheap_path", lambda problem: False)
    leaf = torch.randn(1, 2, 5, 8, requires_grad=True)

    def derivatives(backend: str) -> tuple[Tensor, Tensor]:
        query = leaf * 1.5
        key, value = (query, query) if related == "one tensor" else (query * 0.5, query.sin())
        (first,) = torch.autograd.grad(attention(query, key, value, backend=backend).square().sum(), leaf, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), leaf)[0]

    for ours, expected in zip(derivatives("cpu"), derivatives("reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@needs_cpu_kernels
@pytest.mark.parametrize("path", ["cheap", "operator"])
def test_batched_gradients(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.autograd.grad under vmap, as jacobian(vectorize=True) does."""
    if path == "operator":
        monkeypatch.setattr(ops, "_takes_cheap_path", lambda problem: False)
    inputs = tuple(torch.randn(1, 2, seqlen, 4, requires_grad=True) for seqlen in (3, 5, 5))
    batch = torch.randn(6, 1, 2, 3, 4)
    out = attention(*inputs, backend="cpu")
    ours = torch.autograd.grad(out, inputs, batch, is_grads_batched=True, retain_graph=True)
    each = zip(*(torch.autograd.grad(out, inputs, dout, retain_graph=True) for dout in batch), strict=True)
    for gradients, expected in zip(ours, each, strict=True):
        torch.testing.assert_close(gradients, torch.stack(expected), rtol=1e-5, atol=1e-5)


@needs_cpu_kernels
def test_gradients_of_part_of_the_inputs() -> None:
    query, key, value = layout_inputs("separate", requires_grad=False)
    value.requires_grad_()
    (ours,) = torch.autograd.grad(attention(query, key, value).sum(), value)
    (theirs,) = torch.autograd.grad(F.scaled_dot_product_attention(query, key, value).sum(), value)
    torch.testing.assert_close(ours, theirs)
    _, lse = attention(query.requires_grad_(), key, value, return_lse=True)
    gradient = torch.autograd.grad(lse.sum(), [query, value], allow_unused=True)
    assert gradient[0].abs().sum() > 0


@needs_cpu_kernels
@pytest.mark.parametrize("path", ["cheap", "operator", "compiled"])
def test_gradients_of_overlapping_windows(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that start one element apart: empty_like would lay their gradient out with another dim innermost."""
    windows = torch.randn(200).as_strided((1, 2, 5, 16), (100, 40, 1, 1))
    if path == "operator":
        monkeypatch.setattr(ops, "_takes_cheap_path", lambda problem: False)

    def gradients(function, backend: str) -> tuple[Tensor, ...]:
        leaves = [windows.detach().requires_grad_() for _ in range(3)]
        return torch.autograd.grad(function(*leaves, backend=backend).square().sum(), leaves)

    function = torch.compile(attention, fullgraph=True, backend="aot_eager") if path == "compiled" else attention
    for ours, expected in zip(gradients(function, "cpu"), gradients(attention, "reference"), strict=True):
        torch.testing.assert_close(ours, expected)


class _Subclass(Tensor):
    pass


PATHS = {  # what eager calls take: the kernel straight from Python, the operator, or the reference
    "nothing special": "kernel",
    "a subclass": "operator",
    "a mask of a subclass": "operator",
    "a fake tensor": "operator",
    "counting FLOPs": "operator",
    "selective checkpointing": "operator",
    "a functorch level": "reference",
    "a forward AD level": "reference",
    "a dual tensor": "reference",
}


@needs_cpu_kernels
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no gradient", "gradients"])
@pytest.mark.parametrize("condition", PATHS)
def test_the_path_of_an_eager_call(condition: str, requires_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def noted(path: str, function: Any) -> Any:
        return lambda *arguments: taken.append(path) or function(*arguments)

    kernels = types.SimpleNamespace(**vars(cpu) | {"prepare": watched(cpu.prepare, lambda: taken.append("kernel"))})
    monkeypatch.setitem(backends.BACKENDS, "cpu", kernels)
    monkeypatch.setitem(ops._REGISTERED, "separate", noted("operator", ops._REGISTERED["separate"]))
    monkeypatch.setattr(ops, "attention_reference", noted("reference", ops.attention_reference))
    query, key, value = layout_inputs("separate", requires_grad)
    mask = torch.ones(12, 12, dtype=torch.bool)
    expected: Any = F.scaled_dot_product_attention(query, key, value)
    if condition == "nothing special":
        out = attention(query, key, value, attn_mask=mask, backend="cpu")
    elif condition == "a subclass":
        out = attention(query.as_subclass(_Subclass), key, value, attn_mask=mask, backend="cpu")
    elif condition == "a mask of a subclass":
        out = attention(query, key, value, attn_mask=mask.as_subclass(_Subclass), backend="cpu")
    elif condition == "a fake tensor":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            out = attention(mode.from_tensor(query), key, value, attn_mask=mask, backend="cpu")
        assert out.shape == expected.shape
        expected = None
    elif condition == "counting FLOPs":
        with FlopCounterMode(display=False):
            out = attention(query, key, value, attn_mask=mask, backend="cpu")
    elif condition == "selective checkpointing":
        contexts = partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)
        call = partial(attention, attn_mask=mask, backend="cpu")
        out = checkpoint(call, query, key, value, use_reentrant=False, context_fn=contexts)
    elif condition == "a functorch level":
        out = torch.vmap(lambda q, k, v: attention(q[None], k[None], v[None], attn_mask=mask, backend="cpu")[0])(query, key, value)
    else:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(query.detach(), torch.ones_like(query)) if condition == "a dual tensor" else query
            out, tangent = forward_ad.unpack_dual(attention(dual, key, value, attn_mask=mask, backend="cpu"))
            assert (tangent is not None) == (condition == "a dual tensor")
    if expected is not None:
        torch.testing.assert_close(torch.as_tensor(out), expected)
    assert taken[0] == PATHS[condition]


@needs_cpu_kernels
def test_a_compiled_call_is_one_operator() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list) -> Any:
        graphs.append(graph)
        return graph.forward

    query, key, value = layout_inputs("separate")
    torch.compile(partial(attention, backend="cpu"), backend=keep, fullgraph=True)(query, key, value)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in called if "fused_attention" in name] == ["fused_attention.attention_separate.default"]


@needs_cpu_kernels
def test_tensors_whose_memory_does_not_hold_their_values() -> None:
    """Lazily negated views, and the zero tensors of autograd, which have no memory."""
    query, key, _ = layout_inputs("separate")
    negated = torch.randn(2, 4, 12, 8, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(attention(query, key, negated), attention(query, key, negated.resolve_neg().clone()))
    zeros = torch._efficientzerotensor((2, 4, 12, 8), dtype=torch.float32)
    assert (attention(query, key, zeros) == 0).all()
    for dout in (negated, zeros):
        out = attention(query, key, key)
        ours = torch.autograd.grad(out, query, dout, retain_graph=True)[0]
        assert torch.equal(ours, torch.autograd.grad(out, query, dout.resolve_neg().clone())[0])
    _, lse = attention(query, key, key, return_lse=True)
    dlse = negated[..., 0]
    ours = torch.autograd.grad(lse, query, dlse, retain_graph=True)[0]
    assert torch.equal(ours, torch.autograd.grad(lse, query, dlse.resolve_neg().clone())[0])


@needs_cpu_kernels
def test_the_default_device_does_not_matter() -> None:
    query, key, value = layout_inputs("separate")
    expected = attention(query, key, value)
    with torch.device("meta"):
        assert torch.equal(attention(query, key, value), expected)


def test_jit_trace_is_refused() -> None:
    with pytest.raises(RuntimeError, match="cannot be traced by torch.jit.trace"):
        torch.jit.trace(lambda q: attention(q, q, q), torch.randn(1, 1, 4, 4))


def test_autocast_casts_and_gradients_return_in_the_input_dtype() -> None:
    inputs = layout_inputs("separate")
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*inputs)
    assert out.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(out.float().sum(), inputs))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*layout_inputs("separate", dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_replays_the_dropout_mask(use_reentrant: bool) -> None:
    gradients = []
    for checkpointed in (True, False):
        query, key, value = inputs = [torch.ones(2, 4, 12, 8, requires_grad=True) for _ in range(3)]
        torch.manual_seed(5)
        if checkpointed:
            out = checkpoint(lambda q, k, v: attention(q, k, v, dropout_p=0.5), query, key, value, use_reentrant=use_reentrant)
        else:
            out = attention(query, key, value, dropout_p=0.5)
        out.square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    assert all(torch.equal(ours, expected) for ours, expected in zip(*gradients, strict=True))


def test_calls_and_backwards_from_several_threads() -> None:
    inputs = layout_inputs("separate")
    expected = torch.autograd.grad(attention(*inputs).square().sum(), inputs)

    def work(_: int) -> bool:
        gradients = torch.autograd.grad(attention(*inputs).square().sum(), inputs)
        return all(torch.allclose(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


def test_dropout_follows_torchs_generator_and_replays() -> None:
    query, key, value = layout_inputs("separate", requires_grad=False)
    torch.manual_seed(5)
    first, second = attention(query, key, value, dropout_p=0.5), attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(first, attention(query, key, value, dropout_p=0.5))
    assert not torch.equal(first, second)
    state = torch.tensor([1, 2])
    assert torch.equal(*(attention(query, key, value, dropout_p=0.5, rng_state=state) for _ in range(2)))
