"""What a training keeps, when it stops, what it is told and what it reports: files of settings, averages, dropouts, events."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_translation import one_thread, start_training, tiny_config, write_corpus

from fused_attention import Transformer
from fused_attention.transformer.translation import cli, train
from fused_attention.transformer.translation.batches import BatchSource, Position, Share
from fused_attention.transformer.translation.checkpoint import CHECKPOINT_NAME, read_checkpoint
from fused_attention.transformer.translation.train import Trainer
from fused_attention.transformer.translation.training_config import TrainingConfig, read_settings
from fused_attention.transformer.translation.translate import Translator

reads_toml = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("tomllib", "tomli")), reason="needs Python 3.11 or the package tomli"
)
DROPOUTS = ("embedding_dropout", "attention_dropout", "feed_forward_dropout", "residual_dropout")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "data")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 12 steps that was validated every 2, and kept the last 2 and the best 3."""
    base = tmp_path_factory.mktemp("kept")
    settings = {"steps": 12, "validate_every": 2, "keep_last": 2, "keep_best": 3, "learning_rate_scale": 3.0}
    start_training(base / "run", write_corpus(base / "data"), **settings).run()
    return base / "run"


def kept_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*"))


class TestKeeping:
    def test_the_last_and_the_best_and_no_others(self, kept: Path) -> None:
        losses = dict(read_checkpoint(kept).progress["validations"])
        best = sorted(losses, key=losses.__getitem__)[:3]
        assert kept_steps(kept) == sorted({*best, 10, 12})
        for step in kept_steps(kept):
            checkpoint = read_checkpoint(kept / f"step-{step:08}.safetensors")
            assert checkpoint.progress["quality"] == -losses[step]
            assert not checkpoint.group("optimizer")
        weights = read_checkpoint(kept / "step-00000012.safetensors").group("model")
        assert all(torch.equal(tensor, weights[name]) for name, tensor in read_checkpoint(kept).group("model").items())

    @pytest.mark.parametrize("which", ["--last", "--best"])
    def test_average(self, kept: Path, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["average", str(kept), which, "2", "--output", str(tmp_path)]) == 0
        losses = dict(read_checkpoint(kept).progress["validations"])
        steps = [10, 12] if which == "--last" else sorted(sorted(losses, key=losses.__getitem__)[:2])
        assert f"after steps {steps[0]}, {steps[1]}" in capsys.readouterr().out
        first, second = (read_checkpoint(kept / f"step-{step:08}.safetensors").group("model") for step in steps)
        for name, tensor in read_checkpoint(tmp_path).group("model").items():
            torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
        assert len(Translator.load(tmp_path).translate(["red cat"])) == 1

    def test_what_cannot_be_averaged_or_resumed(self, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def error(*arguments: str) -> str:
            assert cli.main(list(arguments)) == 2
            [line] = capsys.readouterr().err.splitlines()
            return line.removeprefix("fused-attention: ")

        message = f"{kept} has kept the weights of {len(kept_steps(kept))} validations, not 9: the setting keep_last of a run keeps more"
        assert error("average", str(kept), "--last", "9", "--output", str(tmp_path)) == message
        assert "must be at least 1, not 0" in error("average", str(kept), "--best", "0", "--output", str(tmp_path))
        assert not (tmp_path / CHECKPOINT_NAME).exists()
        assert "exists; choose another folder" in error("average", str(kept), "--best", "1", "--output", str(kept))
        assert cli.main(["average", str(kept), "--best", "1", "--output", str(tmp_path)]) == 0
        assert "holds weights alone" in error("train", str(tmp_path), "--resume")

    def test_by_bleu(self, tmp_path: Path, data: Path) -> None:
        trainer = start_training(tmp_path / "run", data, steps=2, validate_every=1, keep_best=1, best_by="bleu")
        trainer.run()
        assert [step for step, _ in trainer.history.bleus] == [1, 2]
        [best] = kept_steps(tmp_path / "run")
        assert dict(trainer.history.bleus)[best] == max(dict(trainer.history.bleus).values())
        assert read_checkpoint(tmp_path / "run").progress["bleus"] == [list(entry) for entry in trainer.history.bleus]

    def test_patience_ends_a_run_that_does_not_get_better(self, tmp_path: Path, data: Path) -> None:
        trainer = start_training(tmp_path / "run", data, steps=9, validate_every=1, patience=2, learning_rate_scale=1e-30)
        trainer.run()
        assert trainer.step == 3
        assert read_checkpoint(tmp_path / "run").progress["step"] == 3


class TestSettings:
    @reads_toml
    def test_a_file_and_flags_over_it(self, tmp_path: Path, data: Path) -> None:
        file = tmp_path / "my.toml"
        file.write_text(tiny_config(data, steps=1, label_smoothing=0.05).to_toml())
        assert cli.main(["train", str(tmp_path / "run"), "--config", str(file), "--d-model", "16", "--steps", "2"]) == 0
        used = TrainingConfig.from_dict(read_settings(tmp_path / "run" / cli.SETTINGS_NAME))
        assert used == tiny_config(data, steps=2, label_smoothing=0.05, d_model=16) == read_checkpoint(tmp_path / "run").training_config()
        again = ["train", str(tmp_path / "again"), "--config", str(tmp_path / "run" / cli.SETTINGS_NAME)]
        assert cli.main(again) == 0
        runs = [read_checkpoint(tmp_path / name).tensors["history.losses"] for name in ("run", "again")]
        assert torch.equal(*runs)

    def test_without_a_reader_of_toml(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("tomllib", "tomli"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match="a file of settings needs Python 3.11, or the package tomli"):
            read_settings(tmp_path / "my.toml")

    @reads_toml
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("d_modle = 16", "unknown training settings: d_modle; is d_modle meant to be d_model?"),
            ("colour = 16", "unknown training settings: colour"),
            ("d_model = 'wide'", "d_model must be an int, got str"),
            ("d_model = ", "is not TOML: "),
            ("patience = -1", "patience must be at least 0, not -1"),
        ],
    )
    def test_bad_ones_are_one_line(self, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "my.toml"
        file.write_text(text)
        assert cli.main(["train", str(tmp_path / "run"), "--config", str(file)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fused-attention: {file}")
        assert message in line
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("joint", [True, False])
    def test_unigram_vocabularies(self, tmp_path: Path, data: Path, joint: bool) -> None:
        settings = {"tokenizer": "unigram", "joint_vocabulary": joint, "vocab_size": 30 if joint else 24, "steps": 1}
        trainer = start_training(tmp_path / "run", data, **settings)
        trainer.run()
        assert (trainer.source_tokenizer is trainer.target_tokenizer) == joint
        [sentence] = trainer.target_tokenizer.decode(trainer.target_tokenizer.encode(["chat rouge"]))
        assert sentence == "chat rouge"
        bpe = start_training(tmp_path / "bpe", data, **settings | {"tokenizer": "bpe"})
        assert bpe.target_tokenizer.model != trainer.target_tokenizer.model


@reads_toml
def test_tensorboard_events(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = tmp_path / "my.toml"
    file.write_text(tiny_config(data, steps=3, validate_every=2).to_toml())
    assert cli.main(["train", str(tmp_path / "run"), "--config", str(file)]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "events"))
    events.Reload()
    assert {"loss/training", "loss/validation", "learning rate", "tokens a second"} <= set(events.Tags()["scalars"])
    validations = [(event.step, event.value) for event in events.Scalars("loss/validation")]
    assert validations == [(step, pytest.approx(loss)) for step, loss in read_checkpoint(tmp_path / "run").progress["validations"]]


class TestDropouts:
    SRC, TGT = torch.randint(3, 20, (2, 7)), torch.randint(3, 20, (2, 5))

    def difference(self, **options: float) -> float:
        """Between the logits in training and in evaluation."""
        model = Transformer(20, 20, d_model=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=32, **options)
        return (model.train()(self.SRC, self.TGT) - model.eval()(self.SRC, self.TGT)).abs().max().item()

    @pytest.mark.parametrize("name", DROPOUTS)
    def test_each_kind_alone(self, name: str) -> None:
        assert self.difference(dropout=0.0, **{name: 0.5}) > 1e-2

    def test_they_replace_the_common_one(self) -> None:
        assert self.difference(dropout=0.5, **dict.fromkeys(DROPOUTS, 0.0)) == 0.0

    def test_probability_of_each(self) -> None:
        """An element survives with 1 - p: means over many draws of the inside of the network."""
        model = Transformer(20, 20, d_model=16, num_heads=2, dropout=0.1, attention_dropout=0.2, residual_dropout=0.3, layer_drop=0.4)
        layer = model.decoder.layers[0]
        assert (layer.dropout, layer.feed_forward_dropout, layer.self_attn.dropout, layer.multihead_attn.dropout) == (0.3, 0.1, 0.2, 0.2)
        assert (model.tgt_embedding.dropout, model.encoder.layer_drop, model.decoder.layer_drop) == (0.1, 0.4, 0.4)

    def test_layer_drop(self) -> None:
        model = Transformer(20, 20, d_model=16, num_heads=2, num_encoder_layers=6, num_decoder_layers=6, dropout=0.0, layer_drop=0.25)
        left_out = [sum(model.encoder.left_out()) for _ in range(500)]
        assert 0.2 < sum(left_out) / (500 * 6) < 0.3
        assert not any(model.eval().encoder.left_out())
        everything = Transformer(**model.config | {"layer_drop": 1.0})
        states = everything.tgt_embedding(self.TGT)
        torch.testing.assert_close(everything(self.SRC, self.TGT), everything.project(everything.decoder.norm(states)))

    @pytest.mark.parametrize("name", [*DROPOUTS, "layer_drop"])
    def test_out_of_range(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} must lie in \\[0, 1\\], got 1.5"):
            Transformer(20, 20, d_model=16, num_heads=2, **{name: 1.5})


def losses_of(folder: Path, data: Path, **settings: object) -> list[float]:
    trainer = start_training(folder, data, **settings)
    trainer.run()
    return trainer.history.losses


class TestCompiled:
    def test_no_graph_break_few_shapes_and_the_same_losses(self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two shapes of the eight there may be, each traced once. CompileCounter compiles nothing: it counts, and runs what was traced."""
        from torch._dynamo.testing import CompileCounter

        assert train.MOST_SHAPES == 8
        monkeypatch.setattr(train, "MOST_SHAPES", 2)
        torch._dynamo.reset()
        counter, modules_compile = CompileCounter(), torch.nn.Module.compile
        settings = {"compile": True, "steps": 12, "dropout": 0.0, "batch_tokens": 120, "accumulate": 2}
        monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
        expected = losses_of(tmp_path / "eager", data, **settings)
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: modules_compile(module, backend=counter, **options))
        trainer = start_training(tmp_path / "compiled", data, **settings)
        steps = [trainer.batches.step(indices, trainer.share) for indices in trainer.batches.epoch(0)]
        shapes = {tuple(part.src.shape) for step in steps for part in step.micro_batches}
        trainer.run()
        assert trainer.position.epoch > 0
        assert counter.frame_count == len(shapes) == 2
        assert trainer.history.losses == pytest.approx(expected, rel=1e-5)

    def test_fixed_shapes(self) -> None:
        """Lengths spread over a hundred widths: at most 8 shapes, in every epoch, and every pair once."""
        rows = [[4] * (1 + index % 97) for index in range(400)]
        batches = BatchSource(rows, rows[::-1], batch_tokens=640, max_len=100, fixed_shapes=8)
        for epoch in range(2):
            indices = batches.epoch(epoch)
            assert sorted(index for batch in indices for index in batch) == list(range(400))
            parts = [part for batch in indices for rank in range(2) for part in batches.step(batch, Share(rank, 2, 2)).micro_batches]
            shapes = {(*part.src.shape, *part.tgt_out.shape) for part in parts}
            assert 1 < len(shapes) <= 8
            assert all(4 * rows * (src + tgt) <= 640 + 4 * (src + tgt) for rows, src, _, tgt in shapes)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"compile": True, "layer_drop": 0.1}, "compile and layer_drop cannot be combined"),
            ({"compile": True, "parallel": "fsdp"}, "compile and fsdp cannot be combined"),
            ({"autocast": "fp16", "parallel": "fsdp"}, "fp16 and fsdp cannot be combined"),
        ],
    )
    def test_what_cannot_be_combined(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TrainingConfig.from_dict({"steps": 1, **settings})


def test_fp16_skips_a_step_that_overflows_and_keeps_its_scale(tmp_path: Path, data: Path) -> None:
    """As on a GPU, with torch's scaler for the CPU. The first scale is so large that the first steps overflow."""
    trainer = start_training(tmp_path / "run", data, autocast="fp16", steps=3)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12)
    before = trainer.model.tgt_embedding.weight.clone()
    batch = next(trainer.batches.from_position(Position()))
    trainer.train_step(batch, 0.0)
    assert torch.equal(trainer.model.tgt_embedding.weight, before)
    assert trainer.scaler.get_scale() == 2.0**28
    losses = [trainer.train_step(batch, 0.0).item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1
    trainer.step = 0
    trainer.history = type(trainer.history)()
    trainer.run()
    checkpoint = read_checkpoint(tmp_path / "run")
    resumed = Trainer.resume(checkpoint, checkpoint.training_config(), trainer.corpus, torch.device("cpu"))
    assert resumed.scaler.state_dict()["scale"] == trainer.scaler.get_scale() < 2.0**28
