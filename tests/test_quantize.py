"""int8 weights: how near their results are, what stays float, checkpoints of them, and what is refused."""

from __future__ import annotations

import copy
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import error_line
from tiny_translation import trained_folder
from torch import Tensor, nn

from fused_attention import MultiHeadAttention, Transformer, quantize_int8
from fused_attention.transformer import quantize
from fused_attention.transformer.export import export_programs
from fused_attention.transformer.optional import MissingModuleError
from fused_attention.transformer.quantize import int8_tensors, is_int8, load_int8
from fused_attention.transformer.translation.checkpoint import CHECKPOINT_NAME, CheckpointError, read_checkpoint, save_checkpoint
from fused_attention.transformer.translation.cli import main
from fused_attention.transformer.translation.corpora import load_corpus
from fused_attention.transformer.translation.translate import Translator

pytest.importorskip("torchao")

SIZES = {"d_model": 32, "num_heads": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 64}
OPTIONS = {
    "untied": {},
    "tied": {"tie_weights": True},
    "ssru": {"tie_weights": True, "decoder_cell": "ssru"},
    "T5": {"gated": True, "norm": "rms", "relative_bias": "each", "bias": False, "positions": "none"},
}


def tiny(**options: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(50, 50, **SIZES, **options).eval()  # type: ignore[arg-type]


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(1))


