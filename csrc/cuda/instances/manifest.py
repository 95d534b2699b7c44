"""The one list of compiled CUDA kernels, and the sources made from it: a .cu file for each image, the table in images.h.

An image is one .cu file, compiled to one fatbin; an instance is one kernel in it, a row of the table. Needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2]
DTYPES = {"bf16": "Dtype::bfloat16", "fp16": "Dtype::float16"}
FEATURE_CLASSES = ("plain", "masked", "bias")  # FeatureClass of forward_arguments.h
SMALL_SHARED_BYTES = 99 * 1024  # what a block may have on sm_86, sm_89 and sm_120
LARGE_SHARED_BYTES = 163 * 1024  # on sm_80


@dataclass(frozen=True)
class Instance:
    name: str  # of the kernel's entry point
    image: str  # stem of the .cu, .ptx and .fatbin file that it is in
    header: str  # that defines it, below csrc
    family: int  # ten times the oldest compute capability that it runs on
    pass_name: str  # one of the names of Pass in images.h
    head_dim_qk: int = 0  # helpers have neither head dims nor tiles
    head_dim_v: int = 0
    dtype: str = "bf16"
    feature_class: str = "plain"
    dropout: bool = False
    block_m: int = 0  # rows of a block
    block_n: int = 0  # keys of a tile
    num_warps: int = 8
    stages: int = 0  # key and value tiles in shared memory at a time
    shared_bytes: int = 0  # dynamic, of a block
    blocks_per_sm: int = 1  # that the registers must leave room for

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    blocks_per_sm: int

    def shared_bytes(self, head_dim_qk: int, head_dim_v: int) -> int:
        """Q, and `stages` tiles of K and of V, two bytes an element; out goes where Q was."""
        return 2 * (self.block_m * head_dim_qk + self.stages * self.block_n * (head_dim_qk + head_dim_v))


# By (head_dim_qk, head_dim_v). A warp has 32 rows where its accumulators leave room, which halves what it reads of K and V.
FORWARD_TILES = {
    (32, 32): Tile(128, 64, 4, 2, 2),
    (64, 64): Tile(128, 64, 4, 2, 2),
    (96, 96): Tile(128, 64, 4, 1, 2),
    (128, 128): Tile(128, 32, 4, 2, 2),
    (192, 192): Tile(128, 64, 8, 1, 1),
    (256, 256): Tile(128, 32, 8, 1, 1),
    (192, 128): Tile(128, 64, 8, 1, 1),
}
# With a float mask, a piece of which waits in registers for its scores: 16 rows to a warp.
BIAS_TILES = FORWARD_TILES | {
    (192, 192): Tile(128, 32, 8, 2, 1),
    (32, 32): Tile(64, 64, 4, 2, 2),
    (64, 64): Tile(64, 64, 4, 2, 2),
    (96, 96): Tile(64, 64, 4, 1, 2),
    (128, 128): Tile(64, 64, 4, 1, 2),
}
DECODE_TILES = {
    (32, 32): Tile(16, 64, 4, 2, 2),
    (64, 64): Tile(16, 64, 4, 2, 2),
    (96, 96): Tile(16, 64, 4, 2, 1),
    (128, 128): Tile(16, 64, 4, 2, 1),
    (192, 192): Tile(16, 64, 4, 1, 1),
    (256, 256): Tile(16, 64, 4, 1, 1),
    (192, 128): Tile(16, 64, 4, 1, 1),
}
# Of the backward: blocks of 64 rows or of 64 keys, 16 to a warp, so that the lists of a PreparedMask are used as they are. Steps are
# block_n keys long (query), or block_m rows (key); 32 where masks leave fewer registers.
BACKWARD_QUERY_TILES = {
    (32, 32): Tile(64, 64, 4, 2, 2),
    (64, 64): Tile(64, 64, 4, 2, 2),
    (96, 96): Tile(64, 64, 4, 1, 2),
    (128, 128): Tile(64, 64, 4, 1, 2),
}
BACKWARD_KEY_TILES = {
    (32, 32): Tile(64, 64, 4, 2, 2),
    (64, 64): Tile(64, 64, 4, 2, 2),
    (96, 96): Tile(32, 64, 4, 2, 2),
    (128, 128): Tile(32, 64, 4, 2, 2),
}
# Above head_dim 128 two warps have 16 rows or keys together (warp_pairs.cuh), and all of it fits in SMALL_SHARED_BYTES.
PAIRED_QUERY_TILE = Tile(64, 32, 8, 2, 1)
PAIRED_KEY_TILES = {
    (192, 192): Tile(32, 64, 8, 2, 1),
    (256, 256): Tile(16, 64, 8, 2, 1),
    (192, 128): Tile(32, 64, 8, 2, 1),
}
PAIRED_KEY_HELD = {(192, 192): (96, 96), (256, 256): (64, 64), (192, 128): (192, 128)}  # columns of K and of V in registers
MASK_GRADIENT_TILE = Tile(64, 64, 4, 3, 2)  # stages are chunks of 64 columns, of two operands
# For up to block_n keys, all of them in shared memory. Forward: 16 rows to a warp. Backward: 16 keys to a warp, steps of block_m rows, of
# which at most `stages` are in shared memory at a time.
SINGLE_TILE_FORWARD_TILES = {
    (32, 32): Tile(64, 128, 4, 1, 3),
    (64, 64): Tile(64, 128, 4, 1, 3),
    (96, 96): Tile(64, 128, 4, 1, 2),
    (128, 128): Tile(64, 128, 4, 1, 2),
}
SINGLE_TILE_BACKWARD_TILES = {
    (32, 32): Tile(32, 128, 8, 4, 1),
    (64, 64): Tile(32, 128, 8, 4, 1),
    (96, 96): Tile(32, 128, 8, 3, 1),
    (128, 128): Tile(32, 128, 8, 1, 1),
}
SINGLE_TILE_NOTES_BYTES = 128  # beside the tiles
# The backward in one pass: blocks of block_n keys, 16 to a warp, in steps of block_m rows. With masks, whose lists name tiles of 64 keys,
# and at head_dim 128 not at all: there the accumulators leave no registers for them.
BACKWARD_TILES = {
    (32, 32): Tile(128, 128, 8, 2, 1),
    (64, 64): Tile(128, 128, 8, 2, 1),
    (96, 96): Tile(64, 128, 8, 2, 1),
    (128, 128): Tile(64, 128, 8, 2, 1),
}
MASKED_BACKWARD_TILES = {
    (32, 32): Tile(64, 64, 4, 2, 2),
    (64, 64): Tile(64, 64, 4, 2, 2),
    (96, 96): Tile(32, 64, 4, 2, 2),
}
# In the classes with masks a kernel decides about dropout at run time.
FORWARD_CLASSES = (("plain", False), ("plain", True), ("masked", False), ("bias", False))
SINGLE_TILE_CLASSES = ("masked", "bias")  # the first also for what is plain elsewhere: a branch or two for 32 keys


def _tiled(pass_name: str, suffix: str, head_dims: tuple[int, int], tile: Tile, dtype: str, feature_class: str, dropout: bool) -> Instance:
    name = f"sm80_{pass_name}_{head_dims[0]}x{head_dims[1]}_{dtype}{suffix}"
    return Instance(
        name, name, f"cuda/sm80/{pass_name}.cuh", 80, pass_name, *head_dims, dtype, feature_class, dropout, tile.block_m,
        tile.block_n, tile.num_warps, tile.stages, tile.shared_bytes(*head_dims), tile.blocks_per_sm,
    )  # fmt: skip


def _backward(head_dims: tuple[int, int], dtype: str, feature_class: str, dropout: bool) -> Iterator[Instance]:
    suffix = f"{head_dims[0]}x{head_dims[1]}_{dtype}_{feature_class}{'_dropout' if dropout else ''}"
    long_steps = feature_class == "plain"
    # The accumulators of dkey and of dvalue are 64 registers each at head_dim 128: too many for both beside anything but a plain tile.
    together = head_dims[0] <= 64 or (long_steps and not dropout)
    for pass_name in ("backward_query", *(("backward_key",) if together else ("backward_dkey", "backward_dvalue"))):
        of_query = pass_name == "backward_query"
        tile = (BACKWARD_QUERY_TILES if of_query else BACKWARD_KEY_TILES)[head_dims]
        if not long_steps:
            tile = replace(tile, **{"block_n" if of_query else "block_m": 32})
        rows, steps = (tile.block_m, tile.block_n) if of_query else (tile.block_n, tile.block_m)
        shared_bytes = 2 * (rows + tile.stages * steps) * sum(head_dims) + (0 if of_query else tile.stages * 8 * steps)
        name, header = f"sm80_{pass_name}_{suffix}", f"cuda/sm80/backward_{'query' if of_query else 'key'}.cuh"
        yield Instance(
            name, name, header, 80, pass_name, *head_dims, dtype, feature_class, dropout,
            tile.block_m, tile.block_n, tile.num_warps, tile.stages, shared_bytes, tile.blocks_per_sm,
        )  # fmt: skip


def _paired_backward(head_dims: tuple[int, int], dtype: str, feature_class: str, dropout: bool) -> Iterator[Instance]:
    suffix = f"{head_dims[0]}x{head_dims[1]}_{dtype}_{feature_class}{'_dropout' if dropout else ''}"
    for pass_name, tile in (("backward_query", PAIRED_QUERY_TILE), ("backward_key", PAIRED_KEY_TILES[head_dims])):
        of_query = pass_name == "backward_query"
        rows, steps = (tile.block_m, tile.block_n) if of_query else (tile.block_n, tile.block_m)
        held = sum(head_dims if of_query else PAIRED_KEY_HELD[head_dims])
        operands = 2 * max(rows * held, tile.stages * steps * sum(head_dims)) + 2 * rows * (sum(head_dims) - held)
        exchanged = 4 * rows * steps * (1 if feature_class == "plain" else 2)  # weights, softcap's derivative
        others = 2 * rows * steps if of_query else tile.stages * 8 * steps  # gradients of scores; lse and delta
        name = f"sm80_{pass_name}_{suffix}"
        yield Instance(
            name, name, f"cuda/sm80/{pass_name}_pairs.cuh", 80, pass_name, *head_dims, dtype, feature_class, dropout,
            tile.block_m, tile.block_n, tile.num_warps, tile.stages, operands + exchanged + others, tile.blocks_per_sm,
        )  # fmt: skip


def _backward_in_one_pass(head_dims: tuple[int, int], dtype: str, feature_class: str, dropout: bool) -> Instance:
    tile = (MASKED_BACKWARD_TILES if feature_class == "masked" else BACKWARD_TILES)[head_dims]
    if dropout and head_dims == (64, 64):  # which takes the registers of half the rows
        tile = replace(tile, block_m=64)
    rows, keys = tile.block_m, tile.block_n
    # K and V, the gradients of scores, and `stages` times Q, dO and two numbers of each row
    shared_bytes = 2 * keys * (sum(head_dims) + rows) + tile.stages * rows * (2 * sum(head_dims) + 8)
    name = f"sm80_backward_{head_dims[0]}x{head_dims[1]}_{dtype}_{feature_class}{'_dropout' if dropout else ''}"
    return Instance(
        name, name, "cuda/sm80/backward.cuh", 80, "backward", *head_dims, dtype, feature_class, dropout, rows, keys, tile.num_warps,
        tile.stages, shared_bytes, tile.blocks_per_sm,
    )  # fmt: skip


def _instances() -> Iterator[Instance]:
    for head_dims, dtype, (feature_class, dropout) in product(FORWARD_TILES, DTYPES, FORWARD_CLASSES):
        tile = (BIAS_TILES if feature_class == "bias" else FORWARD_TILES)[head_dims]
        suffix = f"_{feature_class}{'_dropout' if dropout else ''}"
        yield _tiled("forward", suffix, head_dims, tile, dtype, feature_class, dropout)
    for (head_dims, tile), dtype in product(DECODE_TILES.items(), DTYPES):
        yield _tiled("decode", "", head_dims, tile, dtype, "masked", False)
    for head_dims, dtype, (feature_class, dropout) in product(BACKWARD_QUERY_TILES, DTYPES, FORWARD_CLASSES):
        yield from _backward(head_dims, dtype, feature_class, dropout)
    for head_dims, dtype, (feature_class, dropout) in product(PAIRED_KEY_TILES, DTYPES, FORWARD_CLASSES):
        yield from _paired_backward(head_dims, dtype, feature_class, dropout)
    for dtype in DTYPES:  # one for every head dim
        tile, name = MASK_GRADIENT_TILE, f"sm80_mask_gradient_{dtype}"
        listed = tile.num_warps * (32 * 20 + 4)  # a head for each thread, how many for each warp
        yield Instance(
            name, name, "cuda/sm80/mask_gradient.cuh", 80, "mask_gradient", 256, 256, dtype, "bias", False, tile.block_m, tile.block_n,
            tile.num_warps, tile.stages, tile.stages * 2 * 64 * (tile.block_m + tile.block_n) + listed,
            tile.blocks_per_sm,
        )  # fmt: skip
    for (head_dims, tile), dtype, feature_class in product(SINGLE_TILE_FORWARD_TILES.items(), DTYPES, SINGLE_TILE_CLASSES):
        yield _tiled("single_tile_forward", f"_{feature_class}", head_dims, tile, dtype, feature_class, False)
    for (head_dims, tile), dtype, feature_class in product(SINGLE_TILE_BACKWARD_TILES.items(), DTYPES, SINGLE_TILE_CLASSES):
        row = _tiled("single_tile_backward", f"_{feature_class}", head_dims, tile, dtype, feature_class, False)
        keys_and_scores = 2 * tile.block_n * (sum(head_dims) + tile.block_m)
        rows = tile.stages * tile.block_m * (2 * sum(head_dims) + 8)
        yield replace(row, shared_bytes=keys_and_scores + rows + SINGLE_TILE_NOTES_BYTES)
    for head_dims, dtype, (feature_class, dropout) in product(BACKWARD_TILES, DTYPES, FORWARD_CLASSES[:3]):
        if feature_class != "masked" or head_dims in MASKED_BACKWARD_TILES:
            yield _backward_in_one_pass(head_dims, dtype, feature_class, dropout)
    for dtype in DTYPES:
        name = f"backward_delta_{dtype}"
        yield Instance(name, name, "cuda/backward_delta.cuh", 80, "helper", dtype=dtype, block_m=16, num_warps=4)
    for dtype in DTYPES:
        name = f"backward_dquery_{dtype}"
        yield Instance(name, name, "cuda/backward_dquery.cuh", 80, "helper", dtype=dtype, block_m=16, num_warps=4)
    for dtype in DTYPES:
        name = f"combine_{dtype}"
        yield Instance(name, name, "cuda/combine.cuh", 80, "helper", dtype=dtype, block_m=4, num_warps=4)
    for step in ("classify", "list", "keys", "merge"):
        yield Instance(f"mask_tiles_{step}", "mask_tiles", "cuda/mask_tiles.cuh", 80, "helper")


INSTANCES = tuple(_instances())


def image_names(instances: Iterable[Instance] = INSTANCES) -> list[str]:
    return list(dict.fromkeys(instance.image for instance in instances))


def image_source(instance: Instance) -> str:
    """The .cu file of the instance's image."""
    head = f'// Generated from csrc/cuda/instances/manifest.py.\n#include "{instance.header}"\n'
    if instance.image == "mask_tiles":  # its header defines the entry points itself
        return head
    dtype = DTYPES[instance.dtype]
    if instance.pass_name == "helper":
        kernel = instance.name.removeprefix("sm80_").removesuffix(f"_{instance.dtype}")
    else:
        kernel = "backward_key" if instance.pass_name in ("backward_dkey", "backward_dvalue") else instance.pass_name
        if instance.header.endswith("_pairs.cuh"):
            kernel += "_pairs"
    if kernel in ("backward", "backward_delta", "backward_dquery"):
        arguments = "OnePassArguments"
    else:
        arguments = "BackwardArguments" if "backward" in kernel or kernel == "mask_gradient" else "ForwardArguments"
    if instance.pass_name == "helper":
        check, call = "", f"{kernel}<{dtype}, {instance.block_m}>(arguments)"
    else:
        parameters = [dtype]
        if kernel != "mask_gradient":
            parameters += [instance.head_dim_qk, instance.head_dim_v]
        if kernel not in ("decode", "mask_gradient"):
            parameters += [f"FeatureClass::{instance.feature_class}", str(instance.dropout).lower()]
        parameters += [instance.block_m, instance.block_n, instance.num_warps, instance.stages]
        if kernel == "backward_key":
            parameters += [str(instance.pass_name != without).lower() for without in ("backward_dvalue", "backward_dkey")]
        if kernel == "backward_key_pairs":
            parameters += PAIRED_KEY_HELD[instance.head_dim_qk, instance.head_dim_v]
        config = "".join(word.capitalize() for word in kernel.split("_"))
        check = (
            f"using Config = {config}Config<{', '.join(map(str, parameters))}>;\n"
            f'static_assert(Config::kSharedBytes == {instance.shared_bytes}, "manifest.py has another number");\n'
        )
        call = f"{kernel}<Config>(arguments)"
    return (
        f"{head}using namespace fused_attention;\nusing namespace fused_attention::cuda;\n"
        f"using namespace fused_attention::cuda::sm80;\n{check}"
        f'extern "C" __global__ void __launch_bounds__({instance.num_threads}, {instance.blocks_per_sm})\n'
        f"    {instance.name}(const __grid_constant__ {arguments} arguments) {{\n  {call};\n}}\n"
    )


