"""Parallel text: sentences in a source language and their translations, one per line.

A corpus is a folder with the files `train.<lang>`, `val.<lang>` and any number of `test*.<lang>`, plain or gzipped.
corpora.py can fetch two by name.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .output_files import sync_folder

DATA_VARIABLE = "FUSED_ATTENTION_DATA"


class DataError(ValueError):
    """The corpus is missing, empty or inconsistent; the message is one line that says what and where."""


@dataclass(frozen=True)
class ParallelText:
    """Sentence i of `target` translates sentence i of `source`."""

    source: list[str]
    target: list[str]
    left_out: dict[str, int] = field(default_factory=dict, compare=False)  # reason -> number of pairs in the files that were left out

    def __len__(self) -> int:
        return len(self.source)

    def keep(self, wanted: Callable[[str, str], bool], otherwise: str) -> ParallelText:
        """The pairs for which `wanted(source, target)` is true, in order; the others are counted under the reason `otherwise`."""
        pairs = [(source, target) for source, target in zip(self.source, self.target, strict=True) if wanted(source, target)]
        left_out = {**self.left_out, otherwise: len(self) - len(pairs)}
        return ParallelText([source for source, _ in pairs], [target for _, target in pairs], left_out)


def left_out_text(left_out: dict[str, int]) -> str:
    """How many pairs were left out for each reason, as "; left out: 2 with an empty side, 1 of more than 20 words"; "" if none."""
    reasons = [f"{count:,} {reason}" for reason, count in left_out.items() if count]
    return f"; left out: {', '.join(reasons)}" if reasons else ""


@dataclass(frozen=True)
class Corpus:
    """A training set, a validation set and any number of named test sets in one language pair."""

    name: str  # as given to load_corpus; with the next three fields, it loads the same text again
    source_language: str
    target_language: str
    max_words: int | None
    train: ParallelText
    validation: ParallelText
    tests: dict[str, ParallelText]

    def fingerprint(self) -> str:
        """Changes whenever the training text does, because a resumed run must see the text it started with."""
        digest = hashlib.sha256()
        for sentence in (*self.train.source, *self.train.target):
            digest.update(sentence.encode() + b"\n")
        return digest.hexdigest()[:16]

    def held_out(self) -> tuple[str, ParallelText]:
        """The text that scores are reported on: the first test set by name, or the validation set if there are none."""
        return next(iter(self.tests.items()), ("val", self.validation))


def read_corpus(
    folder: Path, source_language: str, target_language: str, *, name: str | None = None, max_words: int | None = None
) -> Corpus:
    """Read the splits in `folder`. train and val must be there; the tests are the test* files that both languages have."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")

    def read(split: str) -> ParallelText:
        text = read_parallel(folder, split, source_language, target_language)
        if max_words is None:
            return text
        short = text.keep(
            lambda source, target: max(len(source.split()), len(target.split())) <= max_words, f"of more than {max_words} words"
        )
        if not len(short):
            raise DataError(f"{folder}/{split}: no pair has at most {max_words} words on both sides")
        return short

    suffixes = (f".{source_language}", f".{source_language}.gz")
    found = {path.name.removesuffix(s) for path in folder.glob("test*") for s in suffixes if path.name.endswith(s)}
    tests = {split: read(split) for split in sorted(found) if _find_file(folder, split, target_language) is not None}
    return Corpus(name or str(folder), source_language, target_language, max_words, read("train"), read("val"), tests)


def read_parallel(folder: Path, split: str, source_language: str, target_language: str) -> ParallelText:
    """Read one split. Pairs with an empty side are left out; DataError if files are missing, unequal or empty."""
    paths = []
    for language in (source_language, target_language):
        path = _find_file(folder, split, language)
        if path is None:
            raise DataError(f"{folder} has no file {split}.{language} or {split}.{language}.gz")
        paths.append(path)
    source, target = map(read_lines, paths)
    if len(source) != len(target):
        raise DataError(f"parallel files must have equally many lines: {paths[0]} has {len(source)}, {paths[1]} has {len(target)}")
    text = ParallelText(source, target).keep(lambda source, target: bool(source and target), "with an empty side")
    if not len(text):
        raise DataError(f"empty corpus: {paths[0]} and {paths[1]} hold no sentence pair")
    return text


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, gunzipped if its name ends in .gz, without surrounding whitespace."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    # Only "\n" ends a line; str.splitlines would also split at form feeds and Unicode separators inside a sentence.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.strip() for line in lines]


def _find_file(folder: Path, split: str, language: str) -> Path | None:
    candidates = (folder / f"{split}.{language}", folder / f"{split}.{language}.gz")
    return next((path for path in candidates if path.is_file()), None)


def cache_folder() -> Path:
    """Where fetched corpora are kept: $XDG_CACHE_HOME/fused_attention, by default ~/.cache/fused_attention."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fused_attention"


def fill_cache(name: str, fill: Callable[[Path], None]) -> Path:
    """Return the cache folder `name`. If it does not exist yet, `fill` a temporary folder, then rename it into place.

    `fill` writes its files with atomic_write, so that they are on disk before the folder gets its name.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
    except OSError as error:
        raise DataError(f"cannot write the cache folder {folder.parent}: {error.strerror}") from error
    try:
        fill(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process finished the same corpus first.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    return folder
