"""The demonstration: from text to a translating Transformer and a report, in one go, on whatever the machine has.

1. Say what the machine is, and show what a pretrained model does, if there is one. 2. Get parallel text. 3. Train for a time budget.
4. Score on held-out text and translate ten unseen sentences. 5. Swap the attention of a stock torch.nn.Transformer. 6. Compare with
recurrent models. 7. Write report.html.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...benchmarks.journal import Key
from ..embedding import sinusoidal_positions
from ..optional import MissingModuleError, optional_module
from ..pretrained.find import PretrainedError, installed_model
from . import how_it_works, plots, recurrence_demo, report
from .checkpoint import CHECKPOINT_NAME
from .corpora import load_corpus
from .data import DATA_VARIABLE, Corpus, DataError
from .machine import backend_lines, choose_device, machine_facts, machine_report
from .output_files import atomic_write, claim_output_folder
from .recurrence_demo import compare_with_recurrence
from .swap_demo import SwapResult, swap_attention
from .terminal import heartbeat
from .train import Trainer, TrainingError
from .training_config import TrainingConfig
from .translate import Scores, Translator

REPORT_NAME = "report.html"
LANGUAGES = {"en": "English", "fr": "French", "de": "German", "cs": "Czech"}
DEFAULT_MINUTES = {"cpu": 4.0, "cuda": 3.0}
PRETRAINED = "en-pt"
PRETRAINED_LINES = ("Attention is all you need.", "The weather was so good that we had lunch in the garden.")
COMPARED_PART = 0.1  # of the training time, for each model next to recurrence
NUM_EXAMPLES = 10
# Long sentences of the help pages would take most of a short budget.
HELP_MAX_WORDS = 20
# Imported before the work starts, so that a missing one does not show after minutes of training.
NEEDED_MODULES = ("sentencepiece", "safetensors", "tqdm", "sacrebleu", "matplotlib")


@dataclass(frozen=True)
class Example:
    """A held-out sentence with the model's translation."""

    source: str
    translation: str
    reference: str


def run_demo(folder: Path, *, minutes: float | None = None, data: str | None = None, overwrite: bool = False, device: str = "auto") -> Path:
    """Run the demonstration and return the path of the report; the checkpoint lies beside it.

    Raises DataError if no corpus can be had, FileExistsError if the folder holds results and `overwrite` is False.
    """
    for name in NEEDED_MODULES:
        optional_module(name)
    chosen = choose_device(device)
    claim_output_folder(folder, (REPORT_NAME, CHECKPOINT_NAME), overwrite=overwrite)
    print(machine_report(), flush=True)
    show_pretrained(device)

    with heartbeat("getting the text"):
        corpus = load_corpus(data) if data is not None else find_corpus()
    minutes = DEFAULT_MINUTES.get(chosen.type, DEFAULT_MINUTES["cpu"]) if minutes is None else minutes
    print(f"\ntraining {minutes:g} minutes on {corpus.name}", flush=True)
    try:
        with heartbeat("preparing the text"):
            trainer = Trainer(demo_config(corpus, chosen, minutes), corpus, folder, chosen)
        print(trainer.data_summary(), flush=True)
        trainer.run()
    except (DataError, TrainingError) as error:
        # What these call for, such as a smaller vocabulary, are settings that the demonstration does not have.
        raise type(error)(f"{error}; the demo has no settings for it, `fused-attention train --help` lists those of train") from error

    translator = Translator(trainer.model, trainer.source_tokenizer, trainer.target_tokenizer)
    test_name, test = corpus.held_out()
    with heartbeat(f"translating {test_name}"):
        scores, translated = translator.score(test)
    print(f"\n{test_name}: {scores}")
    examples = [Example(test.source[i], translated[i], test.target[i]) for i in choose_examples(test.source)]
    for example in examples:
        print(f"\n  {example.source}\n  -> {example.translation}")

    with heartbeat("replacing the attention of a stock torch.nn.Transformer"):
        swap = swap_attention(chosen)
    print("\nthe attention of a stock torch.nn.Transformer, replaced")
    for label, value in swap.rows().items():
        print(f"  {label:<27} {value}")
    print("\nnext to recurrent models", flush=True)
    recurrence = compare_with_recurrence(corpus, chosen, COMPARED_PART * minutes)
    for label, value in recurrence_demo.rows(recurrence).items():
        print(f"  {label:<27} {value}")
    path = folder / REPORT_NAME
    with heartbeat("writing the report"):
        atomic_write(path, demo_report(trainer, translator, test_name, scores, examples, swap, recurrence).encode())
    print(f"\nreport: {path}\ntranslate more: fused-attention translate {folder} < text.{corpus.source_language}")
    return path


def show_pretrained(device: str) -> None:
    """Print some translations by a pretrained model, or in a line why there is none."""
    try:
        with heartbeat("loading a pretrained model"):
            translator = Translator.from_pretrained(installed_model(PRETRAINED), device)
    except (MissingModuleError, PretrainedError) as error:
        print(f"\nno pretrained model to show: {error}", flush=True)
        return
    print(f"\na pretrained model, {PRETRAINED}")
    for line, translation in zip(PRETRAINED_LINES, translator.translate(PRETRAINED_LINES, beam=4), strict=True):
        print(f"  {line}\n  -> {translation}", flush=True)


