"""A Transformer as two torch.export programs that run without its code: the encoder, and one step of the decoder.

    tokens, memory, caches = encoder(src)
    while wanted:
        logits, caches = step(tokens, memory, caches)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)

Both take any number of sources of any length up to max_len. They call this package's attention operator, so `import fused_attention` before
torch.export.load. They run on the kind of device they were exported on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .cache import KVCache, LayerCache
from .generate import evaluating
from .memory import Memory, Padding
from .model import Transformer
from .quantize import check_float
from .search import Constraints

ProgramMemory = tuple[list[Tensor], Tensor, Tensor]


class EncoderProgram(nn.Module):
    """Returns what all decoder steps read, and what the first one starts from."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, src: Tensor) -> tuple[Tensor, ProgramMemory, list[Tensor]]:
        """src (B, S) int64, padded with pad_id -> tokens (B, 1), all bos_id; memory; empty caches.

        memory: the keys and values of every decoder layer, (B, S, 2, H, D) each; a mask, (B, S) bool, False for padding; the position
        of the last token + 1, (B,) int32.
        """
        memory, _ = self.model.start_decoding(src, capacity=1)
        assert memory.keys_values is not None
        tokens = src.new_full((src.shape[0], 1), self.model.bos_id)
        if self.model.decoder_cell == "ssru":
            caches = [kv.new_zeros(kv.shape[0], 1, self.model.config["d_model"]) for kv in memory.keys_values]
        else:
            caches = [kv.new_zeros(kv.shape[0], 0, *kv.shape[2:]) for kv in memory.keys_values]
        return tokens, (memory.keys_values, memory.padding.key_mask, memory.padding.lengths), caches


class DecoderStepProgram(nn.Module):
    """Scores the next token of every row."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, memory: ProgramMemory, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """tokens (B, T) int64, bos_id and all tokens so far; the encoder's memory; caches of all tokens but the last -> logits
        (B, tgt_vocab), -inf for tokens that are never generated, and the caches of all tokens.

        caches: for every decoder layer, the keys and values of its self-attention, (B, T, 2, H, D), or the state of its SSRU,
        (B, 1, d_model).
        """
        keys_values, key_mask, lengths = memory
        cache = GrowingCache(self.model.is_token(tokens), caches, self.model.decoder_cell)
        logits = self.model.decode(tokens[:, -1:], Memory([], Padding(key_mask, lengths), keys_values), cache)[:, -1]
        return Constraints(self.model).apply(logits, tokens.shape[1] - 1), cache.tensors()


class GrowingCache(KVCache):
    """A cache built from exact-length tensors that returns new ones, because a program has no buffers to write to."""

    def __init__(self, key_mask: Tensor, tensors: list[Tensor], decoder_cell: str) -> None:
        """key_mask: (B, T) bool for all tokens; the tensors do not have the last one yet."""
        super().__init__()
        self.length = key_mask.shape[1] - 1
        self._key_mask = key_mask
        self.layers = [GrowingLayerCache(1) for _ in tensors]
        for layer, tensor in zip(self.layers, tensors, strict=True):
            layer.length = self.length
            setattr(layer, "state" if decoder_cell == "ssru" else "self_kv", tensor)

    def append(self, key_mask: Tensor, num_layers: int) -> dict[str, Tensor]:
        assert self._key_mask is not None
        return {"key_mask": self._key_mask}

    def tensors(self) -> list[Tensor]:
        held = [layer.self_kv if layer.state is None else layer.state for layer in self.layers]
        return [tensor for tensor in held if tensor is not None]


class GrowingLayerCache(LayerCache):
    def append(self, kv: Tensor) -> Tensor:
        assert self.self_kv is not None
        self.self_kv = torch.cat([self.self_kv, kv], 1)
        return self.self_kv


def export_programs(model: Transformer) -> tuple[ExportedProgram, ExportedProgram]:
    """The encoder and the decoder step, in eval mode. ValueError if the model has a shortlist or int8 weights: not supported."""
    check_float(model, "export")
    if model.shortlist is not None:
        raise ValueError("model.shortlist must be None: a program holds the whole vocabulary")
    encoder, step = EncoderProgram(model), DecoderStepProgram(model)
    rows, rows_of_any_length = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    held = Dim("held", min=0, max=model.max_len - 1)  # tokens in the caches
    cache = rows if model.decoder_cell == "ssru" else {0: Dim.DYNAMIC, 1: held}
    num_layers = len(model.decoder.layers)
    memory_sizes = ([rows_of_any_length] * num_layers, rows_of_any_length, rows)
    with evaluating(model), torch.no_grad():
        # Example sizes must be at least 2 to stay dynamic: two sources, and two tokens in the caches.
        src = torch.full((2, 2), model.eos_id, device=model.tgt_embedding.weight.device)
        tokens, memory, caches = encoder(src)
        for _ in range(2):
            _, caches = step(tokens, memory, caches)
            tokens = torch.cat([tokens, src[:, :1]], 1)
        step_sizes = ({0: Dim.DYNAMIC, 1: held + 1}, memory_sizes, [cache] * num_layers)
        return (
            torch.export.export(encoder, (src,), dynamic_shapes=(rows_of_any_length,)),
            torch.export.export(step, (tokens, memory, caches), dynamic_shapes=step_sizes),
        )
