"""Calls on DTensors in two processes, each compared with the same call in one: python sharded_calls.py RANK RENDEZVOUS RESULTS.

RESULTS is a JSON file that process 0 writes: for each case null or what went wrong.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing import assert_close

from fused_attention import attention, attention_varlen
from fused_attention.kernels.attention import attention_kv_packed, attention_qkv_packed

BATCH, HEADS, SEQLEN_Q, SEQLEN_K = 4, 4, 6, 9
Arguments = dict[str, tuple[Tensor, Placement]]  # by name; those that are floating-point get gradients
REPLICATED = Replicate()


def inputs(
    placement: Placement, batch: int = BATCH, heads: int = HEADS, heads_kv: int = HEADS, dtype: torch.dtype = torch.float32
) -> Arguments:
    shapes = {"query": (batch, heads, SEQLEN_Q, 8), "key": (batch, heads_kv, SEQLEN_K, 8), "value": (batch, heads_kv, SEQLEN_K, 4)}
    return {name: (torch.randn(shape, dtype=dtype), placement) for name, shape in shapes.items()}


def padding(placement: Placement, batch: int = BATCH) -> Arguments:
    lengths = torch.arange(batch, dtype=torch.int32)
    return {
        "key_mask": (torch.rand(batch, SEQLEN_K) > 0.3, placement),
        "key_lengths": (SEQLEN_K - lengths, placement),
        "query_lengths": (SEQLEN_Q - lengths, placement),
    }


def bias(*shape: int, placement: Placement = REPLICATED) -> Arguments:
    return {"attn_mask": (torch.randn(shape), placement)}


def terms(slopes: tuple[int, ...], placement: Placement, placement_sinks: Placement) -> Arguments:
    return {"alibi_slopes": (torch.rand(slopes), placement), "sinks": (torch.randn(HEADS), placement_sinks)}


def varlen(**arguments: Any) -> Any:
    starts = arguments.pop("starts")
    query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
    out, lse = attention_varlen(query, key, value, starts, starts, 6, 6, **arguments)
    return out, lse


torch.manual_seed(0)  # the same tensors in both processes
STATE = {"dropout_p": 0.5, "rng_state": (torch.tensor([3, 4]), REPLICATED)}
TOKENS = {name: (torch.randn(10, HEADS, 8), Shard(1)) for name in ("query", "key", "value")}
STARTS = {"starts": (torch.tensor([0, 4, 10], dtype=torch.int32), REPLICATED)}
QUERY = torch.randn(BATCH, HEADS, SEQLEN_Q, 8)
QKV, KV = torch.randn(BATCH, SEQLEN_Q, 3, HEADS, 8), torch.randn(BATCH, SEQLEN_K, 2, HEADS, 8)

# Function, arguments, and whether each process works on what it has, with nothing to gather.
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], bool]] = {
    "batch": (attention, inputs(Shard(0)), True),
    "heads": (attention, inputs(Shard(1)), True),
    "replicated": (attention, inputs(REPLICATED), True),
    "batch, padding": (attention, inputs(Shard(0)) | padding(Shard(0)) | {"is_causal": "bottom_right"}, True),
    "heads, padding": (attention, inputs(Shard(1)) | padding(REPLICATED) | {"is_causal": True, "softcap": 2.0}, True),
    "batch, a bias for each": (attention, inputs(Shard(0)) | bias(BATCH, 1, SEQLEN_Q, SEQLEN_K, placement=Shard(0)), True),
    "batch, a bias for all": (attention, inputs(Shard(0)) | bias(1, HEADS, SEQLEN_Q, SEQLEN_K), True),
    "heads, a bias for each": (attention, inputs(Shard(1)) | bias(1, HEADS, SEQLEN_Q, SEQLEN_K, placement=Shard(1)), True),
    "heads, a bias for all": (attention, inputs(Shard(1)) | bias(1, 1, SEQLEN_Q, SEQLEN_K), True),
    "batch, slopes and sinks": (attention, inputs(Shard(0)) | terms((HEADS,), REPLICATED, REPLICATED), True),
    "batch, slopes for each": (attention, inputs(Shard(0)) | terms((BATCH, HEADS), Shard(0), REPLICATED), True),
    "heads, slopes and sinks": (attention, inputs(Shard(1)) | terms((HEADS,), Shard(0), Shard(0)), True),
    "heads, slopes for each": (attention, inputs(Shard(1)) | terms((BATCH, HEADS), Shard(1), Shard(0)), True),
    "heads in groups": (attention, inputs(Shard(1), heads_kv=2), True),
    "heads of torn groups": (attention, inputs(REPLICATED, heads_kv=1) | {"query": (QUERY, Shard(1))}, False),
    "torn groups, uneven": (attention, inputs(Shard(1), heads=6, heads_kv=3), False),
    "one batch element": (attention, inputs(REPLICATED, batch=1), True),
    "uneven batch": (attention, inputs(Shard(0), batch=3) | padding(Shard(0), 3), True),
    "uneven heads": (attention, inputs(Shard(1), heads=3, heads_kv=3), True),
    "lengths": (attention, inputs(Shard(2)), False),
    "batch of some, heads of others": (attention, inputs(Shard(0)) | {"key": (torch.randn(BATCH, HEADS, SEQLEN_K, 8), Shard(1))}, False),
    "batch, dropout": (attention, inputs(Shard(0)) | STATE, False),
    "heads, dropout": (attention, inputs(Shard(1)) | STATE, False),
    "batch, all dropped": (attention, inputs(Shard(0)) | {"dropout_p": 1.0}, True),
    "bfloat16, batch": (attention, inputs(Shard(0), dtype=torch.bfloat16), True),
    "bfloat16, heads": (attention, inputs(Shard(1), dtype=torch.bfloat16), True),
    "float64": (attention, inputs(Shard(0), dtype=torch.float64), True),
    "qkv, batch": (attention_qkv_packed, {"qkv": (QKV, Shard(0))}, True),
    "qkv, heads": (attention_qkv_packed, {"qkv": (QKV, Shard(3))}, True),
    "kv, batch": (attention_kv_packed, {"query": (QUERY, Shard(0)), "kv": (KV, Shard(0))}, True),
    "kv, heads": (attention_kv_packed, {"query": (QUERY, Shard(1)), "kv": (KV, Shard(3))}, True),
    "varlen, heads": (varlen, TOKENS | STARTS | terms((2, HEADS), Shard(1), Shard(0)), True),
    "varlen, tokens": (varlen, {name: (tensor, Shard(0)) for name, (tensor, _) in TOKENS.items()} | STARTS, False),
}  # fmt: skip


def split_tensors(arguments: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    tensors = {name: value for name, value in arguments.items() if isinstance(value, tuple)}
    return tensors, {name: value for name, value in arguments.items() if name not in tensors}


def run_case(name: str, mesh: DeviceMesh) -> None:
    function, arguments, alone = CASES[name]
    tensors, options = split_tensors(arguments)
    whole = {key: tensor.clone().requires_grad_(tensor.is_floating_point()) for key, (tensor, _) in tensors.items()}
    parts = {
        key: distribute_tensor(tensor, mesh, [placement]).requires_grad_(tensor.is_floating_point())
        for key, (tensor, placement) in tensors.items()
    }
    with CommDebugMode() as communication:
        out, lse = function(**parts, **options, return_lse=True)
    assert isinstance(out, DTensor)
    assert isinstance(lse, DTensor)
    assert (communication.get_total_counts() == 0) == alone, f"{communication.get_total_counts()} collectives, {alone=}"
    expected_out, expected_lse = function(**whole, **options, return_lse=True)
    assert_close(out.full_tensor(), expected_out)
    assert_close(lse.full_tensor(), expected_lse)
    dout, dlse = torch.randn_like(expected_out), torch.randn_like(expected_lse)
    leaves = [key for key, tensor in whole.items() if tensor.requires_grad]
    expected = torch.autograd.grad((expected_out, expected_lse), [whole[key] for key in leaves], (dout, dlse))
    given = [distribute_tensor(gradient, mesh, result.placements) for gradient, result in ((dout, out), (dlse, lse))]
    around = implicit_replication() if name == "float64" else nullcontext()  # the reference makes plain tensors, in its backward pass too
    with CommDebugMode() as communication, around:
        gradients = torch.autograd.grad((out, lse), [parts[key] for key in leaves], given)
    if alone:
        assert communication.get_total_counts() == 0, "collectives in the backward pass"
    for key, gradient, theirs in zip(leaves, gradients, expected, strict=True):
        assert_close(gradient.full_tensor(), theirs, msg=lambda text, key=key: f"gradient of {key}: {text}")


class Attention(nn.Module):
    """Tensor parallelism by torch's own styles: each process has some heads of the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part(x).unflatten(-1, (HEADS, 4)).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.out(attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))


