"""The table of xFormers' masks in docs/migrating.md: each line gives what the matrix of the mask gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_attention import attention, attention_varlen

attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is not installed", exc_type=ImportError)

CPU = torch.device("cpu")
HEADS, HEAD_DIM, PAGE, PADDING = 4, 8, 4, 8
QUERIES, KEYS = [2, 3, 4], [4, 3, 7]  # the lengths of three sequences
STARTS = [1, 9, 16]  # of the keys among gaps, the last three past their end
TABLE = torch.tensor([[3, 0], [5, 1], [4, 2]])  # the pages of each sequence
BIAS = torch.randn(2, HEADS, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OPTIONS = {"bias": BIAS, "window_size": 3, "window_left": 3, "window_right": 1}  # the names that the table uses
BLOCKS = attn_bias.BlockDiagonalMask.from_seqlens(QUERIES, KEYS, device=CPU)
PADDED = {
    name: getattr(attn_bias, name).from_seqlens(QUERIES, PADDING, KEYS, device=CPU)
    for name in ("BlockDiagonalPaddedKeysMask", "BlockDiagonalCausalWithOffsetPaddedKeysMask")
}
GAPPY = {
    name: getattr(attn_bias, name).from_seqlens(QUERIES, [*STARTS, 24], KEYS, device=CPU)
    for name in ("BlockDiagonalGappyKeysMask", "BlockDiagonalCausalWithOffsetGappyKeysMask")
}
PAGED = {
    f"Paged{name}": mask.make_paged(TABLE, PAGE, *(() if mask in PADDED.values() else (PADDING,)), getattr(attn_bias, f"Paged{name}"))
    for name, mask in (PADDED | GAPPY).items()
}
LOCAL_PADDED = {
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": {"_window_size": 3},
    "BlockDiagonalLocalAttentionPaddedKeysMask": {"window_left": 3, "window_right": 1},
}
MASKS: dict[str, Any] = {
    "None": None,
    "a tensor": BIAS,
    "LowerTriangularMask": attn_bias.LowerTriangularMask(),
    "LowerTriangularMaskWithTensorBias": attn_bias.LowerTriangularMaskWithTensorBias(BIAS),
    "LowerTriangularFromBottomRightMask": attn_bias.LowerTriangularFromBottomRightMask(),
    "LowerTriangularFromBottomRightLocalAttentionMask": attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(3),
    "LocalAttentionFromBottomRightMask": attn_bias.LocalAttentionFromBottomRightMask(3, 1),
    "BlockDiagonalMask": BLOCKS,
    "BlockDiagonalCausalMask": BLOCKS.make_causal(),
    "BlockDiagonalCausalFromBottomRightMask": BLOCKS.make_causal_from_bottomright(),
    "BlockDiagonalCausalLocalAttentionMask": BLOCKS.make_local_attention(3),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": BLOCKS.make_local_attention_from_bottomright(3),
    **PADDED,
    **GAPPY,
    **{
        name: getattr(attn_bias, name)(BLOCKS.q_seqinfo, PADDED["BlockDiagonalPaddedKeysMask"].k_seqinfo, **options)
        for name, options in LOCAL_PADDED.items()
    },
}


def lines() -> Iterator[tuple[str, str, str]]:
    """The name of a mask, the function and the options, as docs/migrating.md has them."""
    page = (Path(__file__).resolve().parents[1] / "docs/migrating.md").read_text()
    section = page[page.index("\n## From xFormers") : page.index("\n## From diffusers")]
    for names, function, options in re.findall(r"^\| ([\w, ]+) \| (`.*?) \| (?:`(.*)` )?\|$", section, re.MULTILINE):
        for name in names.split(", "):
            yield name, function, options


def of_heads(batch: int, *lengths: int) -> list[Tensor]:
    """(B, L, H, D) each."""
    return [torch.randn(batch, length, HEADS, HEAD_DIM, dtype=torch.float64) for length in lengths]


def with_matrix(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """xFormers' definition of memory_efficient_attention, which needs a GPU itself."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / HEAD_DIM**0.5
    if mask is not None:
        scores = scores + (mask if isinstance(mask, Tensor) else mask.materialize(scores.shape, torch.float64))
    weights = scores.softmax(-1).nan_to_num()  # NaN: a query without keys, which gives 0 here
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def starts_among_gaps(mask: Any) -> tuple[Tensor, Tensor]:
    starts, lengths = mask.k_seqinfo.seqstart[:-1], mask.k_seqinfo.seqlen
    return mask.q_seqinfo.seqstart.repeat_interleave(2)[1:-1], torch.stack((starts, starts + lengths), dim=1).flatten()


@pytest.mark.parametrize(("name", "function", "options"), list(lines()))
def test_line(name: str, function: str, options: str) -> None:
    mask, given = MASKS[name], eval(f"dict({options})", dict(OPTIONS))
    if function == "`attention`":
        query, key, value = of_heads(2, 5, 9, 9)
        out = attention(*(x.transpose(1, 2) for x in (query, key, value)), **given).transpose(1, 2)
    else:
        gaps = function.endswith("gaps")
        num_keys = mask.k_seqinfo.seqstart_py[-1]
        query, key, value = of_heads(1, sum(QUERIES), num_keys, num_keys)
        starts = starts_among_gaps(mask) if gaps else (mask.q_seqinfo.seqstart, mask.k_seqinfo.seqstart)
        out = attention_varlen(query[0], key[0], value[0], *starts, **given)[None]
    assert_close(out, with_matrix(query, key, value, mask))


@pytest.mark.parametrize("name", PAGED)
def test_pages(name: str) -> None:
    """As the page says: what the mask without pages gives on copied pages."""
    query, key, value = of_heads(1, sum(QUERIES), TABLE.numel() * PAGE, TABLE.numel() * PAGE)
    options = {name: options for name, _, options in lines()}[name.removeprefix("Paged")]
    copied = [x[0].unflatten(0, (-1, PAGE))[TABLE].flatten(0, 2) for x in (key, value)]
    out = attention_varlen(query[0], *copied, *starts_among_gaps(MASKS[name.removeprefix("Paged")]), **eval(f"dict({options})"))
    assert_close(out[None], with_matrix(query, key, value, PAGED[name]))


def test_no_mask_is_missing() -> None:
    public = {name for name, kind in vars(attn_bias).items() if isinstance(kind, type) and issubclass(kind, attn_bias.AttentionBias)}
    assert {name for name, _, _ in lines()} | set(PAGED) == public - {"AttentionBias"} | {"None", "a tensor"}
