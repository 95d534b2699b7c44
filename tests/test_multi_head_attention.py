"""MultiHeadAttention against torch.nn.MultiheadAttention with the same parameters."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from accuracy import assert_accurate
from torch.testing import assert_close

from fused_attention import prepare_mask
from fused_attention.transformer import attention as attention_module
from fused_attention.transformer.attention import MultiHeadAttention

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, EMBED = 2, 7, 19, 3, 24


def pair(*args, **kwargs) -> tuple[torch.nn.MultiheadAttention, MultiHeadAttention]:
    """torch's module and ours with the same random parameters, biases included (torch starts them at zero)."""
    theirs = torch.nn.MultiheadAttention(*args, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(-0.5, 0.5)
    ours = MultiHeadAttention(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def results_and_gradients(module, inputs, **kwargs) -> dict[str, torch.Tensor]:
    """Output, weights, and the gradients of a weighted sum of both; float masks in kwargs count as inputs."""
    differentiable = {f"input {i}": t for i, t in enumerate(inputs)}
    differentiable |= {name: t for name, t in kwargs.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    differentiable |= dict(module.named_parameters())
    output, weights = module(*inputs, **kwargs)
    results = {"output": output} if weights is None else {"output": output, "weights": weights}
    generator = torch.Generator().manual_seed(5)
    loss = torch.zeros((), dtype=torch.float64)
    for t in results.values():
        loss = loss + (t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum()
    gradients = torch.autograd.grad(loss, list(differentiable.values()), allow_unused=True)
    return results | {f"gradient of {name}": g for name, g in zip(differentiable, gradients, strict=True)}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            assert_close(ours[name], expected, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_as_accurate_as_torch(theirs, ours, inputs, autocast: torch.dtype | None = None, **kwargs) -> None:
    """The accuracy rule, with torch's module in float64 as the truth and in the dtype at hand as the peer."""
    doubled: dict[int, torch.Tensor] = {}  # by identity: one tensor given three times stays one

    def double(t):
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            return doubled.setdefault(id(t), t.detach().double().requires_grad_(t.requires_grad))
        return t

    exact = results_and_gradients(
        copy.deepcopy(theirs).double(), [double(t) for t in inputs], **{name: double(t) for name, t in kwargs.items()}
    )
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        peer, actual = (results_and_gradients(module, inputs, **kwargs) for module in (theirs, ours))
    for name, expected in exact.items():
        if expected is None:
            assert actual[name] is None, name
        else:
            assert actual[name].dtype is peer[name].dtype, name
            kind = "gradient" if name.startswith("gradient") else "out"
            # float32 gradients of an autocast computation are sums of rounded terms: they are judged in the autocast dtype
            dtype = autocast or actual[name].dtype
            assert_accurate(name, kind, actual[name].to(dtype), peer[name].to(dtype), expected)


def make_inputs(kind: str, batch_first: bool, dtype=torch.float64, kdim=EMBED, vdim=EMBED) -> tuple[torch.Tensor, ...]:
    """(query, key, value): one tensor three times ("self"), memory twice ("cross"), or three tensors ("separate")."""
    seqlen_k = SEQLEN_Q if kind == "self" else SEQLEN_K

    def tensor(seqlen: int, dim: int) -> torch.Tensor:
        shape = (BATCH, seqlen, dim) if batch_first else (seqlen, BATCH, dim)
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    query = tensor(SEQLEN_Q, EMBED)
    if kind == "self":
        return query, query, query
    key = tensor(seqlen_k, kdim)
    return query, key, key if kind == "cross" else tensor(seqlen_k, vdim)


def make_masks(kind: str, seqlen_k: int, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """torch's masks, True = blocked; every query keeps a key, because torch's module is NaN where none is left."""
    padding = torch.zeros(BATCH, seqlen_k, dtype=torch.bool)
    padding[0, -3:] = padding[1, 2] = True
    blocked = torch.rand(BATCH * HEADS, SEQLEN_Q, seqlen_k) < 0.3
    blocked[..., 0] = False
    bias = torch.randn(BATCH * HEADS, SEQLEN_Q, seqlen_k, dtype=dtype)
    finite = torch.randn(BATCH, seqlen_k, dtype=dtype, requires_grad=True)
    as_float = torch.zeros(BATCH, seqlen_k, dtype=dtype).masked_fill(padding, float("-inf"))
    return {
        "no mask": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": as_float},
        "finite padding": {"key_padding_mask": finite},
        "2-D bool": {"attn_mask": blocked[0]},
        "2-D float": {"attn_mask": bias[0].clone().requires_grad_()},
        "3-D bool": {"attn_mask": blocked},
        "3-D float": {"attn_mask": bias.clone().requires_grad_()},
        "padding and 3-D bool": {"key_padding_mask": padding, "attn_mask": blocked},
        "padding and 2-D float": {"key_padding_mask": as_float, "attn_mask": bias[0].clone().requires_grad_()},
        "float padding and 2-D bool": {"key_padding_mask": as_float, "attn_mask": blocked[0]},
        "padding and 3-D float": {"key_padding_mask": padding, "attn_mask": bias.clone().requires_grad_()},
        "finite padding and 3-D float": {"key_padding_mask": finite, "attn_mask": bias.clone().requires_grad_()},
        "finite padding and 2-D bool": {"key_padding_mask": finite, "attn_mask": blocked[0]},
    }[kind]


MASKS = (
    "no mask",
    "padding",
    "float padding",
    "finite padding",
    "2-D bool",
    "2-D float",
    "3-D bool",
    "3-D float",
    "padding and 3-D bool",
    "padding and 2-D float",
    "float padding and 2-D bool",
    "padding and 3-D float",
    "finite padding and 3-D float",
    "finite padding and 2-D bool",
)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
def test_equals_torch(kind, batch_first, mask):
    theirs, ours = pair(EMBED, HEADS, batch_first=batch_first, dtype=torch.float64)
    inputs = make_inputs(kind, batch_first)
    masks = make_masks(mask, SEQLEN_Q if kind == "self" else SEQLEN_K)
    for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected = results_and_gradients(theirs, inputs, **masks, **options)
        assert_same(results_and_gradients(ours, inputs, **masks, **options), expected)


@pytest.mark.parametrize("mask", ["no mask", "padding", "2-D float", "padding and 3-D bool"])
@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
@pytest.mark.parametrize(
    "configuration",
    [
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
        {"kdim": 10, "vdim": 10},
        {"kdim": 10, "vdim": 6},
        {"kdim": 10, "vdim": 6, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=lambda configuration: " ".join(f"{name}={value}" for name, value in configuration.items()),
)
def test_configurations_equal_torch(configuration, kind, mask):
    kdim, vdim = configuration.get("kdim", EMBED), configuration.get("vdim", EMBED)
    if (kind == "self" and kdim != EMBED) or (kind == "cross" and kdim != vdim):
        kind = "separate"
    theirs, ours = pair(EMBED, HEADS, batch_first=True, dtype=torch.float64, **configuration)
    inputs = make_inputs(kind, True, kdim=kdim, vdim=vdim)
    masks = make_masks(mask, inputs[1].shape[1])
    for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected = results_and_gradients(theirs, inputs, **masks, **options)
        assert_same(results_and_gradients(ours, inputs, **masks, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_torch_on_its_own_samples(training, dtype):
    """The inputs that torch tests its module on ship in its wheel; all of them are without a batch dimension."""
    from torch.testing._internal.common_modules import module_inputs_torch_nn_MultiheadAttention

    samples = module_inputs_torch_nn_MultiheadAttention(None, "cpu", dtype, True, training)
    assert samples
    # float32: the scores reach 81 and the softmax saturates, so differences of large terms are left in the gradients;
    # with 9 to 27 elements torch's own error is luck, too thin for the accuracy rule.
    tolerance = {} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
    for sample in samples:
        theirs, ours = pair(*sample.constructor_input.args, **sample.constructor_input.kwargs, dtype=dtype)
        theirs.train(training)
        ours.train(training)
        inputs, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        expected = results_and_gradients(theirs, inputs, **kwargs)
        assert_same(results_and_gradients(ours, inputs, **kwargs), expected, **tolerance)
        with torch.no_grad():
            assert_close(ours(*inputs, **kwargs), sample.reference_fn(ours, *inputs, **kwargs), **tolerance)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("with_padding", [True, False])
def test_the_mask_is_read_exactly_where_torch_reads_it(need_weights, with_padding):
    theirs, ours = pair(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    inputs = make_inputs("self", True)
    causal = torch.full((SEQLEN_Q, SEQLEN_Q), float("-inf"), dtype=torch.float64).triu(1)
    options = {"attn_mask": causal + torch.arange(SEQLEN_Q), "is_causal": True, "need_weights": need_weights}
    if with_padding:
        options |= {"key_padding_mask": make_masks("float padding", SEQLEN_Q)["key_padding_mask"]}
    assert_same(results_and_gradients(ours, inputs, **options), results_and_gradients(theirs, inputs, **options))


def test_a_mask_that_is_not_read_may_have_any_size():
    theirs, ours = pair(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    inputs = make_inputs("self", True)
    options = {"attn_mask": torch.zeros(64, 64), "is_causal": True, "need_weights": False}
    assert_close(ours(*inputs, **options), theirs(*inputs, **options))
    _, extra = pair(EMBED, HEADS, batch_first=True, add_zero_attn=True, dtype=torch.float64)
    causal = torch.ones(SEQLEN_Q, SEQLEN_Q, dtype=torch.bool).triu(1)
    assert_close(extra(*inputs, **options), extra(*inputs, attn_mask=causal, need_weights=False))


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_prepared_mask_means_itself(need_weights):
    _, ours = pair(EMBED, HEADS, batch_first=True)
    inputs = make_inputs("self", True, torch.float32)
    padding = make_masks("padding", SEQLEN_Q)["key_padding_mask"]
    allowed = torch.ones(SEQLEN_Q, SEQLEN_Q, dtype=torch.bool).tril(2)
    prepared = prepare_mask(allowed, ~padding)
    expected = results_and_gradients(ours, inputs, attn_mask=~allowed, key_padding_mask=padding, need_weights=need_weights)
    for is_causal in (False, True):  # a hint, which it does not need
        options = {"attn_mask": prepared, "is_causal": is_causal, "need_weights": need_weights}
        assert_same(results_and_gradients(ours, inputs, **options), expected)
    with pytest.raises(ValueError, match="key_padding_mask must not be given beside a PreparedMask"):
        ours(*inputs, attn_mask=prepared, key_padding_mask=padding)
    with pytest.raises(TypeError, match=r"attn_mask must be a torch\.Tensor, got list"):
        ours(*inputs, attn_mask=[1])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_sequences_without_padding(kind, layout):
    theirs, ours = pair(EMBED, HEADS, batch_first=True)
    parts = [torch.randn(length, EMBED, requires_grad=True) for length in (3, 5, 1)]
    others = parts if kind == "self" else [torch.randn(length, EMBED, requires_grad=True) for length in (2, 4, 6)]
    query = torch.nested.as_nested_tensor(parts, layout=layout)
    key = query if kind == "self" else torch.nested.as_nested_tensor(others, layout=layout)
    output, weights = ours(query, key, key, need_weights=False)
    assert weights is None
    assert output.layout is layout
    assert (query + output).is_nested
    expected = [theirs(x, y, y, need_weights=False)[0] for x, y in zip(parts, others, strict=True)]
    assert_close(list(output.unbind()), expected)
    leaves = [*parts, *others, *ours.parameters()]
    gradients = torch.autograd.grad(sum(x.square().sum() for x in output.unbind()), leaves)
    leaves = [*parts, *others, *theirs.parameters()]
    assert_close(gradients, torch.autograd.grad(sum(x.square().sum() for x in expected), leaves), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors_do_not_become_jagged_ones(monkeypatch):
    """torch logs a warning where it makes these, and torch's encoder makes strided ones of any padded batch."""
    monkeypatch.setattr(torch.nested, "nested_tensor_from_jagged", None)
    x = torch.nested.as_nested_tensor([torch.randn(3, EMBED), torch.randn(5, EMBED)], layout=torch.strided)
    _, ours = pair(EMBED, HEADS, batch_first=True)
    assert ours(x, x, x, need_weights=False)[0].layout is torch.strided


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_weights_of_nested_tensors_are_torchs(average, layout):
    theirs, ours = pair(8, 2, batch_first=True)  # torch takes an even number of heads
    parts = [torch.randn(length, 8, requires_grad=True) for length in (3, 5, 1)]
    x = torch.nested.as_nested_tensor(parts, layout=layout)
    output, weights = ours(x, x, x, average_attn_weights=average)
    assert output.layout is layout
    assert (x + output).is_nested
    with torch.no_grad():
        strided = torch.nested.as_nested_tensor(parts, layout=torch.strided)
        expected_output, expected_weights = theirs.eval()(strided, strided, strided, average_attn_weights=average)
    assert_close(list(output.unbind()), list(expected_output.unbind()))
    assert_close(weights, expected_weights)  # 0 where there is no query or no key
    alone = [ours(part, part, part, average_attn_weights=average) for part in parts]
    loss = sum(x.square().sum() for x in output.unbind()) + weights.square().sum()
    expected_loss = sum(out.square().sum() + of_one.square().sum() for out, of_one in alone)
    gradients, expected = (torch.autograd.grad(total, [*parts, *ours.parameters()]) for total in (loss, expected_loss))
    assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_weights_of_nested_tensors_between_sequences_of_other_lengths(layout):
    _, ours = pair(EMBED, HEADS, batch_first=True)
    queries, others = ([torch.randn(length, EMBED) for length in lengths] for lengths in ((3, 5, 1), (2, 4, 6)))
    query, key = (torch.nested.as_nested_tensor(parts, layout=layout) for parts in (queries, others))
    output, weights = ours(query, key, key, is_causal=True)
    assert weights.shape == (3, 5, 6)
    for index, (x, y) in enumerate(zip(queries, others, strict=True)):
        blocked = torch.ones(len(x), len(y), dtype=torch.bool).triu(1)
        alone, alone_weights = ours(x, y, y, attn_mask=blocked, is_causal=True)
        assert_close(output.unbind()[index], alone)
        assert_close(weights[index, : len(x), : len(y)], alone_weights)
    assert_close(weights.sum(dim=-1), torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]))
    value = torch.nested.as_nested_tensor(others[::-1], layout=layout)
    with pytest.raises(AssertionError, match="key's sequence lengths do not match value's"):
        ours(query, key, value)


def test_is_causal_with_appended_keys_keeps_them_visible():
    # torch's own is_causal=True hides the appended keys when need_weights=False: a hint must not change the result.
    theirs, ours = pair(EMBED, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True, dtype=torch.float64)
    inputs = make_inputs("self", True)
    causal = torch.ones(SEQLEN_Q, SEQLEN_Q, dtype=torch.bool).triu(1)
    expected, _ = theirs(*inputs, attn_mask=causal)
    assert_close(ours(*inputs, attn_mask=causal, is_causal=True, need_weights=False)[0], expected)


@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_fully_padded_sequence(kind, batch_first):
    _, ours = pair(EMBED, HEADS, batch_first=batch_first)
    inputs = make_inputs(kind, batch_first, torch.float32)
    seqlen_k = SEQLEN_Q if kind == "self" else SEQLEN_K
    for padding in (torch.zeros(BATCH, seqlen_k, dtype=torch.bool), torch.zeros(BATCH, seqlen_k)):
        padding[1] = True if padding.dtype is torch.bool else float("-inf")
        for mode, need_weights in itertools.product((True, False), (True, False)):
            ours.train(mode)
            named = results_and_gradients(ours, inputs, key_padding_mask=padding, need_weights=need_weights)
            assert all(t.isfinite().all() for t in named.values())
            output = named["output"] if batch_first else named["output"].transpose(0, 1)
            assert_close(output[1], ours.out_proj.bias.expand(SEQLEN_Q, EMBED))
            if need_weights:
                assert not named["weights"][1].any()
                assert_close(named["weights"][0].sum(-1), torch.ones(SEQLEN_Q))


def test_values_of_absent_keys_have_no_influence():
    _, ours = pair(EMBED, HEADS, batch_first=True)
    query, key, _ = make_inputs("cross", True, torch.float32)
    padding = torch.zeros(BATCH, SEQLEN_K, dtype=torch.bool)
    padding[:, 11:] = True
    poisoned = key.detach().masked_fill(padding[:, :, None], float("nan"))
    for mask in (padding, torch.zeros(BATCH, SEQLEN_K).masked_fill(padding, float("-inf"))):
        for need_weights in (True, False):
            clean, weights = ours(query, key, key, key_padding_mask=mask, need_weights=need_weights)
            output, poisoned_weights = ours(query, poisoned, poisoned, key_padding_mask=mask, need_weights=need_weights)
            assert_close(output, clean, rtol=0, atol=0)
            assert_close(poisoned_weights, weights, rtol=0, atol=0)


def test_nan_at_absent_keys_reaches_the_gradients_of_key_projections_alone():
    _, ours = pair(EMBED, HEADS, batch_first=True)
    query, key, _ = make_inputs("cross", True, torch.float32)
    padding = torch.zeros(BATCH, SEQLEN_K, dtype=torch.bool)
    padding[:, 11:] = True

    def gradients(key):
        leaves = [query.detach().requires_grad_(), key.detach().requires_grad_(), *ours.parameters()]
        output, _ = ours(leaves[0], leaves[1], leaves[1], key_padding_mask=padding, need_weights=False)
        names = ["query", "key", *dict(ours.named_parameters())]
        return dict(zip(names, torch.autograd.grad(output.square().sum(), leaves), strict=True))

    clean, poisoned = gradients(key), gradients(key.detach().masked_fill(padding[:, :, None], float("nan")))
    for name in ("query", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        assert_close(poisoned[name], clean[name])
    assert_close(poisoned["key"], clean["key"])
    assert_close(poisoned["in_proj_weight"][:EMBED], clean["in_proj_weight"][:EMBED])
    assert poisoned["in_proj_weight"][EMBED:].isnan().all()


@pytest.mark.parametrize(("kind", "num_inputs"), [("self", 1), ("cross", 2), ("separate", 3)], ids=["self", "cross", "separate"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_projections_stay_packed_and_nothing_is_copied(kind, num_inputs, batch_first, monkeypatch):
    seen = []
    layout, operation = attention_module._OPERATION_BY_INPUTS[num_inputs]

    def spy(*inputs, **options):
        seen.append((inputs, operation(*inputs, **options)))
        return seen[-1][1]

    monkeypatch.setitem(attention_module._OPERATION_BY_INPUTS, num_inputs, (layout, spy))
    module = MultiHeadAttention(EMBED, HEADS, batch_first=batch_first)
    merged = []
    module.out_proj.register_forward_pre_hook(lambda _, args: merged.append(args[0]))
    module(*make_inputs(kind, batch_first, torch.float32), need_weights=False)

    [(inputs, out)] = seen
    sequence_dim = 0 if not batch_first else 1
    for tensor in inputs[num_inputs - 1 :]:
        steps = tensor.stride(1 if tensor.dim() == 5 else 2), tensor.stride(0)
        assert (steps[0] > steps[1]) == (sequence_dim == 0), "the projection's memory order was changed"
    assert merged[0].untyped_storage().data_ptr() == out.untyped_storage().data_ptr(), "merging the heads copied"


def test_dropout_is_drawn_from_torch_and_only_in_training():
    module = MultiHeadAttention(EMBED, HEADS, dropout=0.5, batch_first=True)
    inputs = make_inputs("cross", True, torch.float32)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return module(*inputs, need_weights=False)[0]

    assert_close(run(1), run(1), rtol=0, atol=0)
    assert not torch.equal(run(1), run(2))
    module.eval()
    assert_close(run(1), run(2), rtol=0, atol=0)
    plain, _ = pair(EMBED, HEADS, batch_first=True)
    plain.load_state_dict(module.state_dict())
    assert_close(run(1), plain(*inputs)[0])


@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
def test_returned_weights_are_the_dropped_ones_that_made_the_output(kind):
    torch.manual_seed(3)
    dropout = 0.25
    _, ours = pair(EMBED, HEADS, dropout=dropout, batch_first=True, dtype=torch.float64)
    inputs = make_inputs(kind, True)
    output, weights = ours(*inputs, average_attn_weights=False)
    value = torch.nn.functional.linear(inputs[2], ours.in_proj_weight[2 * EMBED :], ours.in_proj_bias[2 * EMBED :])
    heads = weights @ value.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    assert_close(output, ours.out_proj(heads.transpose(1, 2).flatten(2)))
    undropped = ours.eval()(*inputs, average_attn_weights=False)[1]
    kept = weights != 0
    # torch's definition, with the probability rounded to 16 bits: kept weights are scaled by 1 / (1 - p)
    assert_close(weights[kept], undropped[kept] / (1 - dropout))
    # binomial: the standard deviation of the kept share is sqrt(p (1 - p) / n)
    assert abs(kept.double().mean() - (1 - dropout)) < 4 * (dropout * (1 - dropout) / kept.numel()) ** 0.5


def test_dropout_gradients_belong_to_the_same_draw():
    module = MultiHeadAttention(EMBED, HEADS, dropout=0.3, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 5, EMBED, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(11)
        return module(x, x, x, need_weights=False)[0]

    assert torch.autograd.gradcheck(run, (x,), fast_mode=True)


@pytest.mark.parametrize("mask", ["no mask", "padding", "2-D float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
def test_every_dtype_is_as_accurate_as_torch(kind, dtype, mask):
    theirs, ours = pair(EMBED, HEADS, batch_first=True, dtype=dtype)
    inputs = make_inputs(kind, True, dtype)
    masks = make_masks(mask, inputs[1].shape[1], dtype)
    for need_weights in (False, True):
        assert_as_accurate_as_torch(theirs, ours, inputs, need_weights=need_weights, **masks)


@pytest.mark.parametrize("configuration", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 10, "vdim": 6}], ids=str)
def test_autocast(configuration):
    theirs, ours = pair(EMBED, HEADS, batch_first=True, **configuration)
    kdim, vdim = configuration.get("kdim", EMBED), configuration.get("vdim", EMBED)
    inputs = make_inputs("separate", True, torch.float32, kdim, vdim)
    for need_weights in (False, True):
        masks = make_masks("padding", SEQLEN_K)
        assert_as_accurate_as_torch(theirs, ours, inputs, torch.bfloat16, need_weights=need_weights, **masks)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("lengths", [(0, 0), (0, 4), (3, 0)], ids=str)
def test_empty_sequences(lengths, batch_first):
    module = MultiHeadAttention(EMBED, HEADS, batch_first=batch_first)
    query, key = (torch.randn((2, n, EMBED) if batch_first else (n, 2, EMBED)) for n in lengths)
    output, weights = module(query, key, key)
    assert output.shape == query.shape
    assert weights.shape == (2, *lengths)
    if lengths[1] == 0:
        assert_close(output, module.out_proj.bias.expand_as(query))
