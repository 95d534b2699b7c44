"""English-French sentence pairs from the LibreOffice help pages (license: MPL-2.0), as Debian and Ubuntu package them.

1. apt fetches the two help packages, with package lists and cache in a private folder, so root is not needed.
2. Pages are paired by path, paragraphs and headings by their id attribute, which translators do not touch.
3. A paragraph is split into sentences if both languages have the same number, otherwise it stays whole.
4. Of source sentences that differ only in case and punctuation, one is kept, so no held-out sentence is in the training set.
"""

from __future__ import annotations

import gzip
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

from .data import DATA_VARIABLE, DataError, ParallelText, fill_cache
from .output_files import atomic_write

PACKAGES = {"en": "libreoffice-help-en-us", "fr": "libreoffice-help-fr"}
PAGE_FOLDERS = {"en": "usr/share/libreoffice/help/en-US/text", "fr": "usr/share/libreoffice/help/fr/text"}
HELD_OUT_PAIRS = 1000
CODE_CLASSES = {"code", "codeintable", "smathcode", "literal"}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZÀ-ÖØ-Þ«\"“(])")


def fetch_libreoffice_help() -> Path:
    """Return a corpus folder with train, val and test in en and fr, made on first use. Raises DataError."""

    def fill(folder: Path) -> None:
        pages = folder / "pages"
        pages.mkdir()
        fetch_packages(pages)
        write_splits(folder, align_pages(pages / PAGE_FOLDERS["en"], pages / PAGE_FOLDERS["fr"]))
        shutil.rmtree(pages)

    return fill_cache("libreoffice-help", fill)


def fetch_packages(folder: Path) -> None:
    """Download the help packages with apt-get, as any user, and unpack them into `folder`."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(
                f"libreoffice-help needs {tool} (Debian or Ubuntu), which is not on PATH; "
                f"set {DATA_VARIABLE} to a folder with parallel text instead"
            )
    state, cache = folder / "apt-state", folder / "apt-cache"
    for private in (state / "lists" / "partial", cache / "archives" / "partial"):
        private.mkdir(parents=True)
    options = [
        *(f"-oDir::State::Lists={state / 'lists'}", f"-oDir::Cache={cache}"),
        *("-oAcquire::Languages=none", "-oAPT::Update::Error-Mode=any", "-q"),
    ]
    # A package list that cannot be fetched matters only if the packages are not found without it; then it is the reason to report.
    update_failure = tool_failure(["apt-get", *options, "update"], folder)
    download_failure = tool_failure(["apt-get", *options, "download", *PACKAGES.values()], folder)
    if download_failure:
        raise DataError(f"libreoffice-help: {update_failure or download_failure}")
    for package in sorted(folder.glob("*.deb")):
        if failure := tool_failure(["dpkg-deb", "-x", package.name, "."], folder):
            raise DataError(f"libreoffice-help: {failure}")


def tool_failure(command: list[str], folder: Path) -> str | None:
    """Run a command in `folder`; None if it succeeds, else one line that says why not."""
    try:
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as error:
        return f"{command[0]} did not finish within {error.timeout:.0f} s"
    if finished.returncode == 0:
        return None
    errors = [line for line in finished.stderr.splitlines() if line.startswith(("E:", "dpkg-deb:"))]
    return f"{command[0]} failed: {errors[0] if errors else f'exit status {finished.returncode}'}"


class ParagraphParser(HTMLParser):
    """Collects `paragraphs`: id attribute -> visible text of every p and h1-h6 element that has an id."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: dict[str, str] = {}
        self._id: str | None = None
        self._text: list[str] = []
        self._span_is_hidden: list[bool] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if re.fullmatch(r"p|h[1-6]", tag):
            is_code = bool(CODE_CLASSES.intersection((given.get("class") or "").split()))
            self._id = None if is_code else given.get("id")
            self._text, self._span_is_hidden = [], []
        elif tag == "span":
            # Text that varies by platform or program comes in several hidden spans; the one without a class is shown.
            self._span_is_hidden.append("hidden" in given and "class" in given)
        elif tag == "br":
            self._text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._span_is_hidden:
            self._span_is_hidden.pop()
        elif self._id is not None and re.fullmatch(r"p|h[1-6]", tag):
            self.paragraphs[self._id] = " ".join("".join(self._text).split())
            self._id = None

    def handle_data(self, data: str) -> None:
        if self._id is not None and not any(self._span_is_hidden):
            self._text.append(data)


def paragraphs_of(page: str) -> dict[str, str]:
    """Text of the p and h1-h6 elements of an HTML page, keyed by id attribute; code samples are left out."""
    parser = ParagraphParser()
    parser.feed(page)
    parser.close()
    return parser.paragraphs


def align_pages(source_folder: Path, target_folder: Path) -> ParallelText:
    """Pair the sentences of pages with the same name, in page order; untranslated and repeated ones are left out."""
    pairs: dict[str, tuple[str, str]] = {}
    for source_page in sorted(source_folder.rglob("*.html")):
        target_page = target_folder / source_page.relative_to(source_folder)
        if not target_page.is_file():
            continue
        translations = paragraphs_of(target_page.read_text(encoding="utf-8"))
        for identifier, paragraph in paragraphs_of(source_page.read_text(encoding="utf-8")).items():
            for source, target in align_sentences(paragraph, translations.get(identifier, "")):
                if target and source != target and re.search(r"[^\W\d_]{2}", source):
                    pairs.setdefault(" ".join(re.findall(r"\w+", source.casefold())), (source, target))
    if not pairs:
        raise DataError(f"no sentence pairs in the help pages under {source_folder} and {target_folder}")
    return ParallelText([source for source, _ in pairs.values()], [target for _, target in pairs.values()])


def align_sentences(source: str, target: str) -> list[tuple[str, str]]:
    """Sentence pairs of a paragraph if both sides have the same number of sentences, else the paragraph as one pair."""
    source_sentences, target_sentences = SENTENCE_END.split(source), SENTENCE_END.split(target)
    if len(source_sentences) != len(target_sentences):
        return [(source, target)]
    return list(zip(source_sentences, target_sentences, strict=True))


def write_splits(folder: Path, text: ParallelText) -> None:
    """Shuffle with a fixed seed and write train, val and test, HELD_OUT_PAIRS each for the last two, gzipped."""
    order = list(range(len(text)))
    random.Random(0).shuffle(order)
    held_out = min(HELD_OUT_PAIRS, len(order) // 10)
    splits = {"test": order[:held_out], "val": order[held_out : 2 * held_out], "train": order[2 * held_out :]}
    for split, indices in splits.items():
        for language, sentences in (("en", text.source), ("fr", text.target)):
            lines = "".join(f"{sentences[index]}\n" for index in indices)
            atomic_write(folder / f"{split}.{language}.gz", gzip.compress(lines.encode(), mtime=0))