def table_source(
    instances: Iterable[Instance], *, architectures: Iterable[str] = (), toolkit_version: int = 0, built: str = "", why_not: str = ""
) -> str:
    """A C++ file with the images' bytes, the definition of kImages and of what else images.h declares.

    architectures: 80 or 90a, those that every image has machine code for. toolkit_version: 13000 is CUDA 13.0. built: what compiled the
    images, for which GPUs. why_not: there are none because of that.
    """
    instances = list(instances)
    bytes_of_images = "".join(_embedded(image) for image in image_names(instances))
    rows = ",\n".join(_row(instance) for instance in instances) or "    {}"
    codes = [_machine_code(architecture) for architecture in architectures]
    return (
        '// Generated from csrc/cuda/instances/manifest.py.\n#include "cuda/images.h"\n\n'
        f"{bytes_of_images}namespace fused_attention::cuda {{\n\n"
        f"const Image kImages[] = {{\n{rows},\n}};\n"
        f"const int kNumImages = {len(instances)};\n"
        f"const MachineCode kMachineCode[] = {{{', '.join(codes) or '{}'}}};\nconst int kNumMachineCode = {len(codes)};\n"
        f"const int kToolkitVersion = {toolkit_version};\n"
        f"const char* const kBuilt = {_quoted(built)};\n"
        f"const char* const kWhyNoImages = {_quoted(why_not) if why_not else 'nullptr'};\n\n}}  // namespace fused_attention::cuda\n"
    )


