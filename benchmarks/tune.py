"""Measures the tile sizes of the Triton kernels on the GPU of this machine, for kernels/triton/tile_table.json.

    python -m fused_attention.benchmarks.tune tiles.jsonl [--only REGEX] [--minutes N]       measures, on a GPU
    python -m fused_attention.benchmarks.tune tiles.jsonl --apply                            takes the fastest tiles over, anywhere

One row after the other, the most used first, while the other cores compile what comes next; each time is kept as it is taken, and a run
that was stopped goes on where it was. A row that was not reached keeps its tiles. Where there is no GPU of a family its rows hold the first
candidates that pass the codegen gate (tests/triton_codegen_gate.py --choose). Run the gate after tuning as well.

Exit status 3: the GPU was lost to an illegal access; called again, it goes on after the tile that did that.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from ..kernels import replay
from ..kernels.checks import make_problem
from ..kernels.ops import forward
from ..kernels.prepared_mask import prepare_mask
from ..kernels.problem import Gradients, Problem
from ..kernels.triton import backend as triton_backend
from ..kernels.triton import launch as triton_launch
from ..kernels.triton.launch import TABLE_FILE, Tile, _caches, current_family, tile_table
from .gpu_timing import GPU_LOST, is_lost, reason, timed, timing_stream
from .journal import Journal, Key

Table = dict[tuple[str, str, str, int, str], Tile]
SECONDS = 0.05  # of timing, for a tile
AHEAD = 64  # tiles whose compilation is under way or waits for a core
COMPILE_SECONDS = 120.0  # for which one is waited

KERNELS = ("forward", "dkdv", "dq", "dbias", "decode", "weights")
FAMILIES = ("sm80", "sm86", "sm90", "sm100", "other")
DTYPES = {"16-bit": torch.bfloat16, "fp32": torch.float32}
HEAD_DIMS = (64, 128, 32, 256, 16)  # the most used first
FEATURE_CLASSES = ("plain", "masked", "bias", "dropout")
# What runs together. dbias is the gradient of a mask that batches share; dq writes that of one which nothing shares.
PASSES = {"forward": ("forward",), "backward": ("dkdv", "dq"), "dbias": ("dbias",), "decode": ("decode",), "weights": ("weights",)}


class Row(NamedTuple):
    """A key of the tile table."""

    kernel_name: str
    family: str
    dtype: str
    head_dim: int
    feature_class: str


def rows(family: str) -> Iterator[Row]:
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for feature_class in FEATURE_CLASSES:
                for kernel_name in KERNELS:
                    if has_class(kernel_name, feature_class):
                        yield Row(kernel_name, family, dtype, head_dim, feature_class)


def has_class(kernel_name: str, feature_class: str) -> bool:
    """Decoding has no dropout, and only a float mask has a gradient."""
    return {"decode": feature_class != "dropout", "dbias": feature_class in ("bias", "dropout")}.get(kernel_name, True)


# Candidates, the one that should be fastest first: large tiles load less, few warps share less, stages hide latency if registers allow.
WIDE = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2)]
TALL = [(128, 64, 4, 3), (128, 64, 4, 2)]
SQUARE = [(64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 1), (64, 64, 8, 1)]
LOW = [(64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 4, 1), (64, 32, 8, 1), (64, 16, 4, 1), (64, 16, 8, 1)]
SMALL = [
    (32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 4, 2),
    (16, 16, 16, 1), (32, 16, 8, 2), (16, 16, 8, 2), (16, 32, 16, 2),
]  # fmt: skip
# Of the backward kernels, with two tiles of scores at a time.
BACKWARD = [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 64, 4, 1), (64, 64, 8, 1), *LOW[1:], *SMALL]
SPLIT_KEYS = [(16, 128, 4, 3), (16, 128, 4, 2), (16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 1), *SMALL[4:]]


def candidates(row: Row) -> list[Tile]:
    """Tiles worth trying, best guess first."""
    tall_first = row.family in ("sm80", "sm86", "other")
    if row.kernel_name == "forward":
        tiles = [*TALL, *WIDE] if tall_first and row.head_dim <= 64 else [*WIDE[2:], *TALL] if tall_first else [*WIDE, *TALL]
        tiles = [*tiles, *SQUARE, *LOW, *SMALL]
    elif row.kernel_name == "decode":
        tiles = SPLIT_KEYS
    else:
        tiles = BACKWARD
    if row.kernel_name == "dkdv":  # its programs keep a block of keys and visit rows
        tiles = [(block_n, block_m, num_warps, num_stages) for block_m, block_n, num_warps, num_stages in tiles]
    return [tile for tile in map(Tile._make, tiles) if is_plausible(tile, row)]


def is_plausible(tile: Tile, row: Row) -> bool:
    """Leaves out what cannot fit: a compilation takes seconds."""
    kept, visited = (tile.BLOCK_N, tile.BLOCK_M) if row.kernel_name == "dkdv" else (tile.BLOCK_M, tile.BLOCK_N)
    if row.feature_class != "plain" and max(kept, visited) > 64:
        return False  # tile lists are of 64 x 64 tiles
    if row.dtype == "fp32":  # without tensor cores a thread holds whole lines of both factors
        lines = math.sqrt(kept * visited / (32 * tile.num_warps))
        return max(kept, visited) <= 64 and (lines * row.head_dim <= (182 if row.head_dim <= 64 else 256) or kept * visited == 256)
    accumulators = {"forward": 1, "dkdv": 2, "dq": 1, "decode": 1}.get(row.kernel_name, 0)
    score_tiles = 1 if row.kernel_name in ("forward", "decode") else 2
    registers = kept * (accumulators * row.head_dim + score_tiles * visited) / (32 * tile.num_warps)  # of sums and scores alone
    products_from_shared_memory = row.family in ("sm90", "sm100")
    return registers <= (145 if products_from_shared_memory else 100)


class Size(NamedTuple):
    """Of a representative problem."""

    batch: int = 2
    num_heads: int = 4
    num_heads_kv: int = 2
    seqlen: int = 256


COMPILED = Size(4, 16, 16, 256)  # compiles to the same kernels as what is measured, which has more rows


def representative(row: Row, size: Size, device: str, form: str = "separate") -> Problem:
    """A problem with everything that the row's class may hold.

    Args:
        form: "prepared" puts all that masks into a PreparedMask; "varlen" packs the sequences, for which there are no masks.
    """
    batch, num_heads, num_heads_kv, seqlen = size
    dtype = DTYPES[row.dtype]
    if row.kernel_name == "decode":
        return _decode_problem(row, size, device)
    query = torch.randn(batch, num_heads, seqlen, row.head_dim, device=device, dtype=dtype)
    key, value = torch.randn(2, batch, num_heads_kv, seqlen, row.head_dim, device=device, dtype=dtype)
    lengths = torch.full((batch,), seqlen, device=device, dtype=torch.int32)
    options: dict[str, Any] = {"is_causal": "bottom_right", "window": (seqlen, None), "key_lengths": lengths, "query_lengths": lengths}
    if row.feature_class != "plain":
        options["key_mask"] = torch.ones(batch, seqlen, device=device, dtype=torch.bool)
    if row.feature_class == "masked":
        options["attn_mask"] = torch.ones(1, num_heads, seqlen, seqlen, device=device, dtype=torch.bool)
    if row.feature_class in ("bias", "dropout"):
        batches = 1 if row.kernel_name == "dbias" else batch
        options["attn_mask"] = torch.zeros(batches, num_heads, seqlen, seqlen, device=device, dtype=dtype)
        options |= _score_options(num_heads, device)
    if row.feature_class == "dropout":
        options["dropout_p"] = 0.1
    if form == "prepared":
        names = ("attn_mask", "key_mask", "key_lengths", "query_lengths", "is_causal", "window")
        masks = {name: options.pop(name) for name in names if name in options}
        options["attn_mask"] = prepare_mask(**masks, seqlen_q=seqlen, seqlen_k=seqlen)
    if form == "varlen":
        del options["key_lengths"], options["query_lengths"]
        ends = torch.arange(batch + 1, device=device, dtype=torch.int32) * seqlen
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen}
        query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
        return make_problem("varlen", (query, key, value), **options)
    return make_problem("separate", (query, key, value), **options)


def _decode_problem(row: Row, size: Size, device: str) -> Problem:
    batch, num_heads_kv, seqlen = size.batch, size.num_heads_kv, size.seqlen
    dtype = DTYPES[row.dtype]
    if row.feature_class == "plain":
        seqlen *= 4  # is split among programs, then combined
    query = torch.randn(batch, 16 * num_heads_kv, 1, row.head_dim, device=device, dtype=dtype)
    key, value = torch.randn(2, batch, num_heads_kv, seqlen, row.head_dim, device=device, dtype=dtype)
    lengths = torch.full((batch,), seqlen, device=device, dtype=torch.int32)
    options: dict[str, Any] = {"is_causal": "bottom_right", "window": (seqlen, None), "key_lengths": lengths}
    if row.feature_class != "plain":
        options["key_mask"] = torch.ones(batch, seqlen, device=device, dtype=torch.bool)
    if row.feature_class == "bias":
        options |= _score_options(query.shape[1], device)
    return make_problem("separate", (query, key, value), **options)


def _score_options(num_heads: int, device: str) -> dict[str, Any]:
    return {"softcap": 30.0, "alibi_slopes": torch.rand(num_heads, device=device), "sinks": torch.rand(num_heads, device=device)}


def runner(row: Row, problem: Problem) -> Callable[[], object]:
    """Calls the backend so that the row's kernel runs."""
    if row.kernel_name in ("forward", "decode"):
        return lambda: forward(triton_backend, problem)
    query, mask = problem.query, problem.attn_mask
    lse = query.new_zeros(query.shape[:3], dtype=torch.float32)
    if row.kernel_name == "weights":
        return lambda: triton_backend.attention_weights(problem, lse, True)
    out = query.new_zeros(*query.shape[:3], problem.value.shape[3])
    mask_gradient = None if mask is None or mask.dtype == torch.bool else torch.empty_like(mask)
    if row.kernel_name == "dbias":
        assert mask_gradient is not None
        from ..kernels.triton.bias_gradient import summed_mask_gradient

        return lambda: summed_mask_gradient(problem, lse, out, lse, mask_gradient)
    slopes, sinks = (None if side is None else torch.empty_like(side) for side in (problem.alibi_slopes, problem.sinks))
    dquery, dkey, dvalue = map(torch.empty_like, (query, problem.key, problem.value))
    gradients = Gradients(dquery, dkey, dvalue, mask_gradient, slopes, sinks)
    return lambda: triton_backend.backward(problem, out, lse, out, None, gradients)


