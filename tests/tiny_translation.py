"""A made-up language pair, small enough to learn in seconds, and a model that has learned it."""

from __future__ import annotations

import contextlib
import functools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fused_attention.transformer.translation.corpora import load_corpus
from fused_attention.transformer.translation.data import ParallelText
from fused_attention.transformer.translation.train import Trainer
from fused_attention.transformer.translation.training_config import TrainingConfig

WORDS = {"red": "rouge", "blue": "bleu", "big": "grand", "cat": "chat", "dog": "chien", "sees": "voit", "eats": "mange"}


def made_up_text(count: int, seed: int = 0) -> ParallelText:
    """`count` different sentences of 2 to 5 words; the translation is word by word, in the opposite order."""
    words = random.Random(seed)
    sentences: dict[tuple[str, ...], None] = {}
    while len(sentences) < count:
        sentences[tuple(words.choices(list(WORDS), k=words.randint(2, 5)))] = None
    target = [" ".join(WORDS[word] for word in reversed(sentence)) for sentence in sentences]
    return ParallelText([" ".join(sentence) for sentence in sentences], target)


def write_text(folder: Path, split: str, text: ParallelText, languages: tuple[str, str] = ("en", "fr")) -> None:
    for language, sentences in zip(languages, (text.source, text.target), strict=True):
        (folder / f"{split}.{language}").write_text("".join(f"{sentence}\n" for sentence in sentences))


def write_corpus(folder: Path, count: int = 60) -> Path:
    """A corpus folder with train, val and test."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, size) in enumerate({"train": count, "val": 10, "test": 10}.items()):
        write_text(folder, split, made_up_text(size, seed))
    return folder


def tiny_config(data: Path, **changes: object) -> TrainingConfig:
    """Settings for a model of a few thousand parameters, in float32."""
    settings = {
        **{"data": str(data), "vocab_size": 60, "batch_tokens": 300, "seed": 1, "autocast": "off"},
        **{"d_model": 32, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 64},
        **{"max_len": 32, "steps": 8, "warmup_steps": 20, "checkpoint_every": 1000, "validate_every": 1000},
    }
    if "minutes" in changes:
        settings.pop("steps")
    return TrainingConfig.from_dict(settings | changes)


def start_training(folder: Path, data: Path, **changes: object) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(data, **changes)
    return Trainer(config, load_corpus(config.data), folder, torch.device("cpu"))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Operations as small as a tiny model's take longer in several threads, whose number also decides the last bits of results."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def trained_folder() -> Path:
    """The folder of a run that has learned its training sentences by heart, made once for all tests of a session."""
    base = Path(tempfile.mkdtemp(prefix="fused-attention-tests-"))
    data = write_corpus(base / "data", count=30)
    changes = {"steps": 250, "dropout": 0.0, "cooldown": 0.5, "label_smoothing": 0.0, "learning_rate_scale": 0.3}
    with one_thread():
        start_training(base / "run", data, **changes).run()
    return base / "run"
