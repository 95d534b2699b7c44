"""The CUDA backward kernels in the emulator: every feature, instance and awkward size, against the accuracy rule, without a report."""

from __future__ import annotations

from typing import Any

import attention_calls
import cuda_emulation
import pytest
import torch
from attention_calls import CALL, FEATURES, build, run
from cuda_emulation import A100, SMALL, EmulatedGpu
from function_calls import VARLEN, check_packed_sequences

from csrc.cuda.instances.manifest import INSTANCES, Instance
from fused_attention.kernels.attention import attention, attention_qkv_packed
from fused_attention.kernels.native import cuda as cuda_backend

pytestmark = [
    pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not())),
    pytest.mark.usefixtures("no_single_tile_kernels"),  # test_cuda_single_tile.py is theirs
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST = {"head_dims": (32, 32)}
WIDE = {"head_dims": (192, 128)}  # the smallest of the kernels for head dims above 128


def check_call(call: dict[str, Any], *, schedule: int = 0, gpu: cuda_emulation.Gpu = SMALL, stored: float = torch.nan) -> EmulatedGpu:
    """`attention_calls.check` of the backend on the emulator."""
    call = CALL | call
    problem, dout, dlse = build(call, "cpu")
    with EmulatedGpu(schedule, gpu) as emulated:
        attention_calls.check(cuda_backend, problem, dout, dlse, call["memory"], stored=stored, prepare=call["prepare"])
    return emulated


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, dtype: str) -> None:
    check_call(SMALLEST | {"dtype": DTYPES[dtype]} | FEATURES[feature], schedule=len(feature) % 3)


@pytest.mark.parametrize("feature", FEATURES)
def test_features_above_head_dim_128(feature: str) -> None:
    check_call(WIDE | {"dtype": torch.bfloat16} | FEATURES[feature], schedule=(len(feature) + 1) % 3)


# What makes the host code choose the instances of a class, with as much of what the class can do as fits together.
CLASSES: dict[tuple[str, bool], dict[str, Any]] = {
    ("plain", False): {"is_causal": "bottom_right", "lse_gradient": True},
    ("plain", True): {"dropout_p": 0.25, "is_causal": "top_left"},
    ("masked", False): {"key_mask": "holes", "query_lengths": (300, 60), "softcap": 2.0, "alibi_slopes": "H", "sinks": True},
    ("bias", False): {"attn_mask": ("bfloat16", "BHQK"), "key_lengths": (300, 60), "dropout_p": 0.25, "softcap": 2.0},
}
QUERY_ROWS = [row for row in INSTANCES if row.pass_name == "backward_query"]
SEQLENS = [(1, 65), (63, 131), (65, 63), (131, 1)]  # around the sides of blocks of 64 rows and 64 keys, and of steps of 32


@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
@pytest.mark.parametrize("row", QUERY_ROWS, ids=lambda row: row.name)
def test_every_instance_around_the_sides_of_its_tile(row: Instance, seqlens: tuple[int, int]) -> None:
    call = {"dtype": DTYPES[row.dtype], "head_dims": (row.head_dim_qk, row.head_dim_v), "seqlens": seqlens, "sizes": (2, 2, 1)}
    options = CLASSES[row.feature_class, row.dropout]
    if row.feature_class == "bias":
        call["sizes"] = (2, 2, 2)
    emulated = check_call(call | options, schedule=SEQLENS.index(seqlens) % 3)
    suffix = row.name.removeprefix(f"sm80_{row.kernel}_")
    ours = {name for name in emulated.launched if "backward" in name and "delta" not in name}
    both = {f"sm80_{row.kernel.replace('query', 'key')}_{suffix}"}
    apart = {f"sm80_backward_dkey_{suffix}", f"sm80_backward_dvalue_{suffix}"}
    assert ours in ({row.name} | both, {row.name} | apart)


@pytest.mark.parametrize("head_dims", [(8, 8), (40, 40), (72, 72), (64, 32), (72, 40), (120, 8), (136, 16), (200, 40), (24, 136)], ids=str)
@pytest.mark.parametrize("options", CLASSES.values(), ids=lambda options: "-".join(options))
def test_head_dims_between_those_of_the_instances(head_dims: tuple[int, int], options: dict[str, Any]) -> None:
    check_call({"dtype": torch.bfloat16, "head_dims": head_dims, "seqlens": (40, 127), **options})


