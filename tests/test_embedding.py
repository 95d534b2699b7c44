"""Token embedding and sinusoidal positions."""

from __future__ import annotations

import math

import pytest
import torch

from fused_attention.transformer.embedding import TokenEmbedding, sinusoidal_positions


@pytest.mark.parametrize("d_model", [8, 7, 1], ids=["even", "odd", "one"])
def test_positions_follow_the_papers_formula(d_model: int) -> None:
    table = sinusoidal_positions(50, d_model)
    for position in (0, 1, 17, 49):
        for column in range(d_model):
            angle = position / 10000 ** ((column - column % 2) / d_model)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[position, column].item() == pytest.approx(expected, abs=1e-7)


def test_embedding_is_scaled_row_plus_position() -> None:
    embedding = TokenEmbedding(vocab_size=11, d_model=6, max_len=9, pad_id=0, dropout=0.0)
    tokens = torch.tensor([[3, 10, 4], [5, 0, 0]])
    expected = embedding.weight[tokens] * math.sqrt(6) + sinusoidal_positions(9, 6)[2:5]
    torch.testing.assert_close(embedding(tokens, start=2), expected)


def test_padding_row_starts_at_zero_and_gets_no_gradient() -> None:
    embedding = TokenEmbedding(vocab_size=11, d_model=6, max_len=9, pad_id=4, dropout=0.0)
    assert embedding.weight[4].count_nonzero() == 0
    embedding(torch.tensor([[3, 4, 4]])).square().sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.any(1).nonzero().flatten().tolist() == [3]


def test_positions_are_no_part_of_the_checkpoint() -> None:
    embedding = TokenEmbedding(vocab_size=11, d_model=6, max_len=9, pad_id=0, dropout=0.0)
    assert list(embedding.state_dict()) == ["weight"]


def test_reset_restores_the_positions_of_a_model_made_without_memory() -> None:
    with torch.device("meta"):
        embedding = TokenEmbedding(vocab_size=11, d_model=6, max_len=9, pad_id=0, dropout=0.0)
    embedding = embedding.to_empty(device="cpu")
    embedding.positions.fill_(math.nan)
    embedding.reset_parameters()
    assert torch.equal(embedding.positions, sinusoidal_positions(9, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_loading_fills_the_positions_of_a_model_made_without_memory(assign: bool, dtype: torch.dtype) -> None:
    trained = TokenEmbedding(vocab_size=11, d_model=6, max_len=9, pad_id=0, dropout=0.0).to(dtype)
    with torch.device("meta"):
        embedding = TokenEmbedding(vocab_size=11, d_model=6, max_len=9, pad_id=0, dropout=0.0)
    if not assign:
        embedding = embedding.to_empty(device="cpu").to(dtype)
        embedding.positions.fill_(math.nan)
    embedding.load_state_dict(trained.state_dict(), assign=assign)
    assert torch.equal(embedding.positions, sinusoidal_positions(9, 6).to(dtype))
    tokens = torch.tensor([[3, 10, 4]])
    assert torch.equal(embedding(tokens), trained(tokens))


def test_loading_keeps_the_memory_of_the_positions() -> None:
    embedding = TokenEmbedding(vocab_size=11, d_model=6, max_len=9, pad_id=0, dropout=0.0)
    positions = embedding.positions
    embedding.load_state_dict(embedding.state_dict())
    assert embedding.positions is positions


def test_a_model_that_stays_without_memory_loads() -> None:
    embedding = TokenEmbedding(vocab_size=11, d_model=6, max_len=9, pad_id=0, dropout=0.0)
    with torch.device("meta"):
        empty = TokenEmbedding(vocab_size=11, d_model=6, max_len=9, pad_id=0, dropout=0.0)
        empty.load_state_dict(embedding.state_dict(), assign=True)
    assert torch.equal(empty.positions, embedding.positions)


def test_scaled_embeddings_start_with_unit_variance() -> None:
    embedding = TokenEmbedding(vocab_size=1000, d_model=64, max_len=4, pad_id=0, dropout=0.0)
    assert (embedding.weight * embedding.scale).std().item() == pytest.approx(1.0, rel=0.02)


def test_dropout_only_while_training() -> None:
    embedding = TokenEmbedding(vocab_size=11, d_model=6, max_len=9, pad_id=0, dropout=0.5)
    tokens = torch.tensor([[3, 10, 4, 5, 6, 7, 8, 9]])
    assert (embedding(tokens) == 0).any()
    embedding.eval()
    assert (embedding(tokens) == embedding(tokens)).all()
