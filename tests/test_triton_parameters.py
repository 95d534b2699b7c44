"""Kernels take named groups: what is launched in their place has every member with its type, and the host passes each its value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("these tests look at compiled launches", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton_offline import offline  # noqa: E402

from fused_attention.kernels import ops  # noqa: E402
from fused_attention.kernels.checks import make_problem  # noqa: E402
from fused_attention.kernels.problem import Gradients  # noqa: E402
from fused_attention.kernels.triton import backend, backward, bias_gradient, decode, forward, launch, mask, weights  # noqa: E402
from fused_attention.kernels.triton.arguments import UNLIMITED  # noqa: E402
from fused_attention.kernels.triton.launch import Tile  # noqa: E402
from fused_attention.kernels.triton.parameters import KeyMask, Rows, Window, kernel  # noqa: E402

MOST_PARAMETERS = 35
MODULES = backward, bias_gradient, decode, forward, mask, weights


@kernel
def small_kernel(source: Rows, target, key_mask: KeyMask, window: Window, count: tl.int32, scale: tl.float32, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    numbers = tl.load(source.data + places * source.stride_row, places < count) * scale
    if key_mask.data is not None:
        numbers *= tl.load(key_mask.data + places * key_mask.stride_key)
    if window.HAS_LEFT:
        numbers += window.left
    tl.store(target + places, numbers)


def test_members_are_parameters_by_kind() -> None:
    """Pointers, then numbers, then constexprs, each in the order of the groups."""
    assert [(parameter.name, parameter.annotation, not parameter.do_not_specialize) for parameter in small_kernel.params] == [
        ("source_data", "", True),
        ("target", "", True),
        ("key_mask_data", "", True),
        ("source_stride_batch", "i64", True),
        ("source_stride_head", "i64", True),
        ("source_stride_row", "i64", True),
        ("key_mask_stride_batch", "i64", False),
        ("key_mask_stride_key", "", True),
        ("window_left", "i32", False),
        ("window_right", "i32", False),
        ("window_diagonal", "i32", False),
        ("count", "i32", False),
        ("scale", "fp32", True),
        ("window_HAS_LEFT", "constexpr", True),
        ("window_HAS_RIGHT", "constexpr", True),
        ("window_BOTTOM_RIGHT", "constexpr", True),
        ("BLOCK", "constexpr", True),
    ]


def test_no_kernel_has_many_parameters() -> None:
    functions = [function for module in MODULES for function in vars(module).values() if isinstance(function, triton.JITFunction)]
    kernels = [function.fn.__globals__["kernel"] for function in functions if function.fn.__code__.co_filename.startswith("<")]
    assert len(kernels) == 10
    assert all(len(kernel.params) < MOST_PARAMETERS for kernel in kernels)


def test_the_host_passes_each_member_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward and in both backward kernels, with tensors of which no two strides are the same."""
    passed: dict[str, dict[str, Any]] = {}

    def remember(kernel: Any, num_programs: int, tensors: tuple, numbers: tuple, constants: tuple, tile: Tile) -> None:
        names = [parameter.name for parameter in kernel.params]
        passed[kernel.__name__] = dict(zip(names, (*tensors, *numbers, *constants, tile.BLOCK_M, tile.BLOCK_N), strict=True))

    monkeypatch.setattr(launch, "_launch_through_triton", remember)
    query, key, value, dout = (torch.zeros(2, 3 + i, 75 + i, 48 + 8 * i)[:, :3, :70, :40] for i in range(4))
    attn_mask, slopes = torch.zeros(2, 3, 70, 72)[..., 1:71], torch.zeros(3)
    options = {"window": (7, None), "scale": 0.5, "softcap": 4.0, "dropout_p": 0.25, "rng_state": torch.zeros(2, dtype=torch.int64)}
    problem = make_problem("separate", (query, key, value), attn_mask=attn_mask, alibi_slopes=slopes, **options)
    gradients = Gradients(query.clone(), key.clone(), value.clone(), torch.zeros(2, 3, 70, 70), torch.zeros(3))
    with offline(arch=90):
        out, lse = ops.forward(backend, problem)
        backend.backward(problem, out, lse, dout, None, gradients)
    for name in ("attention_forward", "attention_dkdv", "attention_dq"):
        found = passed[name]
        tensors = {"query": query, "key": key, "value": value} | ({} if name == "attention_forward" else {"dout": dout})
        for tensor_name, tensor in tensors.items():
            assert [found[f"{tensor_name}_stride_{dim}"] for dim in ("batch", "head", "row")] == [*tensor.stride()[:3]]
            assert found[f"{tensor_name}_data"].data_ptr() == tensor.data_ptr()
        assert [found[f"attn_mask_stride_{dim}"] for dim in ("batch", "head", "row", "key")] == [*attn_mask.stride()]
        pointers = ("attn_mask_data", "alibi_slopes_data", "dropout_rng_state")
        assert [found[pointer].data_ptr() for pointer in pointers] == [t.data_ptr() for t in (attn_mask, slopes, options["rng_state"])]
        assert all(found[group + "_data"] is None for group in ("key_mask", "mask_bits", "tiles"))
        expected = {
            "alibi_slopes_stride_batch": 0,
            "alibi_slopes_stride_head": 1,
            "sizes_seqlen_q": 70,
            "sizes_num_heads": 3,
            "sizes_heads_per_group": 1,
            "window_left": 7,
            "window_right": UNLIMITED,
            "window_HAS_LEFT": True,
            "window_HAS_RIGHT": False,
            "scoring_scale": 0.5 / 4.0,
            "scoring_HAS_SOFTCAP": True,
            "dropout_threshold": 2**16 // 4,
            "attn_mask_IS_BOOL": False,
            "HEAD_DIM_QK": 40,
            "BLOCK_DQK": 64,
            "INPUT_PRECISION": "ieee",
        }
        assert {member: found[member] for member in expected} == expected
