"""Corpora by name, fetched into the cache folder on first use: "multi30k" (image captions, en/de/fr/cs), "libreoffice-help" (en-fr)."""

from __future__ import annotations

import http.client
import os
import urllib.request
from pathlib import Path

from .data import DATA_VARIABLE, Corpus, DataError, fill_cache, read_corpus, read_lines
from .libreoffice_help import fetch_libreoffice_help
from .output_files import atomic_write

MULTI30K_ADDRESS = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
MULTI30K_LANGUAGES = ("en", "de", "fr", "cs")
NAMED_CORPORA = ("multi30k", "libreoffice-help")


def load_corpus(name_or_folder: str, source_language: str = "en", target_language: str = "fr", *, max_words: int | None = None) -> Corpus:
    """Load a corpus by name (fetched into the cache folder on first use) or from a folder.

    "multi30k" is read from the folder in FUSED_ATTENTION_DATA if that is set. `max_words` drops pairs with a longer side
    from every split. Raises DataError.
    """
    if max_words is not None and max_words < 1:
        raise DataError(f"max_words must be at least 1, not {max_words}")
    if source_language == target_language:
        raise DataError(f"source and target language are both {source_language!r}")
    if name_or_folder == "multi30k":
        given = os.environ.get(DATA_VARIABLE)
        folder = Path(given) if given else fetch_multi30k(source_language, target_language)
    elif name_or_folder == "libreoffice-help":
        if (source_language, target_language) != ("en", "fr"):
            raise DataError(f"libreoffice-help is en-fr only, not {source_language}-{target_language}")
        folder = fetch_libreoffice_help()
    else:
        folder = Path(name_or_folder)
        if not folder.is_dir():
            names = " or ".join(NAMED_CORPORA)
            raise DataError(f"no corpus {name_or_folder!r}: neither a folder nor one of the names {names}")
    return read_corpus(folder, source_language, target_language, name=name_or_folder, max_words=max_words)


def fetch_multi30k(source_language: str, target_language: str) -> Path:
    """Download the Multi30k texts (Elliott et al. 2016) of one language pair: train, val and test_2016_flickr.

    They come from the public GitHub repository multi30k/dataset and are for research and education. Raises DataError.
    """
    for language in (source_language, target_language):
        if language not in MULTI30K_LANGUAGES:
            raise DataError(f"multi30k has no language {language!r}, only {', '.join(MULTI30K_LANGUAGES)}")

    def download(folder: Path) -> None:
        for split in ("train", "val", "test_2016_flickr"):
            for language in (source_language, target_language):
                file_name = f"{split}.{language}.gz"
                atomic_write(folder / file_name, _download(f"{MULTI30K_ADDRESS}/{file_name}"))
                read_lines(folder / file_name)

    return fill_cache(f"multi30k-{source_language}-{target_language}", download)


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"cannot download {address}: {reason}; set {DATA_VARIABLE} to a folder that holds the files instead") from error
