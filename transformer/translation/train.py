"""Trains a Transformer on parallel text, resumable from any saved step with bit-identical losses (on the CPU).

1. Learn the tokenizers, encode the corpus. 2. Draw a length-bucketed batch. 3. Label-smoothed cross entropy under bf16
autocast if that is faster. 4. Clip the gradient norm, set the learning rate, AdamW. 5. Validate and save periodically, and
save when Ctrl-C ends the run.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generate import Generation
from ..model import Transformer
from ..optional import optional_module
from .batches import Batch, BatchSource, Position
from .checkpoint import (
    CHECKPOINT_NAME,
    Checkpoint,
    CheckpointError,
    load_model_tensors,
    load_tokenizers,
    save_checkpoint,
    tokenizer_tensors,
)
from .data import Corpus, left_out_text
from .machine import autocast
from .terminal import stop_on_interrupt
from .tokenizer import PAD_ID, Tokenizer
from .training_config import TrainingConfig, learning_rate

# Losses stay on the device for this many steps, to avoid waiting for a GPU at every step.
STEPS_PER_LOSS_READ = 10
VALIDATION_PAIRS = 500


class TrainingError(RuntimeError):
    """Training cannot continue; the message is one line."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a run, which saved its checkpoint; the message is one line that says where, and how to continue."""


@dataclass
class History:
    """The progress of a run so far: one entry per step, and one per validation."""

    losses: list[float] = field(default_factory=list)  # label-smoothed, nats per target token
    seconds: list[float] = field(default_factory=list)  # training time at the end of the step
    tokens: int = 0  # source and target tokens trained on, not counting padding
    validations: list[tuple[int, float]] = field(default_factory=list)  # (step, cross entropy in nats per target token)


