"""Every engine that runs attention on a CPU and that a user could pick instead: each a function, or the reason why it is missing.

A peer gets the inputs of several calls that differ only in their numbers, and returns a function for each, which returns out as a
(B, H, L, D) tensor. It may prepare whatever a user would keep between calls: a session, a compiled graph, a mask in its own form.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.attention import attention
from ..kernels.native import cpu
from .cell import OURS
from .exact import Inputs
from .isa import reason_against

Run = Callable[[], Tensor]


class Missing(Exception):
    """Why a peer does not run a call."""


class Calls(NamedTuple):
    """The same call on several inputs, so many that no cache holds them."""

    inputs: Sequence[Inputs]
    threads: int
    key_lengths: Tensor | None = None  # (B,), what the inputs' mask says, for those that take it
    dropout_p: float = 0.0

    @property
    def sequence_first(self) -> bool:
        """Whether memory is (B, L, H, D), as a linear layer writes it; (B, H, L, D) otherwise. One token or head has both: the first."""
        query = self.inputs[0].query
        return query.transpose(1, 2).is_contiguous()


FLEX = "FlexAttention"
Maker = Callable[[Calls], list[Run]]


def ours(calls: Calls) -> list[Run]:
    def run_of(inputs: Inputs) -> Run:
        options: dict[str, Any] = {"is_causal": inputs.is_causal, "dropout_p": calls.dropout_p}
        if calls.key_lengths is not None:
            options["key_lengths"] = calls.key_lengths
        elif inputs.bias is not None or inputs.mask is not None:
            options["attn_mask"] = inputs.mask if inputs.bias is None else inputs.bias

        def run() -> Tensor:
            out = attention(inputs.query, inputs.key, inputs.value, **options)
            assert isinstance(out, Tensor)
            return out

        return run

    return [run_of(inputs) for inputs in calls.inputs]


def torch_sdpa(calls: Calls) -> list[Run]:
    def run_of(inputs: Inputs) -> Run:
        attn_mask = inputs.mask if inputs.bias is None else inputs.bias.to(inputs.query.dtype)
        query, key, value, p = inputs.query, inputs.key, inputs.value, calls.dropout_p
        return lambda: scaled_dot_product_attention(query, key, value, attn_mask, p, is_causal=inputs.is_causal)

    return [run_of(inputs) for inputs in calls.inputs]


def flex_attention(calls: Calls) -> list[Run]:
    """Compiled for the sizes at hand."""
    from torch.nn.attention import flex_attention as flex

    first = calls.inputs[0]
    if calls.dropout_p:
        raise Missing("has no dropout")
    batch, heads, seqlen_q, _ = first.query.shape
    seqlen_k = first.key.shape[2]
    block_mask = None
    if first.is_causal:
        block_mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, seqlen_q, seqlen_k, device="cpu")
    elif (lengths := calls.key_lengths) is not None:
        block_mask = flex.create_block_mask(lambda b, h, i, j: j < lengths[b], batch, None, seqlen_q, seqlen_k, device="cpu")
    elif first.mask is not None:
        mask = first.mask.expand(batch, heads, seqlen_q, seqlen_k)
        block_mask = flex.create_block_mask(lambda b, h, i, j: mask[b, h, i, j], batch, heads, seqlen_q, seqlen_k, device="cpu")
    torch.compiler.reset()  # after 8 kinds of calls torch runs it uncompiled, and compiles for changing sizes before
    compiled: Any = torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)

    def run_of(inputs: Inputs) -> Run:
        score_mod = None
        if inputs.bias is not None:
            bias = inputs.bias.expand(batch, heads, seqlen_q, seqlen_k)

            def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + bias[b, h, i, j]

        return lambda: compiled(inputs.query, inputs.key, inputs.value, score_mod=score_mod, block_mask=block_mask)

    return [run_of(inputs) for inputs in calls.inputs]


def onnxruntime_multi_head_attention(calls: Calls) -> list[Run]:
    """com.microsoft.MultiHeadAttention, on (B, L, H * D)."""
    _only_float32(calls)
    if not calls.sequence_first:
        raise Missing("takes (B, L, H, D) memory only")
    first = calls.inputs[0]
    heads = first.query.shape[1]
    feeds = [dict(zip(("query", "key", "value"), map(_merged, inputs[:3]), strict=True)) for inputs in calls.inputs]
    names = ["query", "key", "value"]
    if calls.key_lengths is not None:
        names += ["", "key_padding_mask"]
        for feed in feeds:
            feed["key_padding_mask"] = calls.key_lengths.int().numpy()
    elif first.mask is not None or first.bias is not None:
        names += ["", "", "attention_bias"]
        for feed, inputs in zip(feeds, calls.inputs, strict=True):
            feed["attention_bias"] = _float_mask(inputs).numpy()
    options = {"num_heads": heads, "unidirectional": int(first.is_causal)}
    session = _session("MultiHeadAttention", names, feeds[0], calls.threads, domain="com.microsoft", **options)

    def run(feed: dict[str, Any]) -> Tensor:
        return torch.from_numpy(session.run(None, feed)[0]).unflatten(-1, (heads, -1)).transpose(1, 2)

    return [partial(run, feed) for feed in feeds]


def onnxruntime_attention(calls: Calls) -> list[Run]:
    """ONNX's Attention: (B, H, L, D), or (B, L, H * D) where memory is so."""
    _only_float32(calls)
    first = calls.inputs[0]
    heads: dict[str, Any] = {"q_num_heads": first.query.shape[1], "kv_num_heads": first.key.shape[1]} if calls.sequence_first else {}
    arrays = _merged if calls.sequence_first else lambda tensor: tensor.detach().numpy()
    feeds = [dict(zip(("query", "key", "value"), map(arrays, inputs[:3]), strict=True)) for inputs in calls.inputs]
    names = ["query", "key", "value"]
    if first.mask is not None or first.bias is not None:
        names.append("attn_mask")
        for feed, inputs in zip(feeds, calls.inputs, strict=True):
            mask = inputs.mask if inputs.bias is None else inputs.bias
            assert mask is not None
            feed["attn_mask"] = mask.expand(*mask.shape[:2], first.query.shape[2], first.key.shape[2]).contiguous().numpy()
    session = _session("Attention", names, feeds[0], calls.threads, is_causal=int(first.is_causal), **heads)

    def run(feed: dict[str, Any]) -> Tensor:
        out = torch.from_numpy(session.run(None, feed)[0])
        return out.unflatten(-1, (first.query.shape[1], -1)).transpose(1, 2) if calls.sequence_first else out

    return [partial(run, feed) for feed in feeds]


