"""Where and when the CUDA kernels run: torch's current stream and device, graphs, other threads, checkpoints."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_attention import attention, attention_decode

OPTIONS = {"is_causal": True, "backend": "cuda"}


def inputs(device: str = "cuda", seqlen: int = 512) -> list[Tensor]:
    return [torch.randn(2, 8, seqlen, 64, device=device, dtype=torch.bfloat16) for _ in range(3)]


def test_kernels_run_on_the_current_stream() -> None:
    """Two streams at once: each one's inputs are made on it by slow kernels that a launch elsewhere would overtake."""
    plain = [inputs() for _ in range(2)]
    expected = [attention(*tensors, **OPTIONS) for tensors in plain]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream, tensors in zip(streams, plain, strict=True):
        with torch.cuda.stream(stream):
            late = [torch.zeros_like(tensor) for tensor in tensors]
            torch.cuda._sleep(20_000_000)
            for tensor, source in zip(late, tensors, strict=True):
                tensor.copy_(source)
            results.append(attention(*late, **OPTIONS))
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_kernels_run_on_the_tensors_device() -> None:
    plain = inputs()
    expected = attention(*plain, **OPTIONS)
    with torch.cuda.device(0):
        for _ in range(2):  # the second one may be a repetition
            result = attention(*[tensor.to("cuda:1") for tensor in plain], **OPTIONS)
            assert result.device == torch.device("cuda:1")
            assert torch.equal(result.to("cuda:0"), expected)
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_a_graph_is_replayed_with_fresh_dropout(dropout_p: float) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    dout = torch.randn_like(leaves[0])

    def step() -> tuple[Tensor, ...]:
        out = attention(*leaves, **OPTIONS, dropout_p=dropout_p, deterministic=True)
        return (out, *torch.autograd.grad(out, leaves, dout))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append([tensor.clone() for tensor in captured])
    for place in range(4):
        same = [torch.equal(replays[0][place], replay[place]) for replay in replays[1:]]
        assert same == [dropout_p == 0.0] * 2
    if dropout_p == 0.0:
        for tensor, wanted in zip(replays[0], step(), strict=True):
            assert torch.equal(tensor, wanted)


def test_decoding_in_a_graph_follows_the_lengths() -> None:
    query, cache = torch.randn(4, 8, 1, 64, device="cuda", dtype=torch.bfloat16), inputs(seqlen=4096)
    keys, values = (tensor.repeat(2, 1, 1, 1) for tensor in cache[:2])
    lengths = torch.full((4,), 1000, device="cuda", dtype=torch.int32)
    with torch.no_grad():
        attention_decode(query, keys, values, lengths, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attention_decode(query, keys, values, lengths, backend="cuda")
        for length in (1, 77, 4096):
            lengths.fill_(length)
            graph.replay()
            assert torch.equal(captured, attention_decode(query, keys, values, lengths, backend="cuda"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    dout = torch.randn_like(leaves[0])

    def run(*tensors: Tensor) -> Tensor:
        return attention(*tensors, **OPTIONS, dropout_p=0.2, deterministic=True)

    results = []
    for wrapped in (run, lambda *tensors: checkpoint(run, *tensors, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        out = wrapped(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, dout)] if not use_reentrant else _through_backward(out, leaves, dout))
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted)


def _through_backward(out: Tensor, leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    for leaf in leaves:
        leaf.grad = None
    out.backward(dout)
    return [out, *[leaf.grad for leaf in leaves]]


def test_autograd_from_another_thread() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    dout = torch.randn_like(leaves[0])
    out = attention(*leaves, **OPTIONS, deterministic=True)
    expected = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    found: list[tuple[Tensor, ...]] = []
    thread = threading.Thread(target=lambda: found.append(torch.autograd.grad(out, leaves, dout)))
    thread.start()
    thread.join()
    for ours, wanted in zip(found[0], expected, strict=True):
        assert torch.equal(ours, wanted)
