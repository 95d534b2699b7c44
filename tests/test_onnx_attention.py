"""ONNX's Attention operator: the cases that the onnx package brings for its backends, as calls of `attention`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import attention, attention_weights
from fused_attention.kernels.native import cpu

onnx = pytest.importorskip("onnx", reason="onnx, which brings the cases, is not installed")
node_cases = pytest.importorskip("onnx.backend.test.case.node")
pytest.importorskip("onnx.backend.test.case.node.attention")  # what makes them

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
WEIGHTS = 3  # the qk_matmul_output_mode that asks for them; the others ask for scores, which no kernel holds
# Not collect_testcases(), which makes those of all operators. "_expanded" ones are the same calls written out in other operators.
CASES = {
    case.name: case
    for case in node_cases._NodeTestCases
    if case.model.graph.node[0].op_type == "Attention" and not case.name.endswith("_expanded")
}
NATIVE = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")


def as_tensor(array: Any) -> Tensor:
    if array.dtype.name == "bfloat16":  # which NumPy does not know
        return torch.from_numpy(array.astype("float32")).bfloat16()
    return torch.from_numpy(array.copy())


def heads_first(tensor: Tensor, num_heads: int) -> Tensor:
    return tensor if tensor.dim() == 4 else tensor.unflatten(2, (num_heads, -1)).transpose(1, 2)


def full_mask(mask: Tensor, seqlen_k: int) -> Tensor:
    """4-D, its dims aligned from the right; keys past its end may not be attended to."""
    rest = mask.new_full((*mask.shape[:-1], seqlen_k - mask.shape[-1]), False if mask.dtype == torch.bool else -torch.inf)
    return torch.cat((mask, rest), -1)[(None,) * (4 - mask.dim())]


def call_of(case: Any) -> tuple[tuple[Tensor, ...], dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """query, key and value; the options of `attention`; the results by name; the operator's attributes."""
    node = case.model.graph.node[0]
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    arrays, results = ([as_tensor(array) for array in arrays] for arrays in case.data_sets[0])
    given = dict(zip([name for name in node.input if name], arrays, strict=True))
    tensors = {name: given[own] for name, own in zip(INPUTS, node.input, strict=False) if own}
    query = heads_first(tensors["Q"], attributes.get("q_num_heads", 0))
    key, value = (heads_first(tensors[name], attributes.get("kv_num_heads", 0)) for name in "KV")
    diagonal: int | str | None = None
    if "past_key" in tensors:
        key, value = torch.cat((tensors["past_key"], key), 2), torch.cat((tensors["past_value"], value), 2)
        diagonal = tensors["past_key"].shape[2]
    elif "nonpad_kv_seqlen" in tensors:
        diagonal = "bottom_right"
    left, right = (attributes.get(f"{side}_window_size", -1) for side in ("left", "right"))
    options = {
        "attn_mask": full_mask(tensors["attn_mask"], key.shape[2]) if "attn_mask" in tensors else None,
        "key_lengths": tensors.get("nonpad_kv_seqlen"),
        "is_causal": bool(attributes.get("is_causal", 0)),
        "window": (None if left < 0 else left, None if right < 0 else right),
        "diagonal": diagonal,
        "scale": attributes.get("scale"),
        "softcap": attributes.get("softcap") or None,
    }
    return (query, key, value), options, dict(zip([name for name in node.output if name], results, strict=True)), attributes


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=NATIVE)])
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, backend: str) -> None:
    case = CASES[name]
    (query, key, value), options, results, attributes = call_of(case)
    out, lse = attention(query, key, value, **options, return_lse=True, backend=backend)
    expected = results["Y"]
    out = out if expected.dim() == 4 else out.transpose(1, 2).flatten(2)
    # ONNX rounds the scores and weights of 16-bit inputs to their dtype, ours stay float32.
    tolerance = case.rtol if expected.dtype == torch.float32 else 4 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance / 10)
    if attributes.get("qk_matmul_output_mode") == WEIGHTS:
        weights = attention_weights(query, key, lse, **options)
        torch.testing.assert_close(weights, results["qk_matmul_output"], rtol=tolerance, atol=tolerance / 10)


def test_there_are_cases_of_every_kind() -> None:
    options = [call_of(case)[1] for case in CASES.values()]
    assert len(CASES) >= 90
    assert {type(call["diagonal"]) for call in options} == {type(None), str, int}
    assert {call["is_causal"] for call in options} == {False, True}
