"""attention() on a GPU against every fused attention of torch: SDPA's flash, memory-efficient and cuDNN backends, and FlexAttention.

    python -m fused_attention.benchmarks.gpu_attention results.jsonl

measures cell after cell, the most important first, and appends a line of JSON for each, so a run that was stopped goes on where it was;
then it prints the table, cells that were not run among them. Every cell is checked before it is timed. A provider that cannot run a
cell is recorded with its reason. --minutes limits the time, --peers-only leaves ours out.

The grid: bfloat16, 16,384 tokens and 2,048 channels in all (batch = tokens / length, heads = channels / head_dim).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from fused_attention.kernels.attention import attention

TOKENS, CHANNELS = 16384, 2048
LENGTHS = (2048, 4096, 16384, 8192, 1024, 512, 256, 128)  # the order in which they are measured
LENGTHS_OF_MASKS = (2048, 4096, 1024, 512)  # a dense mask of 16,384 x 16,384 for every head would not fit
HEAD_DIMS = (64, 128, 256)
SHORT_LENGTHS = (64, 128, 32, 256)
FEATURES = ("full", "causal", "bias gradient", "short, padded", "bias", "bool mask", "key padding", "dropout", "deterministic")
PADDED = ("key padding", "short, padded")  # keys of every length from half of the longest to all
PASSES = ("forward", "backward")
DROPOUT_P = 0.1
ERROR_LIMIT = 0.05  # of the largest element, between bfloat16 kernels; the tests judge the accuracy
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
OURS = ("cuda", "triton")  # backends of attention()
PROVIDERS = (*OURS, *SDPA, "flex")


class Bar(NamedTuple):
    """How many times faster than some peers a backend is meant to be, at head dims 64 and 128."""

    ratio: float
    peers: tuple[str, ...]  # the best of those that ran counts
    shortest: int  # length from which it holds


ANY, FLASH, EFFICIENT = (*SDPA, "flex"), ("flash",), ("efficient",)
BARS: dict[tuple[str, str], dict[str, Bar]] = {
    ("triton", "forward"): {
        "full": Bar(0.75, ANY, 2048), "causal": Bar(0.75, ANY, 2048), "bias": Bar(1.0, ANY, 2048), "bool mask": Bar(1.0, ANY, 2048),
    },
    ("triton", "backward"): {"full": Bar(0.5, ANY, 2048), "causal": Bar(0.5, ANY, 2048), "bias gradient": Bar(1.2, ANY, 2048)},
    ("cuda", "forward"): {
        "full": Bar(1.0, FLASH, 1024), "causal": Bar(1.0, FLASH, 1024),
        "bias": Bar(1.5, EFFICIENT, 512), "bool mask": Bar(1.5, EFFICIENT, 512), "short, padded": Bar(1.3, ANY, 32),
    },
    ("cuda", "backward"): {
        "full": Bar(1.0, FLASH, 1024), "causal": Bar(1.0, FLASH, 1024), "bias gradient": Bar(1.5, EFFICIENT, 512),
        "short, padded": Bar(1.3, ANY, 32),
    },
}  # fmt: skip
# Of our own time in the cell without the feature, for every length.
OWN_BARS = {"dropout": (0.7, "triton", PASSES), "deterministic": (0.82, "cuda", ("backward",))}


class Cell(NamedTuple):
    feature: str
    length: int
    head_dim: int

    @property
    def heads(self) -> int:
        return CHANNELS // self.head_dim

    def flops(self, measured_pass: str) -> float:
        """Two products in the forward, five in the backward; causal needs half of them. Masks and padding count as full."""
        forward = 4.0 * TOKENS * self.length * CHANNELS * (0.5 if self.feature == "causal" else 1.0)
        return forward * (2.5 if measured_pass == "backward" else 1.0)


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


class Call(NamedTuple):
    """One provider's forward on tensors that are its own leaves."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


