"""Trains tiny models by `fused-attention train` in several processes, which are forks of this one, so that torch is imported once.

Each run is a name, a number of processes (0: without torchrun's variables) and arguments. What the processes print goes to
OUTPUT/NAME.RANK, their exit statuses to OUTPUT/outcomes.json. Arguments: data folder, OUTPUT.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sacrebleu  # noqa: F401 (imported before the forks, which then need not)
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp

from fused_attention.transformer.translation import cli, corpora
from fused_attention.transformer.translation.data import Corpus, ParallelText
from fused_attention.transformer.translation.train import Trainer

SMALL = (
    *("--vocab-size", "60", "--d-model", "16", "--num-heads", "2", "--dim-feedforward", "32", "--num-encoder-layers", "2"),
    *("--num-decoder-layers", "1", "--batch-tokens", "288", "--max-len", "32", "--dropout", "0", "--warmup-steps", "20"),
    *("--autocast", "off", "--checkpoint-every", "10", "--validate-every", "10", "--seed", "1", "--cooldown", "0"),
    *(
        "--layer-drop",
        "0.2",
    ),
)
EXAMPLE = Path(__file__).parents[1] / "examples" / "train_in_processes.py"
LOST, KILLED_STEP = 1, 14  # the rank that dies, and when


class Runs:
    def __init__(self, data: Path, output: Path) -> None:
        self.data, self.output = data, output
        self.statuses: dict[str, list[int]] = {}
        self.seconds: dict[str, float] = {}

    def run(self, name: str, count: int, action: Callable[[int], int]) -> None:
        """action(rank), which returns the exit status, in `count` processes at once."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = time.monotonic()
        children = [self.fork(name, rank, count, port, lambda rank=rank: action(rank)) for rank in range(max(count, 1))]
        self.statuses[name] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        self.seconds[name] = time.monotonic() - started

    def fork(self, name: str, rank: int, count: int, port: int, action: Callable[[], int]) -> int:
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            printed = os.open(self.output / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            if count:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {variable: str(value) for variable, value in place.items()}
            status = action()
            sys.stdout.flush()
        finally:
            os._exit(status)

    def train(self, name: str, count: int, arguments: Sequence[str], prepare: Callable[[int], None]) -> None:
        """`fused-attention train`; prepare(rank) comes first in each process."""

        def action(rank: int) -> int:
            prepare(rank)
            return cli.main(["train", str(self.output / name), *arguments])

        self.run(name, count, action)

    def new(self, name: str, count: int, *arguments: str, prepare: Callable[[int], None] = lambda rank: None) -> None:
        """A run from scratch in the folder `name`."""
        self.train(name, count, ["--data", str(self.data), *SMALL, *arguments], prepare)

    def resumed(self, name: str, folder: str, count: int, *arguments: str) -> None:
        """A run that goes on from a copy of a folder."""
        shutil.copytree(self.output / folder, self.output / name)
        self.train(name, count, ["--resume", *arguments], lambda rank: None)

    def example(self, name: str, count: int) -> None:
        self.run(name, count, lambda rank: 0 if runpy.run_path(str(EXAMPLE)) else 1)


def dies(rank: int) -> None:
    """In rank LOST, training ends by SIGKILL between the forward and the backward of a step."""
    if rank == LOST:
        take_step = Trainer.train_step

        def step(trainer: Trainer, *arguments: object) -> torch.Tensor:
            if trainer.step + 1 == KILLED_STEP:
                torch.Tensor.backward = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
            return take_step(trainer, *arguments)  # type: ignore[arg-type]

        Trainer.train_step = step  # type: ignore[assignment, method-assign]


def reads_other_text(rank: int) -> None:
    """Rank 1 finds one more sentence in the corpus."""
    if rank == 1:
        read = corpora.load_corpus

        def load(*arguments: Any, **options: Any) -> Corpus:
            corpus = read(*arguments, **options)
            return replace(corpus, train=ParallelText([*corpus.train.source, "cat"], [*corpus.train.target, "chat"]))

        corpora.load_corpus = load


def main(data: Path, output: Path) -> None:
    torch.set_num_threads(1)
    runs = Runs(data, output)
    runs.new("one", 0, "--steps", "22")
    runs.new("accumulated", 0, "--steps", "20", "--accumulate", "4")
    runs.new("ddp2", 2, "--steps", "20", "--parallel", "ddp")
    runs.new("fsdp4", 4, "--steps", "20", "--parallel", "fsdp", "--accumulate", "2", "--sharded-checkpoint")
    runs.resumed("fsdp4 then one", "fsdp4", 0, "--steps", "22", "--no-sharded-checkpoint")
    runs.new("killed", 4, "--steps", "20", "--parallel", "ddp", prepare=dies)
    runs.resumed("killed then fsdp2", "killed", 2, "--parallel", "fsdp", "--sharded-checkpoint")
    runs.new("other text", 2, "--steps", "20", "--parallel", "ddp", prepare=reads_other_text)
    runs.new("indivisible", 2, "--steps", "20", "--parallel", "ddp", "--accumulate", "5")
    runs.new("no way to share", 2, "--steps", "20")
    runs.example("example 1", 1)
    runs.example("example 2", 2)
    (output / "outcomes.json").write_text(json.dumps({"statuses": runs.statuses, "seconds": runs.seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
