"""Derivatives of every kind through the kernels: second ones, forward mode, functorch's transforms, checkpointing, FLOP counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import reference_kernels
import torch
import torch.nn.functional as F
from attention_calls import watched
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fused_attention import attention, attention_varlen, attention_weights, scaled_dot_product_attention
from fused_attention.kernels import backends, ops, routing
from fused_attention.kernels.attention import attention_kv_packed, attention_qkv_packed
from fused_attention.kernels.native import cpu
from fused_attention.transformer.attention import MultiHeadAttention

needs_cpu_kernels = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]

MASK = torch.linspace(-1, 1, 35).view(5, 7)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, window": {"is_causal": "bottom_right", "window": (3, None)},
    "padding": {"key_mask": torch.arange(7) < torch.tensor([[7], [3]]), "query_lengths": torch.tensor([5, 2])},
    "bias": {"attn_mask": MASK},
    "dropout": {"dropout_p": 0.3, "rng_state": torch.tensor([3, 4])},
    "everything else": {"softcap": 2.0, "alibi_slopes": torch.tensor([0.1, 0.3]), "sinks": torch.tensor([0.5, -0.5]), "scale": 0.7},
}


def tensors(requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = ((2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes)


@pytest.fixture
def float64_on_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in float64 stands in for the CPU kernels, so that finite differences can judge what is built around them."""
    monkeypatch.setitem(backends.BACKENDS, "cpu", reference_kernels)


