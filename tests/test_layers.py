"""Encoder and decoder layers against torch's, which have the same parameters under the same names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attention.transformer.cache import KVCache, LayerCache, RowSelection
from fused_attention.transformer.layers import CrossAttention, DecoderLayer, EncoderLayer, SelfAttention, dropout

NORMS = pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])


def randomised(module: nn.Module) -> nn.Module:
    """Gives biases and norms random values too: at their initial 0 and 1 a misplaced one would go unnoticed."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.double()


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)  # torch's polarity: True = blocked


class TestDropout:
    def test_keeps_the_right_share_at_the_right_scale(self) -> None:
        out = dropout(torch.ones(400, 1000), 0.1, training=True)
        kept = out[out != 0]
        assert kept.unique().tolist() == pytest.approx([1 / 0.9], rel=1e-4)
        # 400,000 draws: the share kept has a standard deviation of 0.0005.
        assert kept.numel() / out.numel() == pytest.approx(0.9, abs=0.0025)

    def test_elements_are_independent_of_their_neighbours(self) -> None:
        # Four elements share one 64-bit word, so every distance up to 4 and one row are worth a look.
        out = (dropout(torch.ones(400 * 1000), 0.5, training=True) != 0).double() - 0.5
        for distance in (1, 2, 3, 4, 1000):
            assert abs((out[distance:] * out[:-distance]).mean().item() * 4) < 0.008  # 5 standard deviations

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_gradient_passes_where_the_value_did(self, dtype: torch.dtype) -> None:
        x = torch.ones(7, 33, dtype=dtype, requires_grad=True)  # 231 elements: not a multiple of 4
        out = dropout(x, 0.3, training=True)
        out.sum().backward()
        assert out.dtype == dtype
        assert 0 < out.count_nonzero() < out.numel()
        torch.testing.assert_close(x.grad, out.detach())

    def test_follows_torchs_generator(self) -> None:
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(dropout(torch.ones(100), 0.5, training=True))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])

    def test_ends_of_the_range(self) -> None:
        x = torch.randn(5, 3)
        assert dropout(x, 0.0, training=True) is x
        assert dropout(x, 0.7, training=False) is x
        assert dropout(x, 1.0, training=True).count_nonzero() == 0
        assert dropout(torch.empty(0, 3), 0.5, training=True).shape == (0, 3)

    def test_stays_on_the_device_of_its_input(self) -> None:
        x = torch.ones(5, 3)
        with torch.device("meta"):  # the default device of new tensors
            assert dropout(x, 0.5, training=True).device == x.device

    def test_under_vmap(self) -> None:
        rows = torch.func.vmap(lambda x: dropout(x, 0.5, training=True), randomness="different")(torch.ones(2, 100))
        assert set(rows.unique().tolist()) == {0.0, 2.0}
        assert not torch.equal(*rows)


@NORMS
def test_encoder_layer_equals_torchs(norm_first: bool) -> None:
    theirs = randomised(nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True, norm_first=norm_first))
    ours = EncoderLayer(24, 3, 40, dropout=0.0, norm_first=norm_first).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    key_mask = torch.tensor([[True] * 6, [False, True, True, False, True, False]])
    torch.testing.assert_close(ours(x, key_mask=key_mask), theirs(x, src_key_padding_mask=~key_mask))


@NORMS
def test_decoder_layer_equals_torchs(norm_first: bool) -> None:
    theirs = randomised(nn.TransformerDecoderLayer(24, 3, 40, dropout=0.0, batch_first=True, norm_first=norm_first))
    ours = DecoderLayer(24, 3, 40, dropout=0.0, norm_first=norm_first).double()
    ours.load_state_dict(theirs.state_dict())
    x, memory = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 7, 24, dtype=torch.float64)
    memory_mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    expected = theirs(x, memory, tgt_mask=causal_mask(5), memory_key_padding_mask=~memory_mask)
    torch.testing.assert_close(ours(x, memory, {"is_causal": True}, {"key_mask": memory_mask}), expected)


@pytest.mark.parametrize("attention", [SelfAttention, CrossAttention])
def test_attention_starts_as_in_torchs_transformer(attention: type[SelfAttention | CrossAttention]) -> None:
    module = attention(256, 4, 0.0)
    assert module.state_dict().keys() == nn.MultiheadAttention(256, 4).state_dict().keys()
    for weight in (module.in_proj_weight, module.out_proj.weight):
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier uniform
        assert 0.99 * bound < weight.abs().max() <= bound
    assert module.in_proj_bias.count_nonzero() == module.out_proj.bias.count_nonzero() == 0


