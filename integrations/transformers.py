"""The fused kernels in transformers (version 5.24 or later): attn_implementation="fused_attention", after `register()`.

1. For each forward pass, transformers asks `fused_attention_mask` for one mask per kind of layer (full, sliding). The usual patterns come
   back as a Masking, without a matrix; a mask over masks, such as packed or chunked sequences, as the boolean matrix of its sdpa.
2. Each layer passes it to `fused_attention_forward`, which calls `attention`.
3. Models whose classes compute attention themselves are refused when they are made with this name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.attention import attention, attention_weights
from ..transformer.optional import MissingModuleError, optional_module

NAME = "fused_attention"
# Modules of transformers where some layers compute attention themselves, or cut the masks that they are given.
NOT_SERVED = ("bigbird_pegasus", "gemma4", "gemma4_unified", "git", "informer")


class Masking(NamedTuple):
    """A mask as arguments of `attention`."""

    key_mask: Tensor | None  # (B, Lk) bool, True = may attend
    is_causal: bool
    window: tuple[int | None, int | None] | None
    diagonal: int | None

    @property
    def ndim(self) -> int:
        """As a matrix of masks: generate makes those of a static cache itself, and then models leave what has 4 dims alone."""
        return 4


def register() -> str:
    """Makes attn_implementation="fused_attention" known to transformers, and returns the name; a second call changes nothing.

    A model that takes no attention function, such as BLOOM, MPNet, DeBERTa and Falcon, is then refused under this name with a ValueError
    that names its class; set_attn_implementation leaves it as it was and logs its name.

    Raises:
        MissingModuleError: transformers is not installed, or is older than 5.24; early versions 5 make masks another way.
    """
    version = optional_module("transformers", "transformers").__version__
    if tuple(int(number) for number in version.split(".")[:2]) < (5, 24):
        raise MissingModuleError(f"transformers {version} is too old; install 5.24 with: pip install -U 'fused-attention[transformers]'")
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    AttentionInterface.register(NAME, fused_attention_forward)
    AttentionMaskInterface.register(NAME, fused_attention_mask)
    model: Any = PreTrainedModel
    check = model.get_correct_attn_implementation
    if not hasattr(check, "__wrapped__"):
        model.get_correct_attn_implementation = _refusing(check)
    return NAME


def _refusing(check: Callable[..., str]) -> Callable[..., str]:
    """transformers' check of an implementation's name, which also refuses models that would not call the function of that name."""

    @wraps(check)
    def refusing_check(model: Any, requested_attention: str | None, *arguments: Any, **options: Any) -> str:
        in_part = any(type(model).__module__.startswith(f"transformers.models.{name}.") for name in NOT_SERVED)
        if requested_attention == NAME and (in_part or not model._can_set_attn_implementation()):
            raise ValueError(
                f'{type(model).__name__} computes attention itself, at least in part, so attn_implementation="{NAME}" would not do what '
                'it says: use attn_implementation="eager"'
            )
        return check(model, requested_attention, *arguments, **options)

    return refusing_check


def fused_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | Masking | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Masking | Tensor | None:
    """The mask of one kind of layer in one forward pass, an AttentionMaskInterface function.

    attention_mask: (B, L) bool padding, True = a token, for the keys from position 0; those past L are absent. A Masking is returned as it
    is. Queries start at position q_offset, keys at kv_offset. local_size: the sliding window. The allow_ flags say that the pattern is the
    plain causal or bidirectional one and that the mask need not be a matrix.

    Returns a Masking; None if the attention function's own rule, causal or not, is all there is; or (B, 1, Lq, Lk) bool, for other patterns
    and for static caches, whose q_offset is a tensor.
    """
    if isinstance(attention_mask, Masking):
        return attention_mask
    from transformers import masking_utils

    sdpa_mask: Any = masking_utils.sdpa_mask  # whose annotations leave out that q_offset may be a tensor
    is_chunk = local_size is not None and local_size == getattr(kwargs.get("config"), "attention_chunk_size", None)
    plain = (allow_is_causal_skip or allow_is_bidirectional_skip) and not is_chunk
    if not plain or isinstance(q_offset, Tensor) or (attention_mask is not None and attention_mask.dim() != 2):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )
    diagonal = q_offset - kv_offset
    last = diagonal + q_length - 1  # the key that is at the last query's position
    is_causal = allow_is_causal_skip and kv_length > diagonal + 1
    window: tuple[int | None, int | None] | None = None
    if local_size is not None and allow_is_causal_skip and last >= local_size:
        window = (local_size - 1, None)
    elif local_size is not None and not allow_is_causal_skip and max(last, kv_length - 1 - diagonal) > local_size:
        window = (local_size, local_size)
    key_mask = None
    if attention_mask is not None:
        key_mask = F.pad(attention_mask, (-kv_offset, kv_offset + kv_length - attention_mask.shape[1])).expand(batch_size, -1)
        if not torch.compiler.is_compiling() and bool(key_mask.all()):
            key_mask = None
    if key_mask is None and window is None and (diagonal == 0 or not is_causal):
        return None
    return Masking(key_mask, is_causal, window, diagonal if diagonal and (is_causal or window) else None)


def fused_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Masking | Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention` as an AttentionInterface function.

    Args:
        module: the layer; its is_causal counts if neither the argument nor a mask is given.
        query: (B, Hq, Lq, Dqk). key: (B, Hkv, Lk, Dqk). value: (B, Hkv, Lk, Dv).
        attention_mask: from `fused_attention_mask`, or bool or float that broadcasts to (B, Hq, Lq, Lk) and is the whole mask.
        scaling: factor applied to the scores.
        position_bias: added to the scaled scores, broadcastable to (B, Hq, Lq, Lk); differentiable.
        s_aux: (Hq,) sinks.

    Returns:
        out (B, Lq, Hq, Dv), and the weights after dropout (B, Hq, Lq, Lk) if the call or the model's output_attentions asks for them.

    Raises:
        ValueError: the layer selects keys by indices, which it passes only to functions made for that.
    """
    for name in ("indices", "block_indices", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(f'{type(module).__name__} passes {name}, which "{NAME}" does not take: use attn_implementation="eager"')
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options = _mask_options(query, attention_mask, position_bias, is_causal)
    options |= {"scale": scaling, "dropout_p": dropout, "softcap": softcap, "sinks": s_aux}
    if not (output_attentions or _weights_are_collected()):
        return attention(query, key, value, **options).transpose(1, 2), None  # type: ignore[union-attr]  # without lse
    if dropout > 0.0:
        options["rng_state"] = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=query.device)
    out, lse = attention(query, key, value, **options, return_lse=True)
    return out.transpose(1, 2), attention_weights(query, key, lse, **options)


def _mask_options(query: Tensor, mask: Masking | Tensor | None, bias: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The arguments of `attention` for a mask, a bias that is added, and, if there is no mask, causality."""
    if mask is None:
        return {"attn_mask": bias, "is_causal": is_causal and query.shape[2] > 1}  # a single query is the newest: it sees all keys
    if isinstance(mask, Masking):
        return {"attn_mask": bias, **mask._asdict()}
    if mask.dtype == torch.bool and mask.shape[:3] == (query.shape[0], 1, 1):
        return {"attn_mask": bias, "key_mask": mask[:, 0, 0]}
    if bias is not None:
        mask = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
    return {"attn_mask": mask}


def _weights_are_collected() -> bool:
    """Whether a model's forward pass, not the layer's caller, wants the weights, as for output_attentions=True of most models."""
    from transformers.utils import output_capturing

    return any(name.endswith("attentions") for name in output_capturing._active_collector.get() or ())