def key_of(row: Row, tile: Tile) -> Key:
    return (*row, *tile)


def measure(row: Row, tile: Tile, run: Callable[[], object]) -> float | str:
    """Milliseconds of the GPU with a tile, or why it is none to choose."""
    tile_table()[row] = tile
    replay.forget()
    try:
        run()
    except (OutOfResources, PTXASError) as error:
        return reason(error)
    compiled = [kernel for cache in _caches.values() for key, kernel in cache.compiled.items() if tile in key]
    if spills := max((kernel.n_spills for kernel in compiled), default=0):
        return f"spills {spills} registers"
    return round(timed({"run": run}, "cuda", SECONDS)["run"].kernel_ms, 5)


class CompilingAhead:
    """Compiles tiles on the other cores, in the order in which they are to be measured, without running them."""

    def __init__(self, wanted: Iterable[tuple[Row, Tile]]) -> None:
        self.pool = concurrent.futures.ProcessPoolExecutor(max(1, min(16, os.cpu_count() or 1) - 1), multiprocessing.get_context("spawn"))
        self.wanted = iter(wanted)
        self.results: dict[Key, concurrent.futures.Future[str | None]] = {}
        self.submit(AHEAD)

    def submit(self, count: int) -> None:
        for row, tile in itertools.islice(self.wanted, count):
            self.results[key_of(row, tile)] = self.pool.submit(_compile, row, tile)

    def why_not(self, row: Row, tile: Tile) -> str | None:
        """Waits until it is compiled."""
        self.submit(1)
        try:
            return self.results.pop(key_of(row, tile)).result(timeout=COMPILE_SECONDS)
        except (concurrent.futures.TimeoutError, concurrent.futures.BrokenExecutor):
            return None  # this process tries

    def end(self) -> None:
        for process in list(self.pool._processes.values()):
            process.terminate()
        self.pool.shutdown(wait=False, cancel_futures=True)


