"""torch.compile, export and AOTInductor: one operator in the graph, few compilations, the same numbers and the same dropout mask."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fused_attention import (
    MultiHeadAttention,
    PreparedMask,
    attention,
    attention_decode,
    attention_varlen,
    attention_weights,
    prepare_mask,
    replace_attention,
    scaled_dot_product_attention,
)
from fused_attention.kernels.native import cpu
from fused_attention.kernels.torch_internals import release

pytestmark = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def tensors(seqlen: int = 12, batch: int = 2, requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(batch, 4, seqlen, 8, dtype=dtype).requires_grad_(requires_grad) for _ in range(3)]


def varlen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    tokens = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    starts = torch.arange(query.shape[0] + 1) * query.shape[2]
    return attention_varlen(*tokens, starts, starts, query.shape[2], query.shape[2], is_causal=True)


def decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    lengths = torch.full((query.shape[0],), query.shape[2] - 1)
    with torch.no_grad():
        return attention_decode(query[:, :, :1], key, value, lengths)


def weights(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    _, lse = attention(query, key, value, return_lse=True)
    return attention_weights(query, key, lse)


def with_prepared_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, attn_mask=prepare_mask(is_causal=True, seqlen_q=query.shape[2], seqlen_k=key.shape[2]))


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "attention": partial(attention, is_causal=True),
    "reference": partial(attention, is_causal=True, backend="reference"),
    "scaled_dot_product_attention": partial(scaled_dot_product_attention, is_causal=True),
    "attention_varlen": varlen,
    "attention_decode": decode,
    "attention_weights": weights,
    "prepare_mask": with_prepared_mask,
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_few_compilations_serve_all_sizes(function: str) -> None:
    """Without being told which sizes change: one for those given first, one with the length free, one with the batch free too.

    Lengths above 64, where a mask has several tiles: torch.compile treats what is 1 apart from everything else.
    """
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(FUNCTIONS[function], fullgraph=True, backend=counter)
    for batch, seqlen in ((2, 70), (2, 81), (2, 96), (3, 70), (5, 128), (4, 193)):
        inputs = tensors(seqlen, batch)
        ours, expected = compiled(*inputs), FUNCTIONS[function](*inputs)
        assert_close(ours, expected)
        if function != "attention_decode":
            gradients, expected_gradients = (torch.autograd.grad(out.square().sum(), inputs[:2]) for out in (ours, expected))
            assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3


def unmasked(tensor: Tensor, keep: Tensor) -> Tensor:
    """(1, 2, L, 8), L known only when the values of `keep` are."""
    return tensor[keep].transpose(0, 1)[None]


def with_dense_mask(tensor: Tensor, backend: str) -> Tensor:
    length = tensor.shape[2]
    return attention(tensor, tensor, tensor, attn_mask=torch.ones(length, length, dtype=torch.bool), backend=backend)


UNBACKED: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "length": lambda x, keep, backend: attention(*[unmasked(x, keep)] * 3, is_causal=True, backend=backend),
    "keys": lambda x, keep, backend: attention(x.transpose(0, 1)[None], *[unmasked(x, keep)] * 2, backend=backend),
    "length and mask": lambda x, keep, backend: with_dense_mask(unmasked(x, keep), backend),
    "batch": lambda x, keep, backend: attention(*[x[keep][:, :, None]] * 3, backend=backend),
    "tokens": lambda x, keep, backend: attention_varlen(*[x[keep]] * 3, *[torch.tensor([0, 4, 6])] * 2, backend=backend),
    "bound": lambda x, keep, backend: attention_varlen(*[x] * 3, *[torch.tensor([0, 4, 9])] * 2, *[keep.sum().item()] * 2, backend=backend),
    "bound in a tensor": lambda x, keep, backend: attention_varlen(
        *[x] * 3, *[torch.tensor([0, 4, 9])] * 2, keep.sum(), keep.sum(), backend=backend
    ),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", UNBACKED)
def test_sizes_that_only_values_tell(case: str, backend: str) -> None:
    config = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    function = partial(UNBACKED[case], backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 2, 8, requires_grad=True)
    with torch._dynamo.config.patch(config):
        for keep in (torch.arange(9) < 6, torch.arange(9) % 3 != 1):
            ours, expected = compiled(x, keep), function(x, keep)
            assert_close(ours, expected)
            assert_close(*[torch.autograd.grad(out.square().sum(), x) for out in (ours, expected)])


def test_symbolic_sizes_do_not_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a registered decomposition would, where fake tensors of symbolic sizes look first."""

    def reference(problem: Any) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr("fused_attention.kernels.ops.attention_reference", reference)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        query = torch.randn(2, 3, length, 16)
        assert_close(compiled(query, query, query), scaled_dot_product_attention(query, query, query))


def test_a_diagonal_that_moves_from_call_to_call() -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda q, k, n: attention(q, k, k, is_causal=True, diagonal=n), backend=counter, fullgraph=True, dynamic=True)
    query = torch.randn(2, 4, 5, 16)
    for cached in (3, 7, 9, 12):
        key = torch.randn(2, 4, cached + 5, 16)
        assert_close(compiled(query, key, cached), attention(query, key, key, is_causal="bottom_right"))
    assert counter.frame_count == 1


