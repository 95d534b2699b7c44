"""Training: schedule, learning, checkpoints, and resuming after a kill."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import killed_training
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_translation import one_thread, start_training, tiny_config, trained_folder, write_corpus

from fused_attention.transformer.translation.checkpoint import CHECKPOINT_NAME, CheckpointError, read_checkpoint
from fused_attention.transformer.translation.corpora import load_corpus
from fused_attention.transformer.translation.output_files import atomic_write
from fused_attention.transformer.translation.terminal import stop_on_interrupt
from fused_attention.transformer.translation.train import Trainer, TrainingError, TrainingInterrupted, token_loss
from fused_attention.transformer.translation.training_config import RECIPES, TrainingConfig, learning_rate
from fused_attention.transformer.translation.translate import Translator


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "data")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def resume(folder: Path, **changes: object) -> Trainer:
    checkpoint = read_checkpoint(folder)
    config = replace(checkpoint.training_config(), **changes)
    return Trainer.resume(checkpoint, config, load_corpus(config.data), torch.device("cpu"))


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    """Let `edit` change the tensors and metadata of a safetensors file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(tensors, metadata)
    save_file(tensors, path, metadata)


class TestSchedule:
    @given(st.integers(1, 20000), st.floats(0, 1))
    def test_without_cooldown_it_is_the_papers(self, step: int, progress: float) -> None:
        config = TrainingConfig(steps=1, d_model=512, warmup_steps=4000)
        paper = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert learning_rate(config, step, progress) == pytest.approx(paper, rel=1e-12)

    def test_peak_of_the_papers_base_model(self) -> None:
        config = TrainingConfig(steps=1, d_model=512, warmup_steps=4000)
        assert learning_rate(config, 4000, 0.5) == pytest.approx(7.0e-4, rel=0.01)

    def test_cooldown_scales_the_end_linearly_to_zero(self) -> None:
        config, paper = TrainingConfig(steps=1, cooldown=0.5), TrainingConfig(steps=1)
        factors = [learning_rate(config, 700, p) / learning_rate(paper, 700, p) for p in (0.0, 0.5, 0.75, 1.0, 1.1)]
        assert factors == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": None}, "exactly one of steps and minutes"),
            ({"minutes": 1.0}, "exactly one of steps and minutes"),
            ({"steps": 0}, "steps must be positive, not 0"),
            ({"steps": None, "minutes": math.nan}, "minutes must be positive, not nan"),
            ({"batch_tokens": -1}, "batch_tokens must be positive"),
            ({"label_smoothing": 1.5}, "label_smoothing must be from 0 to 1, not 1.5"),
            ({"autocast": "fp8"}, "autocast must be one of auto, bf16, fp16, off, not 'fp8'"),
            ({"colour": 1}, "unknown training settings: colour"),
        ],
    )
    def test_bad_settings(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TrainingConfig.from_dict({"steps": 10, **changes})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 2.5}, "steps must be an int, got float"),
            ({"steps": "10"}, "steps must be an int, got str"),
            ({"d_model": None}, "d_model must be an int, got NoneType"),
            ({"dropout": "0.1"}, "dropout must be a float, got str"),
            ({"norm_first": "no"}, "norm_first must be a bool, got str"),
            ({"data": 5}, "data must be a str, got int"),
        ],
    )
    def test_settings_of_other_types(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(TypeError, match=message):
            TrainingConfig.from_dict({"steps": 10, **changes})

    def test_numbers_of_numpy(self) -> None:
        config = TrainingConfig(steps=np.int64(5), dropout=np.float32(0.5), norm_first=np.bool_(False), max_words=np.uint8(7))
        assert config == TrainingConfig(steps=5, dropout=0.5, norm_first=False, max_words=7)
        assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    @pytest.mark.parametrize("name", sorted(RECIPES))
    def test_recipes_survive_a_checkpoint(self, name: str) -> None:
        assert TrainingConfig.from_dict(RECIPES[name].to_dict()) == RECIPES[name]


class TestLoss:
    def test_is_the_mean_over_tokens_that_are_not_padding(self) -> None:
        logits, labels = torch.randn(2, 3, 7), torch.tensor([[4, 2, 0], [5, 0, 0]])
        kept = logits.log_softmax(-1)[labels != 0]
        expected = -(0.9 * kept.gather(1, torch.tensor([[4], [2], [5]]))[:, 0] + 0.1 * kept.mean(-1)).mean()
        torch.testing.assert_close(token_loss(logits, labels, 0.1), expected)


class TestLearning:
    def test_learns_a_small_set_by_heart(self) -> None:
        folder = trained_folder()
        checkpoint, translator = read_checkpoint(folder), Translator.load(folder)
        losses = checkpoint.tensors["history.losses"]
        assert losses[0] > 3
        assert losses[-20:].max() < 0.1
        train = load_corpus(checkpoint.config["data"]).train
        assert translator.translate(train.source) == train.target

    @pytest.mark.parametrize("memory_layers", ["each", "mixed"])
    def test_other_memories_and_separate_vocabularies(self, tmp_path: Path, data: Path, memory_layers: str) -> None:
        trainer = start_training(tmp_path / "run", data, memory_layers=memory_layers, joint_vocabulary=False, vocab_size=40, steps=30)
        assert trainer.source_tokenizer is not trainer.target_tokenizer
        trainer.run()
        assert trainer.history.losses[-1] < trainer.history.losses[0]
        sentences = ["red cat eats", "big dog"]
        in_memory = Translator(trainer.model, trainer.source_tokenizer, trainer.target_tokenizer).translate(sentences)
        assert Translator.load(tmp_path / "run").translate(sentences) == in_memory

    def test_bf16_autocast_keeps_float32_weights(self, tmp_path: Path, data: Path) -> None:
        trainer = start_training(tmp_path / "run", data, autocast="bf16", steps=30)
        trainer.run()
        assert trainer.history.losses[-1] < trainer.history.losses[0]
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}

    def test_the_bar_goes_on_while_it_validates(self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = start_training(tmp_path / "run", data, steps=1)
        updates = []
        bar = SimpleNamespace(total=1, n=0, set_postfix_str=lambda *_, **__: None, update=updates.append)
        monkeypatch.setattr(trainer, "_progress_bar", lambda: contextlib.nullcontext(bar))
        trainer.run()
        assert updates.count(0) >= len(list(trainer.validation.once())) > 0

    def test_time_budget_ends_training(self, tmp_path: Path, data: Path) -> None:
        trainer = start_training(tmp_path / "run", data, minutes=0.02, cooldown=0.5)
        trainer.run()
        assert trainer.history.seconds[-2] <= 1.2
        assert trainer.step == len(trainer.history.losses) > 1
        assert trainer.optimizer.param_groups[0]["lr"] < learning_rate(trainer.config, trainer.step, 0.0)

    def test_a_time_budget_that_is_over_at_once_is_one_step(self, tmp_path: Path, data: Path) -> None:
        trainer = start_training(tmp_path / "run", data, minutes=1e-9, cooldown=0.5)
        before = trainer.model.tgt_embedding.weight.clone()
        trainer.run()
        assert read_checkpoint(tmp_path / "run").progress["step"] == 1
        assert not torch.equal(trainer.model.tgt_embedding.weight, before)
        again = resume(tmp_path / "run")
        again.run()
        assert again.step == 1

    def test_gradient_norm_is_clipped(self, tmp_path: Path, data: Path) -> None:
        trainer = start_training(tmp_path / "run", data, clip_norm=1e-3, steps=1)
        trainer.run()
        squares = sum(parameter.grad.square().sum() for parameter in trainer.model.parameters())
        assert squares.sqrt().item() == pytest.approx(1e-3, rel=1e-3)

    def test_a_loss_that_is_not_finite_stops_training(self, tmp_path: Path, data: Path) -> None:
        trainer = start_training(tmp_path / "run", data, steps=20)
        with torch.no_grad():
            trainer.model.tgt_embedding.weight.fill_(math.inf)
        with pytest.raises(TrainingError, match="the loss is not finite at about step 10; lower learning_rate_scale"):
            trainer.run()
        assert not (tmp_path / "run" / CHECKPOINT_NAME).exists()

    def test_what_is_left_out_is_counted(self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fused_attention.transformer.translation.train.VALIDATION_PAIRS", 8)
        with (data / "train.en").open("a") as source, (data / "train.fr").open("a") as target:
            source.write("\n" + "red cat " * 40 + "\ncat\n")
            target.write("chat\nchat\nchat\n")
        trainer = start_training(tmp_path / "run", data)
        assert trainer.data_summary().splitlines() == [
            "61 sentence pairs to train on; left out: 1 with an empty side, 1 of 32 tokens or more",
            "8 sentence pairs to validate on; left out: 2 after the first 8",
        ]

    def test_history_and_validation(self, tmp_path: Path, data: Path) -> None:
        trainer = start_training(tmp_path / "run", data, steps=25, validate_every=10)
        trainer.run()
        assert len(trainer.history.losses) == len(trainer.history.seconds) == 25
        assert [step for step, _ in trainer.history.validations] == [10, 20, 25]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], dict[str, torch.Tensor]]:
    """(data folder, losses, final weights) of the run that killed_training does not get to finish."""
    base = tmp_path_factory.mktemp("uninterrupted")
    data = write_corpus(base / "data")
    trainer = start_training(base / "run", data, steps=killed_training.STEPS, checkpoint_every=killed_training.CHECKPOINT_EVERY)
    trainer.run()
    return data, trainer.history.losses, trainer.model.state_dict()


