"""Files that are either complete or not there, whatever kills the process and whenever."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """An OSError names `file`: those of write, flush and fsync, such as a full disk, name none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def atomic_write(path: Path, data: bytes) -> None:
    """Replace `path` by a file holding `data`; a reader, or a restart after a kill, sees the old file or the new one.

    1. write a hidden temporary file beside it, 2. fsync the file, so that its content is on disk before its name is,
    3. rename it over `path`, 4. fsync the folder, so that the new name is on disk.
    A leftover temporary file of a killed process is overwritten by the next write. Raises OSError that names `path`.
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