def tensor_parallel_module(mesh: DeviceMesh) -> None:
    torch.manual_seed(1)
    alone, x = Attention(), torch.randn(2, 5, 16)
    torch.manual_seed(1)
    column = {name: ColwiseParallel(use_local_output=False) for name in ("query", "key", "value")}
    parallel = parallelize_module(Attention(), mesh, {**column, "out": RowwiseParallel()})
    assert_close(parallel(x), alone(x))
    alone(x).square().sum().backward()
    parallel(x).square().sum().backward()
    for ours, expected in zip(parallel.parameters(), alone.parameters(), strict=True):
        assert_close(ours.grad.full_tensor(), expected.grad)


def states_are_drawn_once_for_all(mesh: DeviceMesh) -> None:
    """Each process has a generator of its own; the mask is that of the first."""
    ones = {name: torch.ones(2, 2, 40, 4) for name in ("query", "key", "value")}
    parts = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in ones.items()}
    torch.manual_seed(dist.get_rank())
    out = attention(**parts, dropout_p=0.5)
    torch.manual_seed(0)
    assert_close(out.full_tensor(), attention(**ones, dropout_p=0.5))


def compiled(mesh: DeviceMesh) -> None:
    query, key, value = (distribute_tensor(tensor, mesh, [Shard(1)]) for tensor, _ in inputs(REPLICATED).values())
    function = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_close(function(query, key, value).full_tensor(), attention(query, key, value).full_tensor())


OTHERS = {"tensor parallel module": tensor_parallel_module, "rng_state": states_are_drawn_once_for_all, "compiled": compiled}


def main(rank: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    outcomes: dict[str, str | None] = {}
    for name in [*CASES, *OTHERS]:
        torch.manual_seed(2)
        try:
            run_case(name, mesh) if name in CASES else OTHERS[name](mesh)
            outcomes[name] = None
        except Exception:  # to be reported by its test, and the other process goes on too
            outcomes[name] = traceback.format_exc()
    if rank == 0:
        Path(results).write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
