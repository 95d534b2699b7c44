"""launch() runs the code that Triton's own launch would run, with the same arguments; the tile table is complete."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("these tests compile kernels", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton_offline import Launch, offline  # noqa: E402

from fused_attention.benchmarks import tune  # noqa: E402
from fused_attention.kernels.triton import launch as triton_launch  # noqa: E402
from fused_attention.kernels.triton.arguments import input_precision  # noqa: E402
from fused_attention.kernels.triton.launch import Tile, launch, tile_table  # noqa: E402

TILE = Tile(16, 32, 4, 2)


@triton.jit(do_not_specialize=["batch_stride", "length"])
def copy_kernel(
    source,
    target,
    bias,
    bias_stride,
    batch_stride: tl.int64,
    source_row: tl.int64,
    target_row: tl.int64,
    length: tl.int32,
    scale: tl.float32,
    SHIFT: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    numbers = tl.load(source + tl.program_id(0) * batch_stride + rows * source_row + columns, columns < length) * scale + SHIFT
    if bias is not None:
        numbers += tl.load(bias + columns * bias_stride)
    tl.store(target + rows * target_row + columns, numbers)


def call(**changes) -> tuple:
    """Arguments of launch() after the number of programs; by default every pointer and row stride is a multiple of 16."""
    values = {
        "source": torch.zeros(1024),
        "target": torch.zeros(1024),
        "bias": torch.zeros(64),
        "bias_stride": 2,
        "batch_stride": 512,
        "source_row": 32,
        "target_row": 32,
        "length": 32,
        "scale": 0.5,
        "SHIFT": 1,
        "NAME": "a",
        "tile": TILE,
    } | changes
    tile = values.pop("tile")
    arguments = tuple(values.values())
    return arguments[:3], arguments[3:9], arguments[9:], tile


CALLS = {
    "aligned": call(),
    "other numbers": call(batch_stride=7, source_row=64, length=3, scale=2.0),
    "source unaligned": call(source=torch.zeros(1025)[1:]),
    "target unaligned": call(target=torch.zeros(1025)[1:]),
    "bias unaligned": call(bias=torch.zeros(65)[1:]),
    "no bias": call(bias=None),
    "bfloat16 source": call(source=torch.zeros(1024, dtype=torch.bfloat16)),
    "float16 target": call(target=torch.zeros(1024, dtype=torch.float16)),
    "int32 bias": call(bias=torch.zeros(64, dtype=torch.int32)),
    "source rows of any length": call(source_row=33),
    "target rows of any length": call(target_row=33),
    "source rows of length 1": call(source_row=1),
    "source rows of length 0": call(source_row=0),
    "source rows beyond 32 bits": call(source_row=2**40),
    "odd rows beyond 32 bits": call(source_row=2**40 + 1),
    "bias stride 1": call(bias_stride=1),
    "bias stride 16": call(bias_stride=16),
    "bias stride beyond 32 bits": call(bias_stride=2**31 + 2),
    "bias stride a float": call(bias=None, bias_stride=2.0),
    "shift 2": call(SHIFT=2),
    "name b": call(NAME="b"),
    "BLOCK_M 32": call(tile=TILE._replace(BLOCK_M=32)),
    "BLOCK_N 16": call(tile=TILE._replace(BLOCK_N=16)),
    "8 warps": call(tile=TILE._replace(num_warps=8)),
    "3 stages": call(tile=TILE._replace(num_stages=3)),
}


def through_triton(num_programs: int, tensors: tuple, numbers: tuple, constants: tuple, tile: Tile) -> None:
    block_m, block_n, num_warps, num_stages = tile
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    copy_kernel[(num_programs,)](*tensors, *numbers, *constants, block_m, block_n, **options)


def passed_to_the_driver(launched: Launch) -> tuple:
    arguments = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in launched.arguments)
    code = launched.binary.ptx  # not the handle: Triton compiles a row stride of 1 apart, to the same code
    return code, launched.num_programs, launched.stream, launched.packed_metadata, arguments


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    triton_launch._caches.clear()
    with offline(arch=80) as launches:
        yield launches


@pytest.fixture
def fast_launches(monkeypatch: pytest.MonkeyPatch) -> list:
    """The launches that did not go through Triton."""
    recorded = []
    run_compiled = triton_launch._run_compiled
    monkeypatch.setattr(triton_launch, "_run_compiled", lambda *a: (recorded.append(a), run_compiled(*a)))
    return recorded


def test_a_launch_passes_what_triton_passes(launches: list[Launch], fast_launches: list) -> None:
    """Twice through every call, so that each finds the others' compiled kernels."""
    for arguments in [*CALLS.values()] * 2:
        launch(copy_kernel, 3, *arguments)
        through_triton(3, *arguments)
        ours, tritons = launches[-2:]
        assert passed_to_the_driver(ours) == passed_to_the_driver(tritons)
    assert len(fast_launches) >= len(CALLS)
    assert ours.hooks == (None, None, None)


