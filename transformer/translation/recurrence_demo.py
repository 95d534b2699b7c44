"""A short `fused-attention compare` for the report: the Transformer next to recurrent models of its size, on the demo's text."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...benchmarks.journal import Key
from ...benchmarks.pictures import Style
from ...benchmarks.recurrence.compare import CONFIG, NEVER, Comparison, Grid
from ...benchmarks.recurrence.curves import panels, plot
from . import plots, report
from .data import Corpus
from .terminal import heartbeat
from .train import train_tokenizers

LENGTHS, ROUNDS = (8, 32, 128), 3  # sentence lengths whose speed is measured, in tokens
TEST_SENTENCES = 200
STYLE = Style(plots.TEXT, plots.LINE, (plots.ACCENT, plots.SECOND, plots.THIRD))


def compare_with_recurrence(corpus: Corpus, device: torch.device, minutes: float) -> Mapping[Key, Any]:
    """What the journal of a comparison holds; each model trains for so many minutes, on all pairs."""
    grid = Grid(LENGTHS, ROUNDS, pairs=(), parts=(), minutes=minutes, test_sentences=TEST_SENTENCES)
    text = {name: getattr(corpus, name) for name in ("source_language", "target_language", "max_words")}
    config = replace(CONFIG, data=corpus.name, **text, minutes=minutes, checkpoint_every=NEVER, validate_every=NEVER)
    with heartbeat("preparing the text"):
        tokenizers = train_tokenizers(config, corpus)
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(Path(folder), grid, config, corpus, tokenizers, device)
        try:
            comparison.measure_speed()
            comparison.measure_quality()
        except KeyboardInterrupt:  # with TrainingInterrupted, whose message names the temporary folder
            raise KeyboardInterrupt from None
    return comparison.journal.results


def rows(results: Mapping[Key, Any]) -> dict[str, str]:
    """A line for each model, label -> value."""
    trained = {str(key[1]): result for key, result in results.items() if key[0] == "bleu"}
    sizes = {name: facts["parameters"] for name, facts in results["run",]["models"].items()}
    return {
        name: f"BLEU {found['bleu']:.1f}, cross entropy {found['cross_entropy']:.2f} after {found['steps']:,} steps; "
        f"{sizes[name] / 1e6:.2f} million parameters"
        for name, found in trained.items()
    }


def section(results: Mapping[Key, Any]) -> str:
    """The comparison as a part of the report."""
    seconds = round(max(result["seconds"] for key, result in results.items() if key[0] == "bleu"))
    note = (
        "Three models of the same size: attention throughout; a recurrent unit (SSRU) in place of the decoder's self-attention; an LSTM "
        "encoder-decoder with attention. They share data, tokens and optimizer, each with a learning rate that suits it. Each trained for "
        f"{seconds} seconds, which is short: fused-attention compare --grid full takes longer and compares more."
    )
    speed = report.Picture("Speed by sentence length", plots.svg(plot(panels(results)["recurrence-speed"], STYLE)))
    return report.section("Next to recurrence", note, f"{report.figures([speed])}\n{report.table(rows(results))}")