@pytest.mark.usefixtures("float64_on_cpu_kernels")
@pytest.mark.parametrize("path", ["kernel", "operator"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_by_finite_differences(feature: str, check: Callable, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "operator":
        monkeypatch.setattr(ops, "_takes_cheap_path", lambda problem: False)

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(*inputs, **FEATURES[feature], return_lse=True, backend="cpu")
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert check(function, tensors(requires_grad=True, dtype=torch.float64), fast_mode=check is gradgradcheck)


@pytest.mark.usefixtures("float64_on_cpu_kernels")
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_of_packed_sequences_by_finite_differences(check: Callable) -> None:
    starts = torch.tensor([0, 2, 5])

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        options = {"is_causal": True, "dropout_p": 0.3, "rng_state": torch.tensor([3, 4])}
        return attention_varlen(*inputs, starts, starts, 3, 3, **options, return_lse=True, backend="cpu")

    inputs = [torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert check(function, inputs, fast_mode=check is gradgradcheck)


@needs_cpu_kernels
def test_third_derivatives() -> None:
    """Of values of size 1, so that float32 is enough."""
    inputs = tensors(requires_grad=True)

    def derivatives(backend: str) -> tuple[Tensor, ...]:
        results = (attention(*inputs, is_causal=True, backend=backend),)
        for _ in range(3):
            results = torch.autograd.grad(sum(result.square().sum() for result in results), inputs, create_graph=True)
        return results

    for ours, expected in zip(derivatives("cpu"), derivatives("reference"), strict=True):
        assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def by_torch(*inputs: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """torch's attention from products and a softmax: what its transforms are known to handle."""
    scores = inputs[0] @ inputs[1].mT / inputs[0].shape[-1] ** 0.5
    return torch.softmax(scores if attn_mask is None else scores + attn_mask, -1) @ inputs[2]


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, inputs, _: torch.func.grad(lambda *x: f(*x).square().sum(), (0, 1, 2))(*inputs),
    "vjp": lambda f, inputs, others: torch.func.vjp(f, *inputs)[1](by_torch(*others)),
    "jvp": lambda f, inputs, others: torch.func.jvp(f, inputs, others),
    "jacrev": lambda f, inputs, _: torch.func.jacrev(f, (0, 1, 2))(*inputs),
    "jacfwd": lambda f, inputs, _: torch.func.jacfwd(f, (0, 1, 2))(*inputs),
    "hessian": lambda f, inputs, _: torch.func.hessian(lambda q, k: f(q, k, inputs[2]).square().sum(), (0, 1))(*inputs[:2]),
    "vmap": lambda f, inputs, others: torch.vmap(f, (0, None, 1))(
        torch.stack((inputs[0], others[0])), inputs[1], torch.stack((inputs[2], others[2]), 1)
    ),
    "vmap over heads in place": lambda f, inputs, _: torch.vmap(lambda *x: f(*(t[:, None] for t in x)), 1, 1)(*inputs),
    "linearize": lambda f, inputs, others: torch.func.linearize(f, *inputs)[1](*others),
    "functionalize": lambda f, inputs, _: torch.func.functionalize(f)(*inputs),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_functorch(transform: str, backend: str | None) -> None:
    inputs, others = tensors(), tensors()
    attend, apply = partial(attention, backend=backend), TRANSFORMS[transform]
    assert_close(apply(attend, inputs, others), apply(by_torch, inputs, others), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_sample_gradients(backend: str) -> None:
    inputs, mask = tensors(), MASK.clone()

    def loss(function: Callable, mask: Tensor, *sample: Tensor) -> Tensor:
        return function(*(tensor[None] for tensor in sample), attn_mask=mask).square().sum()

    for argnums in (1, (0, 1, 2, 3)):
        each = (
            torch.vmap(torch.func.grad(partial(loss, function), argnums), (None, 0, 0, 0))(mask, *inputs)
            for function in (partial(attention, backend=backend), by_torch)
        )
        assert_close(*each, rtol=1e-4, atol=1e-5)


@needs_cpu_kernels
def test_per_sample_gradients_of_a_module() -> None:
    module = MultiHeadAttention(8, 2, batch_first=True)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    x = torch.randn(3, 5, 8)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        out, _ = torch.func.functional_call(module, parameters, (sample[None],) * 3, {"need_weights": False})
        return out.square().sum()

    ours = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for sample in range(3):
        module.zero_grad()
        module(*[x[sample][None]] * 3, need_weights=False)[0].square().sum().backward()
        for name, parameter in module.named_parameters():
            assert_close(ours[name][sample], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_dropout_under_vmap_follows_its_randomness(randomness: str, backend: str) -> None:
    query = torch.randn(1, 2, 40, 4)

    def call(scale: Tensor) -> Tensor:
        return attention(query * 0 * scale, query, torch.ones_like(query), dropout_p=0.5, backend=backend)

    mapped = torch.vmap(call, randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            mapped(torch.ones(3))
        return
    first, second, third = mapped(torch.ones(3))
    assert torch.equal(first, second) == torch.equal(second, third) == (randomness == "same")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", FEATURES)
def test_forward_mode(feature: str, backend: str) -> None:
    """Against the difference quotient in float64."""
    inputs, tangents = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
    step = 1e-6
    ahead, behind = (attention(*[x + s * t for x, t in zip(inputs, tangents, strict=True)], **FEATURES[feature]) for s in (step, -step))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.float(), t.float()) for x, t in zip(inputs, tangents, strict=True)]
        out, lse = attention(*duals, **FEATURES[feature], return_lse=True, backend=backend)
        tangent = forward_ad.unpack_dual(out).tangent
        assert forward_ad.unpack_dual(lse).tangent is not None
    assert_close(tangent.double(), (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["kernel", "operator"])
def test_a_gradient_that_is_given_a_tangent(path: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass is linear in the output's gradient: its tangent is the backward pass of the tangent."""
    if path == "operator":
        monkeypatch.setattr(ops, "_takes_cheap_path", lambda problem: False)
    inputs = tensors(requires_grad=True)
    out = attention(*inputs, backend=backend)
    dout, tangent = torch.randn_like(out), torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, tangent, retain_graph=True)
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(out, inputs, forward_ad.make_dual(dout, tangent))
        ours = [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]
    assert_close(ours, list(expected))


@needs_cpu_kernels
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "selective"])
def test_checkpointing_runs_the_kernel_again_unless_told_to_keep_its_results(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    monkeypatch.setattr(cpu, "prepare", watched(cpu.prepare, lambda: runs.append(1)))
    inputs = tensors(requires_grad=True)
    call = partial(attention, dropout_p=0.5, backend="cpu")
    torch.manual_seed(5)
    expected = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    assert runs == [1]
    options: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        kept = {torch.ops.fused_attention.attention_separate.default, torch.ops.aten.randint.default}
        policy = lambda ctx, op, *_, **__: CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE  # noqa: E731
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    runs.clear()
    torch.manual_seed(5)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]  # a reentrant checkpoint needs .backward()
    checkpoint(call, *leaves, **options).square().sum().backward()
    assert all(torch.equal(ours.grad, theirs) for ours, theirs in zip(leaves, expected, strict=True))
    assert len(runs) == (1 if kind == "selective" else 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensors_go_through_hooks(backend: str) -> None:
    inputs = tensors(requires_grad=True)
    expected = torch.autograd.grad(attention(*inputs, backend=backend).square().sum(), inputs)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor.shape) or tensor.clone(), lambda tensor: tensor):
        out = attention(*inputs, backend=backend)
    assert_close(torch.autograd.grad(out.square().sum(), inputs), expected)
    assert packed
    with save_on_cpu():
        out = attention(*inputs, backend=backend)
    assert_close(torch.autograd.grad(out.square().sum(), inputs), expected)


@needs_cpu_kernels
def test_inputs_changed_in_place_before_the_backward_are_noticed() -> None:
    query, key, value = tensors(requires_grad=True)
    doubled = key * 2
    out = attention(query, doubled, value, backend="cpu")
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_recording(backend: str) -> None:
    inputs = tensors(requires_grad=True)
    expected = by_torch(*inputs).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = attention(*inputs, backend=backend)
        assert not out.requires_grad
        assert_close(out, expected)
    with torch.inference_mode():
        made = tensors()
        assert attention(*made, backend=backend).is_inference()


@needs_cpu_kernels
@pytest.mark.parametrize("num_heads_kv", [2, 1])
def test_flops_are_those_that_torch_counts_for_its_own_attention(num_heads_kv: int) -> None:
    query, key, value = (
        torch.randn(2, heads, length, 8, requires_grad=True) for heads, length in ((2, 5), (num_heads_kv, 7), (num_heads_kv, 7))
    )
    repeated = [tensor.repeat_interleave(2 // num_heads_kv, 1) for tensor in (key, value)]
    counts = []
    for call in (lambda: attention(query, key, value, backend="cpu"), lambda: by_torch(query, *repeated)):
        with FlopCounterMode(display=False) as counter:
            out = call()
            forward = counter.get_total_flops()
            out.sum().backward()
        counts.append((forward, counter.get_total_flops() - forward))
    ours, theirs = counts
    assert ours[0] == theirs[0] == 2 * 2 * 2 * 5 * 7 * (8 + 8)
    assert ours[1] == theirs[1] + 2 * 2 * 2 * 5 * 7 * 8  # the scores, which the kernel computes again
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward
    assert ours[1] == torch.utils.flop_counter.flop_registry[kernel](*[torch.empty(2, 2, n, 8) for n in (5, 5, 7, 7)], out_val=None)


@needs_cpu_kernels
def test_flops_of_packed_layouts() -> None:
    def count(function: Callable, *inputs: Tensor, **options: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            function(*inputs, **options, backend="cpu").sum().backward()
        return counter.get_total_flops()

    rows = [torch.randn(2, 3, 6, 8, requires_grad=True) for _ in range(3)]
    expected = count(attention, *rows)
    assert expected == 2 * 2 * 3 * 6 * 6 * 7 * 8
    assert count(attention_qkv_packed, torch.randn(2, 6, 3, 3, 8, requires_grad=True)) == expected
    assert count(attention_kv_packed, rows[0], torch.randn(2, 6, 2, 3, 8, requires_grad=True)) == expected
    tokens = torch.randn(12, 3, 8, requires_grad=True)
    for starts, scores in (([0, 6, 12], 2 * 36), ([0, 2, 12], 4 + 100)):
        starts = torch.tensor(starts)
        call = partial(attention_varlen, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=12, max_seqlen_k=12)
        assert count(call, tokens, tokens, tokens) == 2 * 3 * scores * 7 * 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_query_key_and_value_and_nothing_else(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = routing.choose
    monkeypatch.setattr("fused_attention.kernels.attention.choose", lambda problem, name: seen.append(problem) or run(problem, name))
    query, key, value = (
        tensor.requires_grad_() for tensor in (torch.randn(2, 2, 5, 4), torch.randn(2, 2, 7, 4).half(), torch.randn(2, 2, 7, 4).bfloat16())
    )
    side = {
        "attn_mask": MASK.clone().requires_grad_(),
        "alibi_slopes": torch.rand(2, requires_grad=True),
        "sinks": torch.rand(2).half().requires_grad_(),
    }
    with pytest.raises(TypeError, match="key must have the dtype of query"):
        attention(query, key, value, **side, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(query, key, value, **side, return_lse=True, backend=backend)
        assert scaled_dot_product_attention(query, key, value).dtype == torch.bfloat16
        assert attention_weights(query, key, lse.detach()).dtype == torch.bfloat16
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    problem = seen[0]
    assert {tensor.dtype for tensor in problem.inputs} == {torch.bfloat16}
    assert [problem.attn_mask.dtype, problem.alibi_slopes.dtype, problem.sinks.dtype] == [torch.float32, torch.float32, torch.float16]
    leaves = [query, key, value, *side.values()]
    out.float().sum().backward()  # outside autocast, as torch asks for
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*tensors(dtype=torch.float64), backend=None).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert attention(*tensors(), backend=backend).dtype == torch.float32


@needs_cpu_kernels
def test_second_derivatives_under_autocast() -> None:
    """The reference in the backward pass computes in the dtype of the forward pass, whatever is cast around it."""
    inputs = tensors(requires_grad=True)

    def second(backend: str) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(*inputs, backend=backend)
            first = torch.autograd.grad(out.float().square().sum(), inputs, create_graph=True)
            return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)

    for ours, expected in zip(second("cpu"), second("reference"), strict=True):
        assert_close(ours, expected, rtol=0.1, atol=0.05 * expected.abs().max().item())


def test_autocast_changes_no_bit_of_the_reference() -> None:
    """It would compute float32 scores in bfloat16."""
    inputs = tuple(tensor.detach().bfloat16().requires_grad_() for tensor in tensors())

    def results(context: Any) -> tuple[Tensor, ...]:
        with context:
            out, lse = attention(*inputs, return_lse=True, backend="reference")
        return out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), inputs)

    for ours, expected in zip(results(torch.autocast("cpu", torch.bfloat16)), results(nullcontext()), strict=True):
        assert torch.equal(ours, expected)


def test_scaled_dot_product_attention_through_functorch() -> None:
    inputs = tensors()
    apply = TRANSFORMS["jacrev"]
    assert_close(
        apply(scaled_dot_product_attention, inputs, None), apply(F.scaled_dot_product_attention, inputs, None), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_through_functorch(backend: str) -> None:
    query, key, value = tensors()

    def weights(query: Tensor, key: Tensor) -> Tensor:
        _, lse = attention(query, key, value, return_lse=True, backend=backend)
        return attention_weights(query, key, lse)

    def expected(query: Tensor, key: Tensor) -> Tensor:
        return torch.softmax(query @ key.mT / 2, -1)

    assert_close(torch.func.jacrev(weights, (0, 1))(query, key), torch.func.jacrev(expected, (0, 1))(query, key), rtol=1e-4, atol=1e-5)
