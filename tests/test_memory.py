"""The score matrix is never held: peak memory grows with the length, not with its square."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fused_attention.kernels.native import cpu

pytestmark = [
    pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process"),
]

SEQLEN = 8192
# Not ru_maxrss, which a process starts with that of its parent.
PEAK = """
def peak():  # bytes
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
"""
SCRIPT = """
import sys, torch
from fused_attention.kernels.attention import attention

def step(seqlen):
    leaves = [torch.randn(1, 1, seqlen, 32, dtype=getattr(torch, sys.argv[1])).requires_grad_() for _ in range(3)]
    dout = torch.randn(1, 1, seqlen, 32).to(leaves[0].dtype)
    before = peak()
    out = attention(*leaves, is_causal=sys.argv[2] == "causal", backend="cpu")
    forward = peak()
    out.backward(dout)
    return forward - before, peak() - forward

step(256)  # code, thread pool and allocator are warm
print(*step(int(sys.argv[3])))
"""


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_peak_memory(dtype: str, mask: str) -> None:
    run = subprocess.run([sys.executable, "-c", PEAK + SCRIPT, dtype, mask, str(SEQLEN)], capture_output=True, text=True, check=True)
    forward, backward = map(int, run.stdout.split())
    allowed = SEQLEN * SEQLEN / 4  # a sixteenth of the scores in float32
    assert forward < allowed, f"the forward took {forward} bytes"
    assert backward < allowed, f"the backward took {backward} bytes"


AVERAGED = """
import sys, torch
from fused_attention import MultiHeadAttention

def step(seqlen):
    x = torch.randn(1, seqlen, 256, requires_grad=True)
    before = peak()
    out, weights = module(x, x, x, average_attn_weights=True)
    out.sum().backward()
    return peak() - before

module = MultiHeadAttention(256, int(sys.argv[2]), dropout=float(sys.argv[3]), batch_first=True)
step(64)
print(step(int(sys.argv[1])))
"""


def test_averaged_weights_take_the_memory_of_one_head() -> None:
    """Also in training, if the loss does not depend on them."""
    seqlen, num_heads, dropout = 2048, 16, 0.1
    arguments = map(str, (seqlen, num_heads, dropout))
    run = subprocess.run([sys.executable, "-c", PEAK + AVERAGED, *arguments], capture_output=True, text=True, check=True)
    taken, one_head = int(run.stdout), 4 * seqlen * seqlen
    assert one_head < taken < 4 * one_head, f"{taken} bytes, {taken / one_head:.1f} times the weights that are returned"