def test_options_that_change_from_call_to_call() -> None:
    """Numbers that are options become constants of the graph, all the same ones find it again."""
    counter = CompileCounter()
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    inputs = tensors(requires_grad=False)
    for _ in range(3):
        for options in ({}, {"is_causal": True}, {"window": (3, 0)}, {"scale": 0.5}):
            assert_close(compiled(*inputs, **options), attention(*inputs, **options))
    assert counter.frame_count == 4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_derivatives_of_derivatives_are_refused(backend: str) -> None:
    inputs = tensors()
    out = torch.compile(partial(attention, backend=backend), fullgraph=True, backend="aot_eager")(*inputs)
    gradients = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradients[0].sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_functorch_inside(transform: str) -> None:
    def function(query: Tensor, key: Tensor, value: Tensor) -> Any:
        if transform == "grad":
            return torch.func.grad(lambda x: attention(x, key, value).square().sum())(query)
        if transform == "vmap":
            return torch.vmap(lambda *x: attention(*(t[None] for t in x))[0])(query, key, value)
        return torch.func.jvp(lambda x: attention(x, key, value), (query,), (value,))

    inputs = tensors(requires_grad=False)
    assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), function(*inputs))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_around_and_inside(backend: str) -> None:
    def inside(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attention(*inputs, backend=backend)

    inputs = tensors()
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    around = torch.compile(partial(attention, backend=backend), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = around(*inputs)
    expected = inside(*inputs)
    for ours in (out, compiled(*inputs)):
        assert ours.dtype == torch.bfloat16
        assert_close(ours, expected)
        gradients = torch.autograd.grad(ours.float().sum(), inputs)
        expected_gradients = torch.autograd.grad(expected.float().sum(), inputs, retain_graph=True)
        # The reference's backward pass is traced under the autocast of the forward pass, with its products in bfloat16.
        tolerance = {"atol": 2e-2, "rtol": 2e-2} if backend == "reference" else {}
        assert_close(gradients, expected_gradients, **tolerance)


SELECTED = {torch.ops.fused_attention.attention_separate.default}


def keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SELECTED else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("kind", ["recomputed", "selective"])
def test_checkpointing_inside(kind: str) -> None:
    """The dropout mask of the second forward pass is that of the first: the loss is linear in the values, so their gradients tell."""
    options = {"context_fn": partial(create_selective_checkpoint_contexts, keep_attention)} if kind == "selective" else {}

    def block(*inputs: Tensor) -> Tensor:
        return attention(*inputs, dropout_p=0.5).sin()

    def function(*inputs: Tensor) -> Tensor:
        return checkpoint(block, *inputs, use_reentrant=False, **options)

    graphs: list[list[str]] = []

    def count(graph: torch.fx.GraphModule, _: list) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    query, key, value = tensors()
    backend = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=count, bw_compiler=count, partition_fn=torch._functorch.partitioners.min_cut_rematerialization_partition
    )
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.manual_seed(3)
    ours = compiled(query, key, value)
    gradients = torch.autograd.grad(ours.sum(), (query, key, value))
    torch.manual_seed(3)
    expected = block(query, key, value)
    assert_close(ours, expected)
    assert_close(gradients, torch.autograd.grad(expected.sum(), (query, key, value)))
    operator = "fused_attention.attention_separate.default"
    assert [graph.count(operator) for graph in graphs] == [1, 0 if kind == "selective" else 1]


@needs_compiler
def test_the_same_rng_state_draws_the_same_mask_however_it_is_run() -> None:
    """Values of ones: the output is the share of the weights that was kept, gradients of the values likewise."""
    query, key, _ = tensors(40)
    value, state = torch.ones_like(key).requires_grad_(), torch.tensor([2**40 + 3, 2**35 + 4])

    def call(query: Tensor, key: Tensor, value: Tensor, state: Tensor, backend: str | None = "cpu") -> Tensor:
        return attention(query, key, value, dropout_p=0.5, rng_state=state, backend=backend)

    ways: dict[str, Callable[..., Tensor]] = {
        "eager": call,
        "again": call,
        "reference": partial(call, backend="reference"),
        "aot_eager": torch.compile(call, fullgraph=True, backend="aot_eager"),
        "inductor": torch.compile(call, fullgraph=True),
        "checkpointed": lambda *inputs: checkpoint(call, *inputs, use_reentrant=False),
        "reentrant": lambda *inputs: checkpoint(call, *inputs, use_reentrant=True),
        "checkpointed and compiled": torch.compile(lambda *inputs: checkpoint(call, *inputs, use_reentrant=False), backend="aot_eager"),
        "vmap": lambda *inputs: torch.vmap(call, (0, 0, 0, None))(*(x[None] for x in inputs[:3]), inputs[3])[0],
    }
    results = {}
    for name, way in ways.items():
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        torch.manual_seed(len(results))  # torch's generator has no say
        out = way(*leaves, state)
        out.square().sum().backward()
        results[name] = [out.detach(), *(leaf.grad for leaf in leaves)]
    for name, result in results.items():
        assert_close(result, results["eager"], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    _, lse = attention(query, key, value, return_lse=True, dropout_p=0.5, rng_state=state)
    kept = attention_weights(query, key, lse, dropout_p=0.5, rng_state=state)
    assert_close(kept @ value, results["eager"][0])
    other = call(query, key, value, state + 1)
    assert (other - results["eager"][0]).abs().mean() > 0.05


def test_a_compiled_call_draws_its_state_from_torchs_generator() -> None:
    inputs = tensors()
    compiled = torch.compile(partial(attention, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = compiled(*inputs), compiled(*inputs)
    torch.manual_seed(3)
    assert torch.equal(first, attention(*inputs, dropout_p=0.5))
    assert not torch.equal(first, second)


class Attend(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = MultiHeadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.attend(x, x, x, key_padding_mask=padding, need_weights=False)[0]


def batch(size: int, seqlen: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, seqlen, 32), torch.arange(seqlen) >= torch.randint(1, seqlen + 1, (size, 1))


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_free_sizes_and_back_from_a_file(strict: bool, tmp_path: Path) -> None:
    module = Attend().eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")}
    with torch.no_grad():
        exported = torch.export.export(module, batch(2, 12), dynamic_shapes=(sizes, sizes), strict=strict)
    assert sum("fused_attention.attention" in str(node.target) for node in exported.graph.nodes) == 1
    torch.export.save(exported, tmp_path / "attend.pt2")
    loaded = torch.export.load(tmp_path / "attend.pt2").module()
    for size, seqlen in ((2, 12), (5, 33)):
        inputs = batch(size, seqlen)
        assert_close(loaded(*inputs), module(*inputs))
    assert_close(exported.run_decompositions().module()(*inputs), module(*inputs))


def test_exported_weights_and_back_from_a_file(tmp_path: Path) -> None:
    module = MultiHeadAttention(32, 4, batch_first=True).eval()
    x, _ = batch(2, 5)
    torch.export.save(torch.export.export(module, (x, x, x)), tmp_path / "weights.pt2")
    assert_close(torch.export.load(tmp_path / "weights.pt2").module()(x, x, x), module(x, x, x))


@pytest.mark.skipif(release(torch.__version__) < (2, 11), reason="torch 2.10 cannot trace its decoder's bool(mask == ...)")
def test_a_swapped_decoder_whose_mask_must_be_looked_at_to_know_that_it_is_causal() -> None:
    """torch's decoder asks the values of tgt_mask; with its own attention the answer is a guard that cannot be made."""
    layer = torch.nn.TransformerDecoderLayer(32, 4, 32, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerDecoder(layer, 1)
    replace_attention(model)
    tgt, memory = torch.randn(2, 4, 32), torch.randn(2, 5, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tgt_mask in (mask, 0.5 * torch.ones(4, 4).tril()):
        assert_close(compiled(tgt, memory, tgt_mask=tgt_mask), model(tgt, memory, tgt_mask=tgt_mask))


class Operation(torch.nn.Module):
    def forward(self, query: Tensor, lengths: Tensor) -> Tensor:
        return attention(query, query, query, key_lengths=lengths, is_causal=True)


@needs_compiler
def test_ahead_of_time_compilation(tmp_path: Path) -> None:
    """AOTInductor: a shared library that calls the operator."""
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("seqlen")}

    def inputs(size: int, seqlen: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, 4, seqlen, 8), torch.randint(seqlen + 1, (size,), dtype=torch.int32)

    with torch.no_grad():
        exported = torch.export.export(Operation(), inputs(3, 12), dynamic_shapes=(sizes, {0: sizes[0]}))
        options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "op.pt2"), inductor_configs=options)
        loaded = torch._inductor.aoti_load_package(package)
        for call in (inputs(3, 12), inputs(5, 33)):
            assert_close(loaded(*call), Operation()(*call))


@needs_compiler
def test_a_module_through_inductor_forward_and_backward() -> None:
    module = Attend()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size, seqlen in ((2, 12), (5, 33)):
        x, padding = batch(size, seqlen)
        module.zero_grad()
        compiled.zero_grad()
        module(x, padding).square().sum().backward()
        compiled(x, padding).square().sum().backward()
        for ours, expected in zip(compiled.parameters(), module.parameters(), strict=True):
            assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_a_prepared_mask_is_an_argument_of_a_compiled_function() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def function(query: Tensor, key: Tensor, value: Tensor, mask: PreparedMask) -> Tensor:
        return attention(query, key, value, attn_mask=mask)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    inputs = tensors()
    for length in (5, 9, 12):  # the same sizes: other values of the mask do not matter
        mask = prepare_mask(key_lengths=torch.tensor([length, 3]), seqlen_q=12, seqlen_k=12)
        assert_close(compiled(*inputs, mask), function(*inputs, mask))
    assert counter.frame_count == 1
