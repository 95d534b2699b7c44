"""scaled_dot_product_attention takes what torch's takes, gives the same, and refuses with the same types of exception."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from fused_attention import attention, prepare_mask, scaled_dot_product_attention
from fused_attention.kernels.torch_internals import release

LIKE_TORCH: dict[str, tuple[list[tuple[int, ...]], dict[str, Any]]] = {
    "2-D": ([(5, 8)] * 3, {}),
    "3-D with mask": ([(3, 5, 8), (3, 6, 8), (3, 6, 4)], {"attn_mask": torch.randn(3, 5, 6)}),
    "4-D causal": ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], {"is_causal": True, "scale": 0.3}),
    "broadcast": ([(2, 4, 5, 8), (1, 4, 6, 8), (4, 6, 8)], {"attn_mask": torch.rand(5, 6) > 0.2}),
    "5-D": ([(2, 3, 4, 5, 8), (2, 1, 4, 6, 8), (3, 4, 6, 8)], {"attn_mask": torch.randn(2, 1, 4, 5, 6)}),
    "grouped": ([(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8)], {"enable_gqa": True}),
    "grouped, fewer value heads": ([(2, 8, 5, 8), (2, 4, 6, 8), (2, 2, 6, 8)], {"enable_gqa": True}),
    "grouped, neither divides the other": ([(6, 5, 8), (2, 6, 8), (3, 6, 8)], {"enable_gqa": True}),
    "head_dim 0": ([(2, 4, 5, 0), (2, 4, 6, 0), (2, 4, 6, 3)], {"is_causal": True}),
    "no values": ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 0)], {}),
    "no batch": ([(0, 4, 5, 8)] * 3, {"attn_mask": torch.randn(5, 5)}),
    "no batch, grouped": ([(0, 4, 5, 8), (0, 2, 5, 8), (0, 2, 5, 8)], {"enable_gqa": True}),
    "no heads": ([(2, 0, 5, 8)] * 3, {}),
    "no queries": ([(2, 4, 0, 8), (2, 4, 6, 8), (2, 4, 6, 8)], {}),
    "no keys": ([(2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)], {}),
    "nothing": ([(0, 8)] * 3, {"is_causal": True}),
    "upper left, square": ([(2, 4, 6, 8)] * 3, {"attn_mask": causal_upper_left(6, 6)}),
    "upper left": ([(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)], {"attn_mask": causal_upper_left(5, 7)}),
    "lower right, square": ([(2, 4, 6, 8)] * 3, {"attn_mask": causal_lower_right(6, 6)}),
    "lower right": ([(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)], {"attn_mask": causal_lower_right(5, 7)}),
    "NumPy numbers": ([(2, 4, 5, 8)] * 3, {"scale": numpy.float32(0.25), "dropout_p": numpy.float64(0.0)}),
    "numbers in tensors": ([(2, 4, 5, 8)] * 3, {"scale": torch.tensor(0.25), "dropout_p": torch.tensor(0)}),
}


@pytest.mark.parametrize("case", LIKE_TORCH)
def test_like_torch(case: str) -> None:
    if case == "no heads" and release(torch.__version__) < (2, 11):
        pytest.skip("torch 2.10's own attention divides by the number of heads, and dies")
    shapes, options = LIKE_TORCH[case]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = function(*inputs, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert_close(*results)


B, H, L, D = 2, 3, 4, 8
MEMORY: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "contiguous": lambda randn: randn(B, H, L, D),
    "heads merged": lambda randn: randn(B, L, H, D).transpose(1, 2),
    "sequence first": lambda randn: randn(L, B, H, D).permute(1, 2, 0, 3),
    "heads first": lambda randn: randn(H, B, L, D).transpose(0, 1),
    "part of a packed one": lambda randn: randn(B, L, 3, H, D)[:, :, 0].transpose(1, 2),
    "expanded batch": lambda randn: randn(1, H, L, D).expand(B, H, L, D),
    "last dim transposed": lambda randn: randn(B, H, D, L).transpose(2, 3),
    "3-D, heads merged": lambda randn: randn(L, H, D).transpose(0, 1),
    "5-D": lambda randn: randn(2, B, H, L, D),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", MEMORY)
def test_results_lie_in_memory_as_torchs_do(case: str, dtype: torch.dtype) -> None:
    query = MEMORY[case](partial(torch.randn, dtype=dtype))
    other = torch.randn(query.shape, dtype=dtype)
    tolerance = dict.fromkeys(("rtol", "atol"), 2e-2 if dtype == torch.bfloat16 else 1e-5)
    for mask in (None, torch.zeros(L, L, dtype=dtype)):
        for requires_grad in (False, True):
            query.requires_grad_(requires_grad)
            expected = F.scaled_dot_product_attention(query, other, other, attn_mask=mask)
            for _ in ("checked", "repeated"):
                out = scaled_dot_product_attention(query, other, other, attn_mask=mask)
                assert out.stride() == expected.stride()
                assert_close(out, expected, **tolerance)
                if requires_grad:
                    given = torch.randn_like(out)
                    gradients = [torch.autograd.grad(result, query, given, retain_graph=True)[0] for result in (out, expected)]
                    assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("case", ["contiguous", "heads first", "expanded batch", "5-D"])
def test_results_of_compiled_calls_lie_there_too(case: str) -> None:
    query = MEMORY[case](torch.randn).requires_grad_()
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    out, expected = compiled(query, query, query), F.scaled_dot_product_attention(query, query, query)
    assert out.stride() == expected.stride()
    assert_close(torch.autograd.grad(out.sum(), query), torch.autograd.grad(expected.sum(), query))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_repeated_calls_of_attention_are_others(requires_grad: bool) -> None:
    query = torch.randn(B, H, L, D, requires_grad=requires_grad)
    for _ in range(2):
        assert scaled_dot_product_attention(query, query.detach(), query.detach()).is_contiguous()
        assert attention(query, query.detach(), query.detach()).transpose(1, 2).is_contiguous()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mask and is_causal": ({"attn_mask": torch.zeros(5, 5), "is_causal": True}, "attn_mask should not be set when is_causal=True"),
    "CausalBias and is_causal": (
        {"attn_mask": causal_lower_right(5, 5), "is_causal": True},
        "CausalBias should not be used with causal=True",
    ),
    "CausalBias of another size": ({"attn_mask": causal_lower_right(4, 7)}, "CausalBias of 4 queries and 7 keys"),
    "batch": ({"query": torch.randn(3, 4, 5, 8)}, "must broadcast"),
    "mask shape": ({"attn_mask": torch.zeros(4, 5)}, "attn_mask must broadcast to"),
    "mask dtype": ({"attn_mask": torch.zeros(5, 5).int()}, "attn_mask must be bool"),
    "mask as a list": ({"attn_mask": [[True]]}, "attn_mask must be a torch.Tensor or a PreparedMask, got list"),
    "no key": ({"key": None}, "key must be a torch.Tensor, got NoneType"),
    "dtypes": ({"key": torch.randn(2, 4, 5, 8).double()}, "key must have the dtype of query"),
    "devices": ({"key": torch.randn(2, 4, 5, 8, device="meta")}, "key must be on the device of query"),
    "1-D": ({"query": torch.randn(8)}, "query must have at least 2 dims"),
    "head_dim": ({"key": torch.randn(2, 4, 5, 7)}, "key must have the head_dim of query"),
    "heads": ({"query": torch.randn(2, 3, 5, 8), "enable_gqa": True}, "the 3 heads of query must be a multiple of the 4 heads of key"),
    "value heads": (
        {"value": torch.randn(2, 3, 5, 8), "enable_gqa": True},
        "the 4 heads of query must be a multiple of the 3 heads of value",
    ),
    "dropout_p": ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\]"),
    "scale": ({"scale": "big"}, "scale must be a number, got str"),
    "scale with a gradient": ({"scale": torch.tensor(0.5, requires_grad=True)}, "scale has no gradient"),
    "is_causal": ({"is_causal": "bottom_right"}, "is_causal must be a bool, got str"),
}
TORCH_TAKES_IT = ("mask and is_causal",)  # against its own documentation, in some kernels


@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_by_torch(case: str) -> None:
    changes, message = REFUSED[case]
    arguments = dict.fromkeys(("query", "key", "value"), torch.randn(2, 4, 5, 8)) | changes
    kind: type[Exception] = RuntimeError
    if case not in TORCH_TAKES_IT:
        with pytest.raises(Exception) as theirs:  # any: it is what ours is compared with
            F.scaled_dot_product_attention(**arguments)
        kind = theirs.type
    with pytest.raises(kind, match=message):
        scaled_dot_product_attention(**arguments)


def test_causal_bias_in_attention() -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    assert_close(attention(query, key, key, attn_mask=causal_lower_right(5, 7)), attention(query, key, key, is_causal="bottom_right"))
    windowed = [
        attention(query, key, key, **causal, window=(2, 2)) for causal in ({"attn_mask": causal_upper_left(5, 7)}, {"is_causal": True})
    ]
    assert_close(*windowed)
    with pytest.raises(ValueError, match="is_causal must not be given beside an attn_mask that is a CausalBias"):
        attention(query, key, key, attn_mask=causal_upper_left(5, 7), is_causal=True)
    with pytest.raises(TypeError, match="attn_mask must be a plain tensor, got a CausalBias"):
        prepare_mask(causal_upper_left(5, 7), seqlen_q=5, seqlen_k=7)


class Overriding(Tensor):
    """Its memory could hold anything: only its own __torch_function__ knows."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_a_subclass_sees_the_call(name: str) -> None:
    arguments = {"query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 4, 5, 8), "value": torch.randn(2, 4, 5, 8)}
    arguments["attn_mask"] = torch.randn(5, 5)
    expected = scaled_dot_product_attention(**arguments)
    arguments[name] = arguments[name].as_subclass(Overriding)
    Overriding.seen.clear()
    out = scaled_dot_product_attention(**arguments)
    assert Overriding.seen[0] is scaled_dot_product_attention
    assert type(out) is Overriding
    assert_close(out.as_subclass(Tensor), expected)
    with pytest.raises(TypeError, match=f"{name} must be a plain tensor, got a Overriding"):
        attention(**arguments)


def test_a_mode_sees_the_call() -> None:
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            result = function(*args, **(kwargs or {}))
            return 2 * result if function is scaled_dot_product_attention else result

    query = torch.randn(2, 4, 5, 8)
    for options in ({}, {"attn_mask": causal_lower_right(5, 5)}):
        expected = 2 * scaled_dot_product_attention(query, query, query, **options)
        with Doubling():
            out = scaled_dot_product_attention(query, query, query, **options)
        assert_close(out, expected)


def test_compiled_where_a_mode_gives_the_device() -> None:
    query = torch.randn(2, 4, 5, 8)
    with torch.device("cpu"):
        out = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")(query, query, query, is_causal=True)
    assert_close(out, scaled_dot_product_attention(query, query, query, is_causal=True))


def strided(*lengths: int, num_heads: int = 2) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(num_heads, length, 8) for length in lengths], requires_grad=True)