def test_weights_are_those_the_values_are_averaged_with() -> None:
    x, memory = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 7, 24, dtype=torch.float64)
    own, cross = SelfAttention(24, 3, 0.0).double(), CrossAttention(24, 3, 0.0).double()
    value = own.project(x)[:, :, 2].transpose(1, 2)
    weights = own.weights(x, is_causal=True)
    torch.testing.assert_close(own.merge_heads(weights @ value), own(x, is_causal=True))
    _, kv = cross.project(x, memory)
    weights = cross.weights(x, memory)
    torch.testing.assert_close(cross.merge_heads(weights @ kv[:, :, 1].transpose(1, 2)), cross(x, memory))


class TestLayerCache:
    @torch.no_grad()
    def test_self_attention_step_by_step_equals_causal_attention(self) -> None:
        module = SelfAttention(24, 3, 0.0).double()
        x = torch.randn(2, 9, 24, dtype=torch.float64)
        cache = LayerCache(capacity=2)  # grows three times on the way to 9
        steps = [module(x[:, i : i + 1], cache, key_lengths=torch.tensor([i + 1, i + 1])) for i in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1), module(x, is_causal=True))

    def test_append_returns_everything_and_keeps_it_when_the_buffer_grows(self) -> None:
        cache = LayerCache(capacity=4)
        kv = torch.randn(2, 11, 2, 3, 8)
        pieces = [(0, 3), (3, 4), (4, 6), (6, 11)]  # fits, fills exactly, doubles, doubles again
        for start, end in pieces:
            buffer = cache.append(kv[:, start:end])
            assert buffer.shape[1] == {3: 4, 4: 4, 6: 8, 11: 16}[end]
            assert torch.equal(buffer[:, :end], kv[:, :end])

    def test_cross_attention_projects_the_memory_once(self) -> None:
        module = CrossAttention(24, 3, 0.0)
        cache = LayerCache(capacity=4)
        x, memory = torch.randn(2, 1, 24), torch.randn(2, 7, 24)
        with torch.no_grad():
            first = module(x, memory, cache)
            later = module(x, torch.full_like(memory, torch.nan), cache)
        assert torch.equal(first, later)


class TestKVCache:
    def test_select_reorders_repeats_and_drops_rows_of_every_buffer(self) -> None:
        cache = KVCache(capacity=5)
        kv = torch.randn(3, 2, 2, 1, 4)
        mask = torch.tensor([[True, True], [True, False], [False, False]])
        cache.append(mask, num_layers=2)
        for layer in cache.layers:
            layer.append(kv)
            layer.cross_kv = kv * 2
        rows = torch.tensor([2, 0, 0, 1])
        cache.select(rows)
        assert cache.batch_size == 4
        assert cache.length == 2
        new = torch.randn(4, 1, 2, 1, 4)
        keys = cache.append(torch.ones(4, 1, dtype=torch.bool), 2)
        assert torch.equal(keys["key_mask"][:, :3], F.pad(mask[rows], (0, 1), value=True))
        assert keys["key_lengths"].tolist() == [3] * 4
        for layer in cache.layers:
            assert torch.equal(layer.append(new)[:, :3], torch.cat([kv[rows], new], 1))
            assert layer.cross_kv is not None
            assert torch.equal(layer.cross_kv, kv[rows] * 2)

    def test_rows_that_stay_are_not_copied(self) -> None:
        cache = KVCache(capacity=3)
        kv = torch.randn(4, 2, 2, 1, 4)
        cache.append(torch.ones(4, 2, dtype=torch.bool), num_layers=1)
        [layer] = cache.layers
        layer.append(kv)
        assert layer.self_kv is not None
        buffer = layer.self_kv
        buffer[:, 2:] = 7  # beyond what is held
        buffer[2, :2] = torch.nan  # nobody goes on from here
        cache.select(torch.tensor([1, 0, 3]))
        assert layer.self_kv.data_ptr() == buffer.data_ptr()
        assert torch.equal(layer.append(torch.zeros(3, 0, 2, 1, 4))[:, :2], kv[[1, 0, 3]])
        assert (buffer[:, 2:] == 7).all()
        assert torch.equal(buffer[3, :2], kv[3])
        assert cache.batch_size == 3
        assert RowSelection(torch.tensor([1, 0, 2, 5]), 6, buffer.device).targets.tolist() == [0, 1, 3]

    def test_empty_cache_can_be_selected_from(self) -> None:
        cache = KVCache()
        cache.select(torch.tensor([0]))
        assert cache.batch_size is None

    def test_capacity_is_checked(self) -> None:
        with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
            KVCache(0)
