"""The Transformer: a training step against the same model on torch.nn.Transformer; generate() against decoding without a cache."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attention.transformer import layers
from fused_attention.transformer.embedding import sinusoidal_positions
from fused_attention.transformer.model import Transformer
from fused_attention.transformer.translation.batches import Batch, BatchSource

VOCAB, PAD_ID, BOS_ID = 8000, 0, 1
TRAINED: dict[str, Any] = {"d_model": 512, "num_heads": 8, "num_encoder_layers": 3, "num_decoder_layers": 3, "dim_feedforward": 2048}
GENERATING: dict[str, Any] = {**TRAINED, "d_model": 256, "dim_feedforward": 1024}
DTYPES = {"fp32": torch.float32, "bf16 autocast": torch.bfloat16}
STEP_BARS = {"fp32": 1.05, "bf16 autocast": 1.15}
GENERATE_BAR = 5.0
# Largest error of a gradient relative to its largest element. It catches a wrong model; the tests judge the accuracy. Wide,
# because a relu whose input is nearly 0 may switch: torch's own model is 4e-3 off in fp32.
ERROR_LIMITS = {"fp32": 2e-2, "bf16 autocast": 0.2}


class TorchTransformer(nn.Module):
    """The same model, with the same weights, as a user of torch.nn.Transformer writes it."""

    def __init__(self, ours: Transformer) -> None:
        super().__init__()
        config = ours.config
        self.src_embedding = nn.Embedding(config["src_vocab"], config["d_model"], padding_idx=PAD_ID)
        self.tgt_embedding = nn.Embedding(config["tgt_vocab"], config["d_model"], padding_idx=PAD_ID)
        self.dropout = nn.Dropout(config["dropout"])
        sizes = {name: config[name] for name in TRAINED if name != "num_heads"}
        self.stacks = nn.Transformer(nhead=config["num_heads"], dropout=config["dropout"], batch_first=True, **sizes)
        self.output = nn.Linear(config["d_model"], config["tgt_vocab"])
        self.scale = math.sqrt(config["d_model"])
        self.register_buffer("positions", sinusoidal_positions(config["max_len"], config["d_model"]), persistent=False)
        self.positions: Tensor
        self.load_state_dict({torchs_name(name): tensor for name, tensor in ours.state_dict().items()})

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        src_padding, tgt_padding = src == PAD_ID, tgt == PAD_ID
        states = self.stacks(
            self.dropout(self.src_embedding(src) * self.scale + self.positions[: src.shape[1]]),
            self.dropout(self.tgt_embedding(tgt) * self.scale + self.positions[: tgt.shape[1]]),
            tgt_mask=torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool).triu(1),
            tgt_is_causal=True,
            src_key_padding_mask=src_padding,
            tgt_key_padding_mask=tgt_padding,
            memory_key_padding_mask=src_padding,
        )
        return self.output(states)


def torchs_name(name: str) -> str:
    return f"stacks.{name}" if name.startswith(("encoder.", "decoder.")) else name


class NoAttention(torch.autograd.Function):
    """In place of the kernels: returns the query, and zeros as the gradient of everything else it was given."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return query.view_as(query)

    @staticmethod
    def backward(ctx: Any, dquery: Tensor) -> tuple[Tensor, ...]:
        return (dquery, *map(torch.zeros_like, ctx.saved_tensors))


def remove_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "attention_qkv_packed", lambda qkv, **_: qkv[:, :, 0].transpose(1, 2))
    monkeypatch.setattr(layers, "attention_kv_packed", lambda query, kv, **_: NoAttention.apply(query, kv))


def sentences() -> list[Batch]:
    """Batches of about 2,048 tokens, source and target together, from pairs of 8 to 30 random tokens of similar length."""
    generator = random.Random(0)

    def sentence(length: int) -> list[int]:
        return [generator.randrange(3, VOCAB) for _ in range(length)]

    lengths = [generator.randint(8, 30) for _ in range(2000)]
    target_lengths = [min(max(round(length * generator.uniform(0.8, 1.3)), 8), 30) for length in lengths]
    source = BatchSource(list(map(sentence, lengths)), list(map(sentence, target_lengths)), batch_tokens=2048, max_len=64)
    return list(itertools.islice(source.once(), 6))


