"""How PyTorch's own tests end on this package, and the comparison itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch_suites import DOCUMENT, SUITES, Row, Suite, compare, differences, rows_of


@pytest.mark.skipif(
    "FUSED_ATTENTION_TORCH_TESTS" not in os.environ, reason="FUSED_ATTENTION_TORCH_TESTS names no folder of PyTorch's tests"
)
@pytest.mark.parametrize("suite", SUITES, ids=[suite.file for suite in SUITES])
def test_only_what_the_document_names_differs_from_torch(suite: Suite) -> None:
    assert not compare(Path(os.environ["FUSED_ATTENTION_TORCH_TESTS"]).resolve(), suite)


def test_what_no_row_explains_and_rows_that_explain_nothing() -> None:
    stock = {
        "A::test_one": "passed",
        "A::test_two_cpu": "passed",
        "A::test_three": "failed",
        "A::test_four": "passed",
        "A::test_five": "timeout",
    }
    ours = {"A::test_one": "failed", "A::test_two_cpu": "skipped", "A::test_three": "failed"}
    rows = [Row("A::test_two_*", "skipped", "because"), Row("A::test_one", "timeout", "slow"), Row("B::*", "failed", "not run here")]
    unexplained, stale = differences(stock, ours, rows)
    assert unexplained == [
        "A::test_one: passed with torch, failed with this package",
        "A::test_four: passed with torch, missing with this package",
    ]
    assert stale == ["A::test_one does not end timeout, or does so with torch too: slow"]


def test_rows_belong_to_the_section_of_their_file() -> None:
    document = "# Title\n\n## one.py\n\n| test | ends | reason |\n|---|---|---|\n| `A::*` | failed | a reason |\n\n## two.py\n"
    assert rows_of("one.py", document) == [Row("A::*", "failed", "a reason")]
    assert rows_of("two.py", document) == rows_of("three.py", document) == []


def test_every_line_of_the_documents_tables_is_read() -> None:
    document = DOCUMENT.read_text()
    lines = [line for line in document.splitlines() if line.startswith("| `")]
    assert sum(len(rows_of(suite.file, document)) for suite in SUITES) == len(lines)
