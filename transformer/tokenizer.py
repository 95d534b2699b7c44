"""Byte-pair encoding (Sennrich et al. 2016) by sentencepiece: one vocabulary for both languages, or one for each."""

from __future__ import annotations

import io
from collections.abc import Sequence

from fused_attention.transformer.data import DataError
from fused_attention.transformer.optional_modules import optional_module

SPECIAL_IDS = PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3


class Tokenizer:
    """Sentences to token ids and back; ids 0 to 3 are padding, begin, end and unknown. `model` is its serialised form."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = optional_module("sentencepiece").SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, sentences: Sequence[str], vocab_size: int) -> Tokenizer:
        """Learn `vocab_size` pieces, the four special ones included. DataError if the text cannot fill or fit them."""
        if vocab_size <= len(SPECIAL_IDS):
            raise DataError(f"vocab_size must be more than the {len(SPECIAL_IDS)} special pieces, not {vocab_size}")
        model = io.BytesIO()
        try:
            optional_module("sentencepiece").SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=1.0,
                pad_id=PAD_ID,
                bos_id=BOS_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            # sentencepiece's message ends with the sentence that says what to do, after its source location.
            reason = str(error).rpartition("] ")[2].strip()
            raise DataError(f"cannot learn a vocabulary of {vocab_size} pieces from this text: {reason}") from error
        return cls(model.getvalue())

    def __len__(self) -> int:
        return self._processor.vocab_size()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token ids of each sentence, without begin and end."""
        return self._processor.encode(list(sentences), out_type=int)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The sentence of each row of ids, which ends at the first end token; padding is left out."""
        rows = []
        for row in ids:
            text = list(row)
            if EOS_ID in text:
                text = text[: text.index(EOS_ID)]
            rows.append([token for token in text if token not in (PAD_ID, BOS_ID)])
        return self._processor.decode(rows)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The written form of each id, e.g. "▁house"."""
        return [self._processor.id_to_piece(token) for token in ids]
