"""Byte-pair encoding (Sennrich et al. 2016) or a unigram model (Kudo 2018) with sentencepiece: one for both languages, or one each."""

from __future__ import annotations

import io
from collections.abc import Sequence

from ..optional import optional_module
from .data import DataError

# sentencepiece's symbols for a space and for unknown text. It does not train on sentences that contain the latter.
SPACE_SIGN, UNKNOWN_SIGN = "▁", "▅"
# In bytes, the maximum sentencepiece accepts. It silently skips longer sentences, by default those over 4192 bytes.
MAX_SENTENCE_LENGTH = 2**30
TOKENIZERS = ("bpe", "unigram")
SPECIAL_IDS = PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3


class Tokenizer:
    """Sentences to token ids and back; ids 0 to 3 are padding, begin, end and unknown. `model` is its serialized form."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = optional_module("sentencepiece").SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, sentences: Sequence[str], vocab_size: int, kind: str = "bpe") -> Tokenizer:
        """Learn `vocab_size` pieces, including the four special ones. DataError if the text cannot fill or fit them.

        kind: one of TOKENIZERS.
        Every character of the sentences, as normalized by sentencepiece (NFKC), is a piece, except for its own symbols and NUL.
        """
        sentencepiece = optional_module("sentencepiece")
        failure = f"cannot learn a vocabulary of {vocab_size} pieces from this text"
        if vocab_size <= len(SPECIAL_IDS):
            raise DataError(f"vocab_size must be more than the {len(SPECIAL_IDS)} special pieces, not {vocab_size}")
        sentences = [sentence.replace(UNKNOWN_SIGN, " ") for sentence in sentences]
        normalized = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").normalize(sentences)
        characters = set().union(*normalized) - {SPACE_SIGN, "\0"}
        if not characters:
            raise DataError(f"{failure}: it has no characters")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                model_type=kind,
                vocab_size=vocab_size,
                max_sentence_length=MAX_SENTENCE_LENGTH,
                character_coverage=1.0,
                # sentencepiece computes the coverage in float32, which reaches 1 before the last of some ten million characters.
                required_chars="".join(sorted(characters)),
                pad_id=PAD_ID,
                bos_id=BOS_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            # sentencepiece's message is its source location, then a sentence that says what to do, if there is one.
            reason = str(error).rpartition("] ")[2].strip() or str(error)
            raise DataError(f"{failure}: {reason}") from error
        return cls(model.getvalue())

    def __len__(self) -> int:
        return self._processor.vocab_size()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence, without begin and end tokens."""
        return self._processor.encode(list(sentences), out_type=int)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The sentence for each row of ids, up to the first end token; padding is skipped."""
        rows = []
        for row in ids:
            text = [int(token) for token in row]
            if EOS_ID in text:
                text = text[: text.index(EOS_ID)]
            rows.append([token for token in text if token not in (PAD_ID, BOS_ID)])
        return self._processor.decode(rows)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The written form of each id, e.g. "▁house"."""
        return [self._processor.id_to_piece(int(token)) for token in ids]
