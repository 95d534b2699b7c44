"""The encoder-decoder Transformer (Vaswani et al. 2017) on fused attention."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attention_maps import weights_in_forward
from .cache import KVCache
from .checks import check_dropout, check_features, check_layers, check_tokens, checked_integer_in
from .embedding import POSITIONS, SpectrogramEmbedding, TokenEmbedding
from .generate import Generation
from .layers import ACTIVATIONS, NORMS, Decoder, DecoderLayer, Encoder, EncoderLayer
from .linear import Linear, linear
from .memory import Candidates, Memory, Padding
from .optional import optional_module
from .quantize import check_float
from .relative_positions import RelativeBias

MEMORY_LAYERS = ("last", "each", "mixed")
DECODER_CELLS = ("attention", "ssru")
TIES = (True, False, "embeddings", "output")
RELATIVE_BIASES = ("none", "shared", "each")
SIZES = ("src_vocab", "tgt_vocab", "d_model", "num_heads", "num_encoder_layers", "num_decoder_layers", "dim_feedforward", "max_len")
DROPOUTS = ("embedding_dropout", "attention_dropout", "feed_forward_dropout", "residual_dropout", "layer_drop")
BOOLS = (
    *("norm_first", "final_norm", "output_bias", "gated", "bias"),
    *("embedding_scale", "embedding_norm", "train_padding", "output_scale"),
)
CHOICES: dict[str, Iterable[Any]] = {
    "memory_layers": MEMORY_LAYERS,
    "decoder_cell": DECODER_CELLS,
    "positions": POSITIONS,
    "tie_weights": TIES,
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "relative_bias": RELATIVE_BIASES,
}
TOKEN_IDS = ("pad_id", "bos_id", "eos_id")


class Transformer(Generation):
    """Encoder-decoder Transformer, batch-first.

    Token embeddings times sqrt(d_model) plus sinusoidal positions; encoder layers of self-attention and feed-forward
    network (relu); decoder layers of causal self-attention, attention to the encoder's memory and feed-forward
    network; dropout and LayerNorm around every residual branch; a projection to the target vocabulary. Padding is
    recognized by `pad_id`, in any pattern: padding tokens are never attended to, and a source that is all padding gives
    finite outputs and gradients.

    src_vocab, tgt_vocab: vocabulary sizes. max_len: longest source and target, in tokens.
    dropout: probability for embeddings, residual branches, the inside of the feed-forward network and attention
    weights; embedding_dropout, residual_dropout, feed_forward_dropout and attention_dropout are in its place where given.
    layer_drop: probability of leaving out each layer in training (LayerDrop, Fan et al. 2020).
    norm_first: False normalizes after each residual sum (the paper), True before each sublayer. Both stacks end with
        another LayerNorm (encoder.norm, decoder.norm), as in torch.nn.Transformer, unless final_norm is False, as in the
        paper and in Marian.
    decoder_cell: "attention", the paper's causal self-attention, or "ssru", a recurrent unit instead (ssru.py).
    layer_norm_eps: of every norm. positions: the layout of the sinusoids, "interleaved", "halves", "concatenated" or "fairseq";
        "learned", a parameter (max_len, d_model) for each side; "rotary", which turns the queries and keys of self-attention
        (relative_positions.rotate); or "none". TokenEmbedding says more.
    tie_weights: the output projection is the target embedding's matrix, without a bias; if src_vocab == tgt_vocab, the
        source embedding is that matrix too (Press & Wolf 2017; section 3.4 of the paper). "embeddings" and "output" share
        only the one or the other. A shared matrix appears once in parameters() and in state_dict(), as tgt_embedding.weight.
        Untied, `output` is a Linear. output_bias: gives a tied projection a bias, `output_bias` (tgt_vocab,).
    memory_layers: what decoder layer i attends to. "last": the last encoder layer (the paper). "each": encoder layer
        i, which needs equal depths (He et al. 2018). "mixed": an average of all encoder layers with weights
        softmax(memory_mix[i]), where memory_mix (num_decoder_layers, num_encoder_layers) is learned, starting from
        zeros, i.e. a plain mean (transparent attention, Bapna et al. 2018, without their embedding layer). Every
        encoder layer's output goes through encoder.norm first.
    pad_id, bos_id, eos_id: special tokens, the same ids in both vocabularies. bos_id may be pad_id: the first token of a target is
        never padding then. eos_id may be pad_id only if the sources are spectrograms.

    The options of pretrained models, which docs/pretrained.md lists:

    activation: of the feed-forward network, "relu", "gelu", "gelu_tanh" or "silu"; gated multiplies it with a second product
        (Shazeer 2020). norm: "layer" or "rms" (Zhang & Sennrich 2019). bias: whether products have a bias.
    head_dim: of the attentions, d_model / num_heads if None. attention_scale: of the scores, 1 / sqrt(head_dim) if None.
    relative_bias: "shared": each stack adds a learned bias (layers.RelativeBias) to the scores of its self-attention, the same in
        every layer; "each": every layer has its own (T5; UMT5). relative_buckets, relative_distance: its size and reach.
    embedding_scale: embeddings are multiplied by sqrt(d_model). embedding_norm: their sum with the positions is normalized.
        train_padding: the embedding of pad_id is trained too. output_scale: states are divided by sqrt(d_model) before the output.
    src_features: if not 0, sources are log-mel spectrograms (B, src_features, frames) float, all frames used, src_vocab is not, and
        the encoder starts with convolutions that halve the frames (SpectrogramEmbedding). max_src_len: longest source, in tokens or
        halved frames; max_len if None.

    Rotary positions and biases in the decoder are those of its attention: an SSRU has none.

    `config` holds these arguments: Transformer(**model.config) builds the same architecture. The encoder's and decoder's
    parameter names are torch.nn.Transformer's: model.load_state_dict(torch_transformer.state_dict(), strict=False)
    loads all of them, if the torch model has the default activation and layer_norm_eps. Outputs are differentiable
    with respect to every parameter.

    Raises ValueError or TypeError, naming the argument, for sizes, ids and options other than these.
    """

    def __init__(
        self,
        src_vocab: int,
        tgt_vocab: int,
        d_model: int = 512,
        num_heads: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        norm_first: bool = False,
        tie_weights: bool | str = False,
        memory_layers: str = "last",
        pad_id: int = 0,
        bos_id: int = 1,
        eos_id: int = 2,
        max_len: int = 512,
        decoder_cell: str = "attention",
        final_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        positions: str = "interleaved",
        output_bias: bool = False,
        embedding_dropout: float | None = None,
        attention_dropout: float | None = None,
        feed_forward_dropout: float | None = None,
        residual_dropout: float | None = None,
        layer_drop: float = 0.0,
        activation: str = "relu",
        gated: bool = False,
        norm: str = "layer",
        bias: bool = True,
        head_dim: int | None = None,
        attention_scale: float | None = None,
        relative_bias: str = "none",
        relative_buckets: int = 32,
        relative_distance: int = 128,
        embedding_scale: bool = True,
        embedding_norm: bool = False,
        train_padding: bool = False,
        output_scale: bool = False,
        src_features: int = 0,
        max_src_len: int | None = None,
    ) -> None:
        arguments = locals()
        config = {name: arguments[name] for name in inspect.signature(Transformer).parameters}
        config |= _checked_integers(config)
        _check_config(config)
        src_vocab, tgt_vocab, d_model, num_heads, num_encoder_layers, num_decoder_layers, dim_feedforward, max_len = (
            config[name] for name in SIZES
        )
        pad_id, bos_id, eos_id = (config[name] for name in TOKEN_IDS)
        super().__init__()
        self.config: dict[str, Any] = config
        self.pad_id, self.bos_id, self.eos_id, self.max_len = pad_id, bos_id, eos_id, max_len
        self.tgt_vocab, self.memory_layers, self.decoder_cell = tgt_vocab, memory_layers, decoder_cell
        self.src_features, self.output_scale = config["src_features"], output_scale
        self.max_src_len = max_len if max_src_len is None else config["max_src_len"]

        new_norm = partial(NORMS[norm], d_model, layer_norm_eps)
        embedding_options = (pad_id, dropout, positions, None if embedding_scale else 1.0)

        def embedding(vocab_size: int, length: int) -> TokenEmbedding:
            return TokenEmbedding(vocab_size, d_model, length, *embedding_options, new_norm() if embedding_norm else None, train_padding)

        self.tgt_embedding = embedding(tgt_vocab, max_len)
        self.src_embedding: TokenEmbedding | SpectrogramEmbedding | None
        shared_source = tie_weights in (True, "embeddings") and src_vocab == tgt_vocab
        if self.src_features:
            self.src_embedding = SpectrogramEmbedding(self.src_features, d_model, self.max_src_len, dropout)
        elif not shared_source:
            self.src_embedding = embedding(src_vocab, self.max_src_len)
        elif positions == "learned" or embedding_norm or self.max_src_len > max_len:
            self.src_embedding = embedding(0, self.max_src_len)  # with the target's matrix
        else:
            self.src_embedding = None
        sizes = (d_model, num_heads, dim_feedforward, dropout, norm_first, layer_norm_eps, activation, gated)
        attentions = {"head_dim": config["head_dim"], "scale": attention_scale, "rotary": positions == "rotary"}
        layer_options = {"norm": norm, "bias": bias, **attentions}
        biases = [self._relative_biases(bidirectional) for bidirectional in (True, False)]
        norms = [new_norm() if final_norm else nn.Identity() for _ in range(2)]
        encoder_layers = [EncoderLayer(*sizes, **layer_options) for _ in range(num_encoder_layers)]
        decoder_layers = [DecoderLayer(*sizes, cell=decoder_cell, **layer_options) for _ in range(num_decoder_layers)]
        self.encoder = Encoder(encoder_layers, norms[0], biases[0])
        self.decoder = Decoder(decoder_layers, norms[1], biases[1])
        self._set_dropouts()
        if memory_layers == "mixed":
            self.memory_mix = nn.Parameter(torch.zeros(num_decoder_layers, num_encoder_layers))
        self.output = None if tie_weights in (True, "output") else Linear(d_model, tgt_vocab, bias)
        if self.output is not None:
            nn.init.xavier_uniform_(self.output.weight)
            if bias:
                nn.init.zeros_(self.output.bias)
        self.output_bias = nn.Parameter(torch.zeros(tgt_vocab)) if output_bias else None
        # sources (B, S) -> (n,) int64, the only target tokens that generate, stream and beam_search may choose; None: any
        self.shortlist: Callable[[Tensor], Tensor] | None = None
        # what generate, stream and beam_search keep the target's keys and values as: None, the model's dtype, or one of 8 bits (KVCache)
        self.cache_dtype: torch.dtype | None = None

    def _set_dropouts(self) -> None:
        """Gives every part its own probability."""

        def probability(name: str) -> float:
            return self.config["dropout" if self.config[name] is None else name]

        for embedding in cast(Any, filter(None, (self.src_embedding, self.tgt_embedding))):
            embedding.dropout = probability("embedding_dropout")
        for stack in (self.encoder, self.decoder):
            stack.layer_drop = self.config["layer_drop"]
            for layer in cast(Any, stack.layers):
                layer.dropout = probability("residual_dropout")
                layer.feed_forward_dropout = probability("feed_forward_dropout")
                for name in ("self_attn", "multihead_attn"):
                    if hasattr(layer, name):
                        getattr(layer, name).dropout = probability("attention_dropout")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Transformer:
        """The model in a Hugging Face folder, or in a Marian file, .npz or .bin, or the folder of one; in eval mode, float32, on the CPU.

        A Hugging Face folder has a config.json and safetensors, in one file or several; docs/pretrained.md lists the families.
        Method of Marian: Junczys-Dowmunt et al. 2018; pretrained/marian.py lists the supported models. Raises
        pretrained.find.PretrainedError, a ValueError, which names the file and the tensor or setting that does not fit.
        """
        path = Path(path)
        if (path / "config.json").is_file():
            from .pretrained.huggingface import read_folder

            config, state = read_folder(path, cls._shapes)
        else:
            for name in ("numpy", "yaml"):
                optional_module(name, "pretrained")
            from .pretrained.find import model_file
            from .pretrained.marian import read_marian

            config, state = read_marian(model_file(path))
        with torch.device("meta"):
            model = cls(**config, dropout=0.0)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> str:
        """Writes a Hugging Face folder, config.json and model.safetensors, that transformers loads; returns its model_type.

        Raises ValueError: no family of models there has this model's options; the message names those in which the nearest differs.
        Or the model's weights are int8.
        """
        check_float(self, "save_pretrained")
        from .pretrained.huggingface import write_folder

        defaults = {name: parameter.default for name, parameter in inspect.signature(Transformer).parameters.items()}
        return write_folder(Path(folder), self.config, self.state_dict(), defaults)

    @classmethod
    def _shapes(cls, config: dict[str, Any]) -> dict[str, torch.Size]:
        """Of the state_dict of a model with these arguments."""
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in cls(**config).state_dict().items()}

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Logits (B, T, tgt_vocab): position t scores the token after tgt[:, : t + 1].

        src (B, S) and tgt (B, T): int64 token ids, padded with pad_id. For training, tgt starts with bos_id and omits
        the last token, and the labels are the target without bos_id. Logits at padding positions of tgt are finite but
        meaningless.
        """
        return self.decode(tgt, self.encode(src))

    def encode(self, src: Tensor) -> Memory:
        """src (B, S) int64, padded with pad_id, or a spectrogram -> the memory for decode. Differentiable with respect to the
        parameters."""
        self.check_source(src)
        if isinstance(self.src_embedding, SpectrogramEmbedding):
            embedded = self.src_embedding(src)
            padding = Padding.of(torch.ones(embedded.shape[:2], dtype=torch.bool, device=src.device))
        else:
            embedding = self.tgt_embedding if self.src_embedding is None else self.src_embedding
            embedded = embedding(src, weight=self.tgt_embedding.weight if embedding.weight is None else None)
            padding = Padding.of(src != self.pad_id)
        heights = self.encoder(embedded, self.memory_layers != "last", **padding.seen_by(padding))
        return Memory(self._mix(heights) if self.memory_layers == "mixed" else heights, padding)

    def decode(self, tgt: Tensor, memory: Memory, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, tgt_vocab) for tgt (B, T) int64; without a cache differentiable with respect to memory.

        With a cache, tgt holds only the tokens after those the cache has seen, and they are added to the cache. memory
        must be that of the first call, with the same row selections as the cache. The logits equal those of decoding
        everything without a cache. RuntimeError if gradients are recorded: caches are for torch.no_grad().
        """
        return self.project(self.decode_states(tgt, memory, cache), memory.candidates)

    def decode_states(self, tgt: Tensor, memory: Memory, cache: KVCache | None = None) -> Tensor:
        """decode without the output projection: (B, T, d_model). project() turns any of its rows into logits."""
        start = 0 if cache is None else cache.length
        check_tokens("tgt", tgt, self.max_len, start)
        beams = cache is not None and memory.keys_values is not None and tgt.shape[0] % max(memory.batch_size, 1) == 0
        if tgt.shape[0] != memory.batch_size and not beams:
            raise ValueError(f"tgt has {tgt.shape[0]} rows, src (memory) has {memory.batch_size}; they must be equal")
        memories = memory.states if memory.keys_values is None else memory.keys_values
        if cache is None:
            padding = Padding.of(self.is_token(tgt))
            self_options = {"key_mask": padding.key_mask} if self.decoder_cell == "ssru" else padding.seen_by(padding, is_causal=True)
            cross_options = memory.padding.seen_by(padding)
            return self.decoder(self.tgt_embedding(tgt), memories, self_options, cross_options)

        if torch.is_grad_enabled():
            raise RuntimeError("decode was given a cache while gradients are recorded; call it under torch.no_grad()")
        if cache.batch_size not in (None, tgt.shape[0]):
            raise ValueError(f"tgt has {tgt.shape[0]} rows but cache has {cache.batch_size}; they must be equal")
        is_token = self.is_token(tgt, start)
        keys = cache.append(is_token, len(self.decoder.layers))
        # One new token sees every key; several are causal, with the last one at the last key.
        self_options = {"is_causal": "bottom_right" if tgt.shape[1] > 1 else False, **keys}
        if self.decoder_cell == "ssru":
            self_options = {"key_mask": is_token}
        return self.decoder(self.tgt_embedding(tgt, start), memories, self_options, memory.padding.as_keys(), cache.layers)

    def project(self, states: Tensor, candidates: Candidates | None = None) -> Tensor:
        """Decoder states (..., d_model) -> logits (..., tgt_vocab), -inf for tokens not among the candidates."""
        if self.output_scale:
            states = states * self.config["d_model"] ** -0.5
        if candidates is None:
            return linear(states, *self._output_parameters())
        logits = linear(states, candidates.weight, candidates.bias)
        return logits.new_full((*states.shape[:-1], self.tgt_vocab), -torch.inf).index_copy_(-1, candidates.tokens, logits)

    def _output_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The weight (tgt_vocab, d_model) and the bias (tgt_vocab,) of the output projection."""
        return (self.tgt_embedding.weight, self.output_bias) if self.output is None else (self.output.weight, self.output.bias)

    def is_token(self, tgt: Tensor, start: int = 0) -> Tensor:
        """Which of tgt (B, T), at positions from `start` on, are not padding: (B, T) bool."""
        is_token = tgt != self.pad_id
        if self.bos_id == self.pad_id and start == 0:
            is_token[:, :1] = True
        return is_token

    def check_source(self, src: Tensor) -> None:
        if self.src_features:
            check_features(src, self.src_features, 2 * self.max_src_len)
        else:
            check_tokens("src", src, self.max_src_len)

    def start_decoding(self, src: Tensor, capacity: int) -> tuple[Memory, KVCache]:
        """The memory of src (B, S), with keys and values for every decoder layer, and an empty cache. Decode with tgt
        (B * beams, T), where row r translates source r // beams."""
        memory, layers = self.encode(src), self.decoder.layers
        states = memory.states if len(memory.states) > 1 else memory.states * len(layers)
        keys_values = [cast(DecoderLayer, layer).memory_keys_values(x) for layer, x in zip(layers, states, strict=True)]
        candidates = None
        if self.shortlist is not None:
            tokens = self.shortlist(src)
            weight, bias = self._output_parameters()
            candidates = Candidates(tokens, weight[tokens], None if bias is None else bias[tokens])
        if self.cache_dtype is not None and self.decoder_cell == "ssru":
            raise ValueError(f"cache_dtype must be None: an SSRU keeps no keys and values, got {self.cache_dtype}")
        if self.cache_dtype is not None and len(self.decoder.relative_bias) > 0:
            raise ValueError(f"cache_dtype must be None with a relative bias, which attention_decode does not add, got {self.cache_dtype}")
        return Memory([], memory.padding, keys_values, candidates), KVCache(capacity, self.cache_dtype)

    def attention_maps(self, src: Tensor, tgt: Tensor) -> dict[str, list[Tensor]]:
        """The attention weights of every layer for one forward pass, without dropout and without gradients.

        Returns {"encoder": [(B, H, S, S), ...], "decoder_self": [(B, H, T, T), ...], "cross": [(B, H, T, S), ...]},
        one entry per layer, none for a decoder's SSRU. Rows of trailing padding are 0.
        """
        groups = {
            "encoder": [layer.get_submodule("self_attn") for layer in self.encoder.layers],
            "decoder_self": [layer.get_submodule("self_attn") for layer in self.decoder.layers if self.decoder_cell == "attention"],
            "cross": [layer.get_submodule("multihead_attn") for layer in self.decoder.layers],
        }
        weights = weights_in_forward(self, (module for group in groups.values() for module in group), src, tgt)
        return {name: [weights[module] for module in group] for name, group in groups.items()}

    def _relative_biases(self, bidirectional: bool) -> list[RelativeBias]:
        """Those of the encoder's layers (bidirectional) or the decoder's."""
        config = self.config
        if config["relative_bias"] == "none" or (not bidirectional and self.decoder_cell == "ssru"):
            return []
        depth = config["num_encoder_layers" if bidirectional else "num_decoder_layers"] if config["relative_bias"] == "each" else 1
        sizes = config["num_heads"], config["relative_buckets"], config["relative_distance"]
        return [RelativeBias(*sizes, bidirectional) for _ in range(depth)]

    def _mix(self, heights: list[Tensor]) -> list[Tensor]:
        """One softmax-weighted average of all encoder layers for each decoder layer."""
        stacked = torch.stack(heights)  # (num_encoder_layers, B, S, d_model)
        mixed = self.memory_mix.softmax(-1) @ stacked.flatten(1)
        return list(mixed.view(-1, *stacked.shape[1:]).unbind(0))


