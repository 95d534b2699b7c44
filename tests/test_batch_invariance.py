"""The CPU kernels: what a sequence gets does not depend on the rest of the batch, on padding, on memory order or on the number of threads,
bit for bit, forward and backward, on every instruction set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attention_calls import DTYPES, MEMORY, guarded
from torch import Tensor

from fused_attention import attention, attention_decode, attention_varlen, prepare_mask, quantize_kv
from fused_attention.kernels.native import cpu

pytestmark = pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}")

BATCH, HEADS, KEY_HEADS, ROWS, KEYS, HEAD_DIM, HEAD_DIM_V = 5, 4, 2, 70, 600, 24, 40
SEQUENCE_DIMS = {"query", "key", "value", "dout", "dlse", "attn_mask", "key_mask", "key_lengths", "query_lengths", "alibi_slopes"}
LEAVES = ("query", "key", "value", "attn_mask", "alibi_slopes")  # whose gradients each belong to one sequence

# Names of tensors that `tensors_of` makes, and plain options.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, gradient of lse": {"is_causal": "bottom_right", "dlse": True},
    "window": {"window": (100, 30), "diagonal": 200},
    "key_mask": {"key_mask": True},
    "lengths": {"key_lengths": True, "query_lengths": True, "is_causal": "bottom_right"},
    "mask with a gradient": {"attn_mask": (BATCH, HEADS, ROWS, KEYS)},
    "mask of keys with a gradient": {"attn_mask": (BATCH, 1, 1, KEYS)},
    "mask of rows with a gradient": {"attn_mask": (BATCH, HEADS, ROWS, 1), "is_causal": True, "diagonal": 300},
    "bool mask and soft cap": {"bool_mask": True, "softcap": 2.0},
    "slopes and sinks": {"alibi_slopes": True, "sinks": True},
    "prepared mask": {"bool_mask": True, "prepare": True},
}  # fmt: skip


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tensors_of(options: dict[str, Any], dtype: torch.dtype, rows: int = ROWS, keys: int = KEYS) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a call and its plain options."""
    tensors = {
        "query": torch.randn(BATCH, HEADS, rows, HEAD_DIM).to(dtype),
        "key": torch.randn(BATCH, KEY_HEADS, keys, HEAD_DIM).to(dtype),
        "value": torch.randn(BATCH, KEY_HEADS, keys, HEAD_DIM_V).to(dtype),
        "dout": torch.randn(BATCH, HEADS, rows, HEAD_DIM_V).to(dtype),
    }
    made = {
        "dlse": lambda: torch.randn(BATCH, HEADS, rows),
        "attn_mask": lambda: torch.randn(options["attn_mask"]),
        "bool_mask": lambda: torch.rand(BATCH, 1, rows, keys) > 0.3,
        "key_mask": lambda: torch.rand(BATCH, keys) > 0.3,
        "key_lengths": lambda: torch.tensor([keys, 1, keys // 2, 130, 513])[:BATCH].clamp(max=keys),
        "query_lengths": lambda: torch.tensor([rows, 40, 1, 65, 3])[:BATCH].clamp(max=rows),
        "alibi_slopes": lambda: torch.rand(BATCH, HEADS) * 0.1,
        "sinks": lambda: torch.randn(HEADS),
    }
    plain = {}
    for name, value in options.items():
        if name in made:
            tensors["attn_mask" if name == "bool_mask" else name] = made[name]()
        else:
            plain[name] = value
    return tensors, plain


def sequences(tensors: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
    return {name: tensor[first : first + count] if name in SEQUENCE_DIMS else tensor for name, tensor in tensors.items()}


def results(tensors: dict[str, Tensor], prepare: bool = False, **options: Any) -> dict[str, Tensor]:
    """out, lse and every gradient that belongs to one sequence, each with a batch dim."""
    tensors = dict(tensors)
    dout, dlse = tensors.pop("dout"), tensors.pop("dlse", None)
    if prepare:
        tensors["attn_mask"] = prepare_mask(tensors["attn_mask"], seqlen_q=dout.shape[2], seqlen_k=tensors["key"].shape[2])
    leaves = {
        name: tensors[name].detach().requires_grad_()
        for name in LEAVES
        if isinstance(tensors.get(name), Tensor) and tensors[name].is_floating_point()
    }
    tensors |= leaves
    query, key, value = (tensors.pop(name) for name in ("query", "key", "value"))
    out, lse = attention(query, key, value, **tensors, **options, return_lse=True, backend="cpu")
    outputs, gradients = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return {"out": out.detach(), "lse": lse.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    different = [name for name in expected if not torch.equal(ours[name], expected[name])]
    assert not different, f"{what}: {', '.join(different)}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_batch_sizes_and_thread_counts(case: str, dtype: torch.dtype, instruction_set: str) -> None:
    tensors, options = tensors_of(OPTIONS[case], dtype)
    with threads(1):
        expected = results(tensors, **options)
    for num_threads in (1, 2, 3):
        for first, count in ((0, 5), (3, 2), *[(n, 1) for n in range(BATCH)]):
            with threads(num_threads):
                ours = results(sequences(tensors, first, count), **options)
            these = {name: tensor[first : first + count] for name, tensor in expected.items()}
            assert_same(ours, these, f"sequences {first} to {first + count - 1} on {num_threads} threads")


SHARED: dict[str, dict[str, Any]] = {
    "a mask that all share": {"attn_mask": (1, 1, ROWS, KEYS)},
    "a mask of rows that all share": {"attn_mask": (1, 1, ROWS, 1)},
    "a mask for each head": {"attn_mask": (1, HEADS, ROWS, KEYS)},
    "dropout": {"dropout_p": 0.25, "rng_state": torch.tensor([3, 4]), "sinks": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHARED)
def test_thread_counts_where_sequences_share_a_gradient(case: str, dtype: torch.dtype, instruction_set: str) -> None:
    """Gradients that are sums over the batch, and dropout, which counts through the batch, depend on the batch but not on threads."""
    tensors, options = tensors_of(SHARED[case], dtype)
    with threads(1):
        expected = results(tensors, **options)
    for num_threads in (2, 3, 8):
        with threads(num_threads):
            assert_same(results(tensors, **options), expected, f"{num_threads} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "causal, gradient of lse", "window", "slopes and sinks"])
def test_padded_and_packed_sequences(case: str, dtype: torch.dtype, instruction_set: str) -> None:
    """Alone, padded to the longest, and packed without padding; one or two queries next to many are a decoding step next to a prompt."""
    rows, keys = [70, 1, 2, 33, 0], [300, 900, 40, 513, 70]
    tensors, options = tensors_of(OPTIONS[case], dtype, max(rows), max(keys))
    if "diagonal" in options:
        options["diagonal"] = 20
    by_query = {"query", "dout", "dlse"}
    alone = []
    for n in range(BATCH):
        lengths = {"query": rows[n], "dout": rows[n], "dlse": rows[n], "key": keys[n], "value": keys[n]}
        cut = {name: tensor[:, :, : lengths[name]] if name in lengths else tensor for name, tensor in sequences(tensors, n, 1).items()}
        alone.append(results(cut, **options))
    padded_tensors = tensors | {"query_lengths": torch.tensor(rows), "key_lengths": torch.tensor(keys)}
    for num_threads in (1, 3):
        with threads(num_threads):
            padded = results(padded_tensors, **options)
        for n, expected in enumerate(alone):
            ours = {name: tensor[n : n + 1] for name, tensor in padded.items()}
            for name, length in [
                ("out", rows[n]),
                ("lse", rows[n]),
                ("gradient of query", rows[n]),
                ("gradient of key", keys[n]),
                ("gradient of value", keys[n]),
            ]:
                ours[name] = ours[name][:, :, :length]
            assert_same(ours, expected, f"padded sequence {n} on {num_threads} threads")

    starts_q, starts_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (rows, keys))
    packed = {
        name: torch.cat([tensor[n, :, : (rows if name in by_query else keys)[n]].transpose(0, 1) for n in range(BATCH)])
        for name, tensor in tensors.items()
        if name in by_query | {"key", "value"}
    }
    leaves = {name: packed[name].requires_grad_() for name in ("query", "key", "value")}
    other = {name: tensor for name, tensor in tensors.items() if name in ("alibi_slopes", "sinks")}
    for num_threads, longest in ((1, 1000), (3, 900)):
        with threads(num_threads):
            out, lse = attention_varlen(
                *leaves.values(), starts_q, starts_k, longest, longest, **other, **options, return_lse=True, backend="cpu"
            )
            outputs, douts = ((out, lse.T), (packed["dout"], packed["dlse"])) if "dlse" in packed else ((out,), (packed["dout"],))
            gradients = torch.autograd.grad(outputs, list(leaves.values()), douts)
        by_token = {"out": out, "lse": lse.T} | dict(
            zip(("gradient of query", "gradient of key", "gradient of value"), gradients, strict=True)
        )
        for n, expected in enumerate(alone):
            ours = {}
            for name, tensor in by_token.items():
                starts = starts_k if name in ("gradient of key", "gradient of value") else starts_q
                ours[name] = tensor[starts[n] : starts[n + 1]].transpose(0, 1)[None]
            assert_same(ours, {name: expected[name] for name in ours}, f"packed sequence {n} on {num_threads} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("memory", [memory for memory in MEMORY if memory != "one batch element expanded"])
def test_memory_orders(memory: str, rows: int, dtype: torch.dtype, instruction_set: str) -> None:
    tensors, _ = tensors_of({"attn_mask": (BATCH, HEADS, rows, KEYS)}, dtype, rows)
    expected = results(tensors, is_causal="bottom_right")
    moved = {name: tensor if name == "attn_mask" else guarded(tensor, memory)[0] for name, tensor in tensors.items()}
    assert_same(results(moved, is_causal="bottom_right"), expected, memory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0, "alibi_slopes": True, "key_mask": True}, {"bool_mask": True, "prepare": True}], ids=str
)
def test_backward_of_few_rows(options: dict[str, Any], rows: int, dtype: torch.dtype, instruction_set: str) -> None:
    """Heads that are adjacent in memory share a task, if the batch leaves enough tasks for the threads."""
    tensors, plain = tensors_of(options, dtype, rows)
    adjacent = tensors | {name: tensors[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key", "value", "dout")}
    with threads(8):
        expected = results(tensors, **plain)
    for num_threads in (1, 3, 8):
        with threads(num_threads):
            assert_same(results(adjacent, **plain), expected, f"{num_threads} threads")
            alone = results(sequences(adjacent, 2, 1), **plain)
        assert_same(alone, {name: tensor[2:3] for name, tensor in expected.items()}, f"alone on {num_threads} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"window": (200, None)}, {"softcap": 2.0, "alibi_slopes": True, "key_mask": True}], ids=str)
def test_decoding(options: dict[str, Any], rows: int, dtype: torch.dtype, instruction_set: str) -> None:
    """With caches of any capacity, too."""
    tensors, plain = tensors_of(options, dtype, rows, 1200)
    tensors.pop("dout")
    tensors["key_lengths"] = torch.tensor([1200, 5, 513, 700, 64])

    def decode(first: int, count: int, capacity: int) -> Tensor:
        these = sequences(tensors, first, count)
        key, value = (these.pop(name)[:, :, :capacity] for name in ("key", "value"))
        if "key_mask" in these:
            these["key_mask"] = these["key_mask"][:, :capacity]
        return attention_decode(these.pop("query"), key, value, **these, **plain, backend="cpu")

    with threads(1):
        expected = decode(0, BATCH, 1200)
    for num_threads in (1, 2, 3):
        with threads(num_threads):
            for first, count in ((0, 5), (1, 2), *[(n, 1) for n in range(BATCH)]):
                capacity = int(tensors["key_lengths"][first : first + count].max())
                assert torch.equal(decode(first, count, capacity), expected[first : first + count]), (num_threads, first, count)


LONG: dict[str, dict[str, Any]] = {
    "plain": {},
    "window and sinks": {"window": (2500, 0), "sinks": torch.tensor([0.5, -torch.inf])},
    "key_mask": {"key_mask": torch.arange(4500) % 3 > 0},
    "int8": {"quantized": True},
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("case", LONG)
def test_fewer_heads_than_threads(case: str, rows: int, instruction_set: str) -> None:
    """Long caches of one key head, whose parts are then tasks: the same bits on any number of threads and beside a longer sequence."""
    options = dict(LONG[case])
    lengths = torch.tensor([4500, 2049, 1])
    query, key, value = torch.randn(3, 2, rows, HEAD_DIM), torch.randn(3, 1, 4500, HEAD_DIM), torch.randn(3, 1, 4500, HEAD_DIM_V)
    caches, scales = (key, value), {}
    if options.pop("quantized", False):
        (key_cache, key_scale), (value_cache, value_scale) = (quantize_kv(tensor, block_size=4) for tensor in (key, value))
        caches, scales = (key_cache, value_cache), {"key_scale": key_scale, "value_scale": value_scale}
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"].expand(3, -1)

    def decode(first: int, count: int, num_threads: int) -> tuple[Tensor, Tensor]:
        these = slice(first, first + count)
        masks = {name: tensor[these] if name != "sinks" and isinstance(tensor, Tensor) else tensor for name, tensor in options.items()}
        with threads(num_threads):
            out = attention_decode(
                query[these],
                *(cache[these] for cache in caches),
                lengths[these],
                **masks,
                **{name: scale[these] for name, scale in scales.items()},
                return_lse=True,
                backend="cpu",
            )
        assert isinstance(out, tuple)
        return out

    out, lse = decode(0, 3, 1)
    if not scales:
        exact = attention_decode(query.double(), key.double(), value.double(), lengths, **options, return_lse=True, backend="reference")
        torch.testing.assert_close(out, exact[0].float())
        torch.testing.assert_close(lse, exact[1].float())
    for num_threads in (2, 4, 7):
        for first, count in ((0, 3), (0, 1), (1, 1), (2, 1)):
            found = decode(first, count, num_threads)
            assert torch.equal(found[0], out[first : first + count]), (num_threads, first)
            assert torch.equal(found[1], lse[first : first + count]), (num_threads, first)
