"""What the codegen gate found in every kernel, kept so that the next check compiles only what changed and a sample of the rest.

A kernel's key is a hash of everything that Triton compiles: the source of the kernel and of the functions that it calls, the types and
constants of its arguments, the options and the architecture. tests/triton_codegen_record holds one file for each version of Triton. The
sample says whether that version still makes the same of them, and whether triton_resources still reads the same out of it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import triton
from triton_resources import Resources

from fused_attention.kernels.triton import backward, bias_gradient, decode, forward, mask, tiles, weights

FOLDER = Path(__file__).with_name("triton_codegen_record")
MODULES = tiles, mask, forward, decode, backward, bias_gradient, weights
MAX_CALL_DEPTH = 6  # of functions that kernels call


def path() -> Path:
    return FOLDER / f"{triton.__version__}.json"


def key(function: Any, specialization_data: str, arch: int) -> str:
    """Of what Triton's jit_cache_hook is told of a kernel before it is compiled."""
    _settle_hashes()
    data = json.loads(specialization_data)
    del data["key"]  # says the same in other words
    attributes = zip(data.pop("attrs_keys"), data.pop("attrs_vals"), strict=True)
    data["attributes"] = [(place, attribute) for place, attribute in attributes if attribute]  # an empty one changes nothing
    data["options"].pop("extern_libs", None)  # paths of this machine
    everything = json.dumps([function.cache_key, arch, data], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()[:24]


@functools.cache
def _settle_hashes() -> None:
    """Makes a kernel's hash depend on its source alone.

    Triton 3.6 counts the constants of a called function only if that one was hashed before, so the hash depends on what the process met
    first: hashing again until all are counted settles it. Triton also counts the line where a function begins, which changes no machine
    code.
    """
    functions = [value for module in MODULES for value in vars(module).values() if isinstance(value, triton.JITFunction)]
    written = [function.fn.__globals__.get("kernel") for function in functions]  # what the functions that parameters.py writes call
    functions += [function for function in written if isinstance(function, triton.JITFunction)]
    for _ in range(MAX_CALL_DEPTH):
        for function in functions:
            function.hash, function.starting_line_number = None, 0
        for function in functions:
            function.cache_key  # noqa: B018  # a property that keeps what it finds


def read() -> dict[str, Resources]:
    """{key: what was found}; empty where no record of this Triton is kept."""
    if not path().exists():
        return {}
    return {name: _resources(entry) for name, entry in json.loads(path().read_text()).items()}


def write(found: dict[str, Resources]) -> None:
    """One line for each kernel, so that a change shows as lines."""
    lines = [f"{json.dumps(name)}: {json.dumps(dataclasses.asdict(found[name]))}" for name in sorted(found)]
    FOLDER.mkdir(exist_ok=True)
    path().write_text("{\n" + ",\n".join(lines) + "\n}\n")


def sample(keys: list[str], share: float, seed: int) -> set[str]:
    """The kernels that are compiled although they are on record."""
    return set(random.Random(seed).sample(sorted(keys), round(share * len(keys))))


def _resources(entry: dict[str, Any]) -> Resources:
    entry["counts"] = {name: tuple(counts) for name, counts in entry["counts"].items()}
    entry["instructions"] = tuple(entry["instructions"])
    return Resources(**entry)
