"""`fused-attention compare`: the Transformer, a Transformer with a recurrent decoder, and an LSTM with attention, on one machine.

The models get the same data, tokens, optimizer and number of parameters (models.py). 1. Measure training speed and decoding latency by
sentence length (speed.py). 2. Train each model from scratch, for part of the time budget or on part of the text, and compute BLEU. 3. Print
tables and draw plots (curves.py). Each result is saved as soon as it is measured, and an interrupted comparison can be resumed.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...transformer.generate import Generation
from ...transformer.optional import optional_module
from ...transformer.translation.corpora import load_corpus
from ...transformer.translation.data import Corpus, ParallelText
from ...transformer.translation.machine import choose_device
from ...transformer.translation.terminal import heartbeat
from ...transformer.translation.tokenizer import Tokenizer
from ...transformer.translation.train import Trainer, train_tokenizers
from ...transformer.translation.training_config import TrainingConfig
from ...transformer.translation.translate import Translator
from ..cell import commit, machine_line
from ..journal import Journal, Key
from .curves import ALL_PAIRS, draw, tables
from .models import builders
from .speed import decoding_milliseconds, fair_clock, training_speed

RESULTS_NAME = "results.jsonl"
NEVER = 10**9  # steps
SPEED_PAIRS = 100  # speed is measured on random tokens, but a trainer needs some text


@dataclass(frozen=True)
class Grid:
    """What to measure."""

    lengths: tuple[int, ...]  # of sentences, in tokens, for training speed and decoding latency
    rounds: int  # of each speed measurement
    pairs: tuple[int, ...]  # sizes of the training set, in addition to all pairs
    parts: tuple[float, ...]  # shorter training times on all pairs, as fractions of `minutes`
    minutes: float  # training time of a model
    test_sentences: int  # at most


GRIDS = {
    "short": Grid((8, 32, 128), rounds=3, pairs=(1000,), parts=(), minutes=0.3, test_sentences=100),
    "full": Grid((8, 16, 32, 64, 128, 256), rounds=9, pairs=(1000, 4000, 16000), parts=(0.25, 0.5), minutes=4.0, test_sentences=1000),
}
# 1.5 million parameters and small batches, so that the models learn something in a minute on a CPU.
CONFIG = TrainingConfig(
    minutes=1.0,
    vocab_size=3000,
    d_model=128,
    dim_feedforward=320,
    batch_tokens=1280,
    warmup_steps=250,
    learning_rate_scale=1.2,
    cooldown=0.6,
)
# The best of several for each model, as multiples of CONFIG's (docs/recurrence.md).
LEARNING_RATES = {"Transformer": 1.0, "SSRU decoder": 1.0, "LSTM": 2.0}


def run_compare(folder: Path, grid: Grid, config: TrainingConfig, device: str = "auto") -> None:
    """Measure whatever is missing from the results in `folder`, print the tables and write the plots to the folder.

    Raises DataError if the corpus cannot be loaded, ValueError if the folder holds a comparison with other settings.
    """
    for name in ("sentencepiece", "safetensors", "tqdm", "sacrebleu", "matplotlib"):
        optional_module(name)
    config, chosen = replace(config, minutes=grid.minutes, checkpoint_every=NEVER, validate_every=NEVER), choose_device(device)
    with heartbeat("getting the text"):
        corpus = load_corpus(config.data, config.source_language, config.target_language, max_words=config.max_words)
        tokenizers = train_tokenizers(config, corpus)
    comparison = Comparison(folder, grid, config, corpus, tokenizers, chosen)
    try:
        comparison.measure_speed()
        comparison.measure_quality()
    except KeyboardInterrupt:  # with TrainingInterrupted, whose message names a temporary folder
        raise KeyboardInterrupt(
            f"interrupted; the results so far are in {comparison.journal.path}; to continue, repeat the command"
        ) from None
    print(tables(comparison.journal.results))
    for path in draw(comparison.journal.results, folder):
        print(path)


def model_facts(model: Generation) -> dict[str, Any]:
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "config": model.config}


class Comparison:
    """A comparison and the journal of its results."""

    def __init__(
        self,
        folder: Path,
        grid: Grid,
        config: TrainingConfig,
        corpus: Corpus,
        tokenizers: tuple[Tokenizer, Tokenizer],
        device: torch.device,
    ) -> None:
        self.grid, self.config, self.corpus, self.tokenizers, self.device = grid, config, corpus, tokenizers, device
        self.clock = fair_clock(device)
        self.builds = builders(config, len(tokenizers[0]), len(tokenizers[1]))
        settings = {
            "grid": asdict(grid),
            "config": config.to_dict(),
            "corpus": corpus.fingerprint(),
            "device": str(device),
            "clock": self.clock.__name__,
            "learning_rates": LEARNING_RATES,
        }
        models = {name: model_facts(build()) for name, build in self.builds.items()}
        self.journal = self.opened(folder, {"settings": settings, "models": models})

    def opened(self, folder: Path, facts: dict[str, Any]) -> Journal:
        """The journal in `folder`: a new one, or that of the same comparison."""
        path = folder / RESULTS_NAME
        journal = Journal(path)
        if journal.results:
            as_read = json.loads(json.dumps(facts["settings"]))  # with lists in place of tuples
            if journal.results.get(("run",), {}).get("settings") != as_read:
                raise ValueError(f"{path} holds a comparison with other settings; choose another folder")
            print(f"continuing {path}, which has {len(journal.results) - 1} results", file=sys.stderr)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            journal.keep(("run",), facts | {"machine": machine_line(), "commit": commit()})
        return journal

    def measure_speed(self) -> None:
        lengths = [length for length in self.grid.lengths if length <= self.config.max_len]
        wanted: list[Key] = [(measure, length) for measure in ("training", "decoding") for length in lengths]
        if not (wanted := [key for key in wanted if key not in self.journal.results]):
            return
        trainers = {
            name: Trainer(self.config, self.part_of_text(SPEED_PAIRS), Path(), self.device, self.tokenizers, build, self.clock)
            for name, build in self.builds.items()
        }
        models = {name: trainer.model for name, trainer in trainers.items()}
        for measure, length in wanted:
            with heartbeat(f"speed of {measure}, sentences of {length} tokens"):
                if measure == "training":
                    result = training_speed(trainers, int(length), self.grid.rounds, self.clock)
                else:
                    result = decoding_milliseconds(models, int(length), self.grid.rounds, self.device, self.clock)
            self.journal.keep((measure, length), result)

    def measure_quality(self) -> None:
        """Train and score the models; at each point one right after the other, so that they see similar load on a shared machine."""
        sizes = [size for size in self.grid.pairs if size < len(self.corpus.train)]
        points = [(size, self.grid.minutes) for size in (ALL_PAIRS, *sizes)]
        points += [(ALL_PAIRS, part * self.grid.minutes) for part in self.grid.parts]
        for pairs, minutes in points:
            for name in self.builds:
                key: Key = ("bleu", name, pairs, f"{minutes:g}")
                if key not in self.journal.results:
                    print(f"{name}: {pairs or len(self.corpus.train):,} pairs, {minutes:g} minutes", file=sys.stderr)
                    self.journal.keep(key, self.trained(name, pairs, minutes))

    def trained(self, model: str, pairs: int, minutes: float) -> dict[str, Any]:
        """Train the named model for this long on this many pairs; its scores, and how far the training got."""
        corpus = self.part_of_text(pairs)
        name, test = self.corpus.held_out()
        limit = self.grid.test_sentences
        learning_rate_scale = LEARNING_RATES[model] * self.config.learning_rate_scale
        config = replace(self.config, minutes=minutes, learning_rate_scale=learning_rate_scale)
        with tempfile.TemporaryDirectory() as folder:
            with heartbeat("preparing the text"):
                trainer = Trainer(config, corpus, Path(folder), self.device, self.tokenizers, self.builds[model], self.clock)
            trainer.run()
        with heartbeat(f"translating {name}"):
            translator = Translator(trainer.model, *self.tokenizers, self.config.autocast)
            scores, _ = translator.score(ParallelText(test.source[:limit], test.target[:limit]))
        return {
            **{"bleu": scores.bleu, "chrf": scores.chrf, "signature": scores.bleu_signature, "sentences": scores.num_sentences},
            **{"pairs": len(corpus.train), "steps": trainer.step, "tokens": trainer.history.tokens},
            **{"seconds": trainer.history.seconds[-1], "cross_entropy": trainer.history.validations[-1][1]},
        }

    def part_of_text(self, pairs: int) -> Corpus:
        """The corpus with this many training pairs, chosen at random; smaller parts are contained in larger ones."""
        text = self.corpus.train
        order = list(range(len(text)))
        random.Random(self.config.seed).shuffle(order)
        chosen = order[: pairs or None]
        return replace(self.corpus, train=ParallelText([text.source[i] for i in chosen], [text.target[i] for i in chosen]))