def _compile(row: Row, tile: Tile) -> str | None:
    """In a process of the pool: into Triton's cache on disk. Why it cannot be."""
    triton_launch._launch_through_triton = _compile_only
    tile_table()[row] = tile
    replay.forget()
    try:
        runner(row, representative(row, COMPILED, "cuda"))()
    except PTXASError as error:
        return reason(error)
    except Exception:
        return None  # whatever it is, it is seen where the kernel is run
    return None


def _compile_only(kernel: Any, num_programs: int, tensors: tuple, numbers: tuple, constants: tuple, tile: Tile) -> Any:
    """In place of triton_launch._launch_through_triton."""
    block_m, block_n, num_warps, num_stages = tile
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    kernel.warmup(*tensors, *numbers, *constants, block_m, block_n, grid=(num_programs,), **options)


def choose(results: Mapping[Key, Any], table: Table) -> list[str]:
    """Puts the fastest tile of each row that was measured, the present one among them, into the table; returns what changed."""
    measured: dict[Row, dict[Tile, float]] = {}
    for key, milliseconds in results.items():
        if isinstance(milliseconds, float):
            measured.setdefault(Row._make(key[:5]), {})[Tile._make(key[5:])] = milliseconds
    changes = []
    for row, times in measured.items():
        best, before = min(times, key=times.__getitem__), table[row]
        if before in times and best != before:
            table[row] = best
            changes.append(f"{' '.join(map(str, row))}: {tuple(best)} {times[best]:.4f} ms, was {tuple(before)} {times[before]:.4f} ms")
    return changes


