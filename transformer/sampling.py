"""Drawing the next token: temperature, top-k (Fan et al. 2018) and top-p (Holtzman et al. 2020)."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .checks import checked_integer_in


@dataclass(frozen=True)
class Sampler:
    """Draws from softmax(logits / temperature), restricted to the top_k best tokens, then to the smallest set of these that holds at
    least top_p of their probability.

    temperature > 0; top_k in [1, vocabulary] or None; top_p in (0, 1]. generator: None means torch's default for the device.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: Generator | None = None

    @classmethod
    def checked(
        cls, vocab_size: int, temperature: float | None, top_k: int | None, top_p: float | None, generator: Generator | None
    ) -> Sampler:
        """None means unrestricted. Raises ValueError or TypeError, naming the argument."""
        temperature = checked_number("temperature", 1.0 if temperature is None else temperature)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        top_p = checked_number("top_p", 1.0 if top_p is None else top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
        if top_k is not None:
            top_k = checked_integer_in("top_k", top_k, 1, vocab_size)
        if generator is not None and not isinstance(generator, Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        return cls(temperature, top_k, top_p, generator)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (R, V) -> tokens (R, 1) int64."""
        # Subtract the best logit first: otherwise a small temperature would make it infinite.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probabilities = ((logits - logits.amax(1, keepdim=True)) / self.temperature).softmax(1)
        if self.top_k is not None or self.top_p < 1:
            best, tokens = probabilities.topk(self.top_k or logits.shape[1], 1)  # in descending order
            best = best.masked_fill(best.cumsum(1) - best >= self.top_p * best.sum(1, keepdim=True), 0)
            return tokens.gather(1, torch.multinomial(best, 1, generator=self.generator))
        return torch.multinomial(probabilities, 1, generator=self.generator)


def checked_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)
