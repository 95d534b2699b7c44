"""What the report shows of the inside of a model is what the model computes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from tiny_translation import trained_folder

from fused_attention import Transformer
from fused_attention.transformer.translation import how_it_works
from fused_attention.transformer.translation.beam_tree import Node, beam_tree
from fused_attention.transformer.translation.translate import Translator
from fused_attention.transformer.translation.walkthrough import walk_through

SRC = torch.tensor([[5, 6, 7, 8, 9, 2]])
TRANSLATION = [4, 9, 7, 7, 12, 5, 10, 11, 2]


def build(**options: object) -> Transformer:
    return Transformer(20, 20, 24, 3, 2, 2, 40, max_len=24, **options).eval()


@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
def test_a_walk_through_is_what_the_model_computes(norm_first: bool) -> None:
    model = build(norm_first=norm_first)
    walk = walk_through(model, SRC, TRANSLATION)
    tgt = torch.tensor([walk.tokens])
    assert [model.bos_id, *TRANSLATION][: len(walk.tokens)] == walk.tokens
    with torch.no_grad():
        torch.testing.assert_close(walk.embedded + walk.positions, model.tgt_embedding(tgt)[0])
        torch.testing.assert_close(walk.probabilities, model(SRC, tgt)[0, -1].softmax(-1))
    torch.testing.assert_close(walk.weights, model.attention_maps(SRC, tgt)["decoder_self"][0][0, walk.head])
    concentration = model.attention_maps(SRC, tgt)["decoder_self"][0][0].amax(-1).mean(-1)  # of each head
    assert concentration[walk.head] == pytest.approx(concentration.max().item())


def test_the_output_of_the_only_head_is_the_attention_of_the_layer() -> None:
    model = Transformer(20, 20, 24, 1, 2, 2, 40).eval()
    attention = model.decoder.layers[0].self_attn
    outputs = []
    attention.register_forward_hook(lambda module, args, output: outputs.append(output))
    walk = walk_through(model, SRC, TRANSLATION)
    torch.testing.assert_close(attention.out_proj(walk.output), outputs[0][0, : len(walk.tokens)])


def test_the_word_is_the_least_certain_one() -> None:
    model = build()
    length = len(walk_through(model, SRC, TRANSLATION).tokens)
    with torch.no_grad():
        certainty = model(SRC, torch.tensor([[1, *TRANSLATION]])).softmax(-1)[0].amax(-1)
    assert 4 <= length <= 7
    assert certainty[length - 1] == pytest.approx(certainty[3:7].min().item(), rel=1e-5)
    assert len(walk_through(model, SRC, [2]).tokens) <= 2
    with pytest.raises(ValueError, match="decoder_cell must be 'attention', got 'ssru'"):
        walk_through(build(decoder_cell="ssru"), SRC, TRANSLATION)


def hypotheses(node: Node, before: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Node]]:
    """Tokens and last node of everything in the tree, without the root."""
    for child in node.children:
        yield (*before, child.token), child
        yield from hypotheses(child, (*before, child.token))


@pytest.mark.parametrize("cell", ["attention", "ssru"])
def test_a_tree_holds_all_beams(cell: str) -> None:
    model = build(decoder_cell=cell)
    assert model.output is not None
    model.output.bias.data[2] = 2.0  # so that hypotheses end
    root = beam_tree(model, SRC, 9, 3)
    found = dict(hypotheses(root))
    [[best]] = model.beam_search(SRC, 9, beam=3)
    assert {tokens for tokens, node in found.items() if node.best} == {tuple(best.tokens[:n]) for n in range(1, len(best.tokens) + 1)}
    node = found[tuple(best.tokens)]
    assert best.ended
    assert (node.log_probability, node.score) == (best.log_probability, best.score)
    for length in range(1, 10):
        going_on = [tokens for tokens, node in found.items() if len(tokens) == length and node.score is None]
        assert len(going_on) <= 3
    for tokens, node in found.items():
        assert model.score(SRC, torch.tensor([tokens])).sentences.item() == pytest.approx(node.log_probability, rel=1e-5)
        assert [child.best for child in node.children] == sorted((child.best for child in node.children), reverse=True)


def test_sections_show_the_numbers() -> None:
    translator = Translator.load(trained_folder(), "cpu")
    source = "big blue dog sees cat"
    [translation] = translator.translate([source])
    section = how_it_works.one_word(translator, source, translation)
    captions = [re.sub(r"^\d\. ", "", caption) for caption in re.findall("<figcaption>(.*?)</figcaption>", section)]
    assert captions == [
        *("Embedding", "+ position", "= input", "Scores q · k / √d", "Mask", "Softmax", "Values", "Weighted values", "Next token"),
    ]
    assert section.count("<svg") == 9
    assert source in section
    tree = how_it_works.beams(translator, source)
    assert "<svg" in tree
