"""Checks an output folder before work starts, so that nothing is overwritten and hours are not lost to a full or read-only disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fused_attention.transformer.atomic_write import atomic_write

PROBE_NAME = ".write-test"


def claim_output_folder(folder: Path, file_names: Iterable[str], *, overwrite: bool) -> None:
    """Create `folder` if needed and write a file to it as a test.

    Raises FileExistsError if one of the files is there and `overwrite` is False, IsADirectoryError if a folder has the name of
    one, OSError if the folder cannot be written.
    """
    paths = [folder / name for name in file_names]
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; choose another output folder")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{existing[0]} exists; choose another folder or allow overwriting with --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / PROBE_NAME
    atomic_write(probe, b"")
    probe.unlink()
