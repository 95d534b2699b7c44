"""replace_attention: swapped models compute and train as before, and nothing bypasses the new forward."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch.testing import assert_close

from fused_attention.transformer.attention import MultiHeadAttention
from fused_attention.transformer.replace import attention_calls, replace_attention, restore_attention

D_MODEL, HEADS = 16, 2

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True",
    "ignore:The PyTorch API of nested tensors",
    "ignore:Complex modules are a new feature",
    "ignore:.*torch.jit.script",
)


def encoder(num_layers: int = 2, **options) -> torch.nn.TransformerEncoder:
    layer = torch.nn.TransformerEncoderLayer(D_MODEL, HEADS, 32, dropout=0.0, batch_first=True, **options)
    return torch.nn.TransformerEncoder(layer, num_layers)


def swapped(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    replace_attention(model)
    return model


def count_calls(monkeypatch) -> list[MultiHeadAttention]:
    calls: list[MultiHeadAttention] = []
    forward = MultiHeadAttention.forward

    def counting(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MultiHeadAttention, "forward", counting)
    return calls


def results_and_gradients(model, inputs, kwargs) -> list[torch.Tensor]:
    output = model(*inputs, **kwargs)
    weighted = output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad(weighted.sum(), [*inputs, *model.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder", "Transformer"])
def test_swapped_modules_equal_torch_on_its_own_samples(name, training, dtype):
    """The inputs that torch tests its modules on ship in its wheel."""
    from torch.testing._internal import common_modules

    samples = getattr(common_modules, f"module_inputs_torch_nn_{name}")(None, "cpu", dtype, True, training)
    assert samples
    for sample in samples:
        construct = sample.constructor_input
        options = {} if name == "TransformerEncoder" else {"dtype": dtype}
        theirs = getattr(torch.nn, name)(*construct.args, **construct.kwargs, **options).train(training)
        ours = swapped(theirs)
        inputs, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        expected = results_and_gradients(theirs, inputs, kwargs)
        assert_close(results_and_gradients(ours, inputs, kwargs), expected)
        with torch.no_grad():
            assert_close(ours(*inputs, **kwargs), theirs(*inputs, **kwargs))  # the encoder zeroes padded positions of the memory


def stock(what: str) -> torch.nn.Module:
    options = {"dropout": 0.0, "batch_first": True}
    if what == "transformer":
        return torch.nn.Transformer(D_MODEL, HEADS, 2, 2, 32, **options)
    if "encoder" in what:
        layer = torch.nn.TransformerEncoderLayer(D_MODEL, HEADS, 32, **options)
        return layer if "layer" in what else torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    layer = torch.nn.TransformerDecoderLayer(D_MODEL, HEADS, 32, **options)
    return layer if "layer" in what else torch.nn.TransformerDecoder(layer, 2)


def inputs_and_masks(what: str, padded: bool) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    x = torch.randn(2, 5, D_MODEL)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    masked = ["memory_key_padding_mask"] if "decoder" in what or what == "transformer" else []
    masked += [] if "decoder" in what else ["src_key_padding_mask"]
    return (x, x) if "memory_key_padding_mask" in masked else (x,), dict.fromkeys(masked, padding) if padded else {}


def real_positions(what: str, masks: dict[str, torch.Tensor]) -> slice | torch.Tensor:
    """Of the output. What an encoder returns at padded positions depends on the mode."""
    return ~masks["src_key_padding_mask"] if masks and "encoder" in what else slice(None)


KINDS = ["encoder layer", "encoder", "decoder layer", "decoder", "transformer"]


@pytest.mark.parametrize("mode", ["train", "eval with grad", "eval without grad", "inference mode"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("what", KINDS)
def test_nothing_bypasses_the_forward(what, padded, mode, monkeypatch):
    calls = count_calls(monkeypatch)
    theirs = stock(what)
    model = swapped(theirs)
    args, masks = inputs_and_masks(what, padded)
    replacements = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    # deepcopy and pickle must keep the forward in use as well
    for clone in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        for module in (theirs, clone):
            module.train(mode == "train")
        with torch.inference_mode() if mode == "inference mode" else torch.set_grad_enabled(mode != "eval without grad"):
            output = clone(*args, **masks)
            expected = theirs(*args, **masks)
        assert len(calls) == len(replacements)
        assert len(set(map(id, calls))) == len(replacements)
        real = real_positions(what, masks)
        assert_close(output[real], expected[real])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval without grad"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("what", KINDS)
def test_nothing_bypasses_the_forward_in_compiled_models(what, padded, training):
    torch._dynamo.reset()
    model = swapped(stock(what)).train(training)
    args, masks = inputs_and_masks(what, padded)
    called: list[str] = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.set_grad_enabled(training):
        output, expected = torch.compile(model, backend=backend, fullgraph=True)(*args, **masks), model(*args, **masks)
    real = real_positions(what, masks)
    assert_close(output[real], expected[real])
    operations = sum(name.startswith("fused_attention.attention_") for name in called)
    assert operations == sum(isinstance(module, MultiHeadAttention) for module in model.modules())


def test_torch_bypasses_a_subclass_without_the_hook(monkeypatch):
    """If this fails, torch has closed the bypass and the hook is not needed any more."""
    calls = count_calls(monkeypatch)
    layer = swapped(torch.nn.TransformerEncoderLayer(D_MODEL, HEADS, 32, batch_first=True)).eval()
    layer.self_attn._forward_pre_hooks.clear()
    with torch.no_grad():
        layer(torch.randn(2, 5, D_MODEL))
    assert not calls


def test_built_into_a_layer_it_is_not_bypassed_and_torchs_encoder_does_not_warn(recwarn):
    layer = torch.nn.TransformerEncoderLayer(D_MODEL, HEADS, 32, batch_first=True)
    layer.self_attn = MultiHeadAttention(D_MODEL, HEADS, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    assert not recwarn.list
    with torch.no_grad(), attention_calls(model) as calls:
        model(torch.randn(2, 5, D_MODEL))
    assert calls == {"layers.0.self_attn": 1, "layers.1.self_attn": 1}


def test_the_flags_that_other_code_reads_tell_the_truth():
    for options in ({}, {"kdim": 4}):
        module = torch.nn.MultiheadAttention(D_MODEL, HEADS, **options)
        replace_attention(module)
        assert module._qkv_same_embed_dim is (module.in_proj_weight is not None)


@pytest.mark.parametrize("built", [True, False], ids=["built", "swapped"])
def test_restore_goes_back(built):
    module = (MultiHeadAttention if built else torch.nn.MultiheadAttention)(D_MODEL, HEADS, batch_first=True)
    model = torch.nn.ModuleDict({"attention": module})
    replace_attention(model)
    x = torch.randn(2, 3, D_MODEL)
    ours = module(x, x, x)
    assert restore_attention(model) == ["attention"]
    assert restore_attention(model) == []
    assert type(module) is torch.nn.MultiheadAttention
    assert vars(module).keys() == vars(torch.nn.MultiheadAttention(D_MODEL, HEADS)).keys()
    assert not module._forward_pre_hooks
    assert_close(module(x, x, x), ours)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        restore_attention([model])


class CallsTorch(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def helper(module, x):
    return torch.nn.functional.multi_head_attention_forward(x, x, x, *module.options)[0]


class CallsAHelper(torch.nn.Module):
    def forward(self, x):
        return helper(self, x)


def test_modules_that_call_torchs_attention_themselves_are_reported():
    model = torch.nn.ModuleDict({"direct": CallsTorch(), "helper": CallsAHelper(), "linear": torch.nn.Linear(2, 2)})
    left = replace_attention(model).left
    assert left.keys() == {"direct", "helper"}
    assert "CallsTorch, which calls scaled_dot_product_attention" in left["direct"]
    assert "multi_head_attention_forward" in left["helper"]


def test_calls_are_counted_where_modules_run_and_only_then():
    class ReadsWeights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.read = (torch.nn.MultiheadAttention(D_MODEL, HEADS) for _ in range(2))

        def forward(self, x):
            return self.used(x, x, x)[0] @ self.read.out_proj.weight

    model = swapped(ReadsWeights())
    with attention_calls(model) as calls:
        for _ in range(2):
            model(torch.randn(3, 2, D_MODEL))
    model(torch.randn(3, 2, D_MODEL))
    assert calls == {"used": 2, "read": 0}
    with pytest.raises(ValueError, match="no MultiHeadAttention"), attention_calls(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match="model is compiled"), attention_calls(torch.compile(model)):
        pass


@pytest.mark.parametrize("padding", ["right", "left", "holes", "whole sequence"])
def test_padded_encoder_in_eval_equals_torch_where_it_is_not_padded(padding):
    theirs = encoder().eval()
    ours = swapped(theirs)
    assert theirs.use_nested_tensor
    x = torch.randn(3, 6, D_MODEL)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    if padding == "right":
        mask[0, 4:] = mask[1, 1:] = True
    elif padding == "left":
        mask[0, :4] = mask[1, :1] = True
    elif padding == "holes":
        mask[0, 1] = mask[1, ::2] = True
    else:
        mask[1] = True
    for enable_grad in (True, False):
        with torch.set_grad_enabled(enable_grad):
            output, expected = ours(x, src_key_padding_mask=mask), theirs(x, src_key_padding_mask=mask)
        assert output.shape == x.shape
        assert output.isfinite().all()
        assert_close(output[~mask], expected[~mask])


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_optimizer_built_before_the_swap_trains_the_swapped_model(make_optimizer):
    theirs = torch.nn.Transformer(D_MODEL, HEADS, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    optimizers = [make_optimizer(model.parameters(), lr=0.01) for model in (theirs, ours)]
    before = [id(parameter) for parameter in ours.parameters()]
    replace_attention(ours)
    assert [id(parameter) for parameter in ours.parameters()] == before
    start = copy.deepcopy(ours.state_dict())
    src, tgt = torch.randn(2, 5, D_MODEL, dtype=torch.float64), torch.randn(2, 4, D_MODEL, dtype=torch.float64)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    for _ in range(3):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            model(src, tgt, tgt_mask=causal, tgt_is_causal=True).square().mean().backward()
            optimizer.step()
    for name, tensor in ours.state_dict().items():
        assert_close(tensor, theirs.state_dict()[name])
        assert not torch.equal(tensor, start[name]), f"{name} was not trained"


def test_everything_about_the_module_survives():
    attention = torch.nn.MultiheadAttention(D_MODEL, HEADS, dropout=0.25, batch_first=True, dtype=torch.bfloat16).eval()
    attention.in_proj_bias.requires_grad_(False)
    attention.register_buffer("steps", torch.tensor(3))
    attention.note = "kept"
    calls = []
    handles = [
        attention.register_forward_pre_hook(lambda *_: calls.append("forward pre")),
        attention.register_forward_hook(lambda *_: calls.append("forward")),
        attention.register_full_backward_pre_hook(lambda *_: calls.append("backward pre")),
        attention.register_full_backward_hook(lambda *_: calls.append("backward")),
        attention.register_state_dict_pre_hook(lambda *_: calls.append("state_dict pre")),
        attention.register_state_dict_post_hook(lambda *_: calls.append("state_dict post")),
        attention.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre")),
        attention.register_load_state_dict_post_hook(lambda *_: calls.append("load post")),
    ]
    model = torch.nn.ModuleDict({"attention": attention})
    report = replace_attention(model)
    assert report.replaced == ["attention"]
    assert model["attention"] is attention
    assert type(attention) is MultiHeadAttention
    assert not attention.training
    assert attention.dropout == 0.25
    assert attention.note == "kept"
    assert not attention.in_proj_bias.requires_grad
    assert attention.in_proj_weight.dtype is torch.bfloat16

    def use() -> list[str]:
        calls.clear()
        x = torch.randn(2, 3, D_MODEL, dtype=torch.bfloat16, requires_grad=True)
        attention(x, x, x)[0].sum().backward()
        attention.load_state_dict(attention.state_dict())
        return calls

    assert use() == [
        "forward pre",
        "forward",
        "backward pre",
        "backward",
        "state_dict pre",
        "state_dict post",
        "load pre",
        "load post",
    ]
    for handle in handles:
        handle.remove()
    assert use() == []


def test_shared_modules_stay_shared():
    shared = torch.nn.MultiheadAttention(D_MODEL, HEADS)
    model = torch.nn.ModuleList([shared, torch.nn.Sequential(shared), torch.nn.MultiheadAttention(D_MODEL, HEADS)])
    tied = model[2]
    tied.in_proj_weight = shared.in_proj_weight
    report = replace_attention(model)
    assert report.replaced == ["0", "2"]
    assert model[0] is model[1][0]
    assert model[0].in_proj_weight is model[2].in_proj_weight


def test_what_may_compute_something_else_is_left_and_reported():
    class Scaled(torch.nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return 2 * output, weights

    parametrised = torch.nn.MultiheadAttention(D_MODEL, HEADS)
    torch.nn.utils.parametrizations.weight_norm(parametrised, "in_proj_weight")
    patched = torch.nn.MultiheadAttention(D_MODEL, HEADS)
    patched.forward = lambda query, *_: (query, None)
    scripted = torch.jit.script(torch.nn.MultiheadAttention(D_MODEL, HEADS))
    hooked = torch.nn.MultiheadAttention(D_MODEL, HEADS)
    hooked.out_proj.register_forward_hook(lambda module, inputs, output: 2 * output)  # torch never calls it

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    adapted = torch.nn.MultiheadAttention(D_MODEL, HEADS)
    adapted.out_proj = Doubled(D_MODEL, D_MODEL)
    model = torch.nn.ModuleDict(
        {
            "subclass": Scaled(D_MODEL, HEADS),
            "parametrised": parametrised,
            "patched": patched,
            "scripted": scripted,
            "hooked": hooked,
            "adapted": adapted,
            "ours": MultiHeadAttention(D_MODEL, HEADS),
            "plain": torch.nn.MultiheadAttention(D_MODEL, HEADS),
            "linear": torch.nn.Linear(D_MODEL, D_MODEL),
        }
    )
    types = {name: type(module) for name, module in model.items()}
    report = replace_attention(model)
    assert report.replaced == ["plain"]
    assert report.left.keys() == {"subclass", "parametrised", "patched", "scripted", "hooked", "adapted", "ours"}
    assert {name: type(module) for name, module in model.items()} == types | {"plain": MultiHeadAttention}
    assert "Scaled" in report.left["subclass"]
    assert "in_proj_weight" in report.left["parametrised"]
    text = str(report)
    assert "replaced 1 attention modules, left 7" in text
    assert all(f"left {name}: {reason}" in text for name, reason in report.left.items())
    assert replace_attention(model).replaced == []


def test_model_that_is_an_attention_module_itself():
    model = torch.nn.MultiheadAttention(D_MODEL, HEADS)
    assert replace_attention(model).replaced == [""]
    assert type(model) is MultiHeadAttention


@pytest.mark.parametrize("breakage", ["complex weight", "dropout", "bias_k alone"])
def test_unsupported_configuration_raises_before_anything_is_changed(breakage):
    model = torch.nn.Sequential(encoder(), torch.nn.MultiheadAttention(D_MODEL, HEADS, add_bias_kv=True))
    if breakage == "complex weight":
        model[1].to(torch.complex64)
    elif breakage == "dropout":
        model[1].dropout = 1.5
    else:
        model[1].bias_v = None
    with pytest.raises(ValueError, match=r"1 cannot be replaced: .*; nothing was changed"):
        replace_attention(model)
    assert not any(isinstance(module, MultiHeadAttention) for module in model.modules())
    assert model[0].use_nested_tensor


def test_bad_argument():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        replace_attention([torch.nn.MultiheadAttention(D_MODEL, HEADS)])


@pytest.mark.parametrize(("norm_first", "bias"), list(itertools.product([True, False], [True, False])))
def test_causal_decoder_and_encoder_without_bias(norm_first, bias):
    """The stacks recognise a causal mask and pass the hint on; encoder layers get padding as a float mask."""
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first, "bias": bias}
    theirs = torch.nn.Transformer(D_MODEL, HEADS, 2, 2, 32, **options)
    ours = swapped(theirs)
    src, tgt = torch.randn(2, 5, D_MODEL), torch.randn(2, 4, D_MODEL)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    kwargs = {
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_mask": torch.nn.Transformer.generate_square_subsequent_mask(4),
    }
    assert_close(ours(src, tgt, **kwargs), theirs(src, tgt, **kwargs))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(D_MODEL, D_MODEL)
        self.attention = torch.nn.MultiheadAttention(D_MODEL, HEADS, batch_first=True)
        self.last = torch.nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.attention(x, x, x)[0])


def test_lora_takes_the_swapped_module():
    """PEFT's LoRA adapts in_proj_weight by the module's attributes, and out_proj as a module."""
    peft = pytest.importorskip("peft")
    model, x = Block(), torch.randn(2, 5, D_MODEL)
    config = peft.LoraConfig(r=4, target_modules=["attention", "last"], init_lora_weights=False)
    theirs, ours = (peft.get_peft_model(block, config) for block in (copy.deepcopy(model), swapped(model)))
    assert isinstance(ours.base_model.model.attention.base_layer, MultiHeadAttention)
    ours.load_state_dict(theirs.state_dict())
    expected = theirs(x)
    assert (expected - model(x)).abs().max() > 0.1
    assert_close(ours(x), expected)
    gradients, expected_gradients = (
        torch.autograd.grad(adapted(x).square().mean(), [p for p in adapted.parameters() if p.requires_grad]) for adapted in (ours, theirs)
    )
    assert_close(gradients, expected_gradients)
    merged = ours.merge_and_unload()
    assert isinstance(merged.attention, MultiHeadAttention)
    assert_close(merged(x), expected)


def test_lora_on_the_output_projection_is_not_passed_over():
    """torch's attention reads out_proj's weight and leaves the adapter out; this one calls out_proj."""
    peft = pytest.importorskip("peft")
    model, x = swapped(Block()), torch.randn(2, 5, D_MODEL)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["attention.out_proj"], init_lora_weights=False))
    output = adapted(x)
    assert_close(adapted.merge_and_unload()(x), output)


@pytest.mark.parametrize(("mode", "frozen"), [("hooks", True), ("ew", True), ("ew", False)])
@pytest.mark.filterwarnings("ignore")
def test_opacus_per_sample_gradients(mode, frozen):
    """Around a frozen attention by either way, of the attention itself by expanded weights."""
    grad_sample = pytest.importorskip("opacus.grad_sample")
    model, x = Block(), torch.randn(3, 5, D_MODEL)
    model.attention.requires_grad_(not frozen)
    ours = swapped(model)
    wrapped = grad_sample.wrap_model(ours, grad_sample_mode=mode, loss_reduction="sum", batch_first=True)
    wrapped(x).square().sum().backward()
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    for index in range(3):
        expected = torch.autograd.grad(model(x[index : index + 1]).square().sum(), [model.get_parameter(name) for name in trained])
        assert_close([ours.get_parameter(name).grad_sample[index] for name in trained], list(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_opacus_replaces_the_attention_once_restored():
    """It trains attention by a class of its own, which it puts in the place of the very class torch.nn.MultiheadAttention."""
    validators = pytest.importorskip("opacus.validators")
    model, x = Block(), torch.randn(3, 5, D_MODEL)
    restored = swapped(model)
    restore_attention(restored)
    fixed, expected = (validators.ModuleValidator.fix(block) for block in (restored, model))
    assert type(fixed.attention) is type(expected.attention)
    assert not isinstance(fixed.attention, torch.nn.MultiheadAttention)
    assert_close(fixed(x), expected(x))