class Trainer:
    """One training run: model, optimizer, data and history, tied to an output folder.

    Trainer(config, corpus, folder, device) starts from scratch; Trainer.resume continues the checkpoint in the folder.
    """

    def __init__(
        self,
        config: TrainingConfig,
        corpus: Corpus,
        folder: Path,
        device: torch.device,
        tokenizers: tuple[Tokenizer, Tokenizer] | None = None,
        build: Callable[[], Generation] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """build: makes a model for the vocabularies of `tokenizers`, instead of the Transformer that config describes.
        clock: measures training time, in seconds."""
        self.clock = clock
        self.config, self.corpus, self.folder, self.device = config, corpus, folder, device
        self.source_tokenizer, self.target_tokenizer = tokenizers or train_tokenizers(config, corpus)
        torch.manual_seed(config.seed)
        arguments = config.model_arguments(len(self.source_tokenizer), len(self.target_tokenizer))
        self.model = (Transformer(**arguments) if build is None else build()).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            betas=(0.9, 0.98),  # beta2 and eps as in the paper
            eps=1e-9,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.batches = BatchSource(
            self.source_tokenizer.encode(corpus.train.source),
            self.target_tokenizer.encode(corpus.train.target),
            batch_tokens=config.batch_tokens,
            max_len=config.max_len,
            seed=config.seed,
        )
        self.validation = BatchSource(
            self.source_tokenizer.encode(corpus.validation.source[:VALIDATION_PAIRS]),
            self.target_tokenizer.encode(corpus.validation.target[:VALIDATION_PAIRS]),
            batch_tokens=config.batch_tokens,
            max_len=config.max_len,
        )
        self.position = Position()
        self.step = 0
        self.history = History()
        self._unread_losses: list[Tensor] = []

    @classmethod
    def resume(cls, checkpoint: Checkpoint, config: TrainingConfig, corpus: Corpus, device: torch.device) -> Trainer:
        """Continue a run. On a CPU with the same number of threads, the losses are those of an uninterrupted run.

        Raises CheckpointError.
        """
        tokenizers = load_tokenizers(checkpoint)
        if checkpoint.progress.get("corpus") != corpus.fingerprint():
            raise CheckpointError(f"{checkpoint.path} was trained on other text than {config.data} holds now")
        trainer = cls(config, corpus, checkpoint.path.parent, device, tokenizers)
        trainer._restore(checkpoint)
        return trainer

    def data_summary(self) -> str:
        """Two lines: how many pairs are used for training and validation, and why others in the corpus are not."""
        too_long = f"of {self.config.max_len} tokens or more"
        lines = []
        for use, text, batches in (("train", self.corpus.train, self.batches), ("validate", self.corpus.validation, self.validation)):
            left_out = {**text.left_out, too_long: batches.num_dropped}
            if use == "validate":
                left_out[f"after the first {VALIDATION_PAIRS}"] = max(0, len(text) - VALIDATION_PAIRS)
            lines.append(f"{len(batches):,} sentence pairs to {use} on{left_out_text(left_out)}")
        return "\n".join(lines)

    def run(self) -> None:
        """Train to the end of the budget, with a progress bar on stderr; saves and validates along the way and at the end.

        Takes at least one step. After Ctrl-C (SIGINT), the run finishes the current step, saves and raises TrainingInterrupted; a
        second Ctrl-C ends it at once.
        """
        seconds = self.history.seconds[-1] if self.history.seconds else 0.0
        started = self.clock() - seconds
        batches = self.batches.from_position(self.position)
        self.model.train()
        with stop_on_interrupt() as interrupted, self._progress_bar() as bar:
            while (progress := self.progress(seconds)) < 1.0:
                batch = next(batches)
                self._unread_losses.append(self.train_step(batch.to(self.device), progress))
                self.history.tokens += batch.tokens()
                self.history.seconds.append(self.clock() - started)
                if len(self._unread_losses) >= STEPS_PER_LOSS_READ:
                    self._read_losses()
                if self.step % self.config.validate_every == 0:
                    self._validate(bar)
                if self.step % self.config.checkpoint_every == 0:
                    self.save()
                self._show_progress(bar)
                seconds = self.clock() - started
                if interrupted():
                    break
            self._read_losses()
            if not interrupted() and (not self.history.validations or self.history.validations[-1][0] != self.step):
                self._validate(bar)
            self.save()
            self._show_progress(bar)
        if interrupted():
            raise TrainingInterrupted(
                f"interrupted after step {self.step}, which {self.folder / CHECKPOINT_NAME} holds; "
                f"go on with: fused-attention train {shlex.quote(str(self.folder))} --resume"
            )

    def progress(self, seconds: float) -> float:
        """How much of the budget is used up, 0 to 1, after `seconds` of training."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        assert self.config.minutes is not None
        return seconds / (60.0 * self.config.minutes)

    def train_step(self, batch: Batch, progress: float) -> Tensor:
        """One optimizer step on a batch, at `progress` (0 to 1) through the run; the loss, on the device."""
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, progress)
        with autocast(self.device, self.config.autocast):
            logits = self.model(batch.src, batch.tgt_in)
        loss = token_loss(logits, batch.tgt_out, self.config.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def _read_losses(self) -> None:
        losses = torch.stack(self._unread_losses).tolist() if self._unread_losses else []
        self._unread_losses = []
        self.history.losses += losses
        if losses and not torch.isfinite(torch.tensor(losses)).all():
            raise TrainingError(f"the loss is not finite at about step {self.step}; lower learning_rate_scale")

    def _validate(self, bar: Any) -> None:
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in self.validation.once():
                batch = batch.to(self.device)
                with autocast(self.device, self.config.autocast):
                    logits = self.model(batch.src, batch.tgt_in)
                tokens = int((batch.tgt_out != PAD_ID).sum())
                total += tokens * token_loss(logits, batch.tgt_out, label_smoothing=0.0).item()
                count += tokens
                bar.update(0)  # refresh the time
        self.model.train()
        self.history.validations.append((self.step, total / count))

    def save(self) -> None:
        """Write the checkpoint; if the process is killed, the folder still holds the previous one or this one."""
        self._read_losses()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        tensors |= tokenizer_tensors(self.source_tokenizer, self.target_tokenizer)
        tensors |= {f"rng.{name}": state for name, state in rng_states().items()}
        tensors["history.losses"] = torch.tensor(self.history.losses, dtype=torch.float64)
        tensors["history.seconds"] = torch.tensor(self.history.seconds, dtype=torch.float64)
        progress = {
            "step": self.step,
            "epoch": self.position.epoch,
            "batch": self.position.batch,
            "tokens": self.history.tokens,
            "validations": self.history.validations,
            "corpus": self.corpus.fingerprint(),
        }
        save_checkpoint(
            self.folder / CHECKPOINT_NAME,
            tensors,
            config=self.config.to_dict(),
            model_config=self.model.config,
            progress=progress,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        load_model_tensors(self.model, checkpoint.group("model"), checkpoint.path)
        try:
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in checkpoint.group("optimizer").items():
                index, _, entry = name.partition(".")
                state.setdefault(int(index), {})[entry] = tensor
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            history, progress = checkpoint.group("history"), checkpoint.progress
            self.step = progress["step"]
            self.position = Position(progress["epoch"], progress["batch"])
            self.history = History(
                history["losses"].tolist(),
                history["seconds"].tolist(),
                progress["tokens"],
                [(step, loss) for step, loss in progress["validations"]],
            )
            if not self.step == len(self.history.losses) == len(self.history.seconds) > 0:
                raise ValueError(f"its history does not cover {self.step} steps")
            set_rng_states(checkpoint.group("rng"))
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"corrupt checkpoint {checkpoint.path}: {type(error).__name__} {error}") from error

    def _progress_bar(self) -> Any:
        by_steps = self.config.steps is not None
        return optional_module("tqdm").tqdm(
            total=self.config.steps if by_steps else max(1, round(60 * (self.config.minutes or 0))),
            unit="step" if by_steps else "s",
            desc="training",
            dynamic_ncols=True,
            # In a log file, every refresh is a separate line.
            mininterval=0.5 if sys.stderr.isatty() else 5.0,
            miniters=0,  # refresh even without progress
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total} {unit} [{elapsed}<{remaining}]{postfix}",
        )

    def _show_progress(self, bar: Any) -> None:
        seconds = self.history.seconds[-1]
        done = self.step if self.config.steps is not None else min(seconds, bar.total)
        if self.history.losses:
            recent = self.history.losses[-50:]
            loss = f"loss {sum(recent) / len(recent):.3f}"
            validation = f", val {self.history.validations[-1][1]:.3f}" if self.history.validations else ""
            speed = f"{self.history.tokens / max(seconds, 1e-9):,.0f} tokens/s"
            bar.set_postfix_str(f"step {self.step}, {loss}{validation}, {speed}", refresh=False)
        bar.update(done - bar.n)


def train_tokenizers(config: TrainingConfig, corpus: Corpus) -> tuple[Tokenizer, Tokenizer]:
    """Source and target tokenizers learned from the training text; the same one if the vocabulary is joint."""
    if config.joint_vocabulary:
        joint = Tokenizer.train([*corpus.train.source, *corpus.train.target], config.vocab_size)
        return joint, joint
    return (
        Tokenizer.train(corpus.train.source, config.vocab_size),
        Tokenizer.train(corpus.train.target, config.vocab_size),
    )


def token_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross entropy in nats over the non-padding labels (B, T), for logits (B, T, vocabulary), in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=PAD_ID, label_smoothing=label_smoothing)


def rng_states() -> dict[str, Tensor]:
    """torch's generator states by device: "cpu", "cuda.0", ..."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Restores rng_states; states of GPUs this machine does not have are ignored."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{index}"], index)
