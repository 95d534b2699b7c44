"""attention() on a GPU against every fused attention of torch: SDPA's flash, memory-efficient and cuDNN backends, and FlexAttention;
and those of other libraries, where they are installed.

    python -m fused_attention.benchmarks.gpu_attention results.jsonl

measures cell after cell, the most important first, and keeps each as it ends, so a run that was stopped goes on where it was; then it
prints the table, cells that were not run among them. Every result is held against float64 math before it is timed. A provider that cannot
run a cell is recorded with its reason. --minutes limits the time, --peers-only leaves ours out.

Exit status 4: one of our kernels failed in a cell. 3: the GPU was lost to an illegal access; called again, it goes on after what did that.

The grid: bfloat16, 16,384 tokens and 2,048 channels in all (batch = tokens / length, heads = channels / head_dim).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .cell import commit
from .exact import all_finite, largest_error
from .gpu_calls import FEATURES, NOT_IN_FLEX, OURS, PROVIDERS, TOKENS, Call, Cell, make_calls, make_inputs
from .gpu_table import PASSES, state_line, table
from .gpu_timing import GPU_LOST, ceilings, gpu_state, is_lost, reason, timed, timing_stream
from .journal import Journal

LENGTHS = (2048, 4096, 16384, 8192, 1024, 512, 256, 128)  # the order in which they are measured
LENGTHS_OF_MASKS = (2048, 4096, 1024, 512)  # a dense mask of 16,384 x 16,384 for every head would not fit
HEAD_DIMS = (64, 128, 256)
SHORT_LENGTHS = (64, 128, 32, 256)
ERROR_LIMIT = 0.05  # of the largest element: bfloat16 against float32; the tests judge the accuracy
OURS_FAILED = 4  # exit status


class GpuLost(Exception):
    """To an illegal access, say: nothing more runs in this process. Its arguments are the provider and the reason."""


def cells() -> list[Cell]:
    lengths = dict.fromkeys(FEATURES, LENGTHS) | dict.fromkeys(("bias gradient", "bias", "bool mask"), LENGTHS_OF_MASKS)
    lengths["short, padded"] = SHORT_LENGTHS
    grid = [Cell(feature, length, head_dim) for feature in FEATURES for length in lengths[feature] for head_dim in HEAD_DIMS]
    grid = [cell for cell in grid if cell.feature != "short, padded" or cell.head_dim == 64]
    group = {feature: max(0, place - 1) for place, feature in enumerate(FEATURES)}  # full and causal together
    return sorted(
        grid,
        key=lambda cell: (cell.head_dim == 256, group[cell.feature] > 2, group[cell.feature] > 0, lengths[cell.feature].index(cell.length)),
    )


Attempt = Callable[..., AbstractContextManager[Any]]  # given the names of the providers that are about to run


def measure(
    cell: Cell,
    providers: tuple[str, ...],
    device: str,
    seconds: float,
    tokens: int = TOKENS,
    attempt: Attempt = lambda *names: nullcontext(),
) -> dict[str, Any]:
    """{provider: {"error": ..., "forward": Time, "backward": Time} or its reason}; GpuLost where a provider ended all work on the GPU."""
    inputs = make_inputs(cell, device, tokens)
    calls = make_calls(cell, inputs, providers)
    results: dict[str, Any] = {name: call for name, call in calls.items() if isinstance(call, str)}
    runnable: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, call in calls.items():
        if isinstance(call, str):
            continue
        try:
            with attempt(name):
                out = call.run()
                found = (out, *call.backward(out, inputs.dout))
                if not all_finite(found):
                    raise AssertionError("is not finite everywhere")
                error = 0.0 if cell.feature == "dropout" else largest_error(inputs, found)  # every provider draws its own mask
                if not error <= ERROR_LIMIT:
                    raise AssertionError(f"differs from float64 math by {error:.3f} of the largest element")
                with torch.no_grad():
                    call.run()
            results[name] = {"error": round(error, 5)}
            runnable[name] = {"forward": torch.no_grad()(call.run), "backward": partial(call.backward, out, inputs.dout)}
        except Exception as failure:
            results[name] = reason(failure)
            if device == "cuda" and is_lost():
                raise GpuLost(name, results[name]) from failure
    try:
        with attempt(*runnable):
            for measured_pass in PASSES:
                functions = {name: functions[measured_pass] for name, functions in runnable.items()}
                for name, times in timed(functions, device, seconds).items():
                    results[name][measured_pass] = times
    except Exception as failure:  # out of memory, say: the cell is recorded, not tried again for ever
        if device == "cuda" and is_lost():
            raise GpuLost(", ".join(runnable), f"while timing: {reason(failure)}") from failure
        results |= dict.fromkeys(runnable, f"while timing: {reason(failure)}")
    return results


def compile_ahead(wanted: list[Cell], providers: Iterable[str], until: float) -> None:
    """Runs what is compiled at its first call on every core, so that the disk caches hold it: Triton's kernels, FlexAttention's of every
    size. until: by time.monotonic(), when to stop waiting.
    """
    jobs = {(cell, "flex"): None for cell in wanted if "flex" in providers and cell.feature not in NOT_IN_FLEX}
    for cell in wanted if "triton" in providers else []:  # whose kernels are for any size
        same = next(other for other in wanted if (other.feature, other.head_dim) == (cell.feature, cell.head_dim))
        jobs[same, "triton"] = None
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in each process
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(16, os.cpu_count() or 1), context)
    futures = [pool.submit(_compile, cell, provider) for cell, provider in sorted(jobs, key=lambda job: job[1] == "flex")]
    concurrent.futures.wait(futures, max(0.0, until - time.monotonic()))
    for process in list(pool._processes.values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)


def _compile(cell: Cell, provider: str) -> None:
    inputs = make_inputs(cell, "cuda")
    call = make_calls(cell, inputs, (provider,))[provider]
    if isinstance(call, Call):
        with torch.no_grad():
            call.run()
        call.backward(call.run(), inputs.dout)
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a .jsonl file; what it holds is not measured again")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no further cell after this time")
    parser.add_argument("--seconds", type=float, default=0.25, help="of timing for each cell and pass")
    parser.add_argument("--peers-only", action="store_true", help="only torch's kernels: the baseline")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS, help="only these")
    parser.add_argument(
        "--compiled", action="store_true", help="an earlier call on this machine has compiled what is compiled at first use"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_attention: torch sees no GPU", file=sys.stderr)
        return 1
    wanted = cells()
    if options.peers_only:
        wanted = [cell for cell in wanted if cell.feature in ("full", "causal")]
    providers = tuple(name for name in PROVIDERS if name in options.providers and not (options.peers_only and name in OURS))
    journal = Journal(options.results)
    end = time.monotonic() + 60 * options.minutes
    status = 0
    with timing_stream("cuda"):
        if ("machine",) not in journal.results:
            machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit()}
            journal.keep(("machine",), machine | ceilings())
        left = [cell for cell in wanted if any((*cell, name) not in journal.results for name in providers)]
        if left and not options.compiled:
            compile_ahead(left, providers, time.monotonic() + 0.4 * (end - time.monotonic()))
        for cell in left:
            if time.monotonic() > end:
                break
            missing = tuple(name for name in providers if (*cell, name) not in journal.results)
            try:
                results = measure(
                    cell,
                    missing,
                    "cuda",
                    options.seconds,
                    attempt=lambda *names, cell=cell: journal.attempt(*((*cell, name) for name in names)),
                )
            except GpuLost as lost:
                names, why = lost.args
                results, status = dict.fromkeys(names.split(", "), why), GPU_LOST
            for name, result in results.items():
                journal.keep((*cell, name), result)
            if status != 0:
                break
            journal.keep((*cell, "state"), gpu_state())
            torch.cuda.empty_cache()
    print(json.dumps(journal.results.get(("machine",), {})))
    print(state_line(journal.results))
    print(table(journal.results, wanted))
    sys.stdout.flush()
    if status == GPU_LOST:
        os._exit(status)  # whatever would free memory on the GPU fails, loudly
    failed = any(isinstance(journal.results.get((*cell, name)), str) for cell in wanted for name in OURS)
    return OURS_FAILED if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that an attempt ends, rather than counts as a crash
    sys.exit(main())
