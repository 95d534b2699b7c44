"""MultiHeadAttention keeps the contract of torch.nn.MultiheadAttention: errors, parameters, copies, hooks, compilation."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from test_multi_head_attention import EMBED, HEADS, make_inputs, make_masks, pair
from torch.testing import assert_close

from fused_attention.transformer.attention import MultiHeadAttention
from fused_attention.transformer.replace import replace_attention, restore_attention

BAD_CALLS = {
    "1-D query": lambda t: ((t(6), t(5, 6), t(5, 6)), {}),
    "4-D query": lambda t: ((t(1, 2, 3, 6), t(5, 6), t(5, 6)), {}),
    "2-D key for 3-D query": lambda t: ((t(2, 3, 6), t(3, 6), t(2, 3, 6)), {}),
    "3-D value for 2-D query": lambda t: ((t(3, 6), t(3, 6), t(2, 3, 6)), {}),
    "embedding": lambda t: ((t(2, 3, 4), t(2, 3, 6), t(2, 3, 6)), {}),
    "1-D padding": lambda t: ((t(2, 3, 6),) * 3, {"key_padding_mask": t(3) > 0}),
    "2-D padding without batch": lambda t: ((t(3, 6),) * 3, {"key_padding_mask": t(1, 3) > 0}),
    "padding batch": lambda t: ((t(2, 3, 6),) * 3, {"key_padding_mask": t(1, 3) > 0}),
    "padding length": lambda t: ((t(2, 3, 6),) * 3, {"key_padding_mask": t(2, 4) > 0}),
    "uint8 padding": lambda t: ((t(2, 3, 6),) * 3, {"key_padding_mask": t(2, 3).byte()}),
    "4-D mask": lambda t: ((t(2, 3, 6),) * 3, {"attn_mask": t(2, 3, 3, 3) > 0}),
    "1-D mask without batch": lambda t: ((t(3, 6),) * 3, {"attn_mask": t(3) > 0}),
    "2-D mask size": lambda t: ((t(2, 3, 6),) * 3, {"attn_mask": t(3, 4) > 0}),
    "3-D mask per batch element": lambda t: ((t(2, 3, 6),) * 3, {"attn_mask": t(2, 3, 3) > 0}),
    "3-D mask without batch": lambda t: ((t(3, 6),) * 3, {"attn_mask": t(2, 3, 3) > 0}),
    "both masks' sizes": lambda t: ((t(2, 3, 6),) * 3, {"key_padding_mask": t(1, 3) > 0, "attn_mask": t(3, 4) > 0}),
    "int64 mask": lambda t: ((t(2, 3, 6),) * 3, {"attn_mask": t(3, 3).long()}),
    "is_causal without a mask": lambda t: ((t(2, 3, 6),) * 3, {"is_causal": True, "need_weights": False}),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls_raise_what_torch_raises(call):
    theirs, ours = pair(6, 3, batch_first=True)
    args, kwargs = call(torch.ones)
    with pytest.raises((AssertionError, RuntimeError)) as torch_error:
        theirs(*args, **kwargs)
    with pytest.raises(torch_error.type, match=re.escape(str(torch_error.value))):
        ours(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:The PyTorch API of nested tensors")
def test_other_refusals_are_clear():
    module = MultiHeadAttention(6, 3, batch_first=True)
    # torch's text shows shapes of its own making here, not those that were given
    with pytest.raises(AssertionError, match=r"key shape .*5, 6.* does not match value shape .*4, 6"):
        module(torch.ones(2, 3, 6), torch.ones(2, 5, 6), torch.ones(2, 4, 6))
    with pytest.raises(AssertionError, match="key's batch size 4 does not match query's 2"):
        module(torch.ones(2, 3, 6), torch.ones(4, 3, 6), torch.ones(4, 3, 6))
    nested = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)])
    with pytest.raises(AssertionError, match="NestedTensor: attn_mask must be None"):
        module(nested, nested, nested, attn_mask=torch.zeros(3, 3))
    for need_weights in (False, True):
        with pytest.raises(AssertionError, match="key's batch size 1 does not match query's 2"):
            module(nested, *[torch.nested.nested_tensor([torch.ones(3, 6)])] * 2, need_weights=need_weights)
    with pytest.raises(AssertionError, match="NestedTensor: query, key and value must all be nested"):
        module(nested, torch.ones(2, 3, 6), torch.ones(2, 3, 6), need_weights=False)
    for scripted in (module, torch.nn.Sequential(module)):
        with pytest.raises(RuntimeError, match=r"cannot be compiled by torch\.jit\.script"):
            torch.jit.script(scripted)
    for arguments in ((0, 1), (5, 2)):
        with pytest.raises(Exception) as torch_error:
            torch.nn.MultiheadAttention(*arguments)
        with pytest.raises(torch_error.type, match=re.escape(str(torch_error.value))):
            MultiHeadAttention(*arguments)


@pytest.mark.parametrize("configuration", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 5, "vdim": 7}], ids=str)
def test_parameters_are_laid_out_and_initialised_as_torchs(configuration):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(EMBED, HEADS, **configuration)
    torch.manual_seed(0)
    ours = MultiHeadAttention(EMBED, HEADS, **configuration)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    for _ in range(2):
        expected = theirs.state_dict()
        assert list(ours.state_dict()) == list(expected)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, expected[name])
        for module in (theirs, ours):
            torch.manual_seed(1)
            module._reset_parameters()


@pytest.mark.parametrize("configuration", [{}, {"kdim": 5, "vdim": 7}], ids=str)
def test_copies_keep_the_forward(configuration):
    module = MultiHeadAttention(EMBED, HEADS, **configuration)
    unpickled_state = MultiHeadAttention.__new__(MultiHeadAttention)
    unpickled_state.__setstate__(torch.nn.MultiheadAttention(EMBED, HEADS, **configuration).__dict__.copy())
    for clone in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module)), unpickled_state):
        assert type(clone) is MultiHeadAttention
        assert len(clone._forward_pre_hooks) == 1  # what torch.nn.TransformerEncoderLayer asks before it bypasses forward
        assert clone.__module__ == torch.nn.MultiheadAttention.__module__  # what torch.fx asks
        assert list(clone.state_dict()) == list(module.state_dict())


def test_bias_of_another_dtype_is_cast():
    theirs, ours = pair(4, 4, batch_first=True, dtype=torch.float64)
    for module in (theirs, ours):
        module.in_proj_bias = torch.nn.Parameter(module.in_proj_bias.detach().half())
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    assert_close(ours(x, x, x), theirs(x, x, x))


def test_hooks_of_the_output_projection_run():
    module = MultiHeadAttention(EMBED, HEADS)
    calls = []
    module.out_proj.register_forward_hook(lambda *_: calls.append("forward"))
    module.out_proj.register_full_backward_hook(lambda *_: calls.append("backward"))
    x = torch.randn(3, 2, EMBED)
    module(x, x, x)[0].sum().backward()
    assert calls == ["forward", "backward"]


def test_fx_takes_the_module_whole():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = MultiHeadAttention(EMBED, HEADS, batch_first=True)

        def forward(self, x):
            return x + self.attention(x, x, x)[0]

    model, x = Model(), torch.randn(2, 5, EMBED)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attention"]
    assert_close(traced(x), model(x))


def test_torchs_function_takes_the_modules_attributes():
    _, ours = pair(EMBED, HEADS)
    x = torch.randn(5, 2, EMBED)
    attributes = ("embed_dim", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout")
    arguments = [getattr(ours, name) for name in attributes]
    out = torch.nn.functional.multi_head_attention_forward(x, x, x, *arguments, ours.out_proj.weight, ours.out_proj.bias)
    assert_close(out, ours(x, x, x))


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*deprecated")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
def test_dynamic_quantization_around_it_is_that_around_torchs(dtype):
    """torch quantizes the linear layers beside the attention and leaves out_proj, before the swap or after it."""
    # In training mode: in eval mode torch's encoder layer fails on quantized weights.
    model = torch.nn.TransformerEncoderLayer(EMBED, HEADS, 8, dropout=0.0, batch_first=True)
    swapped = copy.deepcopy(model)
    replace_attention(swapped)
    theirs, ours = (torch.ao.quantization.quantize_dynamic(layer, dtype=dtype) for layer in (model, swapped))
    assert isinstance(ours.linear1, torch.ao.nn.quantized.dynamic.Linear)
    assert isinstance(ours.self_attn, MultiHeadAttention)
    assert ours.self_attn.out_proj.weight.dtype is torch.float32
    x = torch.randn(2, 5, EMBED)
    assert_close(ours(x), theirs(x))
    expected = theirs(x)
    assert replace_attention(theirs).replaced == ["self_attn"]
    assert_close(theirs(x), expected)


class Quantized(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.quantize, self.attention, self.dequantize = torch.ao.quantization.QuantStub(), attention, torch.ao.quantization.DeQuantStub()
        self.qconfig = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)

    def forward(self, x):
        x = self.quantize(x)
        return self.dequantize(self.attention(x, x, x)[0])


@pytest.mark.filterwarnings("ignore")
def test_static_quantization_takes_it_once_restored():
    """torch.ao looks for the very class, torch.nn.MultiheadAttention."""
    theirs, ours = pair(EMBED, HEADS)
    restore_attention(ours)
    x = torch.randn(5, 2, EMBED)

    def quantized(attention):
        observed = torch.ao.quantization.prepare(Quantized(attention).eval())
        observed(x)
        return torch.ao.quantization.convert(observed)

    model = quantized(ours)
    assert isinstance(model.attention, torch.ao.nn.quantized.MultiheadAttention)
    assert_close(model(x), quantized(theirs)(x), rtol=0, atol=0)


class Onnx(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention(EMBED, HEADS, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_export(dynamo, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x = Onnx().eval(), torch.randn(2, 5, EMBED)
    with torch.no_grad():
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
        [output] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
def test_compiles_without_a_graph_break(kind):
    _, ours = pair(EMBED, HEADS, batch_first=True)
    inputs = make_inputs(kind, True, torch.float32)
    masks = make_masks("padding", inputs[1].shape[1])
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*inputs, **masks, need_weights=False), ours(*inputs, **masks, need_weights=False))


@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
def test_compiles_dropout_and_weights(kind):
    _, module = pair(EMBED, HEADS, dropout=0.5, batch_first=True)
    inputs = make_inputs(kind, True, torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    output, weights = compiled(*inputs, average_attn_weights=False)
    value = torch.nn.functional.linear(inputs[2], module.in_proj_weight[2 * EMBED :], module.in_proj_bias[2 * EMBED :])
    heads = weights @ value.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    assert_close(output, module.out_proj(heads.transpose(1, 2).flatten(2)))
    assert 0 < (weights == 0).sum() < weights.numel()
