"""Prints the table of features, as the backends report them, and the table of transforms: `python -m fused_attention.kernels.support`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .backends import BACKENDS
from .checks import make_problem
from .prepared_mask import prepare_mask
from .problem import Problem


def _problem(
    dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, head_dim_v: int = 64, num_heads_kv: int = 2, **options: Any
) -> Problem:
    query = torch.zeros(2, 2, 8, head_dim, dtype=dtype, requires_grad=True)
    key = torch.zeros(2, num_heads_kv, 12, head_dim, dtype=dtype)
    value = torch.zeros(2, num_heads_kv, 12, head_dim_v, dtype=dtype)
    return make_problem("separate", (query, key, value), **options)


def _packed_problem() -> Problem:
    tokens = torch.zeros(12, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    starts = torch.tensor([0, 4, 12])
    return make_problem("varlen", (tokens, tokens, tokens), cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=8, max_seqlen_k=8)


def _quantized_problem() -> Problem:
    numbers, scale = torch.zeros(2, 2, 12, 64, dtype=torch.int8), torch.ones(2, 2, 12)
    query = torch.zeros(2, 2, 1, 64, dtype=torch.bfloat16)
    return make_problem("separate", (query, numbers, numbers), key_scale=scale, value_scale=scale)


FEATURES: dict[str, Callable[[], Problem]] = {
    "float32": lambda: _problem(torch.float32),
    "bfloat16": _problem,
    "float16": lambda: _problem(torch.float16),
    "float64": lambda: _problem(torch.float64),
    "head_dim to 256, divisible by 8": lambda: _problem(head_dim=200, head_dim_v=200),
    "head_dim to 256, any other": lambda: _problem(head_dim=59, head_dim_v=59),
    "head_dim above 256": lambda: _problem(head_dim=320, head_dim_v=320),
    "value head_dim of its own": lambda: _problem(head_dim=192, head_dim_v=128),
    "causal, top-left and bottom-right": lambda: _problem(is_causal="bottom_right"),
    "key_mask": lambda: _problem(key_mask=torch.ones(2, 12, dtype=torch.bool)),
    "key_lengths, query_lengths": lambda: _problem(key_lengths=torch.tensor([8, 3]), query_lengths=torch.tensor([8, 3])),
    "attn_mask, bool": lambda: _problem(attn_mask=torch.ones(8, 12, dtype=torch.bool)),
    "attn_mask, float": lambda: _problem(attn_mask=torch.zeros(8, 12)),
    "attn_mask with its gradient": lambda: _problem(attn_mask=torch.zeros(8, 12, requires_grad=True)),
    "PreparedMask": lambda: _problem(attn_mask=prepare_mask(window=(4, 4), seqlen_q=8, seqlen_k=12)),
    "dropout": lambda: _problem(dropout_p=0.1),
    "lse and its gradient": _problem,
    "grouped-query heads": lambda: _problem(num_heads_kv=1),
    "window": lambda: _problem(window=(4, 4)),
    "diagonal at any offset": lambda: _problem(is_causal=True, diagonal=5),
    "softcap": lambda: _problem(softcap=30.0),
    "alibi_slopes": lambda: _problem(alibi_slopes=torch.ones(2)),
    "sinks": lambda: _problem(sinks=torch.zeros(2)),
    "attention_varlen": _packed_problem,
    "attention_decode": lambda: _problem(key_lengths=torch.tensor([12, 3]), is_causal="bottom_right"),
    "attention_decode, 8-bit cache": _quantized_problem,
}


KERNEL, OPERATOR, REFERENCE = "the kernel", "the kernel, as one operator", "the reference"
TRANSFORMS = {  # what torch may do with a call, and what runs then, for every backend
    "no gradient, inference mode": KERNEL,
    "gradients": KERNEL,
    "derivatives of derivatives, of any order": REFERENCE,
    "forward-mode AD": REFERENCE,
    "torch.func: vmap, grad, vjp, jvp, jacrev, jacfwd, hessian": REFERENCE,
    "torch.autograd.grad with is_grads_batched": KERNEL,
    "torch.compile(fullgraph=True), sizes may change": OPERATOR,
    "torch.func inside torch.compile": REFERENCE,
    "torch.export, AOTInductor": OPERATOR,
    "checkpointing, reentrant or not": KERNEL,
    "selective checkpointing": OPERATOR,
    "autocast": KERNEL,
    "FLOP counter": OPERATOR,
    "fake tensors": OPERATOR,
    "meta tensors": REFERENCE,
    "nested tensors, layout torch.jagged": KERNEL,
    "DTensor, sharded over batch or heads": OPERATOR,
}


def transforms_table() -> str:
    return "\n".join(["| what torch does | what runs |", "|---|---|", *[f"| {name} | {runs} |" for name, runs in TRANSFORMS.items()]])


def support_table() -> str:
    """A Markdown table: "yes" if a backend's kernels run the feature forward and backward, "forward" if only without gradients."""
    lines = ["| feature | " + " | ".join(BACKENDS) + " |", "|---|" + "---|" * len(BACKENDS)]
    for feature, problem in FEATURES.items():
        answers = [_answer(backend.uncovered, problem()) for backend in BACKENDS.values()]
        lines.append(f"| {feature} | " + " | ".join(answers) + " |")
    return "\n".join(lines)


def _answer(uncovered: Callable[[Problem], list[str]], problem: Problem) -> str:
    if not uncovered(problem):
        return "yes"
    with torch.no_grad():
        return "-" if uncovered(problem) else "forward"


if __name__ == "__main__":
    print(support_table(), transforms_table(), sep="\n\n")