def make_calls(cell: Cell, device: str, tokens: int = TOKENS) -> dict[str, Call | str]:
    """Each provider's call on the same numbers, or the reason why it has none."""
    torch.manual_seed(0)
    batch, length, heads = tokens // cell.length, cell.length, cell.heads
    shape = (batch, length, heads, cell.head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    bias = mask = lengths = None
    if cell.feature in ("bias", "bias gradient"):
        bias = torch.randn(1, heads, length, length, device=device, dtype=torch.bfloat16)
    if cell.feature == "bool mask":
        mask = torch.rand(1, 1, length, length, device=device) < 0.5
        mask[..., 0] = True  # every query attends to something: torch gives NaN otherwise
    if cell.feature in PADDED:
        lengths = torch.linspace(length // 2, length, batch, device=device).int()
        mask = (torch.arange(length, device=device) < lengths[:, None])[:, None, None, :]

    def leaves() -> tuple[Tensor, ...]:
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
        if bias is not None:
            inputs.append(bias.detach().clone().requires_grad_(cell.feature == "bias gradient"))
        return tuple(inputs)

    dropout_p = DROPOUT_P if cell.feature == "dropout" else 0.0
    is_causal = cell.feature == "causal"

    def ours(backend: str) -> Call:
        own = leaves()
        options: dict[str, Any] = {"is_causal": is_causal, "dropout_p": dropout_p, "deterministic": cell.feature == "deterministic"}
        if bias is not None:
            options["attn_mask"] = own[3]
        elif lengths is not None and mask is not None:
            options["key_mask"] = mask[:, 0, 0]
        elif mask is not None:
            options["attn_mask"] = mask

        def run() -> Tensor:
            out = attention(*own[:3], **options, backend=backend)
            assert isinstance(out, Tensor)
            return out

        return Call(run, own)

    def sdpa(backend: SDPBackend) -> Call:
        own = leaves()

        def run() -> Tensor:
            attn_mask = own[3] if bias is not None else mask
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(own[0], own[1], own[2], attn_mask=attn_mask, is_causal=is_causal, dropout_p=dropout_p)

        return Call(run, own)

    def flex() -> Call:
        if cell.feature in ("dropout", "deterministic"):
            raise NotImplementedError(f"{cell.feature}: not compared")
        own = leaves()
        score_mod = block_mask = None
        if bias is not None:
            own_bias = own[3]

            def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + own_bias[0, h, i, j]

        if is_causal:
            block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
        elif lengths is not None:
            block_mask = create_block_mask(lambda b, h, i, j: j < lengths[b], batch, None, length, length, device=device)
        elif mask is not None:
            block_mask = create_block_mask(lambda b, h, i, j: mask[0, 0, i, j], None, None, length, length, device=device)
        torch.compiler.reset()  # after 8 kinds of calls torch runs it uncompiled, and compiles for changing sizes before
        compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        return Call(lambda: compiled(own[0], own[1], own[2], score_mod=score_mod, block_mask=block_mask), own)

    makers: dict[str, Callable[[], Call]] = {backend: partial(ours, backend) for backend in OURS}
    makers |= {name: partial(sdpa, backend) for name, backend in SDPA.items()}
    makers["flex"] = flex
    calls: dict[str, Call | str] = {}
    for name, make in makers.items():
        try:
            calls[name] = make()
        except Exception as error:
            calls[name] = _reason(error)
    return calls


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}" if str(error).strip() else type(error).__name__


def _backward(out: Tensor, leaves: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], dout, retain_graph=True)


