"""Output files that are either complete or absent, even if the process is killed, in folders checked before the work starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROBE_NAME = ".write-test"


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Makes every OSError name `file`; those from write, flush and fsync, such as a full disk, do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def atomic_write(path: Path, data: bytes) -> None:
    """Replace `path` with a file holding `data`; a reader, or a restart after a kill, sees the old file or the new one.

    1. write a hidden temporary file next to it, 2. fsync the file, so that its contents are on disk before its name is,
    3. rename it over `path`, 4. fsync the folder, so that the new name is on disk.
    A temporary file left by a killed process is overwritten by the next write. Raises OSError naming `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on disk."""
    with naming(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def claim_output_folder(folder: Path, file_names: Iterable[str], *, overwrite: bool) -> None:
    """Create `folder` if needed and test that it is writable.

    Raises FileExistsError if one of the files exists and `overwrite` is False, IsADirectoryError if a folder has the name of one,
    OSError if the folder cannot be written.
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