def relative_error(out: Tensor, exact: Tensor) -> float:
    return ((out - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", list(OPTIONS))
def test_every_way_through_a_model(options: str, dynamic: bool) -> None:
    """Rounding to 8 bits moves a number by up to a 255th of its row's largest; a product averages that out to about a hundredth."""
    model = tiny(**OPTIONS[options])
    before = copy.deepcopy(model.state_dict())
    rounded = quantize_int8(model, dynamic)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not is_int8(model)
    assert is_int8(rounded)
    src, tgt = tokens(3, 9), tokens(3, 7)
    with torch.no_grad():
        exact, out = model(src, tgt), rounded(src, tgt)
        assert 1e-4 < relative_error(out, exact) < 0.03
        memory, cache = rounded.start_decoding(src, 8)
        steps = [rounded.decode(tgt[:, i : i + 1], memory, cache) for i in range(7)]
        # In dynamic, a last bit of a state may move its 8 bits to their neighbor.
        assert relative_error(torch.cat(steps, 1), out) < (0.01 if dynamic else 1e-5)
    assert torch.equal(rounded.score(src, tgt).tokens.isfinite(), model.score(src, tgt).tokens.isfinite())
    assert rounded.generate(src, 6, beam=2).shape[0] == 3


def test_matrices_are_int8_and_the_rest_stays() -> None:
    model = tiny(memory_layers="mixed", relative_bias="shared", positions="learned")
    state, scales = int8_tensors(quantize_int8(model))
    own = {name for name, tensor in state.items() if tensor.dtype is not torch.int8}
    assert scales.keys() == state.keys() - own
    assert {name.rpartition(".")[2] for name in scales} == {"weight", "in_proj_weight"}
    for name in own:
        assert "norm" in name or "bias" in name or name in ("memory_mix", "src_embedding.positions", "tgt_embedding.positions"), name
        assert torch.equal(state[name], model.state_dict()[name])
    for name, scale in scales.items():
        weight = model.state_dict()[name]
        torch.testing.assert_close(scale, weight.abs().amax(1, keepdim=True).clamp_min(1e-9) / 127.5, rtol=1e-5, atol=2e-7)
        # Half a step, and a whole one where -128 has no counterpart: 127.5 becomes 127.
        assert ((state[name] * scale - weight).abs() <= scale * 0.501).all()


@pytest.mark.parametrize("sizes", [{}, {"kdim": 8, "vdim": 12}, {"add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_multi_head_attention(sizes: dict[str, int], dynamic: bool) -> None:
    attention = MultiHeadAttention(16, 2, batch_first=True, **sizes).eval()
    rounded = quantize_int8(attention, dynamic)
    query, key, value = (torch.randn(2, 5, sizes.get(name, 16)) for name in ("", "kdim", "vdim"))
    calls = [(query, key, value)] if "kdim" in sizes else [(query, key, value), (query, key, key), (query, query, query)]
    with torch.no_grad():
        for call in calls:
            assert 1e-4 < relative_error(rounded(*call)[0], attention(*call)[0]) < 0.05


def test_what_is_refused() -> None:
    model = tiny()
    rounded = quantize_int8(model)
    with pytest.raises(ValueError, match="quantize_int8 needs a model with float weights"):
        quantize_int8(rounded)
    with pytest.raises(ValueError, match="export needs a model with float weights"):
        export_programs(rounded)
    with pytest.raises(ValueError, match="save_pretrained needs a model with float weights"):
        rounded.save_pretrained("nowhere")
    with pytest.raises(ValueError, match=r"use replace_attention\(model\) first"):
        quantize_int8(nn.TransformerEncoderLayer(16, 2))
    weight = rounded.encoder.layers[0].get_submodule("self_attn").in_proj_weight
    assert isinstance(weight, Tensor)
    with pytest.raises(NotImplementedError, match="not along dim 1"):
        weight[:, :3]
    state, scales = int8_tensors(rounded)
    with pytest.raises(ValueError, match=r"not those of the model: output\.weight"):
        load_int8(tiny(), state, {name: scale for name, scale in scales.items() if name != "output.weight"}, False)
    with pytest.raises(ValueError, match=r"output\.weight must be int8 with scales \(50, 1\) float32, got torch.int8, \(49, 1\)"):
        load_int8(tiny(), state, scales | {"output.weight": scales["output.weight"][1:]}, False)


@pytest.fixture(scope="module", params=["weights only", "dynamic"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `quantize` wrote of a trained model."""
    output = tmp_path_factory.mktemp("int8")
    dynamic = ["--dynamic"] if request.param == "dynamic" else []
    assert main(["quantize", str(trained_folder()), "--output", str(output), "--device", "cpu", *dynamic]) == 0
    return output


def test_without_torchao(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    for kept in (quantize.torchao_quantization, quantize._matrix_type):
        monkeypatch.setattr(quantize, kept.__name__, functools.cache(kept.__wrapped__))
    expected = r"torchao cannot be imported .*; install it with: pip install 'fused-attention\[int8\]'"
    with pytest.raises(MissingModuleError, match=expected):
        quantize_int8(tiny())
    assert re.match(expected, error_line(capsys, "translate", folder, "--device", "cpu"))
    assert re.match(expected, error_line(capsys, "quantize", trained_folder(), "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_translates_like_that_of_float_weights(folder: Path) -> None:
    known = load_corpus(read_checkpoint(trained_folder()).config["data"]).train
    before, after = (Translator.load(path, "cpu") for path in (trained_folder(), folder))
    assert is_int8(after.model)
    assert after.translate(known.source) == known.target
    lines = known.source[:8], known.target[:8]
    assert after.log_probabilities(*lines) == pytest.approx(before.log_probabilities(*lines), abs=0.1)


def test_a_checkpoint_is_smaller(folder: Path) -> None:
    (float_weights, _), (int8_weights, file) = (read_checkpoint(path).num_bytes() for path in (trained_folder(), folder))
    assert file == (folder / CHECKPOINT_NAME).stat().st_size
    assert int8_weights < float_weights / 2.5  # of a width of 32, scales and norms are more than of a real model
    assert {"model", "scale", "tokenizer"} == {name.partition(".")[0] for name in load_file(folder / CHECKPOINT_NAME)}


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints both; neither training goes on from the result, nor is it quantized again."""
    arguments = ["quantize", str(trained_folder()), "--output", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    for line, path in zip(printed, (trained_folder() / CHECKPOINT_NAME, tmp_path), strict=True):
        assert line.startswith(f"test: {path}: weights 0.")
        assert " MB, " in line
        assert "BLEU" in line
    assert "exists; choose another folder" in error_line(capsys, *arguments)
    assert error_line(capsys, "quantize", tmp_path, "--output", tmp_path / "again").endswith("has int8 weights already")
    resumed = error_line(capsys, "train", tmp_path, "--resume", "--steps", "300", "--device", "cpu").splitlines()[-1]
    assert resumed.endswith("holds weights alone, of which no training can go on")
    assert "no corpus 'nowhere'" in error_line(capsys, "quantize", folder, "--output", tmp_path / "again", "--data", "nowhere")


@pytest.mark.parametrize("damage", ["kind", "scales", "dtype"])
def test_damaged(folder: Path, tmp_path: Path, damage: str) -> None:
    checkpoint = read_checkpoint(folder)
    tensors, progress = dict(checkpoint.tensors), dict(checkpoint.progress)
    if damage == "kind":
        del progress["int8"]
    elif damage == "scales":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("scale.")}
    else:
        tensors["model.tgt_embedding.weight"] = tensors["model.tgt_embedding.weight"].float()
    settings = {"config": checkpoint.config, "model_config": checkpoint.model_config, "progress": progress}
    save_checkpoint(tmp_path / CHECKPOINT_NAME, tensors, **settings)
    with pytest.raises(CheckpointError, match=f"corrupt checkpoint {tmp_path}.*: .*int8"):
        Translator.load(tmp_path, "cpu")