@pytest.mark.parametrize("dims", ["BHQK", "BHQ1", "111K", "1H1K", "B111", "1HQ1", "B11K", "11Q1"])
@pytest.mark.parametrize("mask_dtype", ["float32", "bfloat16", "float16", "float64"])
def test_mask_gradients(dims: str, mask_dtype: str) -> None:
    emulated = check_call(SMALLEST | {"dtype": torch.bfloat16, "attn_mask": (mask_dtype, dims), "sizes": (2, 2, 2), "seqlens": (70, 131)})
    assert not any("mask_gradient" in name for name in emulated.launched)


@pytest.mark.parametrize("dims", ["BHQ1", "1H1K"])
def test_mask_gradients_above_head_dim_128(dims: str) -> None:
    call = {"attn_mask": ("float32", dims), "sizes": (2, 2, 2), "seqlens": (70, 131), "softcap": 2.0, "dropout_p": 0.25}
    check_call(WIDE | {"dtype": torch.bfloat16} | call)


# Gradients of masks that batch elements or heads share

SHARED = ("11QK", "1HQK", "B1QK")


def check_shared_mask(call: dict[str, Any], **options: Any) -> None:
    emulated = check_call({"dtype": torch.bfloat16, "sizes": (2, 4, 2)} | call, **options)
    assert [name for name in emulated.launched if "mask_gradient" in name] == [
        f"sm80_mask_gradient_{'bf16' if call.get('dtype') != torch.float16 else 'fp16'}"
    ]


@pytest.mark.parametrize("dims", SHARED)
@pytest.mark.parametrize("mask_dtype", ["float32", "bfloat16", "float16", "float64"])
def test_shared_masks(dims: str, mask_dtype: str) -> None:
    check_shared_mask(SMALLEST | {"attn_mask": (mask_dtype, dims), "seqlens": (70, 131)})