def test_calls_that_triton_compiles_apart_stay_apart(launches: list[Launch]) -> None:
    for arguments in CALLS.values():
        launch(copy_kernel, 1, *arguments)
    code = {name: launched.binary.files["cubin"] for name, launched in zip(CALLS, launches, strict=True)}
    like_aligned = {"other numbers", "source rows of length 0", "source rows beyond 32 bits"}
    like_odd = {"source rows of length 1", "odd rows beyond 32 bits"}
    assert {code[name] for name in like_aligned} == {code["aligned"]}
    assert {code[name] for name in like_odd} == {code["source rows of any length"]}
    assert len(set(code.values())) == len(CALLS) - len(like_aligned | like_odd)


def test_architectures_do_not_share_code(launches: list[Launch]) -> None:
    launch(copy_kernel, 1, *call())
    with offline(arch=90) as on_hopper:
        launch(copy_kernel, 1, *call())
        launch(copy_kernel, 1, *call())
    assert ".target sm_80" in launches[0].binary.ptx
    assert all(".target sm_90a" in launched.binary.ptx for launched in on_hopper)


def test_what_is_launched_may_be_executed() -> None:
    """The stand-in driver hands over each launch when it happens, with what the PTX function takes."""
    triton_launch._caches.clear()
    target = torch.zeros(1024)

    def fill(launched: Launch) -> None:
        kinds, values = zip(*launched.parameters(), strict=True)
        assert kinds == ("*fp32", "*fp32", "i32", "i64", "i64", "i64", "i32", "fp32")
        declared = re.search(r"\.entry \w+\((.*?)\)", launched.binary.ptx, re.DOTALL)
        assert declared is not None
        assert declared[1].count(".param") == len(kinds) + 2
        assert values[1] == target.data_ptr()
        target.add_(values[-1])

    with offline(arch=80, execute=fill):
        for _ in range(3):
            launch(copy_kernel, 1, *call(target=target, bias=None))
    assert torch.equal(target, torch.full((1024,), 1.5))


def test_launches_are_on_the_current_stream(launches: list[Launch]) -> None:
    launch(copy_kernel, 1, *call())
    triton.runtime.driver.active.stream = 7
    launch(copy_kernel, 1, *call())
    assert launches[-1].stream == 7


class OnDevice:
    """As much of a CUDA tensor as a launch looks at."""

    def __init__(self, tensor: torch.Tensor, device: int) -> None:
        self.tensor, self.device, self.dtype, self.data_ptr = tensor, device, tensor.dtype, tensor.data_ptr

    def get_device(self) -> int:
        return self.device