@pytest.fixture(scope="module")
def killed(uninterrupted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kill point, with what a training that was killed there has left."""
    outputs = tmp_path_factory.mktemp("killed")
    command = [sys.executable, killed_training.__file__, uninterrupted[0], outputs]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return outputs


class TestResume:
    @pytest.mark.parametrize("kill_point", killed_training.KILL_POINTS)
    def test_after_sigkill_the_losses_are_those_of_an_uninterrupted_run(self, uninterrupted, killed: Path, kill_point: str) -> None:
        _, losses, weights = uninterrupted
        folder = killed / kill_point
        left_behind = {path.name for path in folder.iterdir()} - {CHECKPOINT_NAME}
        assert bool(left_behind) == (kill_point != "mid-step")

        trainer = resume(folder)
        assert trainer.step == killed_training.CHECKPOINT_EVERY
        assert trainer.history.losses == losses[: killed_training.CHECKPOINT_EVERY]
        trainer.run()
        assert trainer.history.losses == losses
        assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())
        assert {path.name for path in folder.iterdir()} == {CHECKPOINT_NAME}

    def test_in_the_middle_of_the_second_epoch(self, tmp_path: Path, data: Path) -> None:
        whole = start_training(tmp_path / "whole", data, steps=20)
        assert len(whole.batches.epoch(0)) < 10
        whole.run()
        # A run that stops after 13 steps of 20: the schedule of a steps budget without cooldown does not know its end.
        part = start_training(tmp_path / "part", data, steps=13)
        part.run()
        assert part.position.epoch > 0
        rest = resume(tmp_path / "part", steps=20)
        rest.run()
        assert rest.history.losses == whole.history.losses

    def test_other_text_is_refused(self, tmp_path: Path, data: Path) -> None:
        start_training(tmp_path / "run", data, steps=1).run()
        write_corpus(data, count=61)
        with pytest.raises(CheckpointError, match="was trained on other text than .*data holds now"):
            resume(tmp_path / "run")


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Presses Ctrl-C, met by Python's own handler unless a test sets another."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, handler)


class TestInterrupt:
    STEP = 3

    def press_in_step(self, trainer: Trainer, press: Callable[[], None]) -> None:
        trainer.optimizer.step = killed_training.on_call(  # type: ignore[method-assign]
            self.STEP, lambda step=trainer.optimizer.step: (press(), step()), trainer.optimizer.step
        )

    def test_saves_the_step_and_says_how_to_go_on(self, tmp_path: Path, uninterrupted, ctrl_c: Callable[[], None]) -> None:
        data, losses, _ = uninterrupted
        trainer = start_training(tmp_path / "a run", data, steps=killed_training.STEPS)
        self.press_in_step(trainer, ctrl_c)
        with pytest.raises(TrainingInterrupted) as error_info:
            trainer.run()
        assert str(error_info.value) == (
            f"interrupted after step {self.STEP}, which {tmp_path / 'a run' / CHECKPOINT_NAME} holds; "
            f"go on with: fused-attention train '{tmp_path / 'a run'}' --resume"
        )
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        rest = resume(tmp_path / "a run")
        assert rest.step == self.STEP
        rest.run()
        assert rest.history.losses == losses

    def test_the_second_one_stops_at_once(self, tmp_path: Path, data: Path, ctrl_c: Callable[[], None]) -> None:
        trainer = start_training(tmp_path / "run", data, checkpoint_every=2)
        self.press_in_step(trainer, lambda: [ctrl_c() for _ in range(2)])  # type: ignore[arg-type, return-value]
        with pytest.raises(KeyboardInterrupt) as error_info:
            trainer.run()
        assert error_info.type is KeyboardInterrupt
        assert read_checkpoint(tmp_path / "run").progress["step"] == 2

    def test_a_handler_of_the_caller_stays(self, ctrl_c: Callable[[], None]) -> None:
        met = []
        signal.signal(signal.SIGINT, lambda *_: met.append("caller"))
        with stop_on_interrupt() as interrupted:
            ctrl_c()
            assert met == ["caller"]
            assert not interrupted()

    def test_in_another_thread_nothing_changes(self, ctrl_c: Callable[[], None]) -> None:
        def enter() -> object:
            with stop_on_interrupt():
                return signal.getsignal(signal.SIGINT)

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(enter).result() is signal.default_int_handler


class TestCheckpointFiles:
    @pytest.fixture
    def path(self, tmp_path: Path, data: Path) -> Path:
        start_training(tmp_path / "run", data, steps=1).run()
        return tmp_path / "run" / CHECKPOINT_NAME

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no checkpoint .*nowhere"):
            read_checkpoint(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=f"no checkpoint .*{CHECKPOINT_NAME}"):
            read_checkpoint(tmp_path)

    @pytest.mark.parametrize("keep", [0, 4, 1000, -1], ids=["empty", "in the length", "in the header", "last byte missing"])
    def test_cut_off(self, path: Path, keep: int) -> None:
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match="corrupt checkpoint .*checkpoint.safetensors"):
            read_checkpoint(path)

    def test_other_safetensors_file(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, path)
        with pytest.raises(CheckpointError, match="not a checkpoint of fused_attention"):
            read_checkpoint(path)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda tensors: tensors.pop("model.encoder.norm.weight"), "does not fit .*encoder.norm.weight"),
            (lambda tensors: tensors.update({"model.encoder.norm.weight": torch.zeros(3)}), r"has shape \(3,\), not \(32,\)"),
            (lambda tensors: tensors.pop("tokenizer.source"), "no usable tokenizer"),
            (lambda tensors: tensors.update({"tokenizer.source": torch.zeros(9, dtype=torch.uint8)}), "no usable tokenizer"),
        ],
        ids=["weight missing", "weight of another shape", "tokenizer missing", "tokenizer damaged"],
    )
    def test_missing_or_wrong_tensors(self, path: Path, edit, message: str) -> None:
        rewrite(path, lambda tensors, metadata: edit(tensors))
        with pytest.raises(CheckpointError, match=message):
            Translator.load(path)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("config", "[]", "config is not a JSON object"),
            ("progress", "null", "progress is not a JSON object"),
            ("progress", "{}", "was trained on other text"),
        ],
    )
    def test_damaged_metadata(self, path: Path, name: str, value: str, message: str) -> None:
        rewrite(path, lambda tensors, metadata: metadata.update({name: value}))
        with pytest.raises(CheckpointError, match=message):
            resume(path)

    def test_settings_of_other_types(self, path: Path) -> None:
        damaged = json.dumps({**read_checkpoint(path).config, "num_heads": None})
        rewrite(path, lambda tensors, metadata: metadata.update(config=damaged))
        with pytest.raises(CheckpointError, match="corrupt checkpoint .*: num_heads must be an int, got NoneType"):
            resume(path)

    def test_history_of_other_length_than_the_run(self, path: Path) -> None:
        rewrite(path, lambda tensors, metadata: tensors.update({"history.seconds": torch.zeros(0)}))
        with pytest.raises(CheckpointError, match="its history does not cover 1 steps"):
            resume(path)

    def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file"
        atomic_write(path, b"old")

        def no_space(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fused_attention.transformer.translation.output_files.os.fsync", no_space)
        with pytest.raises(OSError, match="No space left") as error_info:
            atomic_write(path, b"new")
        assert error_info.value.filename == str(path)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_settings_of_the_run_are_in_the_file(self, path: Path, data: Path) -> None:
        assert TrainingConfig.from_dict(read_checkpoint(path).config) == tiny_config(data, steps=1)
