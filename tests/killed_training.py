"""Trains a tiny model and kills it with SIGKILL, at each kill point in turn. Arguments: data folder, folder for the outputs.

The first checkpoint, after step 4, is written undisturbed; the kill comes with step 7 or with the second checkpoint, after
step 8.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_translation import start_training

from fused_attention.transformer.translation import output_files
from fused_attention.transformer.translation.train import Trainer

KILL_POINTS = ("mid-step", "mid-write", "before rename")
STEPS, CHECKPOINT_EVERY, KILLED_STEP = 12, 4, 7


def die(*arguments: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(number: int, action: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does `original`, but `action` on its call `number`."""
    calls = 0

    def function(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return (action if calls == number else original)(*arguments, **options)

    return function


def truncate_and_die(descriptor: int) -> None:
    """The state in the middle of a write: the first half of the file is there."""
    os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
    die()


def train(trainer: Trainer, kill_point: str) -> None:
    if kill_point == "mid-step":
        trainer.optimizer.step = on_call(KILLED_STEP, die, trainer.optimizer.step)
    elif kill_point == "mid-write":
        # A checkpoint takes two calls, for the file and for its folder, so the third is the second checkpoint's file.
        output_files.os.fsync = on_call(3, truncate_and_die, os.fsync)
    elif kill_point == "before rename":
        output_files.os.replace = on_call(2, die, os.replace)
    trainer.run()


def main(data: Path, output: Path) -> None:
    """Each training dies in a fork of this process, so that imports are paid for once. Ends with an error if one lives on."""
    torch.set_num_threads(1)
    for kill_point in KILL_POINTS:
        trainer = start_training(output / kill_point, data, steps=STEPS, checkpoint_every=CHECKPOINT_EVERY)
        child = os.fork()
        if child == 0:
            train(trainer, kill_point)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"{kill_point}: {status}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