def measure(cell: Cell, providers: tuple[str, ...], device: str, seconds: float, tokens: int = TOKENS) -> dict[str, Any]:
    """{provider: {"forward": median ms, "backward": median ms} or its reason}; they take turns, each after an L2 flush."""
    calls = {name: call for name, call in make_calls(cell, device, tokens).items() if name in providers}
    results: dict[str, Any] = {name: call for name, call in calls.items() if isinstance(call, str)}
    expected: tuple[Tensor, ...] | None = None
    runnable: dict[str, dict[str, Callable[[], Any]]] = {}
    dout = torch.randn(tokens // cell.length, cell.length, cell.heads, cell.head_dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
    for name, call in calls.items():
        if isinstance(call, str):
            continue
        try:
            out = call.run()
            actual = (out, *_backward(out, call.leaves, dout))
            if expected is None:
                expected = actual
            elif cell.feature != "dropout":  # every provider draws its own mask
                for ours, theirs in zip(actual, expected, strict=True):
                    error = (ours - theirs).abs().max() / theirs.abs().max()
                    if not error <= ERROR_LIMIT:
                        raise AssertionError(f"differs from {next(iter(runnable))} by {error:.3f} of the largest element")
            with torch.no_grad():
                call.run()
            runnable[name] = {"forward": torch.no_grad()(call.run), "backward": partial(_backward, out, call.leaves, dout)}
        except Exception as error:
            results[name] = _reason(error)
    for name in runnable:
        results[name] = {}
    try:
        for measured_pass in PASSES:
            functions = {name: functions[measured_pass] for name, functions in runnable.items()}
            for name, milliseconds in _interleaved(functions, device, seconds).items():
                results[name][measured_pass] = round(milliseconds, 5)
    except Exception as error:  # out of memory, say: the cell is recorded, not tried again for ever
        results |= dict.fromkeys(runnable, f"while timing: {_reason(error)}")
    return results


def _interleaved(functions: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, float]:
    """Median milliseconds of each function; at least 5 rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    flush = torch.empty(2**28 if device == "cuda" else 1, dtype=torch.int8, device=device)  # more than any L2 cache
    start = time.perf_counter()
    rounds = 0
    while rounds < 5 or (time.perf_counter() - start < seconds and rounds < 200):
        for name, function in functions.items():
            flush.zero_()
            times[name].append(_milliseconds(function, device))
        rounds += 1
    return {name: statistics.median(samples[1:]) for name, samples in times.items()}


def _milliseconds(function: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    function()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def table(results: dict[Cell, dict[str, Any]], wanted: list[Cell]) -> str:
    """A Markdown table for each pass: milliseconds of every provider, ours in TFLOP/s and as a ratio to the best peer."""
    lines = []
    for measured_pass in PASSES:
        lines += [f"## {measured_pass}, milliseconds", ""]
        lines.append(
            "| feature | length | head_dim | " + " | ".join(PROVIDERS) + " | cuda TFLOP/s | best peer / cuda | best peer / triton |"
        )
        lines.append("|---" * (6 + len(PROVIDERS)) + "|")
        for cell in wanted:
            lines.append("| " + " | ".join(_row(cell, measured_pass, results)) + " |")
        lines.append("")
    return "\n".join(lines)


def _row(cell: Cell, measured_pass: str, results: dict[Cell, dict[str, Any]]) -> list[str]:
    row = [cell.feature, str(cell.length), str(cell.head_dim)]
    if cell not in results:
        return [*row, *["not run"] * len(PROVIDERS), "", "", ""]
    times = _times(results[cell], measured_pass)
    row += [f"{times[name]:.4f}" if name in times else "-" for name in PROVIDERS]
    row.append(f"{cell.flops(measured_pass) / times['cuda'] / 1e9:.0f}" if "cuda" in times else "")
    return row + [_ratios(cell, measured_pass, results, times, backend) for backend in OURS]


def _ratios(cell: Cell, measured_pass: str, results: dict[Cell, dict[str, Any]], times: dict[str, float], backend: str) -> str:
    """Of the best peer's time, and of what a bar speaks of, to the backend's; with the bar."""
    if backend not in times:
        return ""
    peers = [milliseconds for name, milliseconds in times.items() if name not in OURS]
    words = [f"{min(peers) / times[backend]:.2f}" if peers else "no peer"]
    bar = BARS[backend, measured_pass].get(cell.feature)
    if bar is not None and cell.head_dim in (64, 128) and cell.length >= bar.shortest:
        judged = {name: times[name] for name in bar.peers if name in times}
        if judged:
            best = min(judged, key=judged.__getitem__)
            words.append(f"{judged[best] / times[backend]:.2f} of {best}{_against(judged[best] / times[backend], bar.ratio)}")
    ratio, judged_backend, passes = OWN_BARS.get(cell.feature, (0.0, "", ()))
    own_full = _times(results.get(cell._replace(feature="full"), {}), measured_pass).get(backend)
    if backend == judged_backend and measured_pass in passes and own_full:
        words.append(f"{own_full / times[backend]:.2f} of its own full{_against(own_full / times[backend], ratio)}")
    return "; ".join(words)


def _times(result: dict[str, Any], measured_pass: str) -> dict[str, float]:
    return {name: result[name][measured_pass] for name in PROVIDERS if isinstance(result.get(name), dict)}


def _against(ratio: float, bar: float) -> str:
    return f" ({'>=' if ratio >= bar else 'below'} {bar:g})"


def load(path: Path) -> dict[Cell, dict[str, Any]]:
    """What a file holds; of a cell measured twice the last. A line that was cut off is left out, its cell is measured again."""
    results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # also empty lines
        if "cell" in record:
            results[Cell(*record["cell"])] = record["results"]
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a .jsonl file; cells that it holds are not run again")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no further cell after this time")
    parser.add_argument("--seconds", type=float, default=0.25, help="of timing for each cell and pass")
    parser.add_argument("--peers-only", action="store_true", help="only torch's kernels: the baseline")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_attention: torch sees no GPU", file=sys.stderr)
        return 1
    wanted = cells()
    if options.peers_only:
        wanted = [cell for cell in wanted if cell.feature in ("full", "causal")]
    providers = PROVIDERS[len(OURS) :] if options.peers_only else PROVIDERS
    done = load(options.results)
    end = time.monotonic() + 60 * options.minutes
    with options.results.open("a") as file:
        print(file=file)  # the last line may have been cut off
        if not done:
            machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
            print(json.dumps({"machine": machine}), file=file, flush=True)
        for cell in wanted:
            if set(providers) <= done.get(cell, {}).keys() or time.monotonic() > end:
                continue
            done[cell] = measure(cell, providers, "cuda", options.seconds)
            print(json.dumps({"cell": cell, "results": done[cell]}), file=file, flush=True)
            torch.cuda.empty_cache()
    print(table(done, wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
