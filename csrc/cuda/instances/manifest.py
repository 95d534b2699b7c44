"""The one list of compiled CUDA kernels, and what the build derives from it: the macros of an entry file, the table in images.h.

An image is one entry file compiled for one row, to one fatbin; an instance is one kernel in it. Needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2]
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}  # of problem.h
FEATURE_CLASSES = ("plain", "masked", "bias")  # FeatureClass of forward_arguments.h
SMALL_SHARED_BYTES = 99 * 1024  # what a block may have on sm_86, sm_89 and sm_120
LARGE_SHARED_BYTES = 163 * 1024  # on sm_80


@dataclass(frozen=True)
class Instance:
    name: str  # of the kernel's entry point
    image: str  # stem of the .ptx and .fatbin file that it is in
    source: str  # the entry file, below csrc
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
    stages: int = 0  # key and value tiles in shared memory at once
    blocks_per_sm: int = 1  # that the registers must leave room for
    shared_bytes: int = 0  # dynamic, of a block; the entry file compiles only if it is what its kernel needs
    held_qk: int = 0  # columns of K and V that a pair of warps keeps in registers
    held_v: int = 0

    @property
    def num_threads(self) -> int:
        return 32 * self.num_warps

    @property
    def kernel(self) -> str:
        return Path(self.source).stem

    def macros(self) -> dict[str, str]:
        """What row.cuh reads."""
        values = {
            "NAME": self.name, "DTYPE": DTYPES[self.dtype], "FEATURE_CLASS": self.feature_class, "DROPOUT": str(self.dropout).lower(),
            "HEAD_DIM_QK": self.head_dim_qk, "HEAD_DIM_V": self.head_dim_v, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n,
            "NUM_WARPS": self.num_warps, "STAGES": self.stages, "BLOCKS_PER_SM": self.blocks_per_sm, "SHARED_BYTES": self.shared_bytes,
            "HELD_QK": self.held_qk, "HELD_V": self.held_v,
        }  # fmt: skip
        return {f"ROW_{name}": str(value) for name, value in values.items()}


# A line is an entry file of sm80/ and what it is compiled for: a kernel for each dtype and each of the classes. The class dropout is plain
# with dropout; in the classes with masks it is decided at run time.
#
#   entry file, head_dim_qk, head_dim_v, classes, block_m, block_n, num_warps, stages, blocks_per_sm, shared_bytes[, held_qk, held_v]
SM80 = """
# A warp has 32 rows if its accumulators leave room, which halves its reads of K and V; 16 with a float mask, whose values wait in registers
# for the scores.
forward               32  32  plain+dropout+masked       128  64  4 2 2   24576
forward               32  32  bias                        64  64  4 2 2   20480
forward               64  64  plain+dropout+masked       128  64  4 2 2   49152
forward               64  64  bias                        64  64  4 2 2   40960
forward               96  96  plain+dropout+masked       128  64  4 1 2   49152
forward               96  96  bias                        64  64  4 1 2   36864
forward              128 128  plain+dropout+masked       128  32  4 2 2   65536
forward              128 128  bias                        64  64  4 1 2   49152
forward              192 192  plain+dropout+masked       128  64  8 1 1   98304
forward              192 192  bias                       128  32  8 2 1   98304
forward              256 256  plain+dropout+masked+bias  128  32  8 1 1   98304
forward              192 128  plain+dropout+masked+bias  128  64  8 1 1   90112

decode                32  32  masked                      16  64  4 2 2   17408
decode                64  64  masked                      16  64  4 2 2   34816
decode                96  96  masked                      16  64  4 2 1   52224
decode               128 128  masked                      16  64  4 2 1   69632
decode               192 192  masked                      16  64  4 1 1   55296
decode               256 256  masked                      16  64  4 1 1   73728
decode               192 128  masked                      16  64  4 1 1   47104

# Up to block_n keys, all in shared memory, 16 rows per warp. The class masked also takes what is plain elsewhere: it costs a branch or two
# for 32 keys.
single_tile_forward   32  32  masked+bias                 64 128  4 1 3   20480
single_tile_forward   64  64  masked+bias                 64 128  4 1 3   40960
single_tile_forward   96  96  masked+bias                 64 128  4 1 2   61440
single_tile_forward  128 128  masked+bias                 64 128  4 1 2   81920

# The backward in two passes: blocks of 64 rows or 64 keys, 16 per warp, to use the lists of a PreparedMask as they are. A step is block_n
# keys (query) or block_m rows (key); 32 if masks leave fewer registers. The accumulators of dkey and dvalue take 64 registers each at
# head_dim 128: only a plain tile has room for both.
backward_query        32  32  plain+dropout               64  64  4 2 2   24576
backward_query        32  32  masked+bias                 64  32  4 2 2   16384
backward_query        64  64  plain+dropout               64  64  4 2 2   49152
backward_query        64  64  masked+bias                 64  32  4 2 2   32768
backward_query        96  96  plain+dropout               64  64  4 1 2   49152
backward_query        96  96  masked+bias                 64  32  4 1 2   36864
backward_query       128 128  plain+dropout               64  64  4 1 2   65536
backward_query       128 128  masked+bias                 64  32  4 1 2   49152
backward_key          32  32  plain+dropout               64  64  4 2 2   25600
backward_key          32  32  masked+bias                 32  64  4 2 2   16896
backward_key          64  64  plain+dropout               64  64  4 2 2   50176
backward_key          64  64  masked+bias                 32  64  4 2 2   33280
backward_key          96  96  plain                       32  64  4 2 2   49664
backward_key         128 128  plain                       32  64  4 2 2   66048
backward_dkey         96  96  dropout+masked+bias         32  64  4 2 2   49664
backward_dkey        128 128  dropout+masked+bias         32  64  4 2 2   66048
backward_dvalue       96  96  dropout+masked+bias         32  64  4 2 2   49664
backward_dvalue      128 128  dropout+masked+bias         32  64  4 2 2   66048

