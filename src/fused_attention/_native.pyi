"""The compiled extension (csrc/module.cpp). Addresses are integers, 0 = not given; strides are in elements."""

from collections.abc import Sequence

Strides = tuple[int, ...]  # of batch, head and row

def problem(
    *,
    dtype: int,
    sizes: tuple[int, int, int, int, int, int, int],  # batch, num_heads, num_heads_kv, seqlen_q, seqlen_k, head_dim_qk, head_dim_v
    num_tokens: tuple[int, int],  # of packed queries and keys, otherwise 0
    scale: float,
    window: tuple[int, int],
    diagonal: int,
    bottom_right: bool,
    softcap: float,
    dropout_threshold: int,
    query: Strides,
    key: Strides,
    value: Strides,
    out: Strides,
    attn_mask: Strides,
    attn_mask_key: int,
    attn_mask_dtype: int,
    key_mask: tuple[int, ...],
    alibi_slopes: tuple[int, ...],
    mask_bits: Strides,
    row_tiles: Strides,
    num_tiles: int,
    cache_dtype: int,
    key_scale: tuple[int, ...],
    value_scale: tuple[int, ...],
) -> bytes:
    """All of a problem but the addresses of its tensors."""

def with_bf16x3(problem: bytes, /) -> bytes:
    """The same problem, whose float32 numbers may be split into two of bfloat16, where cpu_has_bf16x3."""

def address_names() -> list[str]:
    """The tensors of a forward call, in the order of their addresses."""

def cpu_forward(
    problem: bytes, num_threads: int, out_error: int, query: int, key: int, value: int, out: int, lse: int, optional: Sequence[int], /
) -> None:
    """Writes out and lse, and out_error unless it is 0. optional: a tuple or list of the addresses that come after these."""

def cpu_linear(
    num_threads: int,
    x: int,
    x_row: int,
    weight: int,
    weight_row: int,
    bias: int,
    out: int,
    rows: int,
    in_features: int,
    out_features: int,
    /,
) -> None:
    """Writes out (rows, out_features) = x weight^T + bias, all float32, for at most 64 rows; x_row and weight_row are strides."""

def cpu_forward_with_weights(problem: bytes, num_threads: int, addresses: tuple[int, ...], mean_weights: int, /) -> None:
    """Writes out, lse and the mean over heads of the weights after dropout, (B, Lq, Lk), for float32 problems of at most 512 keys."""

def cpu_weights(problem: bytes, num_threads: int, addresses: tuple[int, ...], average_heads: bool, /) -> None:
    """Writes the weights after dropout, or their mean over heads, to `out`."""

def cpu_backward(
    problem: bytes,
    num_threads: int,
    addresses: tuple[int, ...],
    gradients: tuple[int, ...],
    dout: Strides,
    dquery: Strides,
    dkey: Strides,
    dvalue: Strides,
    dattn_mask: tuple[int, ...],  # strides of part, batch, head, row and key
    num_mask_parts: int,
    num_key_parts: int,
    /,
) -> None:
    """Writes every gradient.

    gradients: addresses in the order in which csrc/module.cpp places them, 0 = none.
    """

def cpu_has_bf16x3() -> bool: ...
def cpu_key_parts(seqlen_k: int, /) -> int: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def cuda_forward(
    problem: bytes,
    device: int,
    stream: int,
    workspace: int,
    query: int,
    key: int,
    value: int,
    out: int,
    lse: int,
    optional: Sequence[int],
    /,
) -> int:
    """Launches the kernels and returns 0, or launches nothing and returns how many bytes of workspace they want."""

def cuda_backward_problem(
    problem: bytes,
    dout: Strides,
    dquery: Strides,
    dkey: Strides,
    dvalue: Strides,
    dattn_mask: Strides,
    mask_sizes: tuple[int, int],  # batch elements and heads that dattn_mask has
    column_tiles: Strides,
    num_tiles: int,
    deterministic: bool,
    kernels: int,
    /,
) -> bytes:
    """A problem with the strides of gradients (batch, head, row in elements), for cuda_backward."""

def cuda_backward(
    problem: bytes, device: int, stream: int, workspace: int, addresses: tuple[int, ...], gradients: tuple[int, ...], /
) -> int:
    """Launches the backward kernels, or returns how many bytes of workspace they want.

    gradients: addresses of dout, dlse, dquery, dkey, dvalue, dattn_mask, row_sums, column_sums, slope_sums and column tiles, 0 = none.
    """

def cuda_backward_plan(
    problem: bytes,
    compute_capability: int,
    multiprocessors: int,
    shared_bytes: int,
    workspace: int,
    addresses: tuple[int, ...],
    gradients: tuple[int, ...],
    /,
) -> tuple[int, list[tuple[str, int, int, int, bytes]]]:
    """What cuda_backward would launch, like cuda_plan."""

def cuda_plan(
    problem: bytes, compute_capability: int, multiprocessors: int, shared_bytes: int, workspace: int, addresses: tuple[int, ...], /
) -> tuple[int, list[tuple[str, int, int, int, bytes]]]:
    """What cuda_forward would launch on such a device: bytes of workspace, and name, blocks, threads, shared bytes and arguments."""

def cuda_why_not(device: int, /) -> str | None: ...
def cuda_set_single_tile_kernels(used: bool, /) -> bool: ...
def cuda_device_count() -> int: ...
def cuda_device_limits(device: int, /) -> tuple[int, int, int]: ...
def cuda_device_name(device: int, /) -> str: ...
def cuda_has_machine_code(compute_capability: int, /) -> bool:
    """Compute capability times ten; False: its driver compiles the PTX."""

def cuda_versions() -> tuple[int, int]: ...
def cuda_built() -> str: ...
def cuda_images() -> list[str]: ...
