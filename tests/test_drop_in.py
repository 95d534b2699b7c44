"""The four lines of the README that bring the kernels into existing code, and the table of what each covers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drop_in_table import TABLE, WAYS, answer, header, only_kernels, sdpa

from fused_attention.kernels.native import cpu

pytestmark = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")
ROOT = Path(__file__).resolve().parents[1]
SECTION = re.search(r"## Use it in your code\n.*?```python\n(.*?)\n\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
PAGE = (ROOT / "docs/migrating.md").read_text()
IMPORTS, LINES = SECTION.group(1), re.split(r"\n(?! )", SECTION.group(2))  # a line and what is indented below it
X = torch.randn(2, 9, 32)


def encoder() -> torch.nn.Module:
    return torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


def after(line: str, **names: Any) -> dict[str, Any]:
    """The names after the README's imports and one of its lines ran where the given names are known."""
    exec(f"{IMPORTS}\n{line}", names)
    return names


def test_there_are_four_lines() -> None:
    assert [next(way for way in ("replace", "AutoModel", "sdpa", "flash_attn") if way in line) for line in LINES] == [
        "replace", "AutoModel", "sdpa", "flash_attn"
    ]  # fmt: skip


def test_torch_modules() -> None:
    model = encoder()
    after(LINES[0], model=model)
    with only_kernels():
        model(X).sum().backward()


def test_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.24")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    model = after(LINES[1], AutoModel=transformers.AutoModel, name=str(tmp_path))["model"]
    with only_kernels():
        model(torch.arange(9)[None])


def test_scaled_dot_product_attention() -> None:
    with only_kernels():
        after(LINES[2], model=encoder(), x=X)


def test_flash_attn() -> None:
    q, k, v = (torch.randn(2, 9, 4, 8) for _ in range(3))
    with only_kernels():
        out = after(LINES[3])["flash_attn"].flash_attn_func(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2))


def said(feature: str) -> dict[str, str]:
    """The cells of a row of the page's table."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {feature} |"))
    return dict(zip(WAYS, (cell.strip(" |") for cell in row.split(" | ")[1:]), strict=True))


def test_the_table_has_a_row_for_each_feature_and_a_dash_where_there_is_no_way() -> None:
    assert PAGE.index(header()) > 0
    for feature, probes in TABLE.items():
        assert [cell == "-" for cell in said(feature).values()] == [probe is None for probe in probes], feature


@pytest.mark.parametrize(("feature", "way"), [(feature, way) for feature in TABLE for way in WAYS if TABLE[feature][WAYS.index(way)]])
def test_what_the_table_says(feature: str, way: str) -> None:
    if way == "transformers":
        pytest.importorskip("transformers", minversion="5.24")
    assert answer(TABLE[feature][WAYS.index(way)]) == said(feature)[way]


def test_the_reference_would_be_noticed() -> None:
    q = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(AssertionError, match="the reference ran"):
        answer(sdpa(lambda: q.transpose(1, 2)))
    with pytest.raises(AssertionError, match="no kernel ran"):
        answer(lambda: None)