def write_table(table: Table) -> None:
    """One line for each (kernel, family, dtype, head_dim)."""
    lines = []
    for kernel_name in KERNELS:
        for family in FAMILIES:
            for dtype in DTYPES:
                for head_dim in sorted(HEAD_DIMS):
                    classes = [name for name in FEATURE_CLASSES if has_class(kernel_name, name)]
                    tiles = {name: list(table[kernel_name, family, dtype, head_dim, name]) for name in classes}
                    name = json.dumps(f"{kernel_name} {family} {dtype} {head_dim}") + ":"
                    lines.append(f" {name:<29}{json.dumps(tiles)}")
    TABLE_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a .jsonl file; tiles that it holds are not measured again")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows to measure, such as 'forward .* 16-bit 64'")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no further tile after this time")
    parser.add_argument("--apply", action="store_true", help="measure nothing; write the fastest tiles of the file to the table")
    options = parser.parse_args()
    journal = Journal(options.results)
    if options.apply:
        table = dict(tile_table())
        print("\n".join([*(changes := choose(journal.results, table)), f"{len(changes)} tiles changed in {TABLE_FILE.name}"]))
        write_table(table)
        return 0
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU: there is nothing to measure. tests/triton_codegen_gate.py --choose picks tiles without one")
    end = time.monotonic() + 60 * options.minutes
    present = dict(tile_table())
    wanted = {row: list(dict.fromkeys([present[row], *candidates(row)])) for row in rows(current_family())}
    wanted = {row: tiles for row, tiles in wanted.items() if re.search(options.only, " ".join(map(str, row)))}
    left = [(row, tile) for row, tiles in wanted.items() for tile in tiles if key_of(row, tile) not in journal.results]
    ahead = CompilingAhead(left)
    try:
        with timing_stream("cuda"):
            measure_rows(left, journal, ahead, end)
    finally:
        ahead.end()
    for row, tiles in wanted.items():
        name = " ".join(map(str, row))
        times = {tile: journal.results.get(key_of(row, tile)) for tile in tiles}
        if None in times.values():
            print(f"not measured for lack of time: {name}")
        else:
            print(f"{name}: {', '.join(f'{tuple(tile)} {found}' for tile, found in times.items())}")
    return 0


def measure_rows(left: list[tuple[Row, Tile]], journal: Journal, ahead: CompilingAhead, end: float) -> None:
    present = dict(tile_table())
    for row, tiles in itertools.groupby(left, key=lambda pair: pair[0]):
        tile_table().update(present)
        choose(journal.results, tile_table())  # for what runs beside this row's kernel
        run: Callable[[], object] | None = None
        for _, tile in tiles:
            if time.monotonic() > end:
                return
            key = key_of(row, tile)
            result: float | str | None = ahead.why_not(row, tile)
            if result is None:
                with journal.attempt(key):
                    try:
                        run = run or runner(row, representative(row, Size(4, 16, 16, 4096 if row.dtype == "16-bit" else 1024), "cuda"))
                        result = measure(row, tile, run)
                    except Exception as error:  # out of memory, an illegal access
                        result = reason(error)
            journal.keep(key, result)
            if isinstance(result, str) and is_lost():
                os._exit(GPU_LOST)  # whatever would free memory on the GPU fails, loudly


if __name__ == "__main__":
    sys.exit(main())