# Above head_dim 128, two warps share 16 rows or keys, and everything fits in SMALL_SHARED_BYTES.
backward_query_pairs 192 192  plain+dropout               64  32  8 2 1   61440
backward_query_pairs 192 192  masked+bias                 64  32  8 2 1   69632
backward_query_pairs 256 256  plain+dropout               64  32  8 2 1   77824
backward_query_pairs 256 256  masked+bias                 64  32  8 2 1   86016
backward_query_pairs 192 128  plain+dropout               64  32  8 2 1   53248
backward_query_pairs 192 128  masked+bias                 64  32  8 2 1   61440
backward_key_pairs   192 192  plain+dropout               32  64  8 2 1   82432   96  96
backward_key_pairs   192 192  masked+bias                 32  64  8 2 1   90624   96  96
backward_key_pairs   256 256  plain+dropout               16  64  8 2 1   86272   64  64
backward_key_pairs   256 256  masked+bias                 16  64  8 2 1   90368   64  64
backward_key_pairs   192 128  plain+dropout               32  64  8 2 1   49664  192 128
backward_key_pairs   192 128  masked+bias                 32  64  8 2 1   57856  192 128

# One for every head dim. Stages are chunks of 64 columns, of two operands.
mask_gradient        256 256  bias                        64  64  4 3 2   51840

# Up to block_n keys: 16 keys per warp, steps of block_m rows, at most `stages` of them in shared memory at once.
single_tile_backward  32  32  masked+bias                 32 128  8 4 1   42112
single_tile_backward  64  64  masked+bias                 32 128  8 4 1   74880
single_tile_backward  96  96  masked+bias                 32 128  8 3 1   95104
single_tile_backward 128 128  masked+bias                 32 128  8 1 1   90496

# In one pass: blocks of block_n keys, 16 per warp, in steps of block_m rows. With masks, 64 keys, the tile of the lists; at head_dim 128
# the accumulators leave no registers for masks. Dropout at 64 takes the registers of half the rows.
backward              32  32  plain+dropout              128 128  8 2 1   83968
backward              32  32  masked                      64  64  4 2 2   33792
backward              64  64  plain                      128 128  8 2 1  133120
backward              64  64  dropout                     64 128  8 2 1   82944
backward              64  64  masked                      64  64  4 2 2   58368
backward              96  96  plain+dropout               64 128  8 2 1  115712
backward              96  96  masked                      32  64  4 2 2   53760
backward             128 128  plain+dropout               64 128  8 2 1  148480
"""


# What runs before or after the kernels of any family, found by name: entry file, block_m, num_warps; one kernel for each dtype.
HELPERS = (("combine", 4, 4), ("backward_delta", 16, 4), ("backward_dquery", 16, 4))
MASK_STEPS = ("classify", "list", "keys", "merge")  # the kernels of mask_tiles.cu, in one image


def _instances() -> Iterator[Instance]:
    for line in SM80.splitlines():
        if not line or line.startswith("#"):
            continue
        kernel, head_dim_qk, head_dim_v, classes, *numbers = line.split()
        head_dims = "" if kernel == "mask_gradient" else f"_{head_dim_qk}x{head_dim_v}"
        for dtype in DTYPES:
            for each in classes.split("+"):
                dropout = each == "dropout"
                suffix = "" if kernel in ("decode", "mask_gradient") else "_plain_dropout" if dropout else f"_{each}"
                name = f"sm80_{kernel}{head_dims}_{dtype}{suffix}"
                yield Instance(
                    name, name, f"cuda/sm80/{kernel}.cu", 80, kernel.removesuffix("_pairs"), int(head_dim_qk), int(head_dim_v), dtype,
                    "plain" if dropout else each, dropout, *map(int, numbers),
                )  # fmt: skip
    for kernel, block_m, num_warps in HELPERS:
        for dtype in DTYPES:
            name = f"{kernel}_{dtype}"
            yield Instance(name, name, f"cuda/{kernel}.cu", 80, "helper", dtype=dtype, block_m=block_m, num_warps=num_warps)
    for step in MASK_STEPS:
        yield Instance(f"mask_tiles_{step}", "mask_tiles", "cuda/mask_tiles.cu", 80, "helper")


INSTANCES = tuple(_instances())


def image_names(instances: Iterable[Instance] = INSTANCES) -> list[str]:
    return list(dict.fromkeys(instance.image for instance in instances))


def table_source(
    instances: Iterable[Instance], *, architectures: Iterable[str] = (), toolkit_version: int = 0, built: str = "", why_not: str = ""
) -> str:
    """A C++ file with the images' bytes, the definition of kImages and of what else images.h declares.

    architectures: 80 or 90a, those that every image has machine code for. toolkit_version: 13000 is CUDA 13.0. built: what compiled the
    images, for which GPUs. why_not: why there are none.
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
        f"Dtype::{DTYPES[instance.dtype]}", f"FeatureClass::{instance.feature_class}", str(instance.dropout).lower(), instance.block_m,
        instance.block_n, instance.num_threads, instance.shared_bytes, f"image_{instance.image}", f"image_{instance.image}_end",
    )  # fmt: skip
    return f"    {{{', '.join(map(str, members))}}}"


def _machine_code(architecture: str) -> str:
    suffix = architecture.lstrip("0123456789")
    return f"{{{architecture.removesuffix(suffix)}, {repr(suffix) if suffix else 0}}}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
