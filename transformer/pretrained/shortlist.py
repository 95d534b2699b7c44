"""A lexical shortlist: the few thousand target tokens that the words of a source can translate to, instead of the whole vocabulary.

Method: Jean et al. 2015, "On using very large target vocabulary for neural machine translation". The file format is Bergamot's. Little-
endian: a magic number, a checksum, how many of the most frequent target tokens are always included, how many are listed per source token,
the number of offsets and the number of tokens, all uint64; the offsets, uint64, one per source token plus an end; the tokens, uint32.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .find import PretrainedError

MAGIC = 0xF11A48D5013417F5
HEADER = "<6Q"


class Shortlist:
    """tokens[offsets[i] : offsets[i + 1]] are the target tokens of source token i; tokens below `always` are in every list."""

    def __init__(self, offsets: Tensor, tokens: Tensor, always: int) -> None:
        """offsets (source vocabulary + 1,) int64, ascending; tokens int64."""
        self.offsets, self.tokens, self.always = offsets, tokens, always

    @classmethod
    def read(cls, path: Path, source_vocab: int, target_vocab: int) -> Shortlist:
        """Raises PretrainedError: the file is missing, damaged, or for other vocabularies."""
        try:
            data = path.read_bytes()
            magic, _, always, _, num_offsets, num_tokens = struct.unpack_from(HEADER, data)
            if magic != MAGIC:
                raise ValueError("it starts with another number")
            start = struct.calcsize(HEADER)
            if len(data) != start + 8 * num_offsets + 4 * num_tokens:
                raise ValueError(f"it has {len(data)} bytes")
            offsets = np.frombuffer(data, "<u8", num_offsets, start).astype(np.int64)
            tokens = np.frombuffer(data, "<u4", num_tokens, start + 8 * num_offsets).astype(np.int64)
        except OSError as error:
            raise PretrainedError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, struct.error) as error:
            raise PretrainedError(f"{path} is not a binary lexical shortlist, or is damaged: {error}") from error
        fits = num_offsets == source_vocab + 1 and (np.diff(offsets) >= 0).all() and offsets[0] == 0 and offsets[-1] == num_tokens
        if not fits or tokens.max(initial=0) >= target_vocab or always > target_vocab:
            raise PretrainedError(f"{path} is a shortlist of other vocabularies than {source_vocab} and {target_vocab} tokens")
        return cls(torch.from_numpy(offsets), torch.from_numpy(tokens), always)

    def candidates(self, sources: Tensor) -> Tensor:
        """sources (B, S) int64, with any padding -> (n,) int64, ascending: the target tokens that any of them can translate to."""
        known = sources.unique().cpu()
        known = known[known < self.offsets.shape[0] - 1]
        starts, lengths = self.offsets[known], self.offsets[known + 1] - self.offsets[known]
        before = lengths.cumsum(0) - lengths
        places = torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))
        return torch.cat((torch.arange(self.always), self.tokens[places])).unique().to(sources.device)
