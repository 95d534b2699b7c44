"""The results of `make gpu`: two files in a folder, summary.md and an archive of everything else, from which a later run goes on."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PASSED, PARTLY, FAILED, NOT_RUN = "passed", "in part", "failed", "not run"
MOST_BYTES = 8 * 2**20  # of a log, before compression: the end of it
ARCHIVE, SUMMARY, OUTCOMES = "results.tar.gz", "summary.md", "outcomes.json"


class Outcome(NamedTuple):
    state: str  # PASSED, PARTLY (nothing failed, something was not run), FAILED or NOT_RUN
    detail: str


class Results:
    """Outcomes by part and step, and the files of the steps."""

    def __init__(self, folder: Path, files: Path, about: str, commit: str, steps: dict[str, list[str]]) -> None:
        """Goes on from the folder's archive if it is about the same sources and the same GPU, or puts it aside.

        Args:
            folder: gets the summary and the archive.
            files: an empty folder, in which steps write.
            about: what the results are about, in a line.
            commit: for the summary.
            steps: of each part, in the order of the summary.
        """
        self.folder, self.files, self.about, self.commit, self.steps = folder, files, about, commit, steps
        self.outcomes: dict[str, dict[str, Outcome]] = {part: {} for part in steps}
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / ARCHIVE
        if not archive.exists():
            return
        with tarfile.open(archive) as earlier:
            kept = json.load(earlier.extractfile(OUTCOMES))  # type: ignore[arg-type]
            if kept["about"] == about:
                earlier.extractall(files, filter="data")
                for part, outcomes in kept["outcomes"].items():
                    self.outcomes.setdefault(part, {}).update({step: Outcome(*outcome) for step, outcome in outcomes.items()})
                return
        aside = next(path for path in (folder / f"earlier-{number}.tar.gz" for number in range(1, 10**6)) if not path.exists())
        archive.rename(aside)
        print(f"{archive} is about something else ({kept['about']}): it is now {aside.name}", flush=True)

    def text(self) -> str:
        lines = [f"{self.about}; commit {self.commit}", "", "| part | step | | |", "| --- | --- | --- | --- |"]
        for part, steps in self.steps.items():
            for step in steps:
                state, detail = self.outcomes.get(part, {}).get(step, (NOT_RUN, ""))
                lines.append(f"| {part} | {step} | {state} | {detail} |")
        return "\n".join(lines)

    def save(self) -> None:
        """Each file is whole at any time: the new one takes the old one's place."""
        (self.files / OUTCOMES).write_text(json.dumps({"about": self.about, "outcomes": self.outcomes}, indent=1))
        _replace(self.folder / SUMMARY, self.text() + "\n")
        unfinished = self.folder / f".{ARCHIVE}"
        with tarfile.open(unfinished, "w:gz") as archive:
            for path in _files(self.files):
                content = path.read_bytes()[-MOST_BYTES:]
                member = tarfile.TarInfo(str(path.relative_to(self.files)))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        os.replace(unfinished, self.folder / ARCHIVE)


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    os.replace(unfinished, path)
