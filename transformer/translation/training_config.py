"""The settings of a training run, and the committed recipes."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import math
import operator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .machine import AUTOCAST_CHOICES
from .tokenizer import TOKENIZERS

PARALLEL_CHOICES = ("off", "ddp", "fsdp")
BEST_BY_CHOICES = ("loss", "bleu")
CHOICES = {"autocast": AUTOCAST_CHOICES, "parallel": PARALLEL_CHOICES, "best_by": BEST_BY_CHOICES, "tokenizer": TOKENIZERS}


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that determines the result of a training run. ValueError or TypeError, naming the setting that is out of range.

    Settings, including NumPy numbers, become Python ints, floats, bools and strs, so that a checkpoint can hold them.

    Training ends after `steps` optimizer steps or after `minutes`; exactly one of them must be given.
    """

    # Data
    data: str = "multi30k"  # a corpus name or a folder
    source_language: str = "en"
    target_language: str = "fr"
    max_words: int | None = None  # leave out pairs with a longer side
    tokenizer: str = "bpe"  # or "unigram"
    vocab_size: int = 4000  # of each tokenizer
    joint_vocabulary: bool = True  # one tokenizer for both languages; all embeddings and the output layer are then tied
    # Model
    d_model: int = 192
    num_heads: int = 4
    num_encoder_layers: int = 3
    num_decoder_layers: int = 3
    dim_feedforward: int = 512
    dropout: float = 0.1  # of every kind for which the next four say nothing
    embedding_dropout: float | None = None
    attention_dropout: float | None = None
    feed_forward_dropout: float | None = None
    residual_dropout: float | None = None
    layer_drop: float = 0.0  # probability of leaving out each layer in training
    norm_first: bool = True
    memory_layers: str = "last"
    max_len: int = 256  # tokens; longer pairs are left out of training
    # Optimization
    steps: int | None = None
    minutes: float | None = None
    batch_tokens: int = 2560  # source and target tokens of an optimizer step, including padding, in all processes together
    accumulate: int = 1  # micro-batches of an optimizer step, one after the other in each process; they take less memory
    parallel: str = "off"  # several processes: "ddp", each holds the model, or "fsdp", each holds a part of every parameter
    warmup_steps: int = 4000
    learning_rate_scale: float = 1.0  # multiplies the paper's schedule
    cooldown: float = 0.0  # final fraction of the run in which the learning rate also falls linearly to 0; 0 as in the paper
    label_smoothing: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0
    autocast: str = "auto"  # "auto": bf16 if it is faster; "bf16"; "fp16", with scaled gradients; "off"
    compile: bool = False  # the loss and its gradients by torch.compile; batches then have at most 8 shapes
    # Reporting
    checkpoint_every: int = 200  # in steps; the end of the run is always saved
    sharded_checkpoint: bool = False  # each process writes what it holds, instead of all in one file
    validate_every: int = 200  # in steps; also at the end
    best_by: str = "loss"  # of the validation text; "bleu" of greedy translations of it, which takes longer
    keep_last: int = 0  # the weights of so many of the last validations are kept
    keep_best: int = 0  # and those of so many of the best
    patience: int = 0  # validations in a row without a better one than before, after which training ends; 0: it goes on

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(field.name, str(field.type), getattr(self, field.name)))
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("exactly one of steps and minutes must be given")
        positive = [
            *("steps", "minutes", "max_words", "vocab_size", "batch_tokens", "warmup_steps", "learning_rate_scale"),
            *("max_len", "clip_norm", "checkpoint_every", "validate_every", "accumulate"),
        ]
        for name in positive:
            value = getattr(self, name)
            # `not >`, so that NaN fails too.
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in ("keep_last", "keep_best", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("cooldown", "label_smoothing", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {value}")
        for one, other in (("compile", "layer_drop"), ("compile", "fsdp"), ("fp16", "fsdp")):
            named = {"fsdp": self.parallel == "fsdp", "fp16": self.autocast == "fp16"}
            if all(named.get(name, getattr(self, name, False)) for name in (one, other)):
                raise ValueError(f"{one} and {other} cannot be combined")
        if self.minutes is not None and not math.isfinite(60.0 * self.minutes):
            raise ValueError(f"minutes must be finite, not {self.minutes}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits, not {self.seed}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")

    def model_arguments(self, source_vocab: int, target_vocab: int) -> dict[str, Any]:
        """Arguments of Transformer for vocabularies of these sizes."""
        names = (
            *("d_model", "num_heads", "num_encoder_layers", "num_decoder_layers", "dim_feedforward", "dropout"),
            *("embedding_dropout", "attention_dropout", "feed_forward_dropout", "residual_dropout", "layer_drop"),
            *("norm_first", "memory_layers", "max_len"),
        )
        sizes = {"src_vocab": source_vocab, "tgt_vocab": target_vocab, "tie_weights": self.joint_vocabulary}
        return {**sizes, **{name: getattr(self, name) for name in names}}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """Raises ValueError if `values` has settings this version does not know."""
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            near = difflib.get_close_matches(unknown[0], [field.name for field in fields(cls)], 1)
            hint = f"; is {unknown[0]} meant to be {near[0]}?" if near else ""
            raise ValueError(f"unknown training settings: {', '.join(unknown)}{hint}")
        return cls(**values)

    def to_toml(self) -> str:
        """A file of settings that read_settings reads."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in self.to_dict().items() if value is not None]
        return "\n".join([*lines, ""])


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises ValueError, which names the file, if it is no TOML or has a setting that does not exist."""
    tomllib = None
    for name in ("tomllib", "tomli"):  # the former is part of Python 3.11
        with contextlib.suppress(ImportError):
            tomllib = tomllib or importlib.import_module(name)
    if tomllib is None:
        raise ImportError("a file of settings needs Python 3.11, or the package tomli")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{path} is not TOML: {error}") from error
    try:
        TrainingConfig.from_dict(values if values.keys() & {"steps", "minutes"} else {"steps": 1, **values})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return values


def _plain(name: str, declared: str, value: Any) -> Any:
    """The value of a setting in its declared type, such as "int | None"; TypeError if it does not fit."""
    kind, _, optional = declared.partition(" | ")
    if value is None and optional:
        return None
    try:
        if kind == "int":
            return operator.index(value)
        if kind == "float" and not isinstance(value, str):
            return float(value)
        if kind == "bool" and value in (False, True):
            return bool(value)
        if kind == "str" and isinstance(value, str):
            return value
    except (TypeError, OverflowError):
        pass
    raise TypeError(f"{name} must be {'an' if kind == 'int' else 'a'} {kind}, got {type(value).__name__}")


def learning_rate(config: TrainingConfig, step: int, progress: float) -> float:
    """The learning rate of optimizer step `step` (from 1), at `progress` (0 to 1) through the run.

    Vaswani et al. 2017, equation 3, d_model^-0.5 * min(step^-0.5, step * warmup^-1.5), times learning_rate_scale, times a
    linear cooldown to 0 over the last part of the run, since short runs gain several BLEU from ending at a small rate.
    """
    paper = config.d_model**-0.5 * min(step**-0.5, step * config.warmup_steps**-1.5)
    remaining = max(0.0, 1.0 - progress)
    return config.learning_rate_scale * paper * (min(1.0, remaining / config.cooldown) if config.cooldown else 1.0)


# Multi30k en-fr in 2.1 epochs, for a sacreBLEU of at least 40 on test_2016_flickr. So few epochs need no dropout.
MULTI30K_RECIPE = TrainingConfig(steps=900, dropout=0.0, warmup_steps=250, learning_rate_scale=1.2, cooldown=0.6)

RECIPES = {"multi30k": MULTI30K_RECIPE}
