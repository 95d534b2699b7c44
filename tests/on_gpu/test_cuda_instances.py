"""Every compiled CUDA instance runs on this GPU, under the accuracy rule; the planned kernels are those that the profiler saw."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import attention_calls
import pytest
import test_cuda_backward
import test_cuda_forward
import test_cuda_one_pass
import test_cuda_single_tile
import torch
from attention_calls import CALL, build

from csrc.cuda.instances.manifest import INSTANCES, Instance
from fused_attention.kernels.native import cuda as cuda_backend

TILED = [row for row in INSTANCES if row.pass_name != "helper"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OF_OTHER_TILES = (140, 150)  # queries and keys: some blocks, and a rest of both


def call_of(row: Instance) -> dict[str, Any]:
    """A call that the row's kernel computes, with as much of what its class can do as fits together."""
    call = CALL | {
        "dtype": DTYPES[row.dtype],
        "head_dims": (min(row.head_dim_qk, 128), min(row.head_dim_v, 128))
        if row.pass_name == "mask_gradient"
        else (row.head_dim_qk, row.head_dim_v),
        "sizes": (2, 2, 2 if row.feature_class == "bias" else 1),
        "seqlens": OF_OTHER_TILES,
    }
    if row.pass_name == "decode":
        return call | {"seqlens": (1, 300), "is_causal": "bottom_right", "key_lengths": (300, 70)}
    if row.pass_name.startswith("single_tile"):
        return call | test_cuda_single_tile.CLASSES[row.feature_class] | {"seqlens": (70, 127)}
    if row.pass_name == "mask_gradient":
        return call | {"attn_mask": ("bfloat16", "11QK"), "key_lengths": (300, 60)}
    if row.pass_name == "backward":
        return call | test_cuda_one_pass.CLASSES[row.feature_class, row.dropout]
    classes = test_cuda_backward.CLASSES if row.pass_name.startswith("backward") else test_cuda_forward.CLASSES
    return call | classes[row.feature_class, row.dropout]


def backward_of(row: Instance) -> str:
    """Of cuda_backend.BACKWARD_KERNELS."""
    return {"backward": "one pass", "single_tile_backward": "chosen"}.get(row.pass_name, "two passes")


def launched(row: Instance) -> set[str]:
    """Runs the row's call, checks it, and returns the names of the kernels."""
    call = call_of(row)
    problem, dout, dlse = build(call, "cuda")
    backend = SimpleNamespace(**vars(cuda_backend) | {"backward": partial(cuda_backend.backward, kernels=backward_of(row))})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attention_calls.check(backend, problem, dout, dlse, call["memory"])
        torch.cuda.synchronize()
    return {event.key.split("(")[0] for event in profile.key_averages()}


@pytest.mark.parametrize("row", TILED, ids=lambda row: row.name)
def test_instance(row: Instance) -> None:
    names = launched(row)
    ours = sorted(names & {instance.name for instance in INSTANCES})
    assert ours, f"the profiler saw none of our kernels, but {sorted(names)}: nothing says what ran"
    if row.name not in ours:
        pytest.skip(f"this GPU's plan takes other kernels: {ours}")
