"""Parallel text, tokenizers and batches."""

from __future__ import annotations

import errno
import gzip
import io
import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_translation import made_up_text, write_corpus, write_text

from fused_attention.transformer.translation import corpora, data, libreoffice_help
from fused_attention.transformer.translation.batches import BatchSource, Position, Share, StepBatch
from fused_attention.transformer.translation.corpora import load_corpus
from fused_attention.transformer.translation.data import DataError, ParallelText, left_out_text, read_parallel
from fused_attention.transformer.translation.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer


class TestReading:
    def test_plain_and_gzipped_files_read_alike(self, tmp_path: Path) -> None:
        plain = load_corpus(str(write_corpus(tmp_path / "plain")))
        folder = write_corpus(tmp_path / "gz")
        for path in list(folder.iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        zipped = load_corpus(str(folder))
        assert (zipped.train, zipped.validation, zipped.tests) == (plain.train, plain.validation, plain.tests)
        assert len(plain.train) == 60
        assert plain.held_out() == ("test", plain.tests["test"])

    def test_every_test_set_that_both_languages_have(self, tmp_path: Path) -> None:
        folder = write_corpus(tmp_path)
        write_text(folder, "test_2016", made_up_text(3))
        (folder / "test_2017.en").write_text("only English\n")
        assert list(load_corpus(str(folder)).tests) == ["test", "test_2016"]

    def test_without_a_test_set_scores_are_on_val(self, tmp_path: Path) -> None:
        folder = write_corpus(tmp_path)
        for path in folder.glob("test*"):
            path.unlink()
        corpus = load_corpus(str(folder))
        assert corpus.held_out() == ("val", corpus.validation)

    def test_pairs_with_a_blank_side_are_left_out_and_the_rest_stays_aligned(self, tmp_path: Path) -> None:
        (tmp_path / "train.en").write_text(" one \n\ntwo\nthree\n")
        (tmp_path / "train.fr").write_text("un\nrien\n  \ntrois")
        text = read_parallel(tmp_path, "train", "en", "fr")
        assert text == ParallelText(["one", "three"], ["un", "trois"])
        assert text.left_out == {"with an empty side": 2}
        assert left_out_text(text.left_out) == "; left out: 2 with an empty side"

    def test_only_a_newline_ends_a_line(self, tmp_path: Path) -> None:
        # Real corpora hold form feeds and U+2028 inside sentences; splitting there would misalign all that follows.
        (tmp_path / "train.en").write_bytes("a\x0cb\u2028c\r\nd\n".encode())
        (tmp_path / "train.fr").write_text("x\ny\n")
        assert read_parallel(tmp_path, "train", "en", "fr").source == ["a\x0cb\u2028c", "d"]

    def test_max_words_counts_the_longer_side(self, tmp_path: Path) -> None:
        folder = write_corpus(tmp_path)
        (folder / "val.en").write_text("one two\none\none two three\n")
        (folder / "val.fr").write_text("un\nun deux trois\nun\n")
        validation = load_corpus(str(folder), max_words=np.int64(2)).validation
        assert validation == ParallelText(["one two"], ["un"])
        assert validation.left_out == {"with an empty side": 0, "of more than 2 words": 2}
        assert left_out_text(validation.left_out) == "; left out: 2 of more than 2 words"

    def test_fingerprint_follows_the_training_text(self, tmp_path: Path) -> None:
        folder = write_corpus(tmp_path)
        before = load_corpus(str(folder)).fingerprint()
        assert load_corpus(str(folder)).fingerprint() == before
        text = (folder / "train.fr").read_text()
        (folder / "train.fr").write_text(text.replace("chat", "chaton", 1))
        assert load_corpus(str(folder)).fingerprint() != before


class TestBadCorpora:
    def test_mismatched_line_counts_name_files_and_counts(self, tmp_path: Path) -> None:
        folder = write_corpus(tmp_path)
        (folder / "train.fr").write_text("un\ndeux\n")
        with pytest.raises(DataError, match=r"train\.en has 60, .*train\.fr has 2"):
            load_corpus(str(folder))

    @pytest.mark.parametrize("content", ["", "\n", " \n \n"], ids=["no bytes", "one blank line", "blank lines"])
    def test_empty(self, tmp_path: Path, content: str) -> None:
        folder = write_corpus(tmp_path)
        for language in ("en", "fr"):
            (folder / f"val.{language}").write_text(content)
        with pytest.raises(DataError, match=r"empty corpus: .*val\.en and .*val\.fr"):
            load_corpus(str(folder))

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no corpus '.*nowhere': neither a folder nor one of the names multi30k"):
            load_corpus(str(tmp_path / "nowhere"))

    def test_missing_language(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"has no file train\.de or train\.de\.gz"):
            load_corpus(str(write_corpus(tmp_path)), "en", "de")

    def test_one_language_twice(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="both 'en'"):
            load_corpus(str(write_corpus(tmp_path)), "en", "en")

    def test_not_utf8(self, tmp_path: Path) -> None:
        folder = write_corpus(tmp_path)
        (folder / "train.fr").write_bytes("été\n".encode("latin-1"))
        with pytest.raises(DataError, match=r"train\.fr is not UTF-8 text: .* at byte 0"):
            load_corpus(str(folder))

    @pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"plain text"], ids=["cut off", "not gzip"])
    def test_damaged_gzip(self, tmp_path: Path, damage) -> None:
        folder = write_corpus(tmp_path)
        text = (folder / "train.en").read_bytes()
        (folder / "train.en").unlink()
        (folder / "train.en.gz").write_bytes(damage(gzip.compress(text)))
        with pytest.raises(DataError, match=r"train\.en\.gz is not a complete gzip file"):
            load_corpus(str(folder))

    def test_max_words_that_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no pair has at most 1 words"):
            load_corpus(str(write_corpus(tmp_path)), max_words=1)


