"""MultiHeadAttention: torch.nn.MultiheadAttention's parameters and interface on the fused attention operation.

1. Project the inputs, packed if they are the same tensor: one buffer for q, k and v in self-attention, one for k and v
   in cross-attention, so that the backward pass writes one gradient buffer instead of adding zero-filled ones.
2. Translate torch's masks (True = blocked) to the operation's (True = may attend); key padding is never expanded.
3. Attend; merge the heads (a view, because the operation writes (batch, length, heads, head_dim)); project out.

It differs from torch's module only where torch is inconsistent: a query that may attend to nothing gets weights 0 and
the output projection's bias, never NaN; training, evaluation and no_grad run the same code; out_proj's hooks run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.attention import (
    attention,
    attention_kv_packed,
    attention_qkv_packed,
    attention_with_weights,
)
from ..kernels.problem import Layout, PreparedMask
from ..kernels.torch_internals import tracing_state
from . import nested

_HOOK = -1  # the hook's key among the forward pre-hooks; torch's keys start at 0


class MultiHeadAttention(torch.nn.MultiheadAttention):
    """Drop-in replacement for torch.nn.MultiheadAttention (Vaswani et al. 2017, section 3.2.2).

    Constructor, parameters, initialization, state_dict keys and forward signature are torch's. Inside torch's own
    TransformerEncoderLayer, TransformerDecoderLayer and Transformer it is called in every mode, never bypassed.
    `replace_attention` swaps it into an existing model, `restore_attention` undoes that.

    torch.fx treats it as a leaf, like torch's. torch.jit.script is refused, and so is torch.jit.trace outside torch.onnx.export.
    """

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        self._take_torchs_place()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_torchs_place()

    def _take_torchs_place(self) -> None:
        prevent_bypass(self)
        # torch.fx checks this, and traces into modules that are not from torch.nn.
        self.__module__ = torch.nn.MultiheadAttention.__module__

    def _leave_torchs_place(self) -> None:
        allow_bypass(self)
        self.__dict__.pop("__module__", None)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("MultiHeadAttention cannot be compiled by torch.jit.script; use torch.compile or torch.export")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | PreparedMask | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from query to key and value. N: batch, L: queries, S: keys, E: embed_dim, H: heads.

        Args:
            query: (N, L, E) if batch_first, else (L, N, E); (L, E) without a batch. If it is the same tensor object as
                key and value, they are projected together.
            key: (N, S, kdim) or (S, N, kdim); (S, kdim) without a batch.
            value: like key, with vdim.
            key_padding_mask: (N, S), or (S,) without a batch. bool, True = the key is absent: its key and value do not
                affect the result, or the gradients of other inputs. As in torch, the gradients of the projection weights
                include its contents times 0, so they must be finite in training. Or float, added to the scores,
                differentiable.
            need_weights: also return the attention weights, at the cost of computing and storing them.
            attn_mask: (L, S) or (N * H, L, S). bool, True = blocked; or float, added to the scores, differentiable. Or a
                PreparedMask, which holds all the masking and in which True = may attend; its S includes appended keys.
            average_attn_weights: whether the returned weights are averaged over the heads.
            is_causal: promises that attn_mask is the causal mask (query i sees keys j <= i). As in torch, the mask is then not
                read, unless it is a PreparedMask, key_padding_mask is given or weights are returned. Requires attn_mask.

        With batch_first, query, key and value may be nested tensors, (N, ragged L or S, E), without masks or appended keys;
        is_causal then needs no attn_mask. They are padded only if need_weights is True.

        Returns:
            The output in query's layout, and None or, if need_weights, the weights after dropout: (N, L, S) averaged, or
            (N, H, L, S), without N for input without a batch. For nested tensors they are padded with 0 to the longest sequences.
            Both are differentiable. add_bias_kv and add_zero_attn each append a key to S, which every query sees.

        Raises:
            AssertionError: wrong number of dimensions, embedding or padding mask size; integer masks; nested tensors with
                arguments they do not support.
            RuntimeError: wrong attn_mask size; is_causal without attn_mask; differing dtypes.
            TypeError: attn_mask is something else.
            ValueError: a PreparedMask of another size, or together with key_padding_mask.
        """
        if tracing_state() is not None and torch.onnx.is_in_onnx_export():
            # torch.onnx.export(dynamo=False) supports only the operators of torch's own forward.
            if isinstance(attn_mask, PreparedMask):
                raise TypeError("attn_mask must be a torch.Tensor in torch.onnx.export(dynamo=False), got a PreparedMask")
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if query.is_nested or key.is_nested or value.is_nested:
            nested.check(self, query, key, value, key_padding_mask, attn_mask)
            return self._forward_nested(query, key, value, need_weights, average_attn_weights, bool(is_causal))
        # torch's decoder derives is_causal from the mask's values, so torch.compile may not know it; the mask is then read.
        causal = is_causal is True and key_padding_mask is None and not need_weights and not isinstance(attn_mask, PreparedMask)
        _check_inputs(self, query, key, value, key_padding_mask, attn_mask, is_causal, mask_is_read=not causal)
        self_attention, same_memory = query is key and key is value, key is value
        batched = query.dim() == 3
        if not batched:
            query = query.unsqueeze(0)
            key = query if self_attention else key.unsqueeze(0)
            value = key if same_memory else value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        sequence_first = batched and not self.batch_first

        projected = self._project(query, key, value, self_attention, same_memory, sequence_first)
        extra_keys = self._num_extra_keys()
        if causal and extra_keys:
            seqlen_dim = 0 if sequence_first else 1
            seqlens = query.shape[seqlen_dim], key.shape[seqlen_dim]
            attn_mask, causal = torch.ones(seqlens, dtype=torch.bool, device=query.device).triu(1), False
        options: dict[str, Any] = {"is_causal": True} if causal else _mask_options(key_padding_mask, attn_mask, self.num_heads, extra_keys)
        if self.training and self.dropout > 0.0:
            options["dropout_p"] = self.dropout
            if need_weights:
                # Drawn here, not inside the operation, because the weights are recomputed with the output's dropout mask.
                options["rng_state"] = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=query.device)

        weights = None
        layout, operation = _OPERATION_BY_INPUTS[len(projected)]
        if need_weights:
            out, weights = attention_with_weights(layout, projected, average_heads=average_attn_weights, **options)
        else:
            out = operation(*projected, **options)

        merged = (out.permute(2, 0, 1, 3) if sequence_first else out.transpose(1, 2)).flatten(2)
        output = self.out_proj(merged)
        if batched:
            return output, weights
        return output.squeeze(0), None if weights is None else weights.squeeze(0)

    def _project(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        self_attention: bool,
        same_memory: bool,
        sequence_first: bool,
    ) -> tuple[Tensor, ...]:
        """The operation's inputs, views of the projections' memory: (qkv,), (q, kv) or (q, k, v).

        qkv is (N, L, 3, H, D), kv is (N, S, 2, H, D), and q, k, v are (N, H, L or S, D).
        """
        extra_keys = self._num_extra_keys()
        weight: Tensor | None = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        if bias is not None and weight is not None and bias.dtype != weight.dtype:
            bias = bias.to(weight.dtype)

        def split_heads(projected: Tensor, parts: int) -> Tensor:
            split = projected.view(*projected.shape[:2], parts, self.num_heads, self.head_dim)
            return split.transpose(0, 1) if sequence_first else split

        def heads_first(projected: Tensor) -> Tensor:
            return split_heads(projected, 1).squeeze(2).transpose(1, 2)

        if weight is not None and not extra_keys:
            if self_attention:
                return (split_heads(F.linear(query, weight, bias), 3),)
            if same_memory:
                # split, not slices: its backward concatenates the two gradients; slices would zero-fill and add full-size ones.
                sizes = (self.embed_dim, 2 * self.embed_dim)
                q_weight, kv_weight = weight.split(sizes)
                q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
                q = heads_first(F.linear(query, q_weight, q_bias))
                return q, split_heads(F.linear(key, kv_weight, kv_bias), 2)

        q, k, v = (heads_first(F.linear(x, w, b)) for x, (w, b) in zip((query, key, value), self._separate_projections(bias), strict=True))
        if extra_keys:
            k, v = self._append_keys(k, self.bias_k), self._append_keys(v, self.bias_v)
        return q, k, v

    def _separate_projections(self, bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of q, k and v, whether their parameters are packed or not; bias: (3 * embed_dim,)."""
        weight: Tensor | None = self.in_proj_weight
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        return list(zip(weights, (None, None, None) if bias is None else bias.chunk(3), strict=True))

    def _num_extra_keys(self) -> int:
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _append_keys(self, rows: Tensor, learned: Tensor | None) -> Tensor:
        """Appends add_bias_kv's learned row, then add_zero_attn's row of zeros, to keys or values (N, H, S, D)."""
        row_shape = (rows.shape[0], self.num_heads, 1, self.head_dim)
        appended = [rows]
        if learned is not None:
            appended.append(learned.to(rows.dtype).view(1, self.num_heads, 1, self.head_dim).expand(row_shape))
        if self.add_zero_attn:
            appended.append(rows.new_zeros(row_shape))
        return torch.cat(appended, dim=2)

    def _heads_of(self, *inputs: Tensor) -> list[Tensor]:
        """query, key and value (..., E) projected: (..., H, D) each."""
        projections = self._separate_projections(self.in_proj_bias)
        return [F.linear(x, w, b).unflatten(-1, (self.num_heads, self.head_dim)) for x, (w, b) in zip(inputs, projections, strict=True)]

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Nested tensors (N, ragged, E) run packed, or padded if weights are needed, which have the size of the longest sequences."""
        if not need_weights:
            dropout_p = self.dropout if self.training else 0.0
            return nested.attend(query, key, value, self._heads_of, self.out_proj, is_causal=is_causal, dropout_p=dropout_p), None
        padded, mask = nested.pad(query, key, value, is_causal)
        output, weights = self.forward(*padded, attn_mask=mask, average_attn_weights=average_attn_weights)
        return nested.unpad(output, like=query), weights


def prevent_bypass(attention: torch.nn.MultiheadAttention) -> None:
    # NOTE: torch.nn.TransformerEncoderLayer in eval mode without grad passes its weights to torch's own fused kernel,
    # regardless of self_attn's class, unless a module in it has a forward hook.
    attention._forward_pre_hooks[_HOOK] = _keep_forward_in_use


def allow_bypass(attention: torch.nn.MultiheadAttention) -> None:
    """Undoes `prevent_bypass`."""
    attention._forward_pre_hooks.pop(_HOOK, None)


def _keep_forward_in_use(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing."""


_OPERATION_BY_INPUTS: dict[int, tuple[Layout, Callable[..., Any]]] = {
    1: ("qkv", attention_qkv_packed),
    2: ("kv", attention_kv_packed),
    3: ("separate", attention),
}


def _mask_options(
    key_padding_mask: Tensor | None, attn_mask: Tensor | PreparedMask | None, num_heads: int, extra_keys: int
) -> dict[str, Any]:
    """The operation's mask options: torch's masks with polarity flipped and appended keys unmasked."""
    options: dict[str, Any] = {}
    if isinstance(attn_mask, PreparedMask):
        return {"attn_mask": attn_mask}
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = ~attn_mask
        by_head = attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.dim() == 3 else attn_mask
        attn_mask = _pad_open(by_head, extra_keys)

    if key_padding_mask is not None:
        if key_padding_mask.dtype is torch.bool:
            key_mask = ~key_padding_mask
        else:
            # torch's encoder and decoder layers turn bool padding masks into 0 and -inf: those keys are absent too.
            key_mask = key_padding_mask != float("-inf")
            key_bias = _pad_open(key_padding_mask, extra_keys)[:, None, None, :]
            if attn_mask is None:
                attn_mask = key_bias
            elif attn_mask.dtype is torch.bool:
                attn_mask = torch.where(attn_mask, key_bias, float("-inf"))
            else:
                attn_mask = attn_mask + key_bias
        options["key_mask"] = _pad_open(key_mask, extra_keys)
    if attn_mask is not None:
        options["attn_mask"] = attn_mask
    return options


def _pad_open(mask: Tensor, num_keys: int) -> Tensor:
    """Appends keys that may be attended to a bool (True = may attend) or additive mask (..., S)."""
    if num_keys == 0:
        return mask
    return F.pad(mask, (0, num_keys), value=mask.dtype is torch.bool)


def _check_inputs(
    module: MultiHeadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | PreparedMask | None,
    is_causal: bool,
    mask_is_read: bool,
) -> None:
    """Refuses what torch.nn.MultiheadAttention refuses, with its exception types and wording."""
    dims = query.dim()
    if dims not in (2, 3):
        raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {dims}-D query tensor")
    kind = "batched (3-D)" if dims == 3 else "unbatched (2-D)"
    if key.dim() != dims or value.dim() != dims:
        raise AssertionError(
            f"For {kind} `query`, expected `key` and `value` to be {dims}-D"
            f" but found {key.dim()}-D and {value.dim()}-D tensors respectively"
        )
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {module.embed_dim}, but got {query.shape[-1]}")
    if module.in_proj_weight is None:
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}")
    elif key.shape != value.shape:
        raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")

    if dims == 2:
        batch_size, seqlen_q, seqlen_k = 1, query.shape[0], key.shape[0]
    else:
        batch_dim = 0 if module.batch_first else 1
        batch_size, seqlen_q, seqlen_k = query.shape[batch_dim], query.shape[1 - batch_dim], key.shape[1 - batch_dim]
        if key.shape[batch_dim] != batch_size:
            raise AssertionError(f"key's batch size {key.shape[batch_dim]} does not match query's {batch_size}")

    if key_padding_mask is not None:
        _check_mask_dtype(key_padding_mask, "key_padding_mask")
        if key_padding_mask.dim() != dims - 1:
            raise AssertionError(
                f"For {kind} `query`, expected `key_padding_mask` to be `None` or {dims - 1}-D"
                f" but found {key_padding_mask.dim()}-D tensor instead"
            )

    if isinstance(attn_mask, PreparedMask):
        if key_padding_mask is not None:
            raise ValueError(
                "key_padding_mask must not be given beside a PreparedMask: give it to prepare_mask as key_mask, True = may attend"
            )
    elif attn_mask is not None:
        _check_attn_mask(attn_mask, (batch_size * module.num_heads, seqlen_q, seqlen_k), kind, mask_is_read)
    elif is_causal:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )

    if key_padding_mask is not None:
        for dim, size in enumerate((batch_size, seqlen_k)[3 - dims :]):
            if key_padding_mask.shape[dim] != size:
                raise AssertionError(f"Expected key_padded_mask.shape[{dim}] to be {size}, but got {key_padding_mask.shape[dim]}")


def _check_attn_mask(attn_mask: Tensor, shape: tuple[int, int, int], kind: str, is_read: bool) -> None:
    """`shape` is that of a 3-D mask, (batch * heads, seqlen_q, seqlen_k); the size of a mask that is not read does not matter."""
    _check_mask_dtype(attn_mask, "attn_mask")
    if attn_mask.dim() not in (2, 3):
        raise AssertionError(
            f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D but found {attn_mask.dim()}-D tensor instead"
        )
    expected = shape[3 - attn_mask.dim() :]
    if attn_mask.shape == expected:
        return
    if kind.startswith("unbatched") and attn_mask.dim() == 3:
        raise AssertionError(f"Expected `attn_mask` shape to be {expected} but got {attn_mask.shape}")
    if is_read:
        raise RuntimeError(f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}.")


def _check_mask_dtype(mask: Tensor, name: str) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise AssertionError(f"only bool and floating types of {name} are supported")