def openvino(calls: Calls) -> list[Run]:
    """Its ScaledDotProductAttention on (B, H, L, D); memory in the other order is transposed in the graph, as models do."""
    _only_float32(calls)
    ov, ops = library_of("openvino"), library_of("openvino.opset13")
    first, order = calls.inputs[0], [0, 2, 1, 3]

    def stored(tensor: Tensor) -> Any:
        return (tensor.transpose(1, 2) if calls.sequence_first else tensor).detach().numpy()

    parameters = [ops.parameter(stored(tensor).shape, dtype=stored(tensor).dtype) for tensor in first[:3]]
    operands = [ops.transpose(parameter, order) for parameter in parameters] if calls.sequence_first else list(parameters)
    masks = [None if inputs.mask is None and inputs.bias is None else _float_mask(inputs) for inputs in calls.inputs]
    if masks[0] is not None:
        parameters.append(ops.parameter(list(masks[0].shape), dtype=masks[0].numpy().dtype))
        operands.append(parameters[-1])
    node = ops.scaled_dot_product_attention(*operands, causal=first.is_causal)
    out = ops.transpose(node, order) if calls.sequence_first else node
    settings = {"INFERENCE_NUM_THREADS": calls.threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    model = ov.Core().compile_model(ov.Model([out], parameters), "CPU", settings)

    def run_of(inputs: Inputs, mask: Tensor | None) -> Run:
        request = model.create_infer_request()
        arrays = [stored(tensor) for tensor in inputs[:3]] + ([] if mask is None else [mask.numpy()])
        for place, array in enumerate(arrays):
            request.set_input_tensor(place, ov.Tensor(array, shared_memory=True))

        def run(_kept: list[Any] = arrays) -> Tensor:  # the request holds their memory, but does not own it
            request.infer()
            found = torch.from_numpy(request.get_output_tensor(0).data)
            return found.transpose(1, 2) if calls.sequence_first else found

        return run

    return [run_of(inputs, mask) for inputs, mask in zip(calls.inputs, masks, strict=True)]


DIFFERENTIABLE: dict[str, Maker] = {OURS: ours, "torch": torch_sdpa}
FORWARD_ONLY: dict[str, Maker] = {
    FLEX: flex_attention,
    "onnxruntime MHA": onnxruntime_multi_head_attention,
    "onnxruntime Attention": onnxruntime_attention,
    "OpenVINO": openvino,
}
MAKERS = DIFFERENTIABLE | FORWARD_ONLY


def make(calls: Calls, name: str, *, backward: bool) -> list[Run] | str:
    """The peer's functions, one for each input, or the reason why it has none."""
    if backward and name in FORWARD_ONLY:
        return "has no backward on CPUs"
    reason = reason_against(name.partition(" ")[0], cpu.instruction_sets()[1])
    if reason is not None:
        return reason
    try:
        return MAKERS[name](calls)
    except Exception as error:  # whatever another library says
        return short_reason(error)


def short_reason(error: BaseException) -> str:
    """In one line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, Missing) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def library_of(name: str) -> Any:
    """Raises Missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed ({error})") from error


def _only_float32(calls: Calls) -> None:
    if calls.inputs[0].query.dtype != torch.float32:
        raise Missing("float32 only, here")
    if calls.dropout_p:
        raise Missing("has no dropout")


def _merged(tensor: Tensor) -> Any:
    """(B, H, L, D) in (B, L, H, D) memory as a numpy array (B, L, H * D)."""
    return tensor.detach().transpose(1, 2).flatten(2).numpy()


def _float_mask(inputs: Inputs) -> Tensor:
    """What is added to the scores, (B or 1, H or 1, Lq, Lk)."""
    if inputs.bias is not None:
        mask = inputs.bias.detach().float()
    else:
        assert inputs.mask is not None
        mask = torch.zeros(inputs.mask.shape).masked_fill(~inputs.mask, -torch.inf)
    return mask.expand(*mask.shape[:2], inputs.query.shape[2], inputs.key.shape[2]).contiguous()


def _session(op: str, names: list[str], feed: dict[str, Any], threads: int, domain: str = "", **attributes: Any) -> Any:
    """A session of onnxruntime with one node. An input without a name is left out."""
    onnx, onnxruntime = library_of("onnx"), library_of("onnxruntime")
    make = onnx.helper
    inputs = [
        make.make_tensor_value_info(name, make.np_dtype_to_tensor_dtype(feed[name].dtype), list(feed[name].shape)) for name in names if name
    ]
    output = make.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    node = make.make_node(op, names, ["out"], domain=domain, **attributes)
    versions = [make.make_opsetid("", 23), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(make.make_graph([node], "attention", inputs, [output]), opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads would spin on while the next peer is timed
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
