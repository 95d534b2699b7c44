"""`fused-attention compare`: models of one size, a comparison that ends, goes on and refuses, and tables and plots of its numbers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_translation import one_thread, tiny_config, write_corpus

from fused_attention.benchmarks.journal import Journal
from fused_attention.benchmarks.pictures import STYLES
from fused_attention.benchmarks.recurrence import compare, curves, speed
from fused_attention.benchmarks.recurrence.models import builders
from fused_attention.transformer.lstm import LSTMEncoderDecoder
from fused_attention.transformer.model import Transformer
from fused_attention.transformer.translation import cli
from fused_attention.transformer.translation.train import Trainer
from fused_attention.transformer.translation.training_config import TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
RECORDED = sorted((ROOT / "docs/results").glob("recurrence-*.jsonl"))
GRID = compare.Grid((4, 8), rounds=1, pairs=(20, 1000), parts=(0.5,), minutes=0.004, test_sentences=4)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    return tiny_config(write_corpus(tmp_path_factory.mktemp("corpus")), minutes=1.0, dim_feedforward=32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, config: TrainingConfig) -> Path:
    """The folder of a comparison."""
    folder = tmp_path_factory.mktemp("compare")
    compare.run_compare(folder, GRID, config, "cpu")
    return folder


class TestModels:
    @pytest.mark.parametrize("vocabulary", [1000, 3000, 8000])
    @pytest.mark.parametrize("joint", [False, True])
    def test_as_many_parameters_within_five_percent(self, vocabulary: int, joint: bool) -> None:
        models = {name: build() for name, build in builders(replace(compare.CONFIG, joint_vocabulary=joint), *[vocabulary] * 2).items()}
        assert [type(model) for model in models.values()] == [Transformer, Transformer, LSTMEncoderDecoder]
        assert models["SSRU decoder"].config["decoder_cell"] == "ssru"
        counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models.values()]
        assert max(counts) / min(counts) <= 1.05

    def test_no_width_fits(self) -> None:
        with pytest.raises(
            ValueError, match=r"LSTM has [\d,]+ parameters where the Transformer has [\d,]+: more than 5 % apart at any width"
        ):
            builders(tiny_config(Path("corpus"), d_model=48), 60, 60)


class TestSpeed:
    def test_seconds_are_the_processors_own_where_one_thread_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert speed.fair_clock(torch.device("cpu")) is time.process_time
        assert speed.fair_clock(torch.device("cuda")) is time.monotonic
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert speed.fair_clock(torch.device("cpu")) is time.monotonic

    def test_models_take_turns(self) -> None:
        calls: list[str] = []
        runs = {name: lambda name=name: calls.append(name) for name in "ab"}
        assert speed.median_seconds(runs, 2, time.monotonic).keys() == {"a", "b"}
        assert "".join(calls) == "ababab"

    def test_decoding_writes_as_many_tokens_as_it_reads(self, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        models = {name: build() for name, build in builders(config, 60, 60).items()}
        lengths = []
        generate = LSTMEncoderDecoder.generate

        def recorded(model: Any, src: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            tokens = generate(model, src, *arguments, **options)
            lengths.append((src.shape, tokens.shape))
            return tokens

        for kind in (Transformer, LSTMEncoderDecoder):
            monkeypatch.setattr(kind, "generate", recorded)
        assert min(speed.decoding_milliseconds(models, 9, 1, torch.device("cpu"), time.monotonic).values()) > 0
        assert set(lengths) == {((1, 9), (1, 9))}
        assert len(lengths) == 6


class TestComparison:
    def test_everything_is_measured_for_every_model(self, finished: Path) -> None:
        results = Journal(finished / compare.RESULTS_NAME).results
        assert {key[:2] for key in results if key[0] != "bleu"} == {("run",), *((m, n) for m in ("training", "decoding") for n in (4, 8))}
        points = [(compare.ALL_PAIRS, "0.002"), (compare.ALL_PAIRS, "0.004"), (20, "0.004")]  # 1,000 are more than there are
        assert {key for key in results if key[0] == "bleu"} == {("bleu", model, *point) for model in curves.MODELS for point in points}
        for key, result in results.items():
            if key[0] == "bleu":
                assert result["pairs"] == (key[2] or 60)
                assert result["sentences"] == 4
                assert result["seconds"] >= 60 * float(key[3])
            elif key[0] != "run":
                assert result.keys() == set(curves.MODELS)
        assert results["run",]["settings"]["config"]["vocab_size"] == 60

    def test_it_goes_on_where_it_was(
        self, finished: Path, config: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = (finished / compare.RESULTS_NAME).read_text().splitlines(keepends=True)
        kept, [missing] = lines[:-1], lines[-1:]
        journal = tmp_path / compare.RESULTS_NAME
        journal.write_text("".join(kept) + missing[:9])  # what a kill in the middle of a line leaves
        trained = []
        original = Trainer.run

        def recorded(trainer: Trainer) -> None:
            trained.append((type(trainer.model), trainer.config.learning_rate_scale))
            original(trainer)

        monkeypatch.setattr(Trainer, "run", recorded)
        compare.run_compare(tmp_path, GRID, config, "cpu")
        assert trained == [(LSTMEncoderDecoder, 2 * config.learning_rate_scale)]
        assert journal.read_text().startswith("".join(kept))
        assert json.loads(journal.read_text().splitlines()[-1])["key"] == json.loads(missing)["key"]
        assert f"continuing {journal}" in capsys.readouterr().err
        assert len(list(tmp_path.glob("*.svg"))) == 4

    def test_a_folder_with_other_settings_is_left_alone(self, finished: Path, config: TrainingConfig) -> None:
        before = (finished / compare.RESULTS_NAME).read_bytes()
        with pytest.raises(ValueError, match="holds a comparison with other settings; choose another folder"):
            compare.run_compare(finished, replace(GRID, rounds=2), config, "cpu")
        assert (finished / compare.RESULTS_NAME).read_bytes() == before

    def test_interrupted(self, config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "run", interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"the results so far are in .*results.jsonl; to continue, repeat the command"):
            compare.run_compare(tmp_path, GRID, config, "cpu")
        assert len(Journal(tmp_path / compare.RESULTS_NAME).results) == 5

    def test_parts_of_the_text_are_nested(self, config: TrainingConfig, tmp_path: Path) -> None:
        corpus = compare.load_corpus(config.data)
        comparison = compare.Comparison(tmp_path, GRID, config, corpus, compare.train_tokenizers(config, corpus), torch.device("cpu"))
        small, large, everything = (comparison.part_of_text(pairs).train for pairs in (10, 20, compare.ALL_PAIRS))
        assert (len(small), len(large), len(everything)) == (10, 20, 60)
        assert large.source[:10] == small.source != corpus.train.source[:10]
        assert set(zip(everything.source, everything.target, strict=True)) == set(
            zip(corpus.train.source, corpus.train.target, strict=True)
        )


class TestCommand:
    def test_options(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        calls = []
        monkeypatch.setattr(compare, "run_compare", lambda *arguments: calls.append(arguments))
        assert (
            cli.main(["compare", "--grid", "full", "--minutes", "2", "--data", "text", "--output", str(tmp_path), "--device", "cpu"]) == 0
        )
        grid = replace(compare.GRIDS["full"], minutes=2.0)
        assert calls == [(tmp_path, grid, replace(compare.CONFIG, data="text"), "cpu")]

    @pytest.mark.parametrize(
        ("option", "value", "message"), [("data", "nowhere", "no corpus 'nowhere'"), ("minutes", "-1", "minutes must be")]
    )
    def test_bad_input(self, option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["compare", f"--{option}={value}", "--output", str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("fused-attention: ")
        assert message in captured.err
        assert len(captured.err.splitlines()) == 1
        assert not (tmp_path / "out").exists()


RESULTS = {
    ("run",): {"models": {name: {"parameters": 1234, "config": {"d_model": 32}} for name in curves.MODELS}},
    ("training", 8): {"Transformer": 100.0, "SSRU decoder": 90.0, "LSTM": 1200.0},
    ("training", 16): {"Transformer": 300.0, "SSRU decoder": 200.0, "LSTM": 100.0},
    ("bleu", "LSTM", 0, "1"): {"bleu": 10.0, "pairs": 5000, "steps": 70, "tokens": 90000, "seconds": 60.0, "cross_entropy": 2.5},
    ("bleu", "LSTM", 0, "0.5"): {"bleu": 4.0, "pairs": 5000},
    ("bleu", "LSTM", 1000, "1"): {"bleu": 7.0, "pairs": 1000},
    ("bleu", "Transformer", 0, "0.5"): {"bleu": 3.0, "pairs": 5000},
}


class TestTablesAndPlots:
    def test_tables(self) -> None:
        text = curves.tables(RESULTS)
        assert "| Transformer | 1,234 | 32 | - | - | - |\n| SSRU decoder | 1,234 | 32 | - | - | - |\n" in text
        assert "| LSTM | 1,234 | 32 | 70 | 1,500 | 2.50 |\n" in text
        assert "| tokens a second, by tokens in a sentence | 8 | 16 |\n" in text
        assert "| LSTM | 1,200 | 100 |\n" in text
        assert "| BLEU, by minutes of training | 0.5 | 1 |\n" in text
        assert "| Transformer | 3.0 | - |\n" in text
        assert "| LSTM | 4.0 | 10.0 |\n" in text
        assert "| BLEU, by sentence pairs | 1,000 | 5,000 |\n" in text
        assert "| LSTM | 7.0 | 10.0 |" in text

    def test_plots(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        speeds, qualities = curves.panels(RESULTS).values()
        training, _ = curves.plot(speeds, STYLES["dark"]).axes
        assert [line.get_xydata().tolist() for line in training.lines] == [
            [[8, 100], [16, 300]],
            [[8, 90], [16, 200]],
            [[8, 1200], [16, 100]],
        ]
        assert [text.get_text() for text in training.get_legend().get_texts()] == list(curves.MODELS)
        assert [label.get_text() for label in training.get_xticklabels()] == ["8", "16"]
        minutes, pairs = curves.plot(qualities, STYLES["light"]).axes
        assert minutes.lines[2].get_xydata().tolist() == [[0.5, 4], [1, 10]]
        assert pairs.lines[2].get_xydata().tolist() == [[1000, 7], [5000, 10]]
        assert pairs.get_title(loc="left") == "Quality by size of the training set, 1 min"
        paths = curves.draw(RESULTS, tmp_path)
        assert [path.name for path in paths] == [f"recurrence-{n}-{b}.svg" for n in ("speed", "quality") for b in ("light", "dark")]
        assert "LSTM 8: 1200, 16: 100" in paths[0].read_text()


@pytest.mark.skipif(not RECORDED, reason="no run is on record")
def test_the_page_shows_the_recorded_run(tmp_path: Path) -> None:
    results = Journal(RECORDED[-1]).results
    page = (ROOT / "docs/recurrence.md").read_text()
    assert curves.model_table(results) in page
    for group in curves.panels(results).values():
        for panel in group:
            assert curves.table(panel) in page
    described = re.compile(r"<dc:description>(.*?)</dc:description>")
    for path in curves.draw(results, tmp_path):
        drawn, kept = (text.read_text() for text in (path, ROOT / "docs/pictures" / path.name))
        assert described.findall(drawn) == described.findall(kept) != []
