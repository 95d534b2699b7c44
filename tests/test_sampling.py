"""Tokens are drawn from the distribution that temperature, top-k and top-p describe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_generate import SRC, build, ending_model

from fused_attention.transformer.sampling import Sampler

PROBABILITIES = [0.4, 0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 4}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0]),  # 0.4 is not enough, 0.4 + 0.3 is
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.75}, [4 / 7, 3 / 7, 0, 0]),  # 7/9 of what top_k leaves
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_frequencies(options: dict[str, Any], expected: list[float]) -> None:
    order = torch.tensor([2, 0, 3, 1])  # not sorted already
    draws = 20_000
    logits = torch.tensor(PROBABILITIES).log()[order].expand(draws, 4)
    sampler = Sampler.checked(4, **{"temperature": None, "top_k": None, "top_p": None, "generator": None} | options)
    tokens = sampler(logits)
    assert tokens.shape == (draws, 1)
    counts = torch.bincount(order[tokens[:, 0]], minlength=4)
    exact = torch.tensor(expected) * draws
    # Five standard deviations of a binomial count.
    assert ((counts - exact).abs() <= 5 * (exact * (1 - exact / draws)).sqrt()).all()
    assert (counts[exact == 0] == 0).all()


def test_banned_tokens_are_not_drawn() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]]).expand(500, 3)
    for options in ({}, {"top_k": 3}, {"top_p": 0.999}):
        assert set(Sampler(**options)(logits)[:, 0].tolist()) == {0, 2}


def test_a_seed_gives_the_same_tokens() -> None:
    model = ending_model()

    def tokens(seed: int) -> list[list[int]]:
        return model.generate(SRC, 8, generator=torch.Generator().manual_seed(seed)).tolist()

    assert tokens(1) == tokens(1)
    assert len({str(tokens(seed)) for seed in range(5)}) > 1


def test_the_best_token_alone_is_greedy() -> None:
    model = ending_model()
    assert torch.equal(model.generate(SRC, 8, top_k=1), model.generate(SRC, 8))


def test_special_tokens_and_constraints() -> None:
    model = build()
    assert model.output is not None
    with torch.no_grad():
        model.output.bias[:3] = 5.0
    tokens = model.generate(SRC.repeat(50, 1), 4, temperature=2.0, min_length=2)
    assert (tokens[:, :2] > 2).all()
    assert not (tokens == 1).any()
    ended = (tokens == 2).cumsum(1) > 0
    assert ended.any()
    assert ((tokens == 0) == (ended & (tokens != 2))).all()
