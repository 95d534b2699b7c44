"""Trains a Transformer on parallel text, resumable from any saved step with bit-identical losses (on the CPU).

1. Learn the tokenizers, encode the corpus. 2. Draw a length-bucketed batch. 3. Label-smoothed cross entropy under bf16
autocast if that is faster. 4. Clip the gradient norm, set the learning rate, AdamW. 5. Validate and save periodically, and
save when Ctrl-C ends the run.
"""

from __future__ import annotations

import math
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import ALONE, Processes, copy_whole, gradients_exchanged, share_gradients, whole
from ..generate import Generation
from ..model import Transformer
from ..optional import optional_module
from .batches import BatchSource, Position, Share, StepBatch
from .checkpoint import (
    CHECKPOINT_NAME,
    Checkpoint,
    CheckpointError,
    check_sizes,
    kept_name,
    load_tokenizers,
    new_shards,
    remove_kept,
    remove_other_shards,
    save_checkpoint,
    tokenizer_tensors,
)
from .data import Corpus, DataError, ParallelText, left_out_text
from .machine import autocast
from .shards import load_shards, save_shards
from .terminal import stop_on_interrupt
from .tokenizer import PAD_ID, Tokenizer
from .training_config import TrainingConfig, learning_rate

# Losses stay on the device for this many steps, to avoid waiting for a GPU at every step.
STEPS_PER_LOSS_READ = 10
VALIDATION_PAIRS = 500
# Of the batches that compiled code gets: torch.compile compiles for so many before it gives up.
MOST_SHAPES = 8


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
    bleus: list[tuple[int, float]] = field(default_factory=list)  # (step, BLEU of the validation text), where that decides what is best

    def qualities(self, best_by: str) -> dict[int, float]:
        """Step -> how good its validation was; more is better."""
        return dict(self.bleus) if best_by == "bleu" else {step: -loss for step, loss in self.validations}

    def without_progress(self, best_by: str) -> int:
        """How many validations there were after the best."""
        values = list(self.qualities(best_by).values())
        return len(values) - 1 - values.index(max(values)) if values else 0


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
        processes: Processes = ALONE,
    ) -> None:
        """build: makes a model for the vocabularies of `tokenizers`, instead of the Transformer that config describes.
        clock: measures training time, in seconds. processes: those that train together, as config.parallel says.

        Raises DataError or, in a process where another one says what is wrong, FailedElsewhere."""
        self.clock = clock
        self.config, self.corpus, self.folder, self.device = config, corpus, folder, device
        self.processes = processes
        self.share = Share(processes.rank, processes.count, config.accumulate)
        check_shares(config, processes)
        self._check_same_text()
        self.source_tokenizer, self.target_tokenizer = tokenizers or self._shared_tokenizers()
        torch.manual_seed(config.seed)
        arguments = config.model_arguments(len(self.source_tokenizer), len(self.target_tokenizer))
        self.model = Transformer(**arguments) if build is None else build()
        parallel = config.parallel if processes.count > 1 else "off"
        loss = SummedLoss(self.model, config.label_smoothing)
        if config.compile:
            loss.compile(fullgraph=True, dynamic=False)
        self.summed_loss = share_gradients(self.model, loss, parallel, device, unused_parameters=config.layer_drop > 0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.autocast == "fp16")
        if processes.rank > 0:  # dropout is other noise in each process
            torch.manual_seed(random.Random(f"{config.seed}/rank {processes.rank}").getrandbits(63))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            betas=(0.9, 0.98),  # beta2 and eps as in the paper
            eps=1e-9,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.batches, self.validation = processes.all(self._batch_sources)
        self.position = Position()
        self.step = 0
        self.history = History()
        self._unread_losses: list[Tensor] = []
        self._saved: tuple[int, int] | None = None  # step and number of validations of the last checkpoint
        self.report: Callable[[str, float, int], None] = lambda name, value, step: None  # what else is told of the progress
        self._layer_drop = torch.Generator()
        if config.layer_drop:
            for stack in (self.model.encoder, self.model.decoder):
                stack.layer_drop_generator = self._layer_drop  # type: ignore[union-attr]

    @classmethod
    def resume(
        cls, checkpoint: Checkpoint, config: TrainingConfig, corpus: Corpus, device: torch.device, processes: Processes = ALONE
    ) -> Trainer:
        """Continue a run. On a CPU with the same number of threads and processes, the losses are those of an uninterrupted run.

        Raises CheckpointError.
        """

        def tokenizers_of_same_text() -> tuple[Tokenizer, Tokenizer]:
            if checkpoint.progress.get("corpus") != corpus.fingerprint():
                raise CheckpointError(f"{checkpoint.path} was trained on other text than {config.data} holds now")
            if not any(name.startswith("optimizer.") for name in checkpoint.trained_sizes()):
                raise CheckpointError(f"{checkpoint.path} holds weights alone, of which no training can go on")
            return load_tokenizers(checkpoint)

        tokenizers = processes.all(tokenizers_of_same_text)
        trainer = cls(config, corpus, checkpoint.path.parent, device, tokenizers, processes=processes)
        processes.all(lambda: trainer._restore(checkpoint))
        return trainer

    def _check_same_text(self) -> None:
        """Raises DataError unless every process has read the same."""
        prints = self.processes.gather(self.corpus.fingerprint())
        if others := [rank for rank, fingerprint in enumerate(prints) if fingerprint != prints[0]]:
            ranks = f"rank {others[0]} reads other text in {self.config.data} than rank 0"
            self.processes.fail(DataError(f"{ranks}: their fingerprints are {prints[others[0]]} and {prints[0]}"))

    def _shared_tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """Tokenizers that rank 0 learns."""
        if self.processes.count == 1:
            return train_tokenizers(self.config, self.corpus)
        models = self.processes.first(lambda: [tokenizer.model for tokenizer in train_tokenizers(self.config, self.corpus)])
        source = Tokenizer(models[0])
        return source, source if self.config.joint_vocabulary else Tokenizer(models[1])

    def _batch_sources(self) -> tuple[BatchSource, BatchSource]:
        """For training and for validation."""
        sizes = {"batch_tokens": self.config.batch_tokens, "max_len": self.config.max_len}
        train, validation = self.corpus.train, self.corpus.validation
        encode_source, encode_target = self.source_tokenizer.encode, self.target_tokenizer.encode
        return (
            BatchSource(
                encode_source(train.source),
                encode_target(train.target),
                seed=self.config.seed,
                fixed_shapes=MOST_SHAPES if self.config.compile else 0,
                **sizes,
            ),
            BatchSource(encode_source(validation.source[:VALIDATION_PAIRS]), encode_target(validation.target[:VALIDATION_PAIRS]), **sizes),
        )

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
        batches = self.batches.from_position(self.position, self.share)
        self.model.train()
        stop = False
        with stop_on_interrupt() as interrupted, self._progress_bar() as bar:
            while (progress := self.progress(seconds)) < 1.0:
                batch = next(batches)
                self._unread_losses.append(self.train_step(batch, progress))
                self.history.tokens += batch.tokens
                self.history.seconds.append(self.clock() - started)
                if len(self._unread_losses) >= STEPS_PER_LOSS_READ:
                    self._read_losses()
                enough = False
                if self.step % self.config.validate_every == 0:
                    enough = self._validate(bar)
                if self.step % self.config.checkpoint_every == 0:
                    self.save()
                self._show_progress(bar)
                # Rank 0's clock counts, and Ctrl-C in any process.
                seconds, presses = self.processes.sum([self.clock() - started if self.processes.rank == 0 else 0.0, interrupted()])
                if (stop := presses > 0) or enough:
                    break
            self._read_losses()
            if not stop and (not self.history.validations or self.history.validations[-1][0] != self.step):
                self._validate(bar)
            if self._saved != (self.step, len(self.history.validations)):
                self.save()
            self._show_progress(bar)
        if stop:
            kept = f"interrupted after step {self.step}, which {self.folder / CHECKPOINT_NAME} holds"
            command = f"fused-attention train {shlex.quote(str(self.folder))} --resume"
            self.processes.fail(TrainingInterrupted(f"{kept}; go on with: {command}"))

    def progress(self, seconds: float) -> float:
        """How much of the budget is used up, 0 to 1, after `seconds` of training."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        assert self.config.minutes is not None
        return seconds / (60.0 * self.config.minutes)

    def train_step(self, batch: StepBatch, progress: float) -> Tensor:
        """One optimizer step on a batch, at `progress` (0 to 1) through the run.

        Returns this process's part of the loss, on the device: the mean over the processes is the mean over the batch's target tokens.
        """
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, progress)
        self.optimizer.zero_grad()
        # Gradients become means over the processes, so each divides by its part of the tokens, however many its share has.
        tokens = batch.target_tokens / self.processes.count
        losses = []
        for number, micro_batch in enumerate(batch.micro_batches, 1):
            micro_batch = micro_batch.to(self.device)
            # The same layers in every process, which FSDP needs, and in every micro-batch.
            self._layer_drop.manual_seed(random.Random(f"{self.config.seed}/step {self.step}").getrandbits(63))
            with gradients_exchanged(self.model, self.summed_loss, now=number == len(batch.micro_batches)):
                with autocast(self.device, self.config.autocast):
                    loss = self.summed_loss(micro_batch.src, micro_batch.tgt_in, micro_batch.tgt_out) / tokens
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _read_losses(self) -> None:
        if not self._unread_losses:
            return
        sums = self.processes.sum(torch.stack(self._unread_losses).tolist())
        self._unread_losses = []
        losses = [loss / self.processes.count for loss in sums]
        self.history.losses += losses
        self.report("loss/training", sum(losses) / len(losses), self.step)
        self.report("learning rate", self.optimizer.param_groups[0]["lr"], self.step)
        self.report("tokens a second", self.history.tokens / max(self.history.seconds[-1], 1e-9), self.step)
        if not all(map(math.isfinite, losses)):
            self.processes.fail(TrainingError(f"the loss is not finite at about step {self.step}; lower learning_rate_scale"))

    def _validate(self, bar: Any) -> bool:
        """Measures the validation text and keeps the weights if the settings ask for it; True if patience is at its end."""
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for indices in self.validation.epoch(0):
                batch = self.validation.step(indices, Share(self.processes.rank, self.processes.count))
                for part in batch.micro_batches:
                    part = part.to(self.device)
                    with autocast(self.device, self.config.autocast):
                        logits = self.model(part.src, part.tgt_in)
                    total += token_loss(logits, part.tgt_out, label_smoothing=0.0, tokens=1).item()
                count += batch.target_tokens
                bar.update(0)  # refresh the time
        [total] = self.processes.sum([total])
        self.model.train()
        self.history.validations.append((self.step, total / count))
        self.report("loss/validation", total / count, self.step)
        if self.config.best_by == "bleu":
            bleu = self._validation_bleu()
            self.history.bleus.append((self.step, bleu))
            self.report("BLEU/validation", bleu, self.step)
        self._keep_weights()
        return 0 < self.config.patience <= self.history.without_progress(self.config.best_by)

    def _validation_bleu(self) -> float:
        """Of greedy translations; every process makes all of them, because FSDP needs them to do the same."""
        from .translate import Translator

        text = self.corpus.validation
        some = ParallelText(text.source[:VALIDATION_PAIRS], text.target[:VALIDATION_PAIRS])
        return Translator(self.model, self.source_tokenizer, self.target_tokenizer, self.config.autocast).score(some)[0].bleu

    def _keep_weights(self) -> None:
        """Writes the weights of this step, and removes those that are neither among the last nor among the best."""
        if self.config.keep_last == self.config.keep_best == 0:
            return
        qualities = self.history.qualities(self.config.best_by)
        best = sorted(qualities, key=lambda step: qualities[step], reverse=True)[: self.config.keep_best]
        wanted = {*best, *list(qualities)[max(0, len(qualities) - self.config.keep_last) :]}
        tensors = {f"model.{name}": whole(tensor) for name, tensor in self.model.state_dict().items()}
        tensors |= tokenizer_tensors(self.source_tokenizer, self.target_tokenizer)
        progress = {"step": self.step, "best_by": self.config.best_by, "quality": qualities[self.step], "corpus": self.corpus.fingerprint()}

        def write() -> None:
            if self.step in wanted:
                path = self.folder / kept_name(self.step)
                save_checkpoint(path, tensors, config=self.config.to_dict(), model_config=self.model.config, progress=progress)
            remove_kept(self.folder, wanted)

        self.processes.first(write)

    def save(self) -> None:
        """Write the checkpoint; if the process is killed, the folder still holds the previous one or this one."""
        self._read_losses()
        trained, shards = self._trained_tensors(), None
        if self.config.sharded_checkpoint:
            shards = self.processes.first(lambda: new_shards(self.folder, self.step))
            self.processes.all(lambda: save_shards(self.folder / shards, trained))
            tensors = {}
        else:
            tensors = {name: whole(tensor) for name, tensor in trained.items()}
        tensors |= tokenizer_tensors(self.source_tokenizer, self.target_tokenizer)
        for rank, states in enumerate(self.processes.gather(rng_states())):
            tensors |= {f"rng.{rank_prefix(rank)}{name}": state for name, state in states.items()}
        tensors["history.losses"] = torch.tensor(self.history.losses, dtype=torch.float64)
        tensors["history.seconds"] = torch.tensor(self.history.seconds, dtype=torch.float64)
        progress = {
            "step": self.step,
            "epoch": self.position.epoch,
            "batch": self.position.batch,
            "tokens": self.history.tokens,
            "validations": self.history.validations,
            "bleus": self.history.bleus,
            "scaler": self.scaler.state_dict(),
            "corpus": self.corpus.fingerprint(),
            **({} if shards is None else {"shards": shards}),
        }

        def write() -> None:
            save_checkpoint(
                self.folder / CHECKPOINT_NAME,
                tensors,
                config=self.config.to_dict(),
                model_config=self.model.config,
                progress=progress,
            )
            remove_other_shards(self.folder, shards)

        self.processes.first(write)
        self._saved = self.step, len(self.history.validations)

    def _trained_tensors(self) -> dict[str, Tensor]:
        """The weights and the optimizer's state: "model.NAME" and "optimizer.INDEX.NAME"; the tensors themselves, sharded or not."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, parameter in enumerate(self.model.parameters()):
            state = self.optimizer.state[parameter]
            if not state:  # no step yet, which is a state of zeros
                names = ("exp_avg", "exp_avg_sq")
                state |= {"step": torch.zeros((), device=self.device), **{name: torch.zeros_like(parameter) for name in names}}
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        return tensors

    def _restore(self, checkpoint: Checkpoint) -> None:
        try:
            live = self._trained_tensors()
            check_sizes(checkpoint.path, {name: tensor.shape for name, tensor in live.items()}, checkpoint.trained_sizes())
            if checkpoint.shards is not None:
                load_shards(checkpoint.shards, live)
            else:
                with torch.no_grad():
                    for name, tensor in live.items():
                        copy_whole(tensor, checkpoint.tensors[name])
            history, progress = checkpoint.group("history"), checkpoint.progress
            self.step = progress["step"]
            self.position = Position(progress["epoch"], progress["batch"])
            self.history = History(
                history["losses"].tolist(),
                history["seconds"].tolist(),
                progress["tokens"],
                [(step, loss) for step, loss in progress["validations"]],
                [(step, bleu) for step, bleu in progress.get("bleus", [])],
            )
            if not self.step == len(self.history.losses) == len(self.history.seconds) > 0:
                raise ValueError(f"its history does not cover {self.step} steps")
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(progress["scaler"])
            set_rng_states(checkpoint.group("rng"), self.processes.rank)
        except CheckpointError:
            raise
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"corrupt checkpoint {checkpoint.path}: {type(error).__name__} {error}") from error

    def _progress_bar(self) -> Any:
        by_steps = self.config.steps is not None
        return optional_module("tqdm").tqdm(
            total=self.config.steps if by_steps else max(1, round(60 * (self.config.minutes or 0))),
            unit="step" if by_steps else "s",
            desc="training",
            dynamic_ncols=True,
            disable=self.processes.rank > 0,
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
    sides = corpus.train.source, corpus.train.target
    if config.joint_vocabulary:
        joint = Tokenizer.train([*sides[0], *sides[1]], config.vocab_size, config.tokenizer)
        return joint, joint
    source, target = (Tokenizer.train(sentences, config.vocab_size, config.tokenizer) for sentences in sides)
    return source, target


class SummedLoss(nn.Module):
    """The model and its loss, the sum over all labels: what a training step differentiates."""

    def __init__(self, model: Generation, label_smoothing: float) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, src: Tensor, tgt_in: Tensor, tgt_out: Tensor) -> Tensor:
        """src (B, S), tgt_in and tgt_out (B, T): as in Batch."""
        return token_loss(self.model(src, tgt_in), tgt_out, self.label_smoothing, tokens=1)


