"""The fused kernels as an implementation of torch's flash attention on CUDA: torch.nn.attention.activate_flash_attention_impl(register()).

It puts the kernels behind torch's own operators, so scaled_dot_product_attention runs them wherever torch would choose flash attention;
autograd, torch.compile and the choice between torch's backends stay torch's. Flash attention takes no mask: with an attn_mask, torch
chooses other kernels of its own (`fused_sdpa` serves those calls too).

torch.nn.attention.restore_flash_attention_impl() brings torch's kernels back, where torch has it (2.10 does not).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from ..kernels.checks import make_problem
from ..kernels.ops import gradients, run
from ..kernels.problem import Problem
from ..kernels.routing import choose, explain_problem

NAME = "fused_attention"


class Handle:
    """What torch keeps while the kernels are active."""

    def __init__(self, library: Library) -> None:
        self._library: Library | None = library

    def remove(self) -> None:
        """Gives the operators back to torch."""
        self._library = None


def register() -> str:
    """Makes the kernels known to torch, which does not use them yet, and returns the name to activate; a second call changes nothing."""
    from torch.nn.attention import register_flash_attention_impl

    register_flash_attention_impl(NAME, register_fn=replace_kernels)
    return NAME


def replace_kernels(device: str = "CUDA") -> Handle:
    """Puts the kernels behind torch's operators for one dispatch key, as long as the handle lives."""
    library = Library("aten", "IMPL", device)
    for implementation in IMPLEMENTATIONS:
        if hasattr(torch.ops.aten, implementation.__name__):  # some came after torch 2.10
            library.impl(implementation.__name__, implementation, device)
    return Handle(library)


# The functions below have the names and arguments of torch's operators. Tensors are (B, L, H, D), or (T, H, D) with cum_seq_q, the starts
# of packed sequences; those of _scaled_dot_product are (B, H, L, D). Causality, windows and slopes count from the bottom right.


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    alibi_slopes: Tensor | None = None,
    num_splits: int | None = None,  # a matter of speed
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out; lse (B, H, L), or (H, T) packed; the dropout's seed and offset (2,), and what torch does not read."""
    for name, given in {"return_debug_mask": return_debug_mask or None, **others}.items():
        if given is not None:
            raise RuntimeError(f'the flash attention implementation "{NAME}" does not take {name}')
    rng_state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if dropout_p > 0:
        rng_state.random_(2**63 - 1)
    window = window_size_left, window_size_right
    sizes = cum_seq_q, cum_seq_k, max_q, max_k
    with torch.no_grad():
        problem = _problem((query, key, value), sizes, dropout_p, is_causal, rng_state, scale, window, alibi_slopes)
        out, lse = run(problem, _kernel_for(problem))
    seed, unused = rng_state.view(torch.uint64), rng_state.new_zeros(()).view(torch.uint64)
    return _rows_first(problem, out), lse if cum_seq_q is None else lse[0], seed, unused, query.new_empty(0)


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    window = window_size_left, window_size_right
    sizes = cum_seq_q, cum_seq_k, max_q, max_k
    problem = _problem((query, key, value), sizes, dropout_p, is_causal, rng_state.view(torch.int64), scale, window)
    lse = logsumexp if cum_seq_q is None else logsumexp[None]
    results: Any = gradients(problem, _kernel_for(problem), _heads_first(problem, out), lse, _heads_first(problem, grad_out))
    # Gradients of packed tensors are (T, H, D) already.
    return results if cum_seq_q is not None else tuple(gradient.transpose(1, 2) for gradient in results)


def _flash_attention_forward_no_dropout_inplace(out: Tensor, *arguments: Any, **options: Any) -> Tensor:
    result, lse, *_ = _flash_attention_forward(*arguments, **options)
    out.copy_(result)
    return lse


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    sizes: Any = None, None, query.shape[2], key.shape[2]
    arguments: Any = *(tensor.transpose(1, 2) for tensor in (query, key, value)), *sizes, dropout_p, is_causal, return_debug_mask
    out, lse, *rest = _flash_attention_forward(*arguments, scale=scale)
    return out.transpose(1, 2), lse, *sizes, *rest


def _scaled_dot_product_flash_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, ...]:
    rows_first: list[Any] = [tensor.transpose(1, 2) for tensor in (grad_out, query, key, value, out)]
    return tuple(gradient.transpose(1, 2) for gradient in _flash_attention_backward(*rows_first, *arguments, **options))


IMPLEMENTATIONS = (
    _flash_attention_forward,
    _flash_attention_backward,
    _flash_attention_forward_no_dropout_inplace,
    _scaled_dot_product_flash_attention,
    _scaled_dot_product_flash_attention_backward,
)


def _problem(
    qkv: tuple[Tensor, Tensor, Tensor],
    sizes: tuple[Tensor | None, Tensor | None, int, int],
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None,
    window: tuple[int | None, int | None],
    alibi_slopes: Tensor | None = None,
) -> Problem:
    left, right = (None if side is None or side < 0 else side for side in window)
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "rng_state": rng_state if dropout_p > 0 else None}
    options |= {"is_causal": is_causal, "diagonal": "bottom_right", "window": (left, right), "alibi_slopes": alibi_slopes}
    if sizes[0] is None:
        return make_problem("separate", tuple([tensor.transpose(1, 2) for tensor in qkv]), **options, out_memory="like query")
    options |= zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), sizes, strict=True)
    return make_problem("varlen", qkv, **options)


def _kernel_for(problem: Problem) -> str:
    """The backend that runs the problem; RuntimeError if it is the reference, which cannot be differentiated under torch's operators."""
    backend = choose(problem, None)
    if backend == "reference":
        raise RuntimeError(f'the flash attention implementation "{NAME}" has no kernel for this call: {explain_problem(problem)}')
    return backend


def _rows_first(problem: Problem, out: Tensor) -> Tensor:
    return out.transpose(1, 2) if problem.cu_seqlens_q is None else out[0].transpose(0, 1)


def _heads_first(problem: Problem, out: Tensor) -> Tensor:
    return out.transpose(1, 2) if problem.cu_seqlens_q is None else out.transpose(0, 1)[None]
