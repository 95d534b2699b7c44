"""Training in several processes: who they are, what they tell each other, and a model whose gradients they share.

torchrun starts the processes. Messages between them are tensors on the CPU, by gloo; gradients go by nccl between GPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .model import Transformer

# Methods of the model that read its parameters, besides forward.
FORWARD_METHODS = ("generate", "beam_search", "score", "encode", "decode")

Result = TypeVar("Result")


class FailedElsewhere(RuntimeError):
    """Another process says what went wrong; this one has nothing to add."""


class PeerLost(RuntimeError):
    """Another process ended without a word; the message is one line."""


@dataclass(frozen=True)
class Processes:
    """This process's number, from 0, and how many there are. Every method is called by all of them, in the same order."""

    rank: int = 0
    count: int = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def all(self, action: Callable[[], Result]) -> Result:
        """The result of an action, which every process does on its own. If it fails in some, all raise: the first of them its own error."""
        error, result = None, None
        try:
            result = action()
        except Exception as raised:
            error = raised
        failed = [rank for rank, has_failed in enumerate(self.gather(error is not None)) if has_failed]
        if failed and failed[0] == self.rank:
            raise cast(Exception, error)
        if failed:
            raise FailedElsewhere(f"rank {failed[0]} failed") from error
        return cast(Result, result)

    def first(self, action: Callable[[], Result]) -> Result:
        """The result of an action that only rank 0 does; if it fails, all raise."""
        result = self.all(lambda: action() if self.rank == 0 else None)
        return cast(Result, self.gather(result)[0])

    def fail(self, error: BaseException) -> NoReturn:
        """All processes found the same error; rank 0 raises it."""
        raise error if self.rank == 0 else FailedElsewhere(str(error))


ALONE = Processes()


def started_by_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextlib.contextmanager
def joined(gpus: bool) -> Iterator[Processes]:
    """The processes that torchrun started, as long as the body runs; one alone if it started none.

    Raises PeerLost where a message fails because another process has ended. What torch.distributed holds is then left as it is, because
    to free it may take as long as a message may take: end the process by os._exit.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    rank = dist.get_rank()
    try:
        yield Processes(rank, dist.get_world_size())
    except BaseException as error:
        if is_lost_peer(error):
            message = f"rank {rank}: another process of this training has ended; go on from its last checkpoint with --resume"
            raise PeerLost(message) from error
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether this is an error of gloo or nccl that says a peer does not answer; they have no class of their own in every torch."""
    words = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Socket Timeout")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, by its number on this machine, where `device` is a GPU without a number."""
    if device.type != "cuda" or device.index is not None or not started_by_torchrun():
        return device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def share_gradients(model: nn.Module, loss: nn.Module, parallel: str, device: torch.device, unused_parameters: bool = False) -> nn.Module:
    """What to call in place of `loss`, a module that holds the model, in training: gradients are means over the processes.

    "ddp": every process holds the model. "fsdp": each holds a part of every parameter, model itself is changed (shard).
    unused_parameters: some steps do not use some parameters.
    """
    if parallel == "fsdp":
        shard(model, device)
        return loss
    loss.to(device)
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(loss, gradient_as_bucket_view=True, find_unused_parameters=unused_parameters)
    return loss


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """FSDP2, in place: every layer is a unit, and the rest of the model, with embeddings that may be tied, is another.

    The model may be on the CPU still: its parameters move to the device a unit at a time. generate, beam_search, score, encode and decode
    work as before, if every process calls them with the same arguments.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    if isinstance(model, Transformer):
        for layer in (*model.encoder.layers, *model.decoder.layers):
            fully_shard(layer, mesh=mesh)
        for layer in model.decoder.layers:
            register_fsdp_forward_method(layer, "memory_keys_values")
    fully_shard(model, mesh=mesh)
    for name in FORWARD_METHODS:
        register_fsdp_forward_method(model, name)
    return model


@contextlib.contextmanager
def gradients_exchanged(model: nn.Module, loss: nn.Module, now: bool) -> Iterator[None]:
    """Whether the backward in the body exchanges gradients, and with them those that were added up before; loss from share_gradients."""
    set_exchange: Callable[[bool], None] | None = getattr(model, "set_requires_gradient_sync", None)  # FSDP2
    if set_exchange is not None:
        set_exchange(now)
    with loss.no_sync() if isinstance(loss, nn.parallel.DistributedDataParallel) and not now else contextlib.nullcontext():
        yield


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def copy_whole(destination: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one that may be sharded."""
    if hasattr(destination, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        source = distribute_tensor(
            source.to(destination.device),
            destination.device_mesh,  # type: ignore[attr-defined]
            destination.placements,  # type: ignore[attr-defined]
            src_data_rank=None,
        )
    destination.copy_(source)
