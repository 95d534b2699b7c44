"""Microseconds of host time that one eager attention() costs; on the GPU paths with drivers that launch nothing.

    python benchmarks/host_cost.py [cuda] [triton] [cpu]        from a checkout; needs no GPU
    python benchmarks/host_cost.py gpu                          the CUDA and the Triton kernels on a GPU, with its own driver

Small CPU tensors stand in for GPU ones. CUDA: the compiled extension plans and launches through a stand-in libcuda.so.1
(tests/standin_driver.py). Triton: the kernels are compiled for sm_90 but not run (tests/triton_offline.py). The real driver adds its
launch, a GPU allocator its own time. CPU: with the kernel, which takes half a microsecond for one head and one token. Beside them torch's
attention on the same CPU tensors, kernel included, and where transformers is installed its attention functions, ours and that of sdpa.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for csrc
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from torch.nn.functional import scaled_dot_product_attention

from fused_attention import attention, attention_decode
from fused_attention.integrations.transformers import fused_attention_forward
from fused_attention.kernels.native import cuda as cuda_backend
from fused_attention.kernels.triton import backend as triton_backend

CALLS, ROUNDS = 100, 2000


def microseconds(function: Callable[[], object]) -> tuple[float, float]:
    """Processor time, to which a busy machine adds little, per call: the least and the median of several rounds."""
    for _ in range(5 * CALLS):
        function()
    rounds = []  # short ones, some of which nothing disturbs
    for _ in range(ROUNDS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a launch waits for nothing while fewer than a thousand are under way
        start = time.thread_time()
        for _ in range(CALLS):
            function()
        rounds.append(1e6 * (time.thread_time() - start) / CALLS)
    return min(rounds), statistics.median(rounds)


def cases(backend: str, device: str) -> dict[str, Callable[[], object]]:
    batch, num_heads, seqlen, dtype = (1, 1, 1, torch.float32) if backend == "cpu" else (2, 4, 128, torch.bfloat16)
    query, key, value = (torch.randn(batch, num_heads, seqlen, 32, dtype=dtype, device=device) for _ in range(3))
    newest = torch.randn(batch, num_heads, 1, 32, dtype=dtype, device=device)
    leaf = query.clone().requires_grad_()
    key_mask = torch.ones(batch, seqlen, dtype=torch.bool, device=device)
    lengths = torch.full((batch,), seqlen, dtype=torch.int32, device=device)
    calls: dict[str, Callable[[], object]] = {
        "attention, causal": lambda: attention(query, key, value, is_causal=True, backend=backend),
        "attention, causal, with grad": lambda: attention(leaf, key, value, is_causal=True, backend=backend),
        "attention, key_mask": lambda: attention(query, key, value, key_mask=key_mask, backend=backend),
        "attention_decode": lambda: attention_decode(newest, key, value, lengths, backend=backend),
        "torch, causal, with its kernel": lambda: scaled_dot_product_attention(newest, newest, newest, is_causal=True),
    }
    if backend == "cpu":
        mask = torch.zeros(seqlen, seqlen)
        calls["attention, float mask, all checks"] = lambda: attention(query, key, value, attn_mask=mask, backend=backend)
        calls["torch, causal, with grad, with its kernel"] = lambda: scaled_dot_product_attention(leaf, key, value, is_causal=True)
        if importlib.util.find_spec("transformers"):
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            layer = torch.nn.Identity()
            calls["transformers, fused_attention"] = lambda: fused_attention_forward(layer, query, key, value, None)
            calls["transformers, sdpa, with torch's kernel"] = lambda: sdpa_attention_forward(layer, query, key, value, None)
    return calls


def stand_in_for_cuda() -> AbstractContextManager:
    import standin_driver

    standin_driver.load(standin_driver.build(Path(tempfile.mkdtemp())))
    if reason := cuda_backend.status():
        sys.exit(f"cuda: {reason}")
    cuda_backend._machine_reason = lambda device: None
    cuda_backend._device_and_stream = lambda tensor: (max(tensor.get_device(), 0), 0)
    return nullcontext()


def stand_in_for_triton() -> AbstractContextManager:
    import triton_offline

    triton_backend._machine_reason = lambda device: None
    triton_offline._Launcher.__call__ = lambda self, *arguments: None
    return triton_offline.offline(arch=90)


STAND_INS = {"cuda": stand_in_for_cuda, "triton": stand_in_for_triton, "cpu": nullcontext}


def main() -> None:
    on_gpu = sys.argv[1:] == ["gpu"]
    backends = ["cuda", "triton"] if on_gpu else sys.argv[1:] or list(STAND_INS)
    if on_gpu and not torch.cuda.is_available():
        sys.exit("gpu: torch sees no GPU")
    print(f"torch {torch.__version__}, microseconds per call: least, median of {ROUNDS} rounds")
    for backend in backends:
        with nullcontext() if on_gpu else STAND_INS[backend]():
            for name, function in cases(backend, "cuda" if on_gpu else "cpu").items():
                with torch.set_grad_enabled("grad" in name):
                    least, median = microseconds(function)
                print(f"{backend + ': ' + name:48s}{least:7.1f}{median:7.1f}")


if __name__ == "__main__":
    main()
