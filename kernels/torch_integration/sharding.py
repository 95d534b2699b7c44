"""Sharding rules for torch.distributed's DTensors: each process runs its part of the batch or of the heads, without communication.

DTensor gathers inputs that are sharded any other way: over lengths or head_dim, or over heads in a way that would separate a group of query
heads from its key head. It also gathers with dropout, whose masks number batch and heads globally. Gradients of shared inputs (a mask for
the whole batch, a number per head) are summed over the processes. A call that no kernel supports runs on the reference; its backward must
run under torch.distributed.tensor.experimental.implicit_replication().
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..problem import DIFFERENTIABLE, INPUTS, NUM_INPUTS, OPTIONS, PLACE, SAVED, TENSORS, Layout

Dims = tuple[int | None, int | None]  # a tensor's batch dim and head dim

OPTIONAL_DIMS: list[Dims] = [(tensor.batch, tensor.heads) for tensor in TENSORS.values()]
DROPOUT_P, KEEPS_OUT_ERROR = list(OPTIONS).index("dropout_p"), list(OPTIONS).index("keeps_out_error")


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def on_all_processes(tensor: Tensor, like: Tensor) -> Tensor:
    """Replicates a plain tensor as a DTensor on the mesh of another, with the values of the mesh's first process."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim)


def plain_tensors_are_the_same_everywhere() -> AbstractContextManager:
    """A context in which plain tensors that the reference creates next to DTensors count as replicated."""
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def register(layout: Layout, forward: Any, backward: Any) -> None:
    """Tells DTensor how the arguments of a layout's operators may be sharded, and how the results are sharded then."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    num_inputs = NUM_INPUTS[layout]
    num_tensors, num_differentiable = num_inputs + len(TENSORS), len(DIFFERENTIABLE)
    slopes = num_inputs + PLACE["alibi_slopes"]
    input_dims = list(INPUTS[layout].values())
    result_dims = (0, 1)  # of out, lse and out_error; packed sequences have a batch dim of 1

    def place(spec: Any, dim: int | None, otherwise: Any) -> Any:
        """The placement of a tensor, None without one; a dim of size 1 stands for all."""
        if spec is None:
            return None
        return otherwise if dim is None or spec.shape[dim] == 1 else Shard(dim)

    def dims_of(arguments: tuple) -> list[Dims]:
        dims = [*input_dims, *OPTIONAL_DIMS]
        if arguments[slopes] is not None and arguments[slopes].ndim == 1:
            dims[slopes] = (None, 0)
        if layout == "varlen":  # lengths and slopes belong to sequences, which stay together
            dims[num_inputs:] = [(None, heads) for _, heads in dims[num_inputs:]]
        return dims

    def kinds(arguments: tuple) -> list[int]:
        """What a call may be sharded over: 0 = the batch, 1 = the heads."""
        if 0.0 < arguments[num_tensors + DROPOUT_P] < 1.0:
            return []
        first, last = arguments[0], arguments[num_inputs - 1]
        num_heads, num_heads_kv = first.shape[input_dims[0][1]], last.shape[input_dims[-1][1]]
        parts = tuple(first.mesh.shape)
        together = num_heads_kv % math.prod(parts) == 0 or (
            all(num_heads_kv % part == 0 for part in parts) and num_heads_kv < math.prod(parts)  # but not over all of them at once
        )
        by_batch = [0] if layout != "varlen" and first.shape[0] > 1 else []
        return [*by_batch, 1] if num_heads_kv > 1 and (num_heads == num_heads_kv or together) else by_batch

    def tensors_placed(arguments: tuple, kind: int | None) -> list[Any]:
        if kind is None:
            return [None if spec is None else Replicate() for spec in arguments[:num_tensors]]
        specs = zip(arguments, dims_of(arguments), strict=False)  # the options follow
        return [place(spec, dims[kind], Replicate()) for spec, dims in specs]

    @register_sharding(forward)
    def shard_forward(*arguments: Any) -> list[tuple[list, list]]:
        options = [None] * (len(arguments) - num_tensors)
        ways: list[tuple[list, list]] = [([Replicate()] * 3, [*tensors_placed(arguments, None), *options])]
        for kind in kinds(arguments):
            shard = Shard(result_dims[kind])
            out_error = shard if arguments[num_tensors + KEEPS_OUT_ERROR] else Replicate()  # empty
            ways.append(([shard, shard, out_error], [*tensors_placed(arguments, kind), *options]))
        return ways

    @register_sharding(backward)
    def shard_backward(*arguments: Any) -> list[tuple[list, list]]:
        saved, given = arguments[: len(SAVED)], arguments[len(SAVED) : -num_differentiable]  # the forward's
        needs_grad = arguments[-num_differentiable:]
        options = [None] * (len(given) - num_tensors + num_differentiable)
        replicated = [None if spec is None else Replicate() for spec in saved]
        results: list[Any] = [Replicate()] * (num_inputs + num_differentiable)
        ways = [(results, [*replicated, *tensors_placed(given, None), *options])]
        for kind in kinds(given):
            dims = dims_of(given)
            results = [place(spec, dim[kind], None) for spec, dim in zip(given[:num_inputs], dims[:num_inputs], strict=True)]
            for needed, index in zip(needs_grad, DIFFERENTIABLE.values(), strict=True):
                spec = given[num_inputs + index]
                results.append(place(spec, dims[num_inputs + index][kind], Partial()) if needed and spec is not None else Replicate())
            ways.append(
                (results, [*[None if spec is None else Shard(result_dims[kind]) for spec in saved], *tensors_placed(given, kind), *options])
            )
        return ways
