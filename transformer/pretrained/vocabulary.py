"""A Marian model's sentencepiece vocabulary, whose ids are the model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from .find import PretrainedError
from .marian import EOS_ID


class Vocabulary:
    """Sentences to token ids and back, like translation.tokenizer.Tokenizer for the models trained here.

    `model` holds the file's contents.
    """

    def __init__(self, path: Path) -> None:
        """Raises PretrainedError: the file is missing, damaged, or not a Marian vocabulary, in which </s> has id 0."""
        try:
            self.model = path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except OSError as error:
            raise PretrainedError(f"cannot read {path}: {error.strerror or error}") from error
        except RuntimeError as error:
            raise PretrainedError(f"{path} is not a sentencepiece model, or is damaged") from error
        if self._processor.eos_id() != EOS_ID:
            raise PretrainedError(f"{path} is not a vocabulary of Marian's: </s> has id {self._processor.eos_id()}, not {EOS_ID}")

    def __len__(self) -> int:
        return self._processor.vocab_size()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence, without the end."""
        return self._processor.encode(list(sentences), out_type=int)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The sentence for each row of ids, up to the first end token; ids outside the vocabulary are skipped."""
        rows = [[int(token) for token in row] for row in ids]
        rows = [row[: row.index(EOS_ID)] if EOS_ID in row else row for row in rows]
        return self._processor.decode([[token for token in row if token < len(self)] for row in rows])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The written form of each id, e.g. "▁house"."""
        return [self._processor.id_to_piece(int(token)) for token in ids]