def _embedded(image: str) -> str:
    """The path is relative to the build folder, where the compiler runs."""
    begin, end = f"image_{image}", f"image_{image}_end"
    directives = (
        ".section .rodata", ".balign 16", f".hidden {begin}", f".globl {begin}", f"{begin}:", f'.incbin \\"cuda/{image}.fatbin\\"',
        f".hidden {end}", f".globl {end}", f"{end}:", ".byte 0", ".previous",
    )  # fmt: skip
    assembly = "\n".join(f'    "{directive}\\n"' for directive in directives)
    return f'asm(\n{assembly});\nextern "C" __attribute__((visibility("hidden"))) const unsigned char {begin}[], {end}[];\n\n'


def _row(instance: Instance) -> str:
    members = (
        f'"{instance.name}"', instance.family, f"Pass::{instance.pass_name}", instance.head_dim_qk, instance.head_dim_v,
        DTYPES[instance.dtype], f"FeatureClass::{instance.feature_class}", str(instance.dropout).lower(), instance.block_m,
        instance.block_n, instance.num_threads, instance.shared_bytes, f"image_{instance.image}", f"image_{instance.image}_end",
    )  # fmt: skip
    return f"    {{{', '.join(map(str, members))}}}"


def _machine_code(architecture: str) -> str:
    suffix = architecture.lstrip("0123456789")
    return f"{{{architecture.removesuffix(suffix)}, {repr(suffix) if suffix else 0}}}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
