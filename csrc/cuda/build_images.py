"""The CUDA part of the build: writes the table of images and the rules for ninja, and reports what the images cost."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from csrc.cuda.instances.manifest import INSTANCES, Instance, image_names, table_source
from csrc.cuda.toolkit import PTX_FLAGS, NoToolkit, Toolkit, architectures, toolkit_to_build_with

CSRC = Path(__file__).resolve().parents[1]
COMPILE = CSRC / "cuda/compile_image.py"
# Of an image, per architecture that it has machine code for. Checked by tests/cuda_codegen_gate.py: no reason for a user's build to fail.
MAX_SECONDS = 12.0  # of CPU time; a slow machine needs 8
MAX_KILOBYTES = 250.0


class Cost(NamedTuple):
    """One image's."""

    image: str
    seconds: float  # of CPU time, which does not depend on how busy the machine is
    kilobytes: float  # of its fatbin
    architectures: int  # that it has machine code for


class Images(NamedTuple):
    """What the build is to compile."""

    folder: Path
    rules: list[str]  # for ninja, run in the folder's parent
    table: Path  # the C++ file to link, which embeds the images
    fatbins: list[str]  # that it embeds
    built: str  # by which compiler, for which GPUs; empty without CUDA
    why_not: str  # empty with CUDA


def prepare(build_dir: Path) -> Images:
    """Writes the table, if it is new or changed; compiles nothing."""
    folder = build_dir / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "images.cpp"
    try:
        toolkit = toolkit_to_build_with()
    except NoToolkit as reason:
        why_not = f"the CUDA kernels are not built: {reason}"
        _write(table, table_source([], why_not=f"{why_not}; reinstall with FUSED_ATTENTION_CUDA=1, which fetches the compiler it needs"))
        return Images(folder, [], table, [], "", why_not)
    numbers = architectures(toolkit)
    built = f"{toolkit}, machine code for {', '.join(f'sm_{number}' for number in numbers)}, PTX for compute_80"
    _write(table, table_source(INSTANCES, architectures=numbers, toolkit_version=toolkit.driver_version, built=built))
    fatbins = [f"cuda/{image}.fatbin" for image in image_names(INSTANCES)]
    return Images(folder, _rules(toolkit, numbers, INSTANCES), table, fatbins, built, "")


def _rules(toolkit: Toolkit, numbers: Iterable[str], instances: Iterable[Instance]) -> list[str]:
    nvcc = [toolkit.nvcc, *PTX_FLAGS, "-arch=compute_80", f"-I{CSRC}"]
    tools = [f"--ptxas={toolkit.ptxas}", f"--fatbinary={toolkit.fatbinary}", f"--built-by={toolkit}"]
    if toolkit.ptx_version:
        tools.append(f"--ptx-version={toolkit.ptx_version}")
    command = [sys.executable, COMPILE, *tools, f"--architectures={','.join(numbers)}", "--", "$in", "$out", *nvcc]
    words = " ".join(word if word in ("$in", "$out") else shlex.quote(word) for word in map(str, command))
    rules = ["rule image", f"  command = {words} $row", "  depfile = $out.d", "  deps = gcc", "  description = compile $out"]
    for instance in {instance.image: instance for instance in instances}.values():
        macros = " ".join(f"-D{name}={value}" for name, value in instance.macros().items())
        rules += [f"build cuda/{instance.image}.fatbin: image {CSRC / instance.source} | {COMPILE}", f"  row = {macros}"]
    return rules


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def costs(folder: Path, images: Iterable[str]) -> list[Cost]:
    """The costs of the images compiled in that folder."""
    return [Cost(**json.loads((folder / f"{image}.json").read_text())) for image in images]


def over_limits(rows: Iterable[Cost]) -> list[str]:
    """Which limits the images exceed, one sentence each."""
    return [
        f"{row.image}: {value:g} {unit}, at most {limit * row.architectures:g} are allowed"
        for row in rows
        for value, unit, limit in (
            (row.seconds, "seconds of processor time", MAX_SECONDS),
            (row.kilobytes, "kilobytes", MAX_KILOBYTES),
        )
        if value > limit * row.architectures
    ]


def summary(rows: list[Cost]) -> str:
    slowest, largest = max(rows, key=lambda row: row.seconds), max(rows, key=lambda row: row.kilobytes)
    seconds, megabytes = sum(row.seconds for row in rows), sum(row.kilobytes for row in rows) / 1024
    return (
        f"{len(rows)} images, {seconds:.0f} s of processor time (at most {slowest.seconds:.1f} s, {slowest.image}), "
        f"{megabytes:.1f} MB (at most {largest.kilobytes:.0f} KB, {largest.image})"
    )


def report(images: Images) -> None:
    """Says what was built, or why nothing was."""
    if images.why_not:
        print(f"fused_attention: {images.why_not}", file=sys.stderr)
        return
    rows = costs(images.folder, [Path(fatbin).stem for fatbin in images.fatbins])
    lines = [f"{'image':<44} {'seconds':>8} {'KB':>8}", *(f"{row.image:<44} {row.seconds:>8.2f} {row.kilobytes:>8.1f}" for row in rows)]
    file = images.folder / "report.txt"
    file.write_text("\n".join([f"{images.built}: {summary(rows)}", *lines]) + "\n")
    print(f"fused_attention: CUDA kernels by {images.built}: {summary(rows)}; {file.relative_to(CSRC.parent)}", file=sys.stderr)
