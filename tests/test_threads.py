"""Several Python threads, forks and DataLoader workers: the same results, no deadlock, no more threads than asked for.

Each test is a process of its own, because threads that another test started would change what a fork meets. One server, which has imported
torch but started no threads, forks them; a deadlock ends at a time limit.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention import attention, attention_decode
from fused_attention.kernels.native import cpu
from fused_attention.transformer.linear import linear

pytestmark = [
    pytest.mark.skipif(cpu.status() is not None, reason=f"no CPU kernels: {cpu.status()}"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

LIMIT_S = 120


def run_in_process(function: Callable[..., None], *arguments: Any) -> None:
    """Fails if the function does in a new process, in which torch has two threads, or does not end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_on_two_threads, args=(function, *arguments))
    process.start()
    process.join(LIMIT_S)
    hangs = process.is_alive()
    if hangs:
        process.kill()
    assert not hangs, f"not done after {LIMIT_S} s"
    assert process.exitcode == 0, "failed: its traceback is in the captured stderr"


def _on_two_threads(function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(2)
    function(*arguments)


def attend(seed: int) -> tuple[Tensor, ...]:
    """A forward and backward pass, a decoding step, a linear layer, and a product of torch's, all of them enough for two threads."""
    query, dout = torch.randn(2, 2, 4, 256, 32, generator=torch.Generator().manual_seed(seed))
    query.requires_grad_()
    out = attention(query, query, query, is_causal=True, backend="cpu")
    keys = query.detach()
    decoded = attention_decode(keys[:, :, :1], keys, keys, torch.tensor([256, 100]), backend="cpu")
    with torch.no_grad():
        projected = linear(keys.view(-1, 256)[:4], keys.view(-1, 256))
    return out.detach(), *torch.autograd.grad(out, query, dout), decoded, projected, keys @ keys.mT


def assert_same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for tensor, expected_tensor in zip(ours, expected, strict=True):
        assert torch.equal(tensor, expected_tensor)


def in_threads(functions: Sequence[Callable[[], None]]) -> None:
    """Runs each in a Python thread and raises what one of them raised."""
    failures = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


def num_threads_of_process() -> int:
    return len(os.listdir("/proc/self/task"))


def test_the_thread_pool_is_torchs() -> None:
    run_in_process(_check_the_thread_pool)


def _check_the_thread_pool() -> None:
    """One libgomp in the process, and no more threads than torch was told to use."""
    keys = torch.randn(2, 4, 256, 32)
    keys @ keys.mT
    before = num_threads_of_process()
    attend(0)
    assert num_threads_of_process() == before
    with open("/proc/self/maps") as file:
        assert len({line.split()[-1] for line in file if "libgomp" in line}) == 1


def test_several_python_threads() -> None:
    run_in_process(_check_several_python_threads)


def _check_several_python_threads() -> None:
    """Each has torch's number of threads, keeps them from call to call, and gives them back when it ends."""
    expected = [attend(seed) for seed in range(4)]
    before, most, all_ran = num_threads_of_process(), [], threading.Barrier(4, timeout=LIMIT_S)

    def work(seed: int) -> None:
        for _ in range(3):
            assert_same(attend(seed), expected[seed])
        all_ran.wait()
        most.append(num_threads_of_process())
        all_ran.wait()

    in_threads([lambda seed=seed: work(seed) for seed in range(4)])
    assert before < max(most) <= before + 4 * 2
    deadline = time.monotonic() + LIMIT_S / 2
    while num_threads_of_process() > before and time.monotonic() < deadline:  # they end a little later
        time.sleep(0.01)
    assert num_threads_of_process() == before


def test_another_number_of_threads_before_every_call() -> None:
    run_in_process(_check_changing_numbers_of_threads)


def _check_changing_numbers_of_threads() -> None:
    expected = [attend(seed) for seed in range(3)]

    def work(seed: int) -> None:
        for num_threads in (1, 3, 2, 5, 1, 2):
            torch.set_num_threads(num_threads)
            assert_same(attend(seed), expected[seed])

    in_threads([lambda seed=seed: work(seed) for seed in range(3)])


@pytest.mark.parametrize("where", ["main thread", "thread", "thread while another one attends"])
def test_after_a_fork(where: str) -> None:
    run_in_process(_check_fork, where)


def _check_fork(where: str) -> None:
    """Parent and child both go on with two threads, whatever ran before."""
    expected, done = attend(0), threading.Event()

    def fork() -> None:
        try:
            child = os.fork()
            if child == 0:
                before = num_threads_of_process()
                right = all(map(torch.equal, attend(0), expected))
                os._exit(0 if right and num_threads_of_process() == before + 1 else 1)
            assert_same(attend(0), expected)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            done.set()

    def attend_until_done() -> None:
        while not done.is_set():
            attend(0)

    if where == "main thread":
        fork()
    else:
        in_threads([fork, attend_until_done] if "another" in where else [fork])


class Items(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, item: int) -> tuple[Tensor, ...]:
        return attend(item)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_in_a_dataloader_worker(num_threads: int) -> None:
    """torch sets one thread in its workers; a program may set more."""
    run_in_process(_check_dataloader, num_threads)


def _check_dataloader(num_threads: int) -> None:
    expected = [attend(seed) for seed in range(3)]
    loader = torch.utils.data.DataLoader(
        Items(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=LIMIT_S / 2,
        worker_init_fn=lambda _: torch.set_num_threads(num_threads),
    )  # fmt: skip
    for ours, theirs in zip(loader, expected, strict=True):
        assert_same(ours, theirs)
