"""Shows `replace_attention` on a stock torch.nn.Transformer: the same output before and after, and how much faster."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..replace import replace_attention
from .machine import autocast, bf16_pays

# The model and batch of the measurement.
D_MODEL, NUM_HEADS, NUM_LAYERS, DIM_FEEDFORWARD, DROPOUT = 512, 8, 3, 2048, 0.1
BATCH_SIZE, LENGTH = 8, 128
REPETITIONS = 7


@dataclass(frozen=True)
class SwapResult:
    """Largest output difference relative to the largest output, and median seconds of a training step by precision."""

    num_replaced: int
    relative_difference: float
    seconds: dict[str, tuple[float, float]]  # precision -> (torch, replaced)

    def rows(self) -> dict[str, str]:
        """The result as text, label -> value."""
        rows = {
            "attention modules replaced": f"{self.num_replaced}",
            "largest output difference": f"{self.relative_difference:.1e} of the largest output",
        }
        for precision, (before, after) in self.seconds.items():
            rows[f"{precision} training step"] = (
                f"{before * 1e3:.0f} ms with torch's attention, {after * 1e3:.0f} ms with ours: {before / after:.2f} times as fast"
            )
        return rows


def swap_attention(device: torch.device) -> SwapResult:
    """Build a torch.nn.Transformer, swap the attention of a copy, compare outputs and time training steps in turns."""
    torch.manual_seed(0)
    stock = nn.Transformer(D_MODEL, NUM_HEADS, NUM_LAYERS, NUM_LAYERS, DIM_FEEDFORWARD, DROPOUT, batch_first=True, device=device)
    swapped = copy.deepcopy(stock)
    report = replace_attention(swapped)
    batch = _padded_batch(device)

    with torch.no_grad(), warnings.catch_warnings():
        # In evaluation torch's encoder turns padded input into nested tensors and warns that these are a prototype.
        warnings.simplefilter("ignore", UserWarning)
        stock.eval(), swapped.eval()
        expected, got = (_run(model, batch) for model in (stock, swapped))
    relative_difference = ((got - expected).abs().max() / expected.abs().max()).item()

    stock.train(), swapped.train()
    seconds = {}
    for precision in ("fp32", "bf16") if bf16_pays(device) else ("fp32",):
        times: dict[nn.Module, list[float]] = {stock: [], swapped: []}
        # In turns, so that a change of the machine's speed meets both; the first round warms up.
        for repetition in range(REPETITIONS + 1):
            for model in times:
                elapsed = _training_step(model, batch, precision)
                if repetition:
                    times[model].append(elapsed)
        seconds[precision] = (statistics.median(times[stock]), statistics.median(times[swapped]))
    return SwapResult(len(report.replaced), relative_difference, seconds)


def _padded_batch(device: torch.device) -> dict[str, Tensor]:
    """Arguments of nn.Transformer.forward: a batch with padding of different lengths, causal on the target side."""
    lengths = torch.linspace(LENGTH // 2, LENGTH, BATCH_SIZE, device=device).long()
    blocked = torch.arange(LENGTH, device=device) >= lengths[:, None]  # (B, L), torch's polarity: True = not attended
    return {
        "src": torch.randn(BATCH_SIZE, LENGTH, D_MODEL, device=device),
        "tgt": torch.randn(BATCH_SIZE, LENGTH, D_MODEL, device=device),
        "tgt_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).triu(1),
        "src_key_padding_mask": blocked,
        "memory_key_padding_mask": blocked,
    }


def _run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, tgt_is_causal=True)


def _training_step(model: nn.Module, batch: dict[str, Tensor], precision: str) -> float:
    """Seconds of one forward and backward pass."""
    device = batch["src"].device
    model.zero_grad()
    _wait(device)
    start = time.perf_counter()
    with autocast(device, "bf16" if precision == "bf16" else "off"):
        output = _run(model, batch)
    output.float().square().mean().backward()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
