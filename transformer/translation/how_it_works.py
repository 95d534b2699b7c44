"""The parts of the report that look into the model: one word being chosen, the beams of a sentence, and where attention looks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import Transformer
from . import plots, report
from .beam_tree import beam_tree
from .tokenizer import BOS_ID, EOS_ID
from .translate import Translator
from .walkthrough import walk_through

COLUMNS = 24  # of vectors that are too wide to be drawn
NUM_NEXT = 6  # tokens that are shown as possible
BEAM = 3


def one_word(translator: Translator, source: str, translation: str) -> str:
    """A section: what the decoder computes to choose one word of the translation by the model."""
    src, target = source_tensor(translator, source), translator.target_tokenizer.encode([translation])[0]
    assert isinstance(translator.model, Transformer)
    walk = walk_through(translator.model, src, [*target, EOS_ID])
    names = readable_pieces(translator.target_tokenizer.pieces(walk.tokens))
    hidden = torch.ones(len(names), len(names), dtype=torch.bool).triu(1)
    best = walk.probabilities.topk(min(NUM_NEXT, walk.probabilities.shape[0]))
    next_names = readable_pieces(translator.target_tokenizer.pieces(best.indices.tolist()))
    dims = f"{min(COLUMNS, walk.embedded.shape[1])} of {walk.embedded.shape[1]} numbers"

    def vectors(values: Tensor) -> str:
        return plots.svg(plots.matrix(values[:, :COLUMNS], names))

    def pairs(values: Tensor, numbers: str) -> str:
        return plots.svg(plots.matrix(values, names, names, numbers))

    pictures = [
        report.Picture("Embedding", vectors(walk.embedded), f"Each token has a learned vector; {dims} are shown."),
        report.Picture("+ position", vectors(walk.positions), "Waves tell the model where in the sentence a token is."),
        report.Picture("= input", vectors(walk.embedded + walk.positions), "The sum goes into the first layer."),
        report.Picture(
            "Scores q · k / √d",
            pairs(walk.scores, ".1f"),
            f"Head {walk.head + 1}: how well the query of each row matches the key of each column.",
        ),
        report.Picture("Mask", pairs(walk.scores.masked_fill(hidden, -torch.inf), ".1f"), "No token may look at the tokens after it."),
        report.Picture("Softmax", pairs(walk.weights, ".0%"), "Attention weights; each row adds up to 100%."),
        report.Picture("Values", vectors(walk.values), "What each token has to offer in this head."),
        report.Picture("Weighted values", vectors(walk.output), "Weights times values: what each token takes from the others."),
        report.Picture(
            "Next token",
            plots.svg(plots.bars(next_names, best.values.tolist())),
            "After all layers, and with the source in view: what may follow the last row.",
        ),
    ]
    written = translator.target_tokenizer.decode([walk.tokens[1:]])[0]
    note = (
        f"The decoder translates “{source}” It has written “{written}” and computes what comes next. Blue is above 0, orange below 0. "
        "Panels 4 to 8 show one head of its first layer."
    )
    return report.section("How it chooses a word", note, report.steps(pictures))


def beams(translator: Translator, source: str) -> str:
    """A section: the tree of what a beam search for the sentence has looked at."""
    src = source_tensor(translator, source)
    root = beam_tree(translator.model, src, translator.length_limit(src), BEAM)

    def label(token: int) -> str:
        return readable_pieces(translator.target_tokenizer.pieces([token]))[0]

    note = (
        f"“{source}” After each token, the search keeps the {BEAM} most probable beginnings. Blue is the translation that wins. The "
        "percentage is the probability of a token after those before it, left out where it is nearly certain. A finished translation has a "
        "score: its log-probability divided by a length penalty."
    )
    tree = report.Picture("Beams of one sentence", plots.svg(plots.beam_tree(root, label)), wide=True)
    return report.section("What a beam search looks at", note, report.figures([tree]))


def where_it_looks(translator: Translator, source: str, translation: str) -> str:
    """A section: the attention maps of all layers and heads."""
    note = (
        f"Attention weights for “{source}” and its translation “{translation}” Each row of a panel "
        "is a token and shows how its attention is spread over other tokens; deeper blue is more. "
        "A dot marks a piece that continues a word."
    )
    return report.section("Where it looks", note, report.figures(attention_pictures(translator, source, translation)))


def attention_pictures(translator: Translator, source: str, translation: str) -> list[report.Picture]:
    """Attention maps of all layers and heads for a sentence and its translation by the model, each cut at the model's max_len."""
    src, (target,) = source_tensor(translator, source), translator.target_tokenizer.encode([translation])
    tgt = [BOS_ID, *target][: translator.model.max_len]
    maps = translator.model.attention_maps(src, torch.tensor([tgt], device=translator.device))
    source_labels = readable_pieces(translator.source_tokenizer.pieces(src[0].tolist()))
    read_labels = readable_pieces(translator.target_tokenizer.pieces(tgt))
    written_labels = readable_pieces(translator.target_tokenizer.pieces([*target, EOS_ID][: len(tgt)]))
    kinds = {
        "encoder": ("Encoder: each source token looks at the source", source_labels, source_labels),
        "decoder_self": ("Decoder: each token of the translation looks at itself and those before it", read_labels, read_labels),
        "cross": ("Cross-attention: writing each token of the translation (rows), it looks at the source", written_labels, source_labels),
    }
    return [
        report.Picture(caption, plots.svg(plots.attention_grid([layer[0].cpu() for layer in maps[kind]], queries, keys)), wide=True)
        for kind, (caption, queries, keys) in kinds.items()
    ]


def source_tensor(translator: Translator, line: str) -> Tensor:
    """(1, S) int64, on the model's device."""
    ids = translator.source_tokenizer.encode([line])[0]
    return torch.tensor([translator.source_tokens(ids)], device=translator.device)


def readable_pieces(pieces: list[str]) -> list[str]:
    """Labels of BPE pieces: begin and end as words, "▁" at the start of a word left out, continuations with a dot."""
    names = {"<s>": "[begin]", "</s>": "[end]"}
    return [names.get(piece) or (piece[1:] or "▁" if piece.startswith("▁") else f"·{piece}") for piece in pieces]
