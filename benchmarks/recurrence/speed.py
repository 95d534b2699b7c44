"""The speed of training and greedy decoding at one sentence length; the models take turns, so that all see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from ...transformer.generate import Generation
from ...transformer.translation.batches import Batch, StepBatch
from ...transformer.translation.tokenizer import SPECIAL_IDS
from ...transformer.translation.train import Trainer

BATCH_TOKENS = 2560

Clock = Callable[[], float]  # seconds


def fair_clock(device: torch.device) -> Clock:
    """Processor time if one thread does all the work, which other programs on the machine hardly affect; otherwise elapsed time."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.monotonic


def training_speed(trainers: Mapping[str, Trainer], length: int, rounds: int, clock: Clock) -> dict[str, float]:
    """Source and target tokens per second in training steps on random sentences of `length` tokens, BATCH_TOKENS per batch.

    Changes the trainers' models. A batch has at least one pair.
    """
    some = next(iter(trainers.values()))
    rows = max(1, BATCH_TOKENS // (2 * length))
    src, tgt_in, tgt_out = (random_tokens(rows, length, some.model).to(some.device) for _ in range(3))
    batch = StepBatch.of(Batch(src, tgt_in, tgt_out))
    for trainer in trainers.values():
        trainer.model.train()
    steps = {name: lambda trainer=trainer: trainer.train_step(batch, 0.5).item() for name, trainer in trainers.items()}
    return {name: batch.tokens / seconds for name, seconds in median_seconds(steps, rounds, clock).items()}


def decoding_milliseconds(
    models: Mapping[str, Generation], length: int, rounds: int, device: torch.device, clock: Clock
) -> dict[str, float]:
    """The time to translate one sentence of `length` tokens greedily into as many tokens."""
    src = random_tokens(1, length, next(iter(models.values()))).to(device)
    runs = {name: lambda model=model: model.generate(src, length, min_length=length).cpu() for name, model in models.items()}
    return {name: 1000 * seconds for name, seconds in median_seconds(runs, rounds, clock).items()}


def random_tokens(rows: int, length: int, model: Generation) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(len(SPECIAL_IDS), model.tgt_vocab, (rows, length), generator=generator)


def median_seconds(runs: Mapping[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, float]:
    """Medians over `rounds` rounds, after one to warm up; in each round every function runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}