def find_corpus() -> Corpus:
    """Multi30k (from the folder in FUSED_ATTENTION_DATA, else from GitHub), else LibreOffice help, else DataError."""
    if os.environ.get(DATA_VARIABLE):
        return load_corpus("multi30k")
    try:
        return load_corpus("multi30k")
    except DataError as error:
        print(f"\nmulti30k: {error}", flush=True)
    try:
        return load_corpus("libreoffice-help", max_words=HELP_MAX_WORDS)
    except DataError as error:
        print(f"libreoffice-help: {error}", flush=True)
    raise DataError(
        f"no parallel text: set {DATA_VARIABLE} to a folder with train, val and test files in en and fr, "
        "or give access to github.com (multi30k), or to a Debian or Ubuntu package mirror through apt (libreoffice-help)"
    )


def demo_config(corpus: Corpus, device: torch.device, minutes: float) -> TrainingConfig:
    """A model that learns most in the budget: small on a CPU, where it sees the text a few times, larger on a GPU."""
    text: dict[str, Any] = {
        "data": corpus.name,
        "source_language": corpus.source_language,
        "target_language": corpus.target_language,
        "max_words": corpus.max_words,
        "minutes": minutes,
    }
    if device.type == "cuda":
        return TrainingConfig(
            **text,
            d_model=256,
            dim_feedforward=1024,
            dropout=0.3,  # the text is seen tens of times
            batch_tokens=8192,
            warmup_steps=500,
            cooldown=0.6,
            validate_every=500,
            checkpoint_every=1000,
        )
    return TrainingConfig(**text, warmup_steps=250, learning_rate_scale=1.2, cooldown=0.6)


def choose_examples(sentences: list[str]) -> list[int]:
    """Indices of ten sentences of 6 to 14 plain words, spread evenly over the text; fewer if it has fewer.

    Plain: no digits or symbols, which formulas and code samples in help pages consist of.
    """
    plain = [i for i, sentence in enumerate(sentences) if not re.search(r"[\d=_<>()]", sentence)]
    candidates = [i for i in plain if 6 <= len(sentences[i].split()) <= 14] or list(range(len(sentences)))
    count = min(NUM_EXAMPLES, len(candidates))
    return [candidates[position * len(candidates) // count] for position in range(count)]


def demo_report(
    trainer: Trainer,
    translator: Translator,
    test_name: str,
    scores: Scores,
    examples: list[Example],
    swap: SwapResult,
    recurrence: Mapping[Key, Any],
) -> str:
    """The text of report.html."""
    config, corpus, history = trainer.config, trainer.corpus, trainer.history
    minutes = history.seconds[-1] / 60
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    source, target = (LANGUAGES.get(code, code) for code in (corpus.source_language, corpus.target_language))
    tiles = {
        f"BLEU on {test_name}": f"{scores.bleu:.1f}",
        "chrF": f"{scores.chrf:.1f}",
        "minutes of training": f"{minutes:.1f}",
        "tokens a second": f"{history.tokens / history.seconds[-1]:,.0f}",
        "parameters": f"{parameters / 1e6:.1f} M",
    }
    # Long enough to show something, short enough for the labels to be read.
    example = min(examples, key=lambda example: abs(len(example.source.split()) - 9))
    facts = {
        **machine_facts(),
        **{f"backend {name}": status for name, status in backend_lines().items()},
        "model": f"{config.num_encoder_layers} + {config.num_decoder_layers} layers, {config.d_model} wide, "
        f"{config.num_heads} heads, feed-forward {config.dim_feedforward}, {len(trainer.source_tokenizer):,} BPE pieces",
        "training": f"{trainer.step:,} steps on {corpus.name}: {trainer.data_summary().replace(chr(10), '. ')}",
        "scores": str(scores),
    }
    sections = [
        report.section(
            "Ten sentences it has never seen",
            f"Greedy translations of sentences from {test_name}, chosen by position and length, not by how they turned out.",
            report.translations((e.source, e.translation, e.reference) for e in examples),
        ),
        report.section(
            "Learning",
            "Loss of every training step and its running mean; cross entropy on held-out sentences.",
            report.figures([report.Picture("Loss by optimizer step", plots.svg(plots.loss_curve(history)))]),
        ),
        how_it_works.one_word(translator, example.source, example.translation),
        how_it_works.beams(translator, example.source),
        how_it_works.where_it_looks(translator, example.source, example.translation),
        report.section(
            "How it knows the order of words",
            "Attention alone ignores order, so these waves, a different mix at every position, are added to the embeddings.",
            report.figures(
                [
                    report.Picture(
                        "Sinusoidal positional encoding",
                        plots.svg(plots.positional_encoding(sinusoidal_positions(100, config.d_model))),
                    )
                ]
            ),
        ),
        report.section(
            "The same attention in a stock torch.nn.Transformer",
            "replace_attention swaps the attention modules of an existing model; weights and results stay. "
            "A training step is forward and backward, 512 wide, 3 + 3 layers, batch 8 of up to 128 tokens; medians.",
            report.table(swap.rows()),
        ),
        recurrence_demo.section(recurrence),
        report.section("The machine and the run", "What produced this page.", report.table(facts)),
    ]
    lead = (
        f"An encoder-decoder Transformer on fused attention, trained from nothing in {minutes:.1f} minutes "
        f"to translate {source} to {target}."
    )
    return report.page("A Transformer that translates", lead, tiles, sections)
