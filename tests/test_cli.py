"""The command line: what it prints, what it refuses, and that it never overwrites or shows a traceback."""

from __future__ import annotations

import errno
import io
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_translation import trained_folder, write_corpus

from fused_attention.transformer.optional import MissingModuleError, optional_module
from fused_attention.transformer.translation import cli
from fused_attention.transformer.translation.checkpoint import CHECKPOINT_NAME, read_checkpoint
from fused_attention.transformer.translation.corpora import load_corpus
from fused_attention.transformer.translation.train import Trainer

TINY = (
    *("--steps", "3", "--vocab-size", "60", "--d-model", "16", "--num-heads", "2", "--dim-feedforward", "16"),
    *("--num-encoder-layers", "1", "--num-decoder-layers", "1", "--batch-tokens", "300"),
)


@pytest.fixture(autouse=True)
def _started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable the command sets it and starts anew, importing torch a second time."""
    monkeypatch.setenv(cli.SPIN_VARIABLE, "2000")


def run_command(*arguments: object, text: str = "", environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m fused_attention` in a process of its own."""
    command = [sys.executable, "-m", "fused_attention", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, env=environment)


def stdin_of(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def error_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with status 2 and exactly one line on stderr; returns that line."""
    capsys.readouterr()  # what making the arguments has printed
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("fused-attention: ")
    return lines[0].removeprefix("fused-attention: ")


class TestInfo:
    def test_every_backend_with_its_reason(self) -> None:
        without = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        finished = run_command("info", environment=without)
        assert finished.returncode == 0, finished.stderr
        lines = dict(line.split(maxsplit=1) for line in finished.stdout.splitlines() if line.startswith("  "))
        for backend in ("cuda", "triton", "cpu", "reference"):
            assert lines[backend] == "available" or lines[backend].startswith("not available: ")
        assert lines["reference"] == "available"
        if sys.platform == "linux":
            # Started anew with the variable, because it was not set.
            assert lines["GOMP_SPINCOUNT"] == "2000"

    @pytest.mark.parametrize("variable", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
    def test_a_choice_of_the_user_is_left_alone(self, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(variable, "7")
        monkeypatch.setattr(os, "execv", lambda *arguments: pytest.fail("started anew"))
        cli.restart_with_short_spinning()
        assert os.environ[variable] == "7"


class TestTrain:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        return write_corpus(tmp_path / "data")

    def test_train_then_resume(self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = tmp_path / "run"
        assert cli.main(["train", str(output), "--data", str(data), *TINY]) == 0
        assert capsys.readouterr().out.startswith("test: BLEU ")
        assert read_checkpoint(output).progress["step"] == 3
        assert cli.main(["train", str(output), "--resume", "--steps", "5"]) == 0
        checkpoint = read_checkpoint(output)
        assert checkpoint.progress["step"] == 5
        assert checkpoint.config["d_model"] == 16

    def test_resume_where_the_corpus_moved(
        self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.main(["train", "run", "--data", "data", *TINY]) == 0
        data.rename(tmp_path / "moved")
        message = error_line(capsys, "train", "run", "--resume")
        assert message == f"{Path('run', CHECKPOINT_NAME)} was trained on the folder data, which is not there; --data says where it is now"
        write_corpus(tmp_path / "other", count=61)
        message = error_line(capsys, "train", "run", "--resume", "--steps", "5", "--data", "other")
        assert message == f"{Path('run', CHECKPOINT_NAME)} was trained on other text than other holds now"
        assert "no corpus 'nowhere'" in error_line(capsys, "train", "run", "--resume", "--data", "nowhere")
        assert cli.main(["train", "run", "--resume", "--steps", "5", "--data", "moved"]) == 0
        checkpoint = read_checkpoint("run")
        assert (checkpoint.progress["step"], checkpoint.config["data"]) == (5, "moved")

    def test_pairs_left_out_are_counted(self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (data / "test.fr").write_text("\n" + (data / "test.fr").read_text().partition("\n")[2])
        assert cli.main(["train", str(tmp_path / "run"), "--data", str(data), "--max-words", "4", *TINY]) == 0
        captured = capsys.readouterr()
        train, validate = captured.err.splitlines()[:2]
        assert re.fullmatch(r"\d+ sentence pairs to train on; left out: \d+ of more than 4 words", train)
        assert "sentence pairs to validate on" in validate
        assert re.search("; left out: 1 with an empty side, [0-9]+ of more than 4 words", captured.out)

    def test_ctrl_c_saves(self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        original = Trainer.train_step

        def interrupted(trainer: Trainer, *arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return original(trainer, *arguments)

        monkeypatch.setattr(Trainer, "train_step", interrupted)
        try:
            assert cli.main(["train", str(tmp_path / "run"), "--data", str(data), *TINY]) == 130
        finally:
            signal.signal(signal.SIGINT, handler)
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"fused-attention: interrupted after step 1, which {tmp_path / 'run' / CHECKPOINT_NAME} holds; "
            f"go on with: fused-attention train {tmp_path / 'run'} --resume"
        )
        assert read_checkpoint(tmp_path / "run").progress["step"] == 1

    def test_full_disk_names_the_checkpoint(
        self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_space(descriptor: int) -> None:
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and os.fstat(descriptor).st_size > 5000:  # the settings are less
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("fused_attention.transformer.translation.output_files.os.fsync", no_space)
        assert cli.main(["train", str(tmp_path / "run"), "--data", str(data), *TINY]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message == f"fused-attention: {tmp_path / 'run' / CHECKPOINT_NAME}: No space left on device"
        assert {path.name for path in (tmp_path / "run").iterdir()} <= {cli.SETTINGS_NAME, "events"}

    def test_an_existing_checkpoint_is_not_replaced(self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / CHECKPOINT_NAME).write_bytes(b"precious")
        message = error_line(capsys, "train", tmp_path, "--data", data, *TINY)
        assert message == f"{tmp_path / CHECKPOINT_NAME} exists; choose another folder or allow overwriting with --overwrite"
        assert (tmp_path / CHECKPOINT_NAME).read_bytes() == b"precious"
        assert cli.main(["train", str(tmp_path), "--data", str(data), "--overwrite", *TINY]) == 0
        assert read_checkpoint(tmp_path).progress["step"] == 3

    def test_a_folder_in_place_of_the_checkpoint(self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / CHECKPOINT_NAME).mkdir()
        message = error_line(capsys, "train", tmp_path, "--data", data, "--overwrite", *TINY)
        assert message == f"{tmp_path / CHECKPOINT_NAME} is a folder; choose another output folder"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data", "nowhere"], "no corpus 'nowhere': neither a folder nor one of the names"),
            (["--data", "DATA", "--target-language", "de"], "has no file train.de"),
            (["--data", "DATA", *TINY, "--num-heads", "3"], "num_heads"),
            (["--data", "DATA", *TINY, "--vocab-size", "9000"], "cannot learn a vocabulary of 9000 pieces"),
            (["--data", "DATA", *TINY, "--dropout", "2"], "dropout must lie in [0, 1], got 2.0"),
            (["--data", "DATA", *TINY, "--memory-layers", "top"], "memory_layers must be one of"),
            (["--data", "DATA", *TINY, "--batch-tokens", "3"], "batch_tokens = 3 is less than the longest"),
            (["--data", "DATA", "--steps", "0"], "steps must be positive, not 0"),
            (["--data", "DATA", "--minutes", "-1"], "minutes must be positive, not -1.0"),
            (["--data", "DATA", "--minutes", "inf"], "minutes must be finite, not inf"),
            (["--data", "DATA", *TINY, "--vocab-size", "4"], "vocab_size must be more than the 4 special pieces, not 4"),
            (["--data", "DATA", *TINY, "--vocab-size", str(2**40)], f"cannot learn a vocabulary of {2**40} pieces"),
            (["--data", "DATA", *TINY, "--seed", str(2**63)], f"seed must fit in 64 bits, not {2**63}"),
            (["--data", "DATA", "--autocast", "int8"], "autocast must be one of auto, bf16, fp16, off"),
            (["--data", "DATA", "--device", "abacus"], "device 'abacus' cannot be used"),
            (["--resume"], "no checkpoint"),
        ],
    )
    def test_bad_input_is_one_line(
        self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        given = [str(data) if argument == "DATA" else argument for argument in arguments]
        assert message in error_line(capsys, "train", tmp_path / "run", *given)
        assert not (tmp_path / "run" / CHECKPOINT_NAME).exists()

    @pytest.mark.parametrize("setting", [("dropout", "0.5"), ("recipe", "multi30k")], ids=lambda setting: setting[0])
    def test_settings_with_resume(self, capsys: pytest.CaptureFixture[str], setting: tuple[str, str]) -> None:
        message = error_line(capsys, "train", trained_folder(), "--resume", f"--{setting[0]}", setting[1])
        assert message == f"--resume keeps the run's settings; not allowed with it: {setting[0]}"

    def test_output_below_a_file(self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("kept")
        assert "Not a directory" in error_line(capsys, "train", tmp_path / "file" / "run", "--data", data, *TINY)
        assert (tmp_path / "file").read_text() == "kept"

    def test_read_only_output(self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        if os.geteuid() == 0:
            pytest.skip("root may write to read-only folders")
        (tmp_path / "run").mkdir(mode=0o500)
        assert "Permission denied" in error_line(capsys, "train", tmp_path / "run", "--data", data, *TINY)

    def test_a_missing_package_names_the_extra(
        self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
        message = error_line(capsys, "train", tmp_path / "run", "--data", data, *TINY)
        assert message.startswith("sentencepiece cannot be imported")
        assert message.endswith("install it with: pip install 'fused-attention[translation]'")
        with pytest.raises(MissingModuleError):
            optional_module("sentencepiece")


class TestTranslate:
    @pytest.fixture
    def translate(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
        """Runs the command on this stdin with these options and gives what is on stdout and stderr."""

        def run(stdin: bytes, *options: str) -> tuple[str, str]:
            arguments = ["translate", str(trained_folder()), *options]
            capsys.readouterr()  # what training has printed
            monkeypatch.setattr(sys, "stdin", stdin_of(stdin))
            assert cli.main(arguments) == 0
            return capsys.readouterr()

        return run

    def test_stdin_to_stdout(self) -> None:
        train = load_corpus(read_checkpoint(trained_folder()).config["data"]).train
        finished = run_command("translate", trained_folder(), text=f"{train.source[4]}\n\n{train.source[2]}")
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout == f"{train.target[4]}\n\n{train.target[2]}\n"
        assert finished.stderr == ""

    def test_empty_input(self, translate: Callable[..., tuple[str, str]]) -> None:
        assert translate(b"") == ("", "")

    def test_a_cache_of_8_bits(self, translate: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
        from fused_attention.transformer.cache import LayerCache

        seen, append = set(), LayerCache.append
        monkeypatch.setattr(LayerCache, "append", lambda cache, kv: (seen.add(cache.dtype), append(cache, kv))[1])
        assert translate(b"cat\n", "--cache", "float8_e4m3fn") == translate(b"cat\n")
        assert seen == {torch.float8_e4m3fn, None}

    def test_long_line_is_named(self, translate: Callable[..., tuple[str, str]]) -> None:
        output, errors = translate(b"cat\n" + b"big dog " * 90)
        assert errors.splitlines()[0] == "fused-attention: longer than 31 tokens and cut: line 2"
        assert len(output.splitlines()) == 2

    def test_translations_that_do_not_end_are_counted(
        self, translate: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fused_attention.transformer.translation.translate.LENGTH_LIMIT", (0, 1))
        _, errors = translate(b"\n" + b"cat\n" * 12)
        numbers = ", ".join(map(str, range(2, 12)))
        assert errors == f"fused-attention: translation cut before its end: 12 lines ({numbers}, ...)\n"

    @pytest.mark.parametrize("options", [["--stream"], ["--stream", "--scores"]], ids=["pieces", "scores"])
    def test_a_stream_names_each_line_that_is_cut(
        self, translate: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch, options: list[str]
    ) -> None:
        text = b"cat\n\n" + b"big dog " * 90 + b"\n"
        assert translate(text, *options)[1].splitlines()[0] == "fused-attention: longer than 31 tokens and cut: line 3"
        monkeypatch.setattr("fused_attention.transformer.translation.translate.LENGTH_LIMIT", (0, 1))
        output, errors = translate(text[:5], *options)
        assert errors == "fused-attention: translation cut before its end: line 1\n"
        assert output.count("\n") == 2

    def test_corrupt_checkpoint(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / CHECKPOINT_NAME
        path.write_bytes((trained_folder() / CHECKPOINT_NAME).read_bytes()[:5000])
        assert error_line(capsys, "translate", path).startswith(f"corrupt checkpoint {path}: ")

    def test_missing_checkpoint(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert error_line(capsys, "translate", tmp_path) == f"no checkpoint {tmp_path / CHECKPOINT_NAME}"

    def test_stdin_that_is_not_text(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", stdin_of(b"caf\xe9\n"))
        message = error_line(capsys, "translate", trained_folder())
        assert message == "stdin is not UTF-8 text: invalid continuation byte at byte 3"


class TestBench:
    @pytest.mark.parametrize(
        ("missing", "message"),
        [
            ("fused_attention.benchmarks", "this installation has no benchmarks"),
            ("pytest_benchmark", "pip install 'fused-attention[bench]'"),
        ],
    )
    def test_what_is_missing_is_named(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str, message: str
    ) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        assert message in error_line(capsys, "bench")

    def test_further_arguments_go_to_pytest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # a run of its own, whoever runs this one
        finished = run_command("bench", "--collect-only", "-k", "no_such_benchmark")
        assert "deselected" in finished.stdout, finished.stdout + finished.stderr


def test_without_the_optional_packages_the_rest_works() -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('sentencepiece', 'sacrebleu', 'safetensors', 'tqdm', 'matplotlib'))); "
        "import fused_attention; from fused_attention.transformer.translation import cli; sys.exit(cli.main(['info']))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "reference" in finished.stdout


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train"], ["info", "--more"], ["train", "x", "--steps", "many"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_interrupt_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_info", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "fused-attention: interrupted\n"


def test_reader_of_stdout_that_leaves_early() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fused_attention", "translate", trained_folder()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate("red cat\n" * 50_000, timeout=120)
    assert process.returncode == 141
    assert errors == ""


def buffered_command(*arguments: str, redirection: str) -> subprocess.CompletedProcess[str]:
    """`python -m fused_attention` with its streams redirected by a shell, and with Python's buffer before stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = f"{shlex.join([sys.executable, '-m', 'fused_attention', *arguments])} {redirection}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("arguments", [["info"], ["--help"]])
class TestOutputThatCannotBeWritten:
    """What is printed is written when the buffer is full or at exit, where Python reports errors in words of its own."""

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_full_disk(self, arguments: list[str]) -> None:
        finished = buffered_command(*arguments, redirection="> /dev/full")
        assert (finished.returncode, finished.stderr) == (2, "fused-attention: stdout: No space left on device\n")

    def test_reader_that_has_left(self, arguments: list[str]) -> None:
        finished = buffered_command(*arguments, redirection="| true; exit ${PIPESTATUS[0]}")
        assert (finished.returncode, finished.stderr) == (141, "")

    def test_closed_streams(self, arguments: list[str]) -> None:
        finished = buffered_command(*arguments, redirection="<&- >&-")
        assert (finished.returncode, finished.stderr) == (0, "")


def test_translation_of_a_closed_stdin_is_empty() -> None:
    finished = buffered_command("translate", str(trained_folder()), redirection="<&-")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
