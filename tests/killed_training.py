"""Trains a tiny model and kills itself with SIGKILL. Arguments: kill point, data folder, output folder.

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

from fused_attention.transformer import atomic_write
from fused_attention.transformer.train import Trainer

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


def main(kill_point: str, data: Path, output: Path) -> None:
    torch.set_num_threads(1)
    trainer = start_training(output, data, steps=STEPS, checkpoint_every=CHECKPOINT_EVERY)
    if kill_point == "mid-step":
        trainer.optimizer.step = on_call(KILLED_STEP, die, trainer.optimizer.step)
    elif kill_point == "mid-write":
        # A checkpoint takes two calls, for the file and for its folder, so the third is the second checkpoint's file.
        atomic_write.os.fsync = on_call(3, truncate_and_die, os.fsync)
    elif kill_point == "before rename":
        atomic_write.os.replace = on_call(2, die, os.replace)
    Trainer.run(trainer)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