def test_launches_are_on_the_tensors_device(launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = triton.runtime.driver.active
    current = driver.device
    entered = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        driver.device = index
        yield
        driver.device = current

    monkeypatch.setattr(torch.cuda, "device", device)
    launch(copy_kernel, 1, *call(source=OnDevice(torch.zeros(1024), current)))
    assert entered == []
    launch(copy_kernel, 1, *call(source=OnDevice(torch.zeros(1024), 555)))
    launch(copy_kernel, 1, *call(source=OnDevice(torch.zeros(1024), 555)))
    assert entered == [555, 555]
    assert launches[0].function != launches[1].function == launches[2].function


def test_profiler_hooks_see_launches(launches: list[Launch], fast_launches: list) -> None:
    launch(copy_kernel, 1, *call())
    launch(copy_kernel, 1, *call())
    assert len(fast_launches) == 1
    for hooks in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        hooks.add(print)
        launch(copy_kernel, 1, *call())
        hooks.remove(print)
        assert launches[-1].hooks[1] is triton.knobs.runtime.launch_enter_hook
    assert len(fast_launches) == 1


def test_another_triton_is_left_to_launch_itself(launches: list[Launch], fast_launches: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    triton_launch._knows_this_triton.cache_clear()
    with pytest.warns(UserWarning, match=r"triton 4\.0\.0"):
        launch(copy_kernel, 1, *call())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch(copy_kernel, 1, *call())
    triton_launch._knows_this_triton.cache_clear()
    assert len(launches) == 2
    assert fast_launches == []


def test_threads_launch_the_same_code(launches: list[Launch]) -> None:
    expected = {}
    for name, arguments in CALLS.items():
        launch(copy_kernel, 1, *arguments)
        expected[name] = launches[-1].function
    triton_launch._caches.clear()
    launches.clear()
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for arguments in CALLS.values():
            launch(copy_kernel, 100 + number, *arguments)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(launches) == 8 * len(CALLS)
    for number in range(8):
        ran = [launched.function for launched in launches if launched.num_programs == 100 + number]
        assert ran == list(expected.values())


def test_arguments_and_parameters_must_match(launches: list[Launch]) -> None:
    tensors, numbers, constants, tile = call()
    with pytest.raises(TypeError, match="13 parameters, got 14 arguments"):
        launch(copy_kernel, 1, tensors, (*numbers, 1), constants, tile)


def test_products_follow_torchs_setting() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            matmul.fp32_precision = setting
            assert input_precision(torch.float32) == setting
            assert input_precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


def test_the_tile_table_is_complete() -> None:
    assert set(tile_table()) == {row for family in tune.FAMILIES for row in tune.rows(family)}
    for (kernel_name, _, _, _, feature_class), tile in tile_table().items():
        largest = 128 if feature_class == "plain" or kernel_name == "decode" else 64  # the tiles of a mask's lists are 64 x 64
        assert tile.BLOCK_M in (16, 32, 64, 128)
        assert tile.BLOCK_N in (16, 32, 64, 128)
        assert max(tile.BLOCK_M, tile.BLOCK_N) <= largest
        assert tile.num_warps in (1, 2, 4, 8, 16)


@pytest.mark.parametrize(("arch", "family"), [(80, "sm80"), (86, "sm86"), (89, "sm86"), (90, "sm90"), (100, "sm100"), (120, "sm86")])
def test_tiles_follow_the_current_device(arch: int, family: str) -> None:
    with offline(arch):
        assert triton_launch.tile_for("dq", torch.bfloat16, 64, "masked") == tile_table()["dq", family, "16-bit", 64, "masked"]
        assert triton_launch.tile_for("dq", torch.float32, 256, "plain") == tile_table()["dq", family, "fp32", 256, "plain"]


def test_an_unknown_device_has_tiles() -> None:
    with offline(arch=80):
        driver = triton.runtime.driver.active
        driver.arch, driver.device = 75, 75
        assert triton_launch.tile_for("dq", torch.float16, 64, "plain") == tile_table()["dq", "other", "16-bit", 64, "plain"]
