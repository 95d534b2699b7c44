"""`pytest --part sample` runs some cases of every test function, `--part rest` all others: what `make test` runs, and what it leaves out.

The rule, so that nobody keeps a list: of a function's cases a share is taken, one at least. Those come first that show the most values of
its parameters for the first time (each instruction set, each backend, each feature), and among equals it is a checksum of the name that
decides: always the same ones. A case is added for every backend and the like (KINDS) that no function's share shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from itertools import groupby

import pytest

PARTS = ("sample", "rest")
SHARE = 1 / 12
KINDS = ("instruction_set", "backend", "dtype", "function", "seed")  # parameters whose every value is in the sample

COLLECTED = pytest.StashKey[list[pytest.Item]]()  # of which a part was kept

Values = frozenset[tuple[str, int]]  # of the parameters of a case: their names, and which of its values each has


def chosen(cases: Mapping[str, Values]) -> set[str]:
    """The names in the sample of one function's cases."""
    left = sorted(cases, key=lambda name: zlib.crc32(name.encode()))
    names: set[str] = set()
    shown: set[tuple[str, int]] = set()
    for _ in range(max(1, round(SHARE * len(cases)))):
        best = max(left, key=lambda name: len(cases[name] - shown))  # the first of the best ones
        left.remove(best)
        names.add(best)
        shown |= cases[best]
    return names


def sample(items: Iterable[pytest.Item]) -> set[str]:
    """The names of the tests in the sample."""
    names: set[str] = set()
    items = sorted(items, key=function_of)
    for _, cases in groupby(items, key=function_of):
        names |= chosen({item.nodeid: values_of(item) for item in cases})
    shown = {kind for item in items if item.nodeid in names for kind in kinds_of(item)}
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        if not kinds_of(item) <= shown:
            names.add(item.nodeid)
            shown |= kinds_of(item)
    return names


def function_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def values_of(item: pytest.Item) -> Values:
    return frozenset(item.callspec.indices.items()) if hasattr(item, "callspec") else frozenset()


def kinds_of(item: pytest.Item) -> set[tuple[str, str]]:
    """(parameter, value) of KINDS."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return {(name, repr(params[name])) for name in KINDS if name in params}


def keep_part(config: pytest.Config, items: list[pytest.Item], part: str) -> None:
    """For pytest_collection_modifyitems."""
    config.stash[COLLECTED] = list(items)
    names = sample(items)
    config.hook.pytest_deselected(items=[item for item in items if (item.nodeid in names) != (part == "sample")])
    items[:] = [item for item in items if (item.nodeid in names) == (part == "sample")]
