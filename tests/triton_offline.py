"""A stand-in for Triton's GPU driver: real host code runs on CPU tensors, its kernels are compiled for an architecture but not run.

    with offline(arch=90) as launches:
        forward(problem)
    print(launches[0].binary.ptx, launches[0].num_programs, launches[0].parameters())

With `execute` something else may run them: host code then goes on with the results, as on a GPU. Specialisation and options are Triton's
own, so the binaries are those that a machine with such a GPU would build.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from fused_attention.kernels import replay
from fused_attention.kernels.triton import launch as triton_launch

KB = 1024
SHARED_MEMORY = {80: 163 * KB, 86: 99 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB, 120: 99 * KB}  # bytes that a block may take


@dataclass(eq=False)
class Binary:
    """One compiled kernel."""

    name: str  # of the kernel function
    files: dict[str, str]  # {suffix: path} of what the compiler wrote
    log: str  # of the ptxas that made it, with inspect=True

    @property
    def ptx(self) -> str:
        return Path(self.files["ptx"]).read_text()

    @property
    def cubin(self) -> bytes:
        return Path(self.files["cubin"]).read_bytes()

    @property
    def metadata(self) -> dict[str, Any]:
        """shared (bytes), num_warps, ..."""
        return json.loads(Path(self.files["json"]).read_text())


@dataclass
class Launch:
    binary: Binary
    num_programs: int
    signature: dict[str, str]  # {parameter: type such as *bf16, i64 or constexpr}
    arguments: tuple  # of all parameters; pointers are tensors or ints
    stream: int
    function: int  # handle of the loaded binary
    packed_metadata: Any
    hooks: tuple  # launch metadata, enter hook, exit hook

    def parameters(self) -> list[tuple[str, int | float]]:
        """The parameters of the PTX function with their types, but for the two pointers to scratch memory that follow them."""
        return [
            (kind, argument.data_ptr() if hasattr(argument, "data_ptr") else argument)
            for kind, argument in zip(self.signature.values(), self.arguments, strict=True)
            if kind != "constexpr"
        ]


class OfflineDriver(DriverBase):
    def __init__(self, arch: int, inspect: bool, execute: Callable[[Launch], None]) -> None:
        self.arch = arch
        # Triton and our library cache by device: what was compiled for another architecture, or without a log, must not be found.
        self.device = arch + 1000 * inspect
        self.shared_memory = 2**20 if inspect else SHARED_MEMORY[arch]
        self.stream = 0
        self.launches: list[Launch] = []
        self.execute = execute
        self.utils = self  # the methods that Triton expects of a driver's C module are below
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_active_torch_device(self) -> None:
        raise NotImplementedError

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_memory, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, next(_handles), 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None:
        pass


class _Launcher:
    """Called like the launcher of a compiled kernel in triton 3.6 to 3.9."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = source.signature

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, stream: int, function: int, packed_metadata: Any, *others: Any) -> None:
        assert (grid_y, grid_z) == (1, 1)
        hooks, arguments = others[:3], others[3:]
        launched = Launch(_binaries[function], grid_x, self.signature, arguments, stream, function, packed_metadata, hooks)
        driver = triton.runtime.driver.active
        driver.launches.append(launched)
        driver.execute(launched)


def do_nothing(launched: Launch) -> None:
    pass


_handles = itertools.count(1)
_binaries: dict[int, Binary] = {}  # by handle, as long as Triton keeps a compiled kernel: for ever


@contextlib.contextmanager
def offline(
    arch: int = 90,
    *,
    inspect: bool = False,
    execute: Callable[[Launch], None] = do_nothing,
    wanted: Callable[[str], bool] | None = None,
) -> Iterator[list[Launch]]:
    """Replaces Triton's driver; gives the list that launches are added to.

    With inspect, binaries have a ptxas log (so nothing comes from Triton's cache on disk), and a kernel that needs more shared memory
    than there is is recorded like any other; without it Triton raises OutOfResources, as it does on a GPU. Kernel functions whose names
    are not `wanted` are left out.
    """
    knobs = triton.knobs
    log = io.StringIO()

    def remember(module: int, function: int, name: str, files: dict[str, str], key: str) -> None:
        suffixes = {Path(path).suffix[1:]: path for path in files.values()}
        _binaries[function] = Binary(name, suffixes, log.getvalue())
        log.seek(0)
        log.truncate()

    driver = OfflineDriver(arch, inspect, execute)
    before = triton.runtime.driver._active
    with contextlib.ExitStack() as stack:
        stack.enter_context(knobs.runtime.scope())
        knobs.runtime.kernel_load_end_hook = remember
        if inspect:
            stack.enter_context(knobs.compilation.scope())
            stack.enter_context(knobs.nvidia.scope())
            knobs.compilation.always_compile = True
            knobs.nvidia.dump_ptxas_log = True
            stack.enter_context(contextlib.redirect_stdout(log))
        if wanted is not None:
            compile_and_launch = triton_launch._launch_through_triton
            stack.callback(setattr, triton_launch, "_launch_through_triton", compile_and_launch)
            triton_launch._launch_through_triton = lambda kernel, *others: (
                compile_and_launch(kernel, *others) if wanted(kernel.__name__) else None
            )
        triton.runtime.driver.set_active(driver)
        replay.forget()  # their tiles are for another GPU
        try:
            yield driver.launches
        finally:
            triton.runtime.driver._active = before
