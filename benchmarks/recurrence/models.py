"""The models being compared, with equal numbers of parameters (within PARAMETER_TOLERANCE) for any vocabulary."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ...transformer.generate import Generation
from ...transformer.lstm import LSTMEncoderDecoder
from ...transformer.model import Transformer
from ...transformer.translation.training_config import TrainingConfig

PARAMETER_TOLERANCE = 0.05
LSTM_LAYERS = 2  # of the encoder and of the decoder
SIZE_STEP = 8  # widths are multiples of 8, as the kernels require

Build = Callable[[], Generation]


def builders(config: TrainingConfig, source_vocab: int, target_vocab: int) -> dict[str, Build]:
    """The Transformer of `config`, the same with an SSRU in place of the decoder's self-attention, and an LSTM with attention.

    An SSRU has fewer parameters than self-attention; wider feed-forward networks make up for them. The width of the LSTM is chosen to
    match. Raises ValueError if no width is within PARAMETER_TOLERANCE.
    """
    arguments = config.model_arguments(source_vocab, target_vocab)

    def transformer(_: int) -> Generation:
        return Transformer(**arguments)

    def ssru(dim_feedforward: int) -> Generation:
        return Transformer(**arguments | {"decoder_cell": "ssru", "dim_feedforward": dim_feedforward})

    def lstm(width: int) -> Generation:
        shared = {name: arguments[name] for name in ("src_vocab", "tgt_vocab", "tie_weights", "dropout", "max_len")}
        return LSTMEncoderDecoder(**shared, d_model=width, num_layers=LSTM_LAYERS)

    wanted = parameters_of(transformer, 0)
    feedforwards = range(SIZE_STEP, 4 * (config.dim_feedforward + config.d_model), SIZE_STEP)
    widths = range(SIZE_STEP, 4 * config.d_model, SIZE_STEP)
    found: dict[str, Build] = {"Transformer": partial(transformer, 0)}
    for name, build, sizes in (("SSRU decoder", ssru, feedforwards), ("LSTM", lstm, widths)):
        size = nearest(build, wanted, sizes)
        count = parameters_of(build, size)
        if abs(count / wanted - 1) > PARAMETER_TOLERANCE:
            raise ValueError(f"{name} has {count:,} parameters where the Transformer has {wanted:,}: more than 5 % apart at any width")
        found[name] = partial(build, size)
    return found


def nearest(build: Callable[[int], nn.Module], wanted: int, sizes: Sequence[int]) -> int:
    """The size whose number of parameters is nearest to `wanted`; the number must grow with the size."""
    above = bisect_left(sizes, wanted, key=partial(parameters_of, build))
    return min(sizes[max(0, above - 1) : above + 1], key=lambda size: abs(parameters_of(build, size) - wanted))


def parameters_of(build: Callable[[int], nn.Module], size: int) -> int:
    """The number of parameters, counted without allocating memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(size).parameters())