def _checked_integers(config: dict[str, Any]) -> dict[str, int]:
    """The sizes and token ids, as Python ints."""
    integers = {name: checked_integer_in(name, config[name], 1) for name in SIZES}
    integers |= {name: checked_integer_in(name, config[name], 1) for name in ("head_dim", "max_src_len") if config[name] is not None}
    integers["src_features"] = checked_integer_in("src_features", config["src_features"], 0)
    integers["relative_buckets"] = checked_integer_in("relative_buckets", config["relative_buckets"], 4)
    integers["relative_distance"] = checked_integer_in("relative_distance", config["relative_distance"], integers["relative_buckets"])
    target_ids = integers["tgt_vocab"] - 1
    source_ids = target_ids if integers["src_features"] else integers["src_vocab"] - 1
    last_ids = {"pad_id": min(source_ids, target_ids), "bos_id": target_ids, "eos_id": target_ids}
    return integers | {name: checked_integer_in(name, config[name], 0, last) for name, last in last_ids.items()}


def _check_config(config: dict[str, Any]) -> None:
    depths = {name: config[name] for name in ("num_encoder_layers", "num_decoder_layers")}
    for name in BOOLS:
        if not isinstance(config[name], bool):
            raise TypeError(f"{name} must be a bool, got {type(config[name]).__name__}")
    check_layers(config["d_model"], config["num_heads"] if config["head_dim"] is None else 1, config["dropout"], config["layer_norm_eps"])
    for name in DROPOUTS:
        if config[name] is not None:
            check_dropout(config[name], name)
    for name, choices in CHOICES.items():
        if not any(config[name] is choice or (choice == config[name] and isinstance(choice, str)) for choice in choices):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {config[name]!r}")
    scale = config["attention_scale"]
    if scale is not None and (not isinstance(scale, float) or not 0 < scale < math.inf):
        raise ValueError(f"attention_scale must be a float > 0 or None, got {scale!r}")
    tied = config["tie_weights"]
    if config["output_bias"] and tied not in (True, "output"):
        raise ValueError("output_bias needs tie_weights: an untied output has a bias already")
    if tied == "embeddings" and (config["src_features"] or config["src_vocab"] != config["tgt_vocab"]):
        sizes = config["src_features"] or config["src_vocab"], config["tgt_vocab"]
        raise ValueError(f"tie_weights = 'embeddings' needs equal vocabularies, got {sizes[0]} and {sizes[1]}")
    if config["positions"] in ("halves", "concatenated", "fairseq") and config["d_model"] % 2:
        raise ValueError(f"positions = {config['positions']!r} needs an even d_model, got {config['d_model']}")
    head_dim = config["head_dim"] or config["d_model"] // config["num_heads"]
    if config["positions"] == "rotary" and head_dim % 2:
        raise ValueError(f"positions = 'rotary' needs an even head_dim, got {head_dim}")
    if config["memory_layers"] == "each" and len(set(depths.values())) > 1:
        raise ValueError(f"memory_layers = 'each' needs an encoder and a decoder of equal depth, got {depths}")
    if config["eos_id"] == config["pad_id"] and not config["src_features"]:
        raise ValueError(f"eos_id must differ from pad_id, both are {config['eos_id']}")