NESTED: dict[str, Callable[[], tuple[Tensor, Tensor, dict[str, Any]]]] = {
    "self": lambda: (*[strided(3, 5)] * 2, {}),
    "cross, one without queries": lambda: (strided(0, 4), strided(3, 2), {"scale": 0.3}),
    "without heads": lambda: (*[torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], requires_grad=True)] * 2, {}),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", NESTED)
def test_strided_nested_tensors_are_torchs(case: str) -> None:
    query, key, options = NESTED[case]()
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = function(query, key, key, **options)
        assert out.layout is torch.strided
        assert out.is_nested
        gradients = torch.autograd.grad(sum(part.square().sum() for part in out.unbind()), (query, key))
        results.append([part for nested in (out, *gradients) for part in nested.unbind()])
    assert_close(*results)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors_that_are_refused() -> None:
    nested, dense = strided(3, 5), torch.randn(2, 2, 5, 8)
    for function, kind in ((attention, TypeError), (scaled_dot_product_attention, RuntimeError)):
        for name in ("query", "key", "value"):
            arguments = dict.fromkeys(("query", "key", "value"), dense) | {name: nested}
            with pytest.raises(kind, match="must be a"):
                function(**arguments)
    for requires_grad in (False, True):
        with pytest.raises(TypeError, match="query must be a nested tensor of layout torch.jagged"):
            attention(*[nested.detach().requires_grad_(requires_grad)] * 3)
    with pytest.raises(RuntimeError, match="attn_mask must be None for nested tensors"):
        scaled_dot_product_attention(nested, nested, nested, attn_mask=torch.zeros(5, 5))
    with pytest.raises(RuntimeError, match="key and value must have as many sequences as query"):
        scaled_dot_product_attention(nested, nested, strided(3, 4))
