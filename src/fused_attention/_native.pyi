"""The compiled extension (csrc/module.cpp). Addresses are integers, 0 = not given; strides are in elements."""

Strided = tuple[int, int, int, int]  # address, stride of batch, head, row; the last dim is contiguous

def cpu_forward(
    num_threads: int,
    dtype: int,
    sizes: tuple[int, int, int, int, int, int],
    scale: float,
    causal: int,
    query: Strided,
    key: Strided,
    value: Strided,
    out: Strided,
    lse: int,
    attn_mask: Strided,
    key_mask: tuple[int, int, int],
    key_lengths: int,
    query_lengths: int,
    dropout_threshold: int,
    rng_state: int,
    /,
) -> None: ...
def cpu_backward(
    num_threads: int,
    dtype: int,
    sizes: tuple[int, int, int, int, int, int],
    scale: float,
    causal: int,
    query: Strided,
    key: Strided,
    value: Strided,
    out: Strided,
    lse: int,
    attn_mask: Strided,
    key_mask: tuple[int, int, int],
    key_lengths: int,
    query_lengths: int,
    dropout_threshold: int,
    rng_state: int,
    dout: Strided,
    dlse: int,
    dquery: Strided,
    dkey: Strided,
    dvalue: Strided,
    /,
) -> None: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
