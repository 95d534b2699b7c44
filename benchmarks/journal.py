"""What was measured, kept while it is measured: a .jsonl file from which a later process goes on, whatever ended the one before.

Each line is {"key": [...], "result": ...}, or says that keys were begun, or that they are over. A key that was begun twice and never over
killed its process both times, or hung: it is not begun a third time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_ATTEMPTS = 2
NEVER_OVER = "did not come back: it hung or ended the process, twice"
LIMIT_SECONDS = 150.0  # of one attempt, compilation included

Key = tuple[str | int, ...]


class Journal:
    def __init__(self, path: Path, limit_seconds: float = LIMIT_SECONDS) -> None:
        self.path = path
        self.limit_seconds = limit_seconds
        self.results: dict[Key, Any] = {}  # of a key that was measured twice the last
        open_attempts: Counter[Key] = Counter()
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):
            with path.open("a") as file:
                file.write("\n")
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off
            if "key" in record:
                self.results[tuple(record["key"])] = record["result"]
            open_attempts.update(map(tuple, record.get("begun", ())))
            open_attempts.subtract(map(tuple, record.get("over", ())))
        for key, count in open_attempts.items():
            if count >= MOST_ATTEMPTS:
                self.results.setdefault(key, NEVER_OVER)

    def keep(self, key: Key, result: Any) -> None:
        self.results[key] = result
        self._append({"key": key, "result": result})

    @contextlib.contextmanager
    def attempt(self, *keys: Key) -> Iterator[None]:
        """Around what may hang or end the process. After `limit_seconds` the process ends, with a traceback."""
        self._append({"begun": keys})
        faulthandler.dump_traceback_later(self.limit_seconds, exit=True, file=2)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._append({"over": keys})

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
