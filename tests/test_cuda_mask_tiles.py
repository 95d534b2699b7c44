"""The CUDA pre-pass alone: bits and lists of full and mixed tiles against plain PyTorch's."""

from __future__ import annotations

import ctypes
import struct
from typing import Any, NamedTuple

import cuda_emulation
import pytest
import torch
from cuda_emulation import EmulatedGpu
from torch import Tensor
from torch.nn import functional as F

from fused_attention.kernels.checks import make_problem
from fused_attention.kernels.native import cuda as cuda_backend
from fused_attention.kernels.ops import forward
from fused_attention.kernels.prepared_mask import pack_bits, prepare_mask, tile_lists
from fused_attention.kernels.problem import Problem, unpack_bits
from fused_attention.kernels.reference import allowed_pairs, present

pytestmark = [
    pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not())),
    pytest.mark.usefixtures("no_single_tile_kernels"),  # test_cuda_single_tile.py is theirs
]

BATCH, HEADS = 2, 3
KEYS_PER_TILE = 64
HEAD_DIM = 64  # whose kernels have blocks of 128 rows with masks, of 64 with a float mask
NOT_DECODED = {"dropout_p": 0.5, "rng_state": torch.zeros(2, dtype=torch.int64)}  # which needs no lists
SEQLENS = [(64, 64), (65, 130), (1, 31), (130, 33), (200, 300), (257, 176)]  # at, above and below tiles of 64 and 128 and words of 32


def chance(*shape: int, of: float) -> Tensor:
    return torch.rand(shape) < of