def loss_of(model: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(batch.src, batch.tgt_in)
        return F.cross_entropy(logits.flatten(0, 1), batch.tgt_out.flatten(), ignore_index=PAD_ID, label_smoothing=0.1)


def training_step(model: nn.Module, batches: list[Batch], dtype: torch.dtype) -> Callable[[], None]:
    """A function that takes one step on the next batch each time it is called."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    upcoming = itertools.cycle(batches)

    def step() -> None:
        loss = loss_of(model, next(upcoming), dtype)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def without_attention(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            remove_attention(monkeypatch)
            step()

    return run


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_step(compare, dtype):
    torch.manual_seed(0)
    ours = Transformer(VOCAB, VOCAB, dropout=0.1, **TRAINED)
    peer = TorchTransformer(ours)
    batches = sentences()
    exact, evaluated = copy.deepcopy(peer).double().eval(), copy.deepcopy(ours).eval()  # before any step

    def check() -> None:
        """Without dropout, the loss and every gradient are torch's in float64 but for rounding."""
        losses = [loss_of(evaluated, batches[0], DTYPES[dtype]), loss_of(exact, batches[0], torch.float32)]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=ERROR_LIMITS[dtype] / 10)
        for name, parameter in evaluated.named_parameters():
            gradient, exact_gradient = parameter.grad, exact.get_parameter(torchs_name(name)).grad
            assert gradient is not None
            assert exact_gradient is not None
            error = (gradient - exact_gradient).abs().max()
            assert error <= ERROR_LIMITS[dtype] * exact_gradient.abs().max(), name

    compare(
        training_step(ours, batches, DTYPES[dtype]),
        training_step(peer, batches, DTYPES[dtype]),
        check=check,
        group="model: training step against torch.nn.Transformer",
        case={"d, ff, layers, heads": "512, 2048, 3 + 3, 8", "tokens a batch": "2048", "dtype": dtype},
        measure="step",
        bar=STEP_BARS[dtype],
        ceiling=without_attention(training_step(copy.deepcopy(ours), batches, DTYPES[dtype])),
        warmup_rounds=len(batches),
        min_rounds=2 * len(batches),
    )


def test_generate(compare):
    torch.manual_seed(0)
    batch_size, num_tokens = 32, 64
    model = Transformer(VOCAB, VOCAB, **GENERATING).eval()
    assert model.output is not None
    with torch.no_grad():
        model.output.bias[model.eos_id] = -math.inf  # every row runs to the end
    lengths = torch.randint(8, 31, (batch_size, 1))
    src = torch.randint(3, VOCAB, (batch_size, 30)).masked_fill(torch.arange(30) >= lengths, PAD_ID)

    def with_cache() -> Tensor:
        return model.generate(src, num_tokens)

    @torch.no_grad()
    def without_cache() -> Tensor:
        memory = model.encode(src)
        tokens = src.new_full((batch_size, 1), BOS_ID)
        for _ in range(num_tokens):
            logits = model.project(model.decode_states(tokens, memory)[:, -1])
            logits[:, [PAD_ID, BOS_ID]] = -math.inf
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        return tokens[:, 1:]

    def check() -> None:
        assert torch.equal(with_cache(), without_cache())

    compare(
        with_cache,
        without_cache,
        check=check,
        group="model: generate() against decoding without a cache, the source encoded once in both",
        case={"d, ff, layers, heads": "256, 1024, 3 + 3, 8", "batch": str(batch_size)},
        work=batch_size * num_tokens,
        unit="tokens/s",
        measure="generate",
        peer_name="no cache",
        bar=GENERATE_BAR,
    )