def check_shares(config: TrainingConfig, processes: Processes) -> None:
    """Raises ValueError unless every micro-batch of every process gets the same part of batch_tokens."""
    if config.batch_tokens % (processes.count * config.accumulate):
        shares = f"{processes.count} processes times {config.accumulate} micro-batches"
        processes.fail(ValueError(f"batch_tokens = {config.batch_tokens}, of all processes together, cannot be divided by {shares}"))


def token_loss(logits: Tensor, labels: Tensor, label_smoothing: float, tokens: float | None = None) -> Tensor:
    """Cross entropy in nats, in float32, for logits (B, T, vocabulary): its sum over the labels (B, T) that are not padding, over `tokens`.

    tokens: None stands for their number, which makes it a mean.
    """
    reduction = "mean" if tokens is None else "sum"
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=PAD_ID, label_smoothing=label_smoothing, reduction=reduction
    )
    return loss if tokens is None else loss / tokens


def rng_states() -> dict[str, Tensor]:
    """torch's generator states by device: "cpu", "cuda.0", ..."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def rank_prefix(rank: int) -> str:
    """Of the names of a process's generator states; rank 0's have none."""
    return f"rank{rank}." if rank else ""


def set_rng_states(states: dict[str, Tensor], rank: int) -> None:
    """Restores the rng_states of a process. Those of GPUs that are not there are ignored; a process that had none keeps its own."""
    prefix = rank_prefix(rank)
    if rank == 0 or prefix + "cpu" in states:
        torch.set_rng_state(states[prefix + "cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"{prefix}cuda.{index}" in states:
                torch.cuda.set_rng_state(states[f"{prefix}cuda.{index}"], index)