class TestMulti30k:
    @pytest.fixture(autouse=True)
    def _private_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def test_real_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not os.environ.get(data.DATA_VARIABLE):
            pytest.skip(f"{data.DATA_VARIABLE} is not set to a folder with Multi30k")
        corpus = load_corpus("multi30k")
        name, test = corpus.held_out()
        assert (len(corpus.train), len(corpus.validation), name, len(test)) == (29000, 1014, "test_2016_flickr", 1000)

    def test_download_fills_the_cache_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
        asked = []

        def answer(address: str, timeout: float) -> io.BytesIO:
            asked.append(address.rpartition("/")[2])
            return io.BytesIO(gzip.compress(f"{address[-5:]}\n".encode()))

        monkeypatch.setattr(corpora.urllib.request, "urlopen", answer)
        corpus = load_corpus("multi30k", "en", "de")
        assert corpus.train == ParallelText(["en.gz"], ["de.gz"])
        assert corpus.held_out()[0] == "test_2016_flickr"
        assert len(asked) == 6
        load_corpus("multi30k", "en", "de")
        assert len(asked) == 6

    def test_broken_download_leaves_no_corpus_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(data.DATA_VARIABLE, raising=False)

        def answer(address: str, timeout: float) -> io.BytesIO:
            if "val" in address:
                raise urllib.error.URLError("Network is unreachable")
            return io.BytesIO(gzip.compress(b"a\n"))

        monkeypatch.setattr(corpora.urllib.request, "urlopen", answer)
        with pytest.raises(DataError, match="cannot download .*Network is unreachable; set FUSED_ATTENTION_DATA"):
            load_corpus("multi30k")
        assert list((tmp_path / "cache" / "fused_attention").iterdir()) == []

    def test_full_disk_names_the_file_and_leaves_no_corpus_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
        monkeypatch.setattr(corpora.urllib.request, "urlopen", lambda address, timeout: io.BytesIO(gzip.compress(b"a\n")))

        def no_space(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("fused_attention.transformer.translation.output_files.os.fsync", no_space)
        with pytest.raises(OSError, match="No space left on device") as error_info:
            load_corpus("multi30k")
        assert str(error_info.value.filename).endswith("train.en.gz")
        assert list((tmp_path / "cache" / "fused_attention").iterdir()) == []

    def test_unknown_language(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
        with pytest.raises(DataError, match="multi30k has no language 'es', only en, de, fr, cs"):
            load_corpus("multi30k", "en", "es")


class TestLibreOfficeHelp:
    def test_visible_text_of_elements_with_an_id(self) -> None:
        page = """<h1 id="h" dir="auto">Menu <span class="emph">Insert</span></h1><p dir="auto">no id</p>
            <p id="keys"><span class="switchinline"><span hidden="true" class="MAC">Command</span>
            <span hidden="true">Ctrl</span></span>+F2 &amp; Enter<br>now</p><p class="code" id="c">PRINT 1</p>
            <p id="image"><img src="x" alt="Icon"></p>"""
        assert libreoffice_help.paragraphs_of(page) == {"h": "Menu Insert", "keys": "Ctrl+F2 & Enter now", "image": ""}

    def test_sentences_split_only_where_both_sides_agree(self) -> None:
        assert libreoffice_help.align_sentences("Open it. Close it.", "Ouvrez-le. Éteignez-le.") == [
            ("Open it.", "Ouvrez-le."),
            ("Close it.", "Éteignez-le."),
        ]
        assert libreoffice_help.align_sentences("Open it. Close it.", "Ouvrez puis fermez.") == [
            ("Open it. Close it.", "Ouvrez puis fermez.")
        ]

    def test_pages_pair_by_path_and_paragraphs_by_id(self, tmp_path: Path) -> None:
        pages = {
            "en/a/1.html": '<p id="x">Good day.</p><p id="y">Only here.</p><p id="z">SUM</p>',
            "fr/a/1.html": '<p id="z">SUM</p><p id="x">Bonjour.</p>',
            "en/2.html": '<p id="x">good day!</p><p id="w">Thank you.</p>',
            "fr/2.html": '<p id="x">Salut.</p><p id="w">Merci.</p>',
            "en/3.html": '<p id="x">No such page.</p>',
        }
        for name, text in pages.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        # "Good day." is the same sentence as "good day!" of the page that comes first; SUM is not translated.
        text = libreoffice_help.align_pages(tmp_path / "en", tmp_path / "fr")
        assert text == ParallelText(["good day!", "Thank you."], ["Salut.", "Merci."])

    def test_splits_are_disjoint_and_complete(self, tmp_path: Path) -> None:
        text = made_up_text(100)
        libreoffice_help.write_splits(tmp_path, text)
        corpus = data.read_corpus(tmp_path, "en", "fr")
        parts = [corpus.train, corpus.validation, corpus.tests["test"]]
        assert [len(part) for part in parts] == [80, 10, 10]
        assert sorted(sentence for part in parts for sentence in part.source) == sorted(text.source)
        translation = dict(zip(text.source, text.target, strict=True))
        assert all(part.target == [translation[sentence] for sentence in part.source] for part in parts)

    def test_without_apt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(libreoffice_help.shutil, "which", lambda tool: None)
        with pytest.raises(DataError, match="needs apt-get .*set FUSED_ATTENTION_DATA"):
            load_corpus("libreoffice-help")

    @pytest.fixture
    def fake_tools(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder first on PATH for stand-ins of apt-get and dpkg-deb."""
        folder = tmp_path / "bin"
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return folder

    @pytest.mark.parametrize(
        ("failing", "message"),
        [
            # A failed update alone is no failure; the stand-in then downloads nothing.
            ("update", "no sentence pairs in the help pages"),
            ("download", "apt-get failed: E: no download$"),
            ("*", "apt-get failed: E: no update$"),
        ],
    )
    def test_apt_failure_is_one_line(self, fake_tools: Path, failing: str, message: str) -> None:
        script = '#!/bin/sh\nfor last; do case "$last" in update|download) command=$last;; esac; done\n'
        script += f'case "$command" in {failing}) echo "W: slow" >&2; echo "E: no $command" >&2; exit 100;; esac\n'
        for tool in ("apt-get", "dpkg-deb"):
            (fake_tools / tool).write_text(script)
            (fake_tools / tool).chmod(0o755)
        with pytest.raises(DataError, match=message):
            load_corpus("libreoffice-help")

    def test_other_language_pair(self) -> None:
        with pytest.raises(DataError, match="libreoffice-help is en-fr only, not en-de"):
            load_corpus("libreoffice-help", "en", "de")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = made_up_text(60)
    return Tokenizer.train(text.source + text.target, 60)


class TestTokenizer:
    def test_special_ids_and_size(self, tokenizer: Tokenizer) -> None:
        assert len(tokenizer) == 60
        assert tokenizer.pieces([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<unk>"]

    def test_decode_undoes_encode(self, tokenizer: Tokenizer) -> None:
        sentences = [*made_up_text(20, seed=5).target, ""]
        assert tokenizer.decode(tokenizer.encode(sentences)) == sentences

    def test_decode_ends_at_eos_and_skips_padding(self, tokenizer: Tokenizer) -> None:
        cat, dog = tokenizer.encode(["cat", "dog"])
        assert tokenizer.decode([[BOS_ID, *cat, EOS_ID, *dog], [*cat, *dog, PAD_ID, PAD_ID]]) == ["cat", "cat dog"]

    def test_survives_serialisation(self, tokenizer: Tokenizer) -> None:
        assert Tokenizer(tokenizer.model).encode(["big red dog"]) == tokenizer.encode(["big red dog"])

    def test_ids_of_numpy(self, tokenizer: Tokenizer) -> None:
        ids = np.array(tokenizer.encode(["big red dog"])[0])
        assert tokenizer.decode([ids]) == ["big red dog"]
        assert tokenizer.pieces(ids) == tokenizer.pieces(ids.tolist())

    @pytest.mark.parametrize(
        "sentence",
        ["Ω " + "the cat " * 600, "Ω ▅", "Ω\0", "Ω ▁ <s>Ω</s>", "Ω\t\u2028\ufeff", "e\u0301Ω"],
        ids=["more than 4192 bytes", "sign for unknown", "NUL", "other signs", "spaces", "combining accent"],
    )
    def test_every_character_of_the_text_is_known(self, sentence: str) -> None:
        tokenizer = Tokenizer.train(["the cat sees a dog"] * 20 + [sentence], np.int64(30))
        assert len(tokenizer) == 30
        known = sentence.replace("▅", "").replace("\0", "")
        assert UNK_ID not in tokenizer.encode([known])[0]

    def test_only_long_lines(self) -> None:
        assert UNK_ID not in Tokenizer.train(["the cat " * 600] * 3, 12).encode(["the cat"])[0]

    @pytest.mark.parametrize("text", [[], ["", "  "], ["▅", "\0"]], ids=["nothing", "spaces", "signs"])
    def test_text_without_characters(self, text: list[str]) -> None:
        with pytest.raises(DataError, match="cannot learn a vocabulary of 20 pieces from this text: it has no characters"):
            Tokenizer.train(text, 20)

    @pytest.mark.parametrize(("size", "message"), [(5000, "too high"), (5, "smaller than required")])
    def test_impossible_vocabulary(self, size: int, message: str) -> None:
        with pytest.raises(DataError, match=f"cannot learn a vocabulary of {size} pieces from this text: .*{message}"):
            Tokenizer.train(made_up_text(60).source, size)


rows = st.lists(st.integers(4, 50), max_size=12)
pairs = st.lists(st.tuples(rows, rows), min_size=1, max_size=60)


class TestBatches:
    @given(pairs, st.integers(26, 100), st.integers(0, 3))
    def test_every_pair_once_an_epoch_within_the_token_limit(self, pairs, batch_tokens: int, epoch: int) -> None:
        source, target = zip(*pairs, strict=True)
        batches = BatchSource(source, target, batch_tokens=batch_tokens, max_len=13)
        indices = batches.epoch(epoch)
        assert sorted(index for batch in indices for index in batch) == list(range(len(pairs)))
        assert indices == BatchSource(source, target, batch_tokens=batch_tokens, max_len=13).epoch(epoch)
        for batch in map(batches.collate, indices):
            assert batch.src.numel() + batch.tgt_out.numel() <= batch_tokens

    @given(pairs, st.integers(0, 20))
    def test_a_position_continues_where_it_was_taken(self, pairs, drawn: int) -> None:
        source, target = zip(*pairs, strict=True)
        batches = BatchSource(source, target, batch_tokens=60, max_len=13)
        position = Position()
        stream = batches.from_position(position)
        for _ in range(drawn):
            next(stream)
        resumed = batches.from_position(Position(position.epoch, position.batch))
        for _ in range(5):
            expected, got = next(stream), next(resumed)
            [ours], [theirs] = expected.micro_batches, got.micro_batches
            assert ours.src.equal(theirs.src)
            assert ours.tgt_out.equal(theirs.tgt_out)

    @given(pairs, st.integers(1, 5), st.integers(1, 4))
    def test_shares_are_the_batch(self, pairs, count: int, pieces: int) -> None:
        source, target = zip(*pairs, strict=True)
        batches = BatchSource(source, target, batch_tokens=60, max_len=13)
        for indices in batches.epoch(0):
            steps = [batches.step(indices, Share(index, count, pieces)) for index in range(count)]
            parts = [part for step in steps for part in step.micro_batches]
            assert [len(step.micro_batches) for step in steps] == [pieces] * count
            labels = sorted(tuple(row[row != PAD_ID].tolist()) for part in parts for row in part.tgt_out if row.any())
            assert labels == sorted((*target[index], EOS_ID) for index in indices)
            whole = StepBatch.of(batches.collate(indices))
            assert {(step.tokens, step.target_tokens) for step in steps} == {(whole.tokens, whole.target_tokens)}

    def test_layout(self) -> None:
        batch = BatchSource([[7, 8], [9]], [[5], [6, 4, 5, 6]], batch_tokens=100, max_len=10).collate([0, 1])
        assert batch.src.tolist() == [[7, 8, EOS_ID, PAD_ID], [9, EOS_ID, PAD_ID, PAD_ID]]
        assert batch.tgt_in.tolist() == [[BOS_ID, 5, *[PAD_ID] * 6], [BOS_ID, 6, 4, 5, 6, *[PAD_ID] * 3]]
        assert batch.tgt_out.tolist() == [[5, EOS_ID, *[PAD_ID] * 6], [6, 4, 5, 6, EOS_ID, *[PAD_ID] * 3]]
        assert batch.tokens() == 5 + 7

    def test_few_shapes_but_never_wider_than_the_model_takes(self) -> None:
        rows = [[4] * (1 + index % 13) for index in range(300)]
        batches = BatchSource(rows, rows, batch_tokens=60, max_len=14)
        assert {batch.src.shape[1] for batch in batches.once()} == {4, 8, 12, 14}

    def test_epochs_and_seeds_differ(self) -> None:
        rows = [[4] * (1 + index % 5) for index in range(100)]
        batches = BatchSource(rows, rows, batch_tokens=60, max_len=10)
        assert batches.epoch(0) != batches.epoch(1)
        assert batches.epoch(0) != BatchSource(rows, rows, batch_tokens=60, max_len=10, seed=1).epoch(0)

    def test_long_pairs_are_left_out(self) -> None:
        batches = BatchSource([[4] * 9, [4]], [[4], [4] * 10], batch_tokens=60, max_len=10)
        assert batches.num_dropped == 1
        assert batches.collate([0]).src.shape == (1, 10)

    def test_nothing_fits(self) -> None:
        with pytest.raises(DataError, match="no sentence pair has fewer than max_len = 3 tokens"):
            BatchSource([[4] * 5], [[4]], batch_tokens=60, max_len=3)
        with pytest.raises(DataError, match="batch_tokens = 5 is less than the longest sentence pair, 12 tokens"):
            BatchSource([[4] * 5], [[4]], batch_tokens=5, max_len=30)
