"""Training in several processes: the losses of one, checkpoints for any number of processes, and what happens when one dies.

One launch of training_processes.py does all runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import training_processes
from tiny_translation import write_corpus

from fused_attention.transformer.translation import cli
from fused_attention.transformer.translation.batches import Share
from fused_attention.transformer.translation.checkpoint import CHECKPOINT_NAME, SHARDS_PREFIX, Checkpoint, CheckpointError, read_checkpoint
from fused_attention.transformer.translation.corpora import load_corpus
from fused_attention.transformer.translation.train import Trainer
from fused_attention.transformer.translation.translate import Translator

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a folder for each run."""
    base = tmp_path_factory.mktemp("distributed")
    (base / "output").mkdir()
    data = write_corpus(base / "data")
    with (data / "train.en").open("a") as source, (data / "train.fr").open("a") as target:
        for count in range(6, 14):  # long sources of short targets, so that few rows of a batch make it wide
            source.write("red cat" + " sees big dog" * (count // 3) + "\n")
            target.write("chat " * (1 + count % 4) + "\n")
    command = [sys.executable, training_processes.__file__, str(data), str(base / "output")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", cli.SPIN_VARIABLE: "2000"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    return base / "output"


def outcome(output: Path, run: str) -> tuple[list[int], list[str], float]:
    """The exit statuses of a run's processes, the last line that each printed, and how many seconds the run took.

    Lines that start with [rank are warnings of torch, such as of layers that DDP was told a step may leave out, and that none did.
    """
    outcomes: dict[str, Any] = json.loads((output / "outcomes.json").read_text())
    statuses = outcomes["statuses"][run]
    printed = [(output / f"{run}.{rank}").read_text().replace("\r", "\n").split("\n") for rank in range(len(statuses))]
    last = [[line for line in ["", *lines] if line and not line.startswith("[rank")][-1:] for lines in printed]
    return statuses, ["".join(line) for line in last], outcomes["seconds"][run]


def losses(checkpoint: Checkpoint) -> torch.Tensor:
    return checkpoint.tensors["history.losses"]


@pytest.mark.parametrize("run", ["accumulated", "ddp2", "fsdp4", "fsdp4 then one", "killed then fsdp2"])
def test_losses_are_those_of_one_process(output: Path, run: str) -> None:
    """The shares of a batch have different widths, and different numbers of tokens; dropout is off, or its noise would differ.

    Means over ranks or micro-batches in place of tokens differ by more than 1e-4. Rounding starts at 2e-7, and grows with the steps.
    """
    statuses, printed, _ = outcome(output, run)
    assert set(statuses) == {0}, printed
    assert [bool(line) for line in printed] == [rank == 0 for rank in range(len(printed))]
    checkpoint, one = read_checkpoint(output / run), read_checkpoint(output / "one")
    steps = len(losses(checkpoint))
    assert steps == (22 if run == "fsdp4 then one" else 20)
    torch.testing.assert_close(losses(checkpoint), losses(one)[:steps], rtol=1e-5, atol=0)
    assert checkpoint.progress["tokens"] == one.progress["tokens"] or steps < 22
    ours, theirs = (dict(progress["validations"]) for progress in (checkpoint.progress, one.progress))
    assert ours[20] == pytest.approx(theirs[20], rel=2e-5)
    assert printed[0].partition("BLEU")[0] == "test: "


def test_shares_differ_in_width_and_tokens(output: Path) -> None:
    """Without which the losses above would prove less."""
    config = read_checkpoint(output / "ddp2").training_config()
    trainer = Trainer(config, load_corpus(config.data), output, torch.device("cpu"))
    widths, tokens = set(), set()
    for indices in trainer.batches.epoch(0):
        parts = [part for rank in range(4) for part in trainer.batches.step(indices, Share(rank, 4)).micro_batches]
        widths.add(len({part.src.shape[1] for part in parts}))
        tokens.add(len({part.tokens() for part in parts}))
    assert max(widths) > 1
    assert min(tokens) > 1


def test_a_killed_process_ends_the_others_and_leaves_a_whole_checkpoint(output: Path) -> None:
    statuses, printed, seconds = outcome(output, "killed")
    assert seconds < 60
    for rank, (status, line) in enumerate(zip(statuses, printed, strict=True)):
        if rank == training_processes.LOST:
            assert (status, line) == (-9, "")
        else:
            assert status == 2
            end = "another process of this training has ended; go on from its last checkpoint with --resume"
            assert line == f"fused-attention: rank {rank}: {end}"
    assert read_checkpoint(output / "killed").progress["step"] == 10


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("other text", "rank 1 reads other text in .* than rank 0: their fingerprints are [0-9a-f]{16} and [0-9a-f]{16}"),
        ("indivisible", "batch_tokens = 288, of all processes together, cannot be divided by 2 processes times 5 micro-batches"),
        ("no way to share", "there are 2 processes: choose how they share the work, --parallel ddp or --parallel fsdp"),
    ],
)
def test_bad_input_is_one_line_of_one_process(output: Path, run: str, message: str) -> None:
    statuses, printed, _ = outcome(output, run)
    assert statuses == [2, 2]
    assert printed[1] == ""
    assert len((output / f"{run}.0").read_text().strip().splitlines()) == 1
    assert re.fullmatch(f"fused-attention: {message}", printed[0]), printed[0]
    assert not (output / run / CHECKPOINT_NAME).exists()


def test_the_example_learns_the_same_in_one_process_and_two(output: Path) -> None:
    found = []
    for run in ("example 1", "example 2"):
        statuses, printed, _ = outcome(output, run)
        assert set(statuses) == {0}, printed
        assert printed[1:] == [""] * (len(statuses) - 1)
        found.append([float(line.rpartition(" ")[2]) for line in (output / f"{run}.0").read_text().splitlines()])
    assert found[0] == pytest.approx(found[1], abs=2e-3)
    assert found[0][-1] < 0.8 * found[0][0]


class TestShards:
    @pytest.fixture
    def folder(self, output: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(output / "fsdp4", tmp_path / "run"))

    def test_every_process_wrote_one_and_older_ones_are_gone(self, output: Path) -> None:
        [shards] = (output / "fsdp4").glob(f"{SHARDS_PREFIX}*")
        assert shards.name == f"{SHARDS_PREFIX}20"
        assert len(list(shards.glob("*.distcp"))) == 4
        assert (output / "fsdp4" / CHECKPOINT_NAME).stat().st_size < sum(path.stat().st_size for path in shards.iterdir())
        assert not list((output / "fsdp4 then one").glob(f"{SHARDS_PREFIX}*"))

    def test_translates_like_the_whole_one(self, output: Path) -> None:
        sentences = ["red cat eats", "big dog"]
        sharded, whole = (Translator.load(output / run) for run in ("killed then fsdp2", "ddp2"))
        assert sharded.translate(sentences) == whole.translate(sentences)

    @pytest.mark.parametrize("name", ["__2_0.distcp", ".metadata"])
    def test_a_missing_one_is_named(self, folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        missing = folder / f"{SHARDS_PREFIX}20" / name
        missing.unlink()
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        for command in (["train", str(folder), "--resume", "--steps", "30"], ["translate", str(folder)]):
            assert cli.main(command) == 2
            line = f"corrupt checkpoint {folder / CHECKPOINT_NAME}: its shard {missing} is missing"
            assert capsys.readouterr().err == f"fused-attention: {line}\n"
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    def test_one_that_is_cut_off(self, folder: Path) -> None:
        path = folder / f"{SHARDS_PREFIX}20" / "__1_0.distcp"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="__1_0.distcp is cut off"):
            read_checkpoint(folder)