def key_lengths_mask(seqlen_k: int) -> Tensor:
    return torch.arange(seqlen_k) < torch.tensor([[seqlen_k - 3], [seqlen_k // 2]])


BOOL_MASKS = {
    "of its own for every head": lambda m, n: {"attn_mask": chance(BATCH, HEADS, m, n, of=0.6)},
    "shared, mostly full": lambda m, n: {"attn_mask": chance(m, n, of=0.9998)},
    "of its own for every head alone": lambda m, n: {"attn_mask": chance(1, HEADS, m, n, of=0.999)},
    "by key": lambda m, n: {"attn_mask": chance(BATCH, 1, 1, n, of=0.97)},
    "by key, some queries": lambda m, n: {"attn_mask": chance(BATCH, 1, 1, n, of=0.97), "query_lengths": torch.tensor([m // 2, 0])},
    "by row": lambda m, n: {"attn_mask": chance(1, HEADS, m, 1, of=0.5)},
    "one value": lambda m, n: {"attn_mask": torch.tensor([True, False])[:, None, None, None]},
    "transposed": lambda m, n: {"attn_mask": chance(n, m, of=0.999).T},
    "every other byte": lambda m, n: {"attn_mask": chance(m, 2 * n, of=0.999)[:, ::2]},
    "aligned, then one byte later": lambda m, n: {"attn_mask": F.pad(chance(m, n, of=0.999), (1, 16))[:, 1 : n + 1]},
    "rows of 16 bytes": lambda m, n: {"attn_mask": F.pad(chance(m, n, of=0.999), (0, -n % 16))[:, :n]},
    "and all else": lambda m, n: {
        "attn_mask": chance(BATCH, 1, m, n, of=0.999), "key_mask": chance(BATCH, n, of=0.99), "is_causal": "bottom_right",
        "key_lengths": torch.tensor([n, 20]), "query_lengths": torch.tensor([5, m]), "window": (100, None),
    },
}  # fmt: skip
KEY_MASKS = {
    "holes": lambda m, n: {"key_mask": chance(BATCH, n, of=0.97)},
    "right, some queries": lambda m, n: {"key_mask": key_lengths_mask(n), "query_lengths": torch.tensor([5, 2 * m])},
    "right, causal": lambda m, n: {"key_mask": key_lengths_mask(n), "is_causal": True},
    "one for all": lambda m, n: {"key_mask": chance(1, n, of=0.97).expand(BATCH, -1), "is_causal": "bottom_right"},
    "window": lambda m, n: {"key_mask": chance(BATCH, n, of=0.995), "window": (70, 3)},
    "beside a float mask": lambda m, n: {"key_mask": key_lengths_mask(n), "attn_mask": torch.randn(m, n)},
    "every other byte, lengths": lambda m, n: {
        "key_mask": chance(BATCH, 2 * n, of=0.995)[:, ::2], "is_causal": True,
        "key_lengths": torch.tensor([-4, n + 5]), "query_lengths": torch.tensor([m // 2, m]),
    },
}  # fmt: skip


def problem_of(options: dict[str, Any], seqlen_q: int, seqlen_k: int) -> Problem:
    query, key = (torch.zeros(BATCH, HEADS, seqlen, HEAD_DIM, dtype=torch.bfloat16) for seqlen in (seqlen_q, seqlen_k))
    return make_problem("separate", (query, key, key), **options)


class Tiles(NamedTuple):
    """What the pre-pass made, of B' batch elements, H' heads and Lq' rows, 1 where they are all the same."""

    block_m: int
    mask_bits: Tensor | None  # (B', H', Lq', words)
    lists: Tensor  # (B', H', ceil(Lq' / block_m), 2 + tiles)


# The last members of MaskArguments in csrc/cuda/mask_arguments.h: block_m, six sizes, mask_bits, kinds, lists.
MEMBERS = "i4x6q3Q"


def last_members(arguments: bytes) -> tuple[int, ...]:
    return struct.unpack(MEMBERS, arguments[-struct.calcsize(MEMBERS) :])


def run_pre_pass(problem: Problem, kernels: list[str], schedule: int = 0) -> Tiles:
    with EmulatedGpu(schedule, kernels="mask_tiles") as gpu:
        forward(cuda_backend, problem)
    assert gpu.launched == kernels
    arguments = dict(gpu.planned)[kernels[-1]]
    block_m, batch, heads, rows, row_blocks, key_tiles, words, bits, _, lists = last_members(arguments)

    def words_at(address: int, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.frombuffer(bytearray(ctypes.string_at(address, 4 * size)), dtype=torch.int32).view(shape)

    mask_bits = words_at(bits, batch, heads, rows, words) if bits else None
    return Tiles(block_m, mask_bits, words_at(lists, batch, heads, row_blocks, 2 + key_tiles))


def expected_lists(problem: Problem, block_m: int) -> Tensor:
    """(B, H or 1, row blocks, 2 + tiles); rows that are absent have no say."""
    allowed = allowed_pairs(problem)
    absent = ~present(problem)[0][:, None, :, None]
    more_keys, more_rows = -allowed.shape[3] % KEYS_PER_TILE, -allowed.shape[2] % block_m

    def in_tiles(pairs: Tensor) -> Tensor:  # (B, H, row blocks, block_m, tiles, 64)
        return pairs.unflatten(3, (-1, KEYS_PER_TILE)).unflatten(2, (-1, block_m))

    some = in_tiles(F.pad(allowed, (0, more_keys, 0, more_rows))).any(5).any(3)
    every = F.pad(F.pad(allowed | absent, (0, more_keys)), (0, 0, 0, more_rows), value=True)
    full = some & in_tiles(every).all(5).all(3)
    return tile_lists(full, some & ~full)


def tiles_of(lists: Tensor) -> list[tuple[list[int], list[int]]]:
    """The full and the mixed tiles of each line; what stands between them is undefined."""
    lines = lists.flatten(0, 2).tolist()
    return [(tiles[:num_full], tiles[len(tiles) - num_mixed :]) for num_full, num_mixed, *tiles in lines]


def assert_lists(tiles: Tiles, problem: Problem) -> None:
    expected = expected_lists(problem, tiles.block_m)
    batch, heads, row_blocks, _ = expected.shape
    ours = tiles.lists.expand(batch, max(heads, tiles.lists.shape[1]), row_blocks, -1).clone()
    expected = expected.expand(-1, ours.shape[1], -1, -1).clone()
    # Blocks of rows that are all absent visit nothing, whatever a list that all blocks share says.
    visited = present(problem)[0][:, :: tiles.block_m][:batch]  # (B, row blocks)
    for lists in (ours, expected):
        lists[..., :2] *= visited[:, None, :, None]
    assert tiles_of(ours) == tiles_of(expected)


@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
@pytest.mark.parametrize("mask", BOOL_MASKS)
def test_bool_masks(mask: str, seqlens: tuple[int, int]) -> None:
    problem = problem_of(BOOL_MASKS[mask](*seqlens), *seqlens)
    tiles = run_pre_pass(problem, ["mask_tiles_classify", "mask_tiles_list"])
    assert tiles.block_m == 128
    assert tiles.mask_bits is not None
    ours, expected = unpack_bits(tiles.mask_bits, seqlens[1]), allowed_pairs(problem)
    assert torch.equal(pack_bits(ours), tiles.mask_bits)  # 0 past the last key
    if tiles.mask_bits.shape[2] < seqlens[0]:  # rows share them, the absent ones too
        absent = ~present(problem)[0][:, None, :, None]
        ours, expected = ours | absent, expected | absent
    assert torch.equal(*torch.broadcast_tensors(ours, expected))
    assert_lists(tiles, problem)


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
@pytest.mark.parametrize("mask", KEY_MASKS)
def test_key_masks_make_lists_alone(mask: str, seqlens: tuple[int, int], block_m: int) -> None:
    float_mask = {"attn_mask": torch.zeros(seqlens)} if block_m == 64 else {}
    options = KEY_MASKS[mask](*seqlens) | float_mask | NOT_DECODED
    tiles = run_pre_pass(problem := problem_of(options, *seqlens), ["mask_tiles_keys"])
    assert tiles.block_m == (64 if "attn_mask" in options else 128)
    assert tiles.mask_bits is None
    assert tiles.lists.shape[1] == 1
    if problem.window_left is None and problem.window_right is None:
        assert tiles.lists.shape[2] == 1
    if problem.attn_mask is not None:
        problem.attn_mask = None  # a float mask makes no tile empty or mixed
    assert_lists(tiles, problem)


MASKS_ALONE = {name: mask for name, mask in KEY_MASKS.items() if name != "beside a float mask"}
PREPARED = {**BOOL_MASKS, **MASKS_ALONE, "causal": lambda m, n: {"is_causal": True}}


@pytest.mark.parametrize("seqlens", [(64, 64), (200, 300), (257, 176)], ids=str)
@pytest.mark.parametrize("mask", PREPARED)
def test_lists_of_64_rows_become_lists_of_128(mask: str, seqlens: tuple[int, int]) -> None:
    options = PREPARED[mask](*seqlens)
    prepared = prepare_mask(**options, seqlen_q=seqlens[0], seqlen_k=seqlens[1], gradients=False)
    problem = problem_of({"attn_mask": prepared}, *seqlens)
    tiles = run_pre_pass(problem, ["mask_tiles_merge"])
    assert tiles.lists.shape[:2] == (prepared.shape[0], prepared.shape[1])
    # Of a PreparedMask, absent rows are rows that may attend to nothing.
    assert_lists(tiles, problem_of({"attn_mask": prepared.unpack()}, *seqlens))


def test_lists_of_64_rows_are_used_as_they_are() -> None:
    problem = problem_of({"attn_mask": prepare_mask(torch.zeros(200, 130), is_causal=True, seqlen_q=200, seqlen_k=130)}, 200, 130)
    with EmulatedGpu(kernels="mask_tiles") as gpu:
        forward(cuda_backend, problem)
    assert gpu.launched == []


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_schedules(schedule: int) -> None:
    seqlens = (130, 200)
    for masks, kernels in ((BOOL_MASKS, ["mask_tiles_classify", "mask_tiles_list"]), (KEY_MASKS, ["mask_tiles_keys"])):
        for mask in list(masks.values())[schedule::3]:
            run_pre_pass(problem_of(mask(*seqlens) | NOT_DECODED, *seqlens), kernels, schedule)
