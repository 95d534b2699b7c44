"""The demonstration on scikit-learn's digits: the split, a short run, its report; what the command refuses."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from fused_attention import VisionTransformer
from fused_attention.transformer.digits import classifiers, demo
from fused_attention.transformer.digits.pictures import attention_over
from fused_attention.transformer.translation import cli


@pytest.fixture(scope="module")
def digits() -> classifiers.Digits:
    return classifiers.load_digits()


@pytest.fixture(scope="module")
def few_digits(digits: classifiers.Digits) -> classifiers.Digits:
    return classifiers.Digits(digits.images[:200], digits.labels[:200], digits.held_out_images[:100], digits.held_out_labels[:100])


@pytest.fixture(scope="module")
def report_text(few_digits: classifiers.Digits, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a short demonstration."""
    folder = tmp_path_factory.mktemp("digits") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "load_digits", lambda: few_digits)
        path = demo.run_demo(folder, epochs=1, device="cpu")
    assert path == folder / "digits.html"
    assert list(folder.iterdir()) == [path]
    return path.read_text()


class TestSplit:
    def test_a_third_is_held_out_and_no_image_twice(self, digits: classifiers.Digits) -> None:
        assert (len(digits.images), len(digits.held_out_images)) == (1198, 599)
        assert digits.images.shape[1:] == (1, 8, 8)
        assert (digits.images.min(), digits.images.max()) == (0, 1)
        everything = torch.cat([digits.images, digits.held_out_images]).flatten(1)
        assert len(everything.unique(dim=0)) == len(everything)

    def test_each_digit_has_the_same_share(self, digits: classifiers.Digits) -> None:
        counts = [labels.bincount().double() / len(labels) for labels in (digits.labels, digits.held_out_labels)]
        assert (counts[0] - counts[1]).abs().max() < 2 / 599


class TestClassifiers:
    def test_scikit_learns(self, digits: classifiers.Digits) -> None:
        result = classifiers.train_logistic_regression(digits)
        assert result.parameters == 64 * 10 + 10
        assert 0.95 < result.accuracy(digits) < 0.99
        assert result.seconds > 0

    def test_mlp(self, few_digits: classifiers.Digits) -> None:
        result = classifiers.train_mlp(few_digits)
        assert result.parameters == 64 * 100 + 100 + 100 * 10 + 10
        assert result.accuracy(few_digits) > 0.8

    def test_the_transformer_learns_by_heart(self, few_digits: classifiers.Digits, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(classifiers, "BATCH_SIZE", 20)
        images, labels = few_digits.images[:40], few_digits.labels[:40]
        train = classifiers.Digits(images, labels, images, labels)
        model, result = classifiers.train_transformer(train, torch.device("cpu"), epochs=40)
        assert result.accuracy(train) > 0.8
        assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert not model.training


class TestReport:
    def test_has_every_part_and_needs_no_other_file(self, report_text: str) -> None:
        for title in ("Beside two others", "Where it looks", "Every layer and head", "What it gets wrong", "The machine"):
            assert f"<h2>{title}" in report_text
        assert not re.search(r'(src|href)="(?!data:)', report_text)
        for name in ("logistic regression", "MLP", "Vision Transformer"):
            assert re.search(rf"<th>{name}</th><td>[\d.]+% of 100 images held out, \d+ wrong; [\d,]+ parameters, trained in", report_text)

    def test_pictures(self, report_text: str, few_digits: classifiers.Digits) -> None:
        looks, heads, wrong = re.findall(r'<div class="gallery".*?</div>', report_text, re.DOTALL)
        assert looks.count("<svg ") == 20
        assert re.findall(r"<figcaption>(\d)", looks) == [str(digit) for digit in range(10) for _ in range(2)]
        assert re.findall(r"<figcaption>(.*?)<", heads) == [f"layer {layer}, head {head}" for layer in (1, 2, 3) for head in (1, 2, 3, 4)]
        number = int(re.search(r"Vision Transformer</th><td>[^;]*?(\d+) wrong", report_text)[1])
        assert wrong.count("<svg ") == len(re.findall(r"<figcaption>\d read as \d<", wrong)) == number > 0

    def test_the_maps_are_what_the_class_token_weighs_patches_with(self) -> None:
        model = VisionTransformer((4, 6), (2, 3), 5, channels=2, d_model=24, num_heads=3, num_layers=2, dim_feedforward=40)
        images = torch.randn(3, 2, 4, 6)
        maps = demo.class_token_maps(model, images)
        assert maps.shape == (3, 2, 3, 2, 2)
        layer = model.attention_maps(images)[1]
        assert torch.equal(maps[2, 1, 0], torch.stack([layer[2, 0, 0, 1:3], layer[2, 0, 0, 3:5]]))


class TestPictures:
    IMAGE = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.4]])

    def cells(self, text: str) -> list[tuple[str, ...]]:
        pattern = r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" fill="var\((--\w+)\)" fill-opacity="([\d.]+)"/>'
        return re.findall(pattern, text)

    def test_patches_below_pixels(self) -> None:
        text = attention_over(self.IMAGE, torch.tensor([[0.1, 0.4]]))
        assert 'viewBox="0 0 4 2"' in text
        assert self.cells(text) == [
            ("0", "0", "2", "2", "--second", "0.25"),
            ("2", "0", "2", "2", "--second", "1.00"),
            ("1", "0", "1", "1", "--text", "0.75"),
            ("3", "1", "1", "1", "--text", "0.30"),
        ]


class TestCommand:
    def error_line(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
        assert cli.main(["demo", "--task", "digits", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line

    def test_runs_the_demonstration(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(demo, "run_demo", lambda folder, **options: seen.append((folder, options)))
        assert cli.main(["demo", "--task", "digits", "--output", str(tmp_path), "--overwrite", "--device", "cpu"]) == 0
        assert seen == [(tmp_path, {"overwrite": True, "device": "cpu"})]

    @pytest.mark.parametrize("name", ["sklearn", "tqdm"])
    def test_a_missing_package_names_the_extra(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        line = self.error_line(capsys, "--output", tmp_path / "out")
        assert line.startswith(f"fused-attention: {name} cannot be imported")
        assert line.endswith("pip install 'fused-attention[vision]'")
        assert not (tmp_path / "out").exists()

    def test_an_earlier_report_is_kept(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / demo.REPORT_NAME).write_text("kept")
        assert "digits.html exists; " in self.error_line(capsys, "--output", tmp_path)
        assert (tmp_path / demo.REPORT_NAME).read_text() == "kept"

    @pytest.mark.parametrize("option", ["--minutes", "--data"])
    def test_options_of_the_other_task(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
        assert f"{option} is for --task translation" in self.error_line(capsys, "--output", tmp_path / "out", option, "1")
        assert not (tmp_path / "out").exists()