SHARED_FEATURES = {
    "causal": {"is_causal": "top_left"},
    "window, causal bottom-right": {"window": (20, 3), "is_causal": "bottom_right", "seqlens": (131, 70)},
    "lengths, bottom-right": {"key_lengths": (70, 140), "query_lengths": (65, 9), "is_causal": "bottom_right"},
    "an empty batch element": {"key_lengths": (0, 131), "query_lengths": (131, 0)},
    "key_mask": {"key_mask": "holes"},
    "key_mask left, causal": {"key_mask": "left", "is_causal": "top_left"},
    "one batch element without keys, sinks": {"key_mask": "nothing in one", "sinks": True},
    "dropout": {"dropout_p": 0.25},
    "dropout of everything": {"dropout_p": 1.0},
    "softcap, alibi": {"softcap": 1.5, "alibi_slopes": "BH"},
    "gradient of lse": {"lse_gradient": True},
    "prepared": {"key_mask": "holes", "is_causal": "top_left", "prepare": True},
    "prepared, lengths": {"key_lengths": (70, 140), "query_lengths": (65, 9), "prepare": True},
    "everything": {
        "is_causal": "bottom_right", "window": (90, 20), "key_mask": "holes", "key_lengths": (100, 131), "query_lengths": (131, 50),
        "dropout_p": 0.25, "scale": 0.4, "softcap": 2.0, "alibi_slopes": "BH", "sinks": True, "lse_gradient": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", SHARED_FEATURES)
def test_features_with_a_shared_mask(feature: str, dtype: str) -> None:
    number = list(SHARED_FEATURES).index(feature)
    call = {"dtype": DTYPES[dtype], "attn_mask": ("float32", SHARED[number % 3]), "seqlens": (131, 131)}
    check_shared_mask(SMALLEST | call | SHARED_FEATURES[feature], schedule=number % 3)


@pytest.mark.parametrize("seqlens", [(1, 131), (63, 65), (65, 63), (131, 1)], ids=str)
@pytest.mark.parametrize("head_dims", [(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (40, 136)], ids=str)
def test_head_dims_with_a_shared_mask(head_dims: tuple[int, int], seqlens: tuple[int, int]) -> None:
    call = {"attn_mask": ("float32", "11QK"), "sizes": (2, 2, 1), "key_lengths": (64, 131)}
    check_shared_mask(call | {"head_dims": head_dims, "seqlens": seqlens}, schedule=sum(head_dims) % 3)


def test_a_mask_that_more_heads_share_than_a_block_has_threads() -> None:
    """The kernel lists the heads that visit its tile 128 at a time; those of three batch elements have no keys or no rows."""
    lengths = {"key_lengths": (3, 0, 5, 9, 9, 9), "query_lengths": (5, 5, 5, 0, 5, 2)}
    check_shared_mask(SMALLEST | {"attn_mask": ("float32", "11QK"), "sizes": (6, 26, 1), "seqlens": (5, 9), **lengths}, gpu=A100)


def test_a_shared_mask_has_the_same_gradient_whatever_the_schedule() -> None:
    call = CALL | SMALLEST | {"dtype": torch.bfloat16, "attn_mask": ("float32", "1HQK"), "sizes": (3, 2, 2), "key_mask": "holes"}
    problem, dout, dlse = build(call, "cpu")
    gradients = []
    for schedule in range(3):
        with EmulatedGpu(schedule, A100):
            gradients.append(run(cuda_backend, problem, dout, dlse)["attn_mask"])
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("head_dims", [SMALLEST["head_dims"], WIDE["head_dims"]], ids=str)
@pytest.mark.parametrize("case", VARLEN)
def test_packed_sequences(case: str, head_dims: tuple[int, int]) -> None:
    with EmulatedGpu(schedule=len(case) % 3):
        check_packed_sequences("cuda", case, torch.bfloat16, "cpu", head_dims)


@pytest.mark.parametrize("memory", ["heads first", "sequence first", "one batch element expanded"])
def test_memory_orders(memory: str) -> None:
    order = ("batch first", memory, memory, memory)
    check_call(SMALLEST | {"dtype": torch.bfloat16, "memory": order, "sizes": (2, 2, 2), "is_causal": "top_left"})


@pytest.mark.parametrize("stored", [torch.inf, -torch.inf])
def test_infinities_in_absent_rows(stored: float) -> None:
    """The other tests store NaN there."""
    call = {"key_mask": "holes", "key_lengths": (60, 0), "query_lengths": (50, 70), "attn_mask": ("float32", "BHQK"), "lse_gradient": True}
    check_call(SMALLEST | {"dtype": torch.bfloat16} | call, stored=stored)


@pytest.mark.parametrize(("sizes", "seqlens"), [((0, 2, 2), (5, 7)), ((2, 2, 1), (0, 7)), ((2, 2, 1), (5, 0))], ids=str)
@pytest.mark.parametrize("options", [{}, {"key_mask": "holes", "sinks": True, "alibi_slopes": "H"}], ids=["plain", "all"])
def test_empty_inputs(options: dict, sizes: tuple[int, int, int], seqlens: tuple[int, int]) -> None:
    check_call(options | {"sizes": sizes, "seqlens": seqlens, "lse_gradient": True, "dtype": torch.bfloat16})


def test_bits_stay_the_same_whatever_the_schedule() -> None:
    call = CALL | SMALLEST | {"dtype": torch.bfloat16, "key_mask": "holes", "dropout_p": 0.25, "alibi_slopes": "BH", "sizes": (2, 4, 2)}
    problem, dout, dlse = build(call, "cpu")
    results = []
    for schedule in range(3):
        with EmulatedGpu(schedule, A100):
            results.append(run(cuda_backend, problem, dout, dlse))
    for result in results[1:]:
        for name, gradient in result.items():
            assert torch.equal(gradient, results[0][name]), name


def test_autograd_through_packed_projections() -> None:
    projection = torch.randn(2, 70, 3, 2, 32).bfloat16()
    dout = torch.randn(2, 2, 70, 32).bfloat16()
    separate = [tensor.transpose(1, 2).clone().requires_grad_() for tensor in projection.unbind(2)]
    packed = projection.clone().requires_grad_()
    with EmulatedGpu():
        attention(*separate, is_causal=True, backend="cuda").backward(dout)
        attention_qkv_packed(packed, is_causal=True, backend="cuda").backward(dout)
    expected = torch.stack([tensor.grad.transpose(1, 2) for tensor in separate], dim=2)
    assert torch.equal(packed.grad, expected)
