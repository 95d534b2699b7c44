"""An LSTM encoder-decoder with attention, to compare with the Transformer; trained and searched by the same code (search.py)."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..kernels.attention import attention, attention_weights
from .checks import check_dropout, check_tokens, checked_integer_in
from .generate import Generation, evaluating
from .layers import dropout
from .linear import Linear, linear
from .memory import Padding

LSTMState = tuple[Tensor, Tensor]  # hidden and cell states, (num_layers, R, d_model) each


class LSTMEncoderDecoder(Generation):
    """The encoder-decoder of Luong et al. 2015 ("Effective Approaches to Attention-based Neural Machine Translation"), batch-first.

    1. A bidirectional LSTM reads the source and gives e (S, d_model), half of it from each direction.
    2. Another LSTM, which starts from the encoder's final state, reads the translation and gives h (T, d_model).
    3. Global attention with the "general" score, h_t W_a e_s, averages e into contexts c (T, d_model).
    4. tanh(W_c [c_t; h_t]) is projected onto the vocabulary.
    There is no input feeding (section 3.3 of the paper), so in training the decoder LSTM processes the whole target in one call.

    num_layers: of each LSTM. dropout: probability for the embeddings, between the layers of each LSTM, and before the projection.
    tie_weights: the target embedding's matrix is also the projection, without a bias, and the source embedding if src_vocab == tgt_vocab.
    max_len, pad_id, bos_id, eos_id: as in Transformer. Sources are padded on the right.

    `config` holds these arguments. Raises ValueError or TypeError, naming the argument.
    """

    def __init__(
        self,
        src_vocab: int,
        tgt_vocab: int,
        d_model: int = 256,
        num_layers: int = 2,
        dropout: float = 0.1,
        tie_weights: bool = False,
        pad_id: int = 0,
        bos_id: int = 1,
        eos_id: int = 2,
        max_len: int = 512,
    ) -> None:
        arguments = locals()
        super().__init__()
        self.config: dict[str, Any] = {name: arguments[name] for name in inspect.signature(LSTMEncoderDecoder).parameters}
        for name in ("src_vocab", "tgt_vocab", "d_model", "num_layers", "max_len"):
            checked_integer_in(name, arguments[name], 1)
        for name in ("pad_id", "bos_id", "eos_id"):
            checked_integer_in(name, arguments[name], 0, min(src_vocab, tgt_vocab) - 1)
        if d_model % 2:
            raise ValueError(f"d_model must be even, half for each direction of the encoder, got {d_model}")
        check_dropout(dropout)
        self.tgt_vocab, self.d_model, self.num_layers, self.dropout = tgt_vocab, d_model, num_layers, dropout
        self.pad_id, self.bos_id, self.eos_id, self.max_len = pad_id, bos_id, eos_id, max_len

        self.tgt_embedding = nn.Embedding(tgt_vocab, d_model, pad_id)
        self.src_embedding = None if tie_weights and src_vocab == tgt_vocab else nn.Embedding(src_vocab, d_model, pad_id)
        between_layers = dropout if num_layers > 1 else 0.0
        self.encoder = nn.LSTM(d_model, d_model // 2, num_layers, batch_first=True, dropout=between_layers, bidirectional=True)
        self.decoder = nn.LSTM(d_model, d_model, num_layers, batch_first=True, dropout=between_layers)
        self.attention_score = Linear(d_model, d_model, bias=False)  # W_a, transposed
        self.combine = Linear(2 * d_model, d_model, bias=False)  # W_c
        self.output = None if tie_weights else Linear(d_model, tgt_vocab)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings start as in TokenEmbedding, so that a tied projection starts like the Transformer's; LSTMs start as in torch."""
        for embedding in (self.tgt_embedding, self.src_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=self.d_model**-0.5)
                nn.init.zeros_(embedding.weight[self.pad_id].detach())
        for layer in (self.attention_score, self.combine):
            nn.init.xavier_uniform_(layer.weight)
        if self.output is not None:
            nn.init.xavier_uniform_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits (B, T, tgt_vocab) for src (B, S) and tgt (B, T), int64: position t scores the token after tgt[:, : t + 1]."""
        memory = self.encode(src)
        if tgt.shape[0] != memory.batch_size:
            raise ValueError(f"tgt has {tgt.shape[0]} rows, src has {memory.batch_size}; they must be equal")
        return self.decode(tgt, memory, LSTMCache())

    def encode(self, src: Tensor) -> LSTMMemory:
        """src (B, S) int64, padded with pad_id on the right."""
        check_tokens("src", src, self.max_len)
        padding = Padding.of(src != self.pad_id)
        lengths = padding.lengths.cpu().clamp(min=1)
        embedded = self._embedded(self.tgt_embedding if self.src_embedding is None else self.src_embedding, src)
        if src.numel() == 0:
            state = embedded.new_zeros(2, self.num_layers, src.shape[0], self.d_model)
            return LSTMMemory(embedded, padding, (state[0], state[1]))
        # Packing makes the backward direction start at each row's last token. Without it torch uses faster kernels.
        if (lengths == src.shape[1]).all():
            outputs, state = self.encoder(embedded)
        else:
            outputs, state = self.encoder(pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False))
            outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=src.shape[1])
        hidden, cell = (self._both_directions(part) for part in state)
        return LSTMMemory(outputs, padding, (hidden, cell))

    def start_decoding(self, src: Tensor, capacity: int) -> tuple[LSTMMemory, LSTMCache]:
        """The memory of src (B, S) and an empty cache; the state needs no capacity."""
        return self.encode(src), LSTMCache()

    def decode(self, tgt: Tensor, memory: LSTMMemory, cache: LSTMCache) -> Tensor:
        """Logits (R, T, tgt_vocab) for tgt (R, T) int64, the tokens after those the cache has seen.

        Row r translates source r // (R / B).
        """
        states = self._states(tgt, memory, cache)
        query, key = self._scored(states, memory)
        context = cast(Tensor, attention(query, key, key, scale=1.0, key_lengths=memory.padding.lengths)).view(states.shape)
        attentional = torch.tanh(self.combine(torch.cat([context, states], -1)))
        weight, bias = (self.tgt_embedding.weight, None) if self.output is None else (self.output.weight, self.output.bias)
        return linear(dropout(attentional, self.dropout, self.training), weight, bias)

    def attention_maps(self, src: Tensor, tgt: Tensor) -> dict[str, list[Tensor]]:
        """{"cross": [(B, 1, T, S)]}: the attention of each position of tgt (B, T) to src (B, S), without dropout and gradients."""
        with evaluating(self), torch.no_grad():
            memory = self.encode(src)
            query, key = self._scored(self._states(tgt, memory, LSTMCache()), memory)
            options: dict[str, Any] = {"scale": 1.0, "key_lengths": memory.padding.lengths}
            _, lse = attention(query, key, key, return_lse=True, **options)
            return {"cross": [attention_weights(query, key, lse, **options)]}

    def _embedded(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        return dropout(embedding(tokens) * math.sqrt(self.d_model), self.dropout, self.training)

    def _both_directions(self, state: Tensor) -> Tensor:
        """The encoder's final state (num_layers * 2, B, d_model / 2) -> the decoder's first (num_layers, B, d_model)."""
        return state.unflatten(0, (self.num_layers, 2)).transpose(1, 2).flatten(2)

    def _states(self, tgt: Tensor, memory: LSTMMemory, cache: LSTMCache) -> Tensor:
        """The outputs of the decoder LSTM, (R, T, d_model); the cache keeps its state."""
        check_tokens("tgt", tgt, self.max_len)
        if cache.state is None:
            beams = tgt.shape[0] // max(memory.batch_size, 1)
            hidden, cell = (part.repeat_interleave(beams, 1) for part in memory.state)
            cache.state = hidden, cell
        embedded = self._embedded(self.tgt_embedding, tgt)
        if tgt.numel() == 0:
            return embedded
        states, cache.state = self.decoder(embedded, cache.state)
        return states

    def _scored(self, states: Tensor, memory: LSTMMemory) -> tuple[Tensor, Tensor]:
        """Query (B, 1, beams * T, d_model) and key (B, 1, S, d_model), whose products are the scores; beams share their source's keys."""
        query = self.attention_score(states).view(memory.batch_size, 1, -1, self.d_model)
        return query, memory.outputs.to(query.dtype).unsqueeze(1)


@dataclass(frozen=True)
class LSTMMemory:
    """What the decoder reads of B sources."""

    outputs: Tensor  # (B, S, d_model), of the encoder
    padding: Padding
    state: LSTMState  # with which the decoder starts

    @property
    def batch_size(self) -> int:
        return self.outputs.shape[0]

    @property
    def device(self) -> torch.device:
        return self.outputs.device

    def select(self, rows: Tensor) -> LSTMMemory:
        hidden, cell = self.state
        return LSTMMemory(self.outputs[rows], self.padding.select(rows), (hidden[:, rows], cell[:, rows]))


@dataclass
class LSTMCache:
    """The decoder's state after the tokens so far, of the same size for any number of them; None before the first."""

    state: LSTMState | None = None

    def select(self, rows: Tensor) -> None:
        if self.state is not None:
            hidden, cell = self.state
            rows = rows.to(hidden.device)
            self.state = hidden[:, rows], cell[:, rows]
