"""Windows of CPT documents: the items of the global order, each token after a document's first in exactly one of them.

With ``seq_len`` L, a document ``d`` of n tokens has n - 1 predictions. Its window k has the inputs
``d[kL : min((k + 1)L, n - 1)]`` and as targets the same shifted by one. So windows of one document share no input and
no target, the eos is a target, no window holds two documents, and a window's length is the number of tokens it counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medtrain.trainer.data.tokens import TokenizedSource
from medtrain.trainer.errors import bad_input

_BLOCK = 2**18


@dataclass(frozen=True)
class Windows:
    """The windows of one source.

    ``first`` int64 [num_docs + 1]: windows before each document; ``lengths`` int32 [num_windows]: inputs, and as many
    counted tokens, of each. Documents of one token (eos alone) have none.
    """

    source: TokenizedSource
    seq_len: int
    first: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def window(self, i: int) -> np.ndarray:
        """Return the tokens of window ``i``, uint32 [length + 1]: ``[:-1]`` the inputs, ``[1:]`` the targets."""
        doc = int(np.searchsorted(self.first, i, side="right")) - 1
        start = int(self.source.offsets[doc]) + (i - int(self.first[doc])) * self.seq_len
        return self.source.tokens(start, start + int(self.lengths[i]) + 1)


def make_windows(source: TokenizedSource, seq_len: int) -> Windows:
    """Cut the documents of ``source`` into windows of at most ``seq_len`` inputs. Raises InputError if none remains."""
    if seq_len < 1:
        raise bad_input("wrong setting", field="data.seq_len", found=seq_len, expected="at least 1")
    first = np.zeros(source.num_docs + 1, dtype=np.int64)
    for docs, predictions in _predictions(source):
        first[docs.start + 1 : docs.stop + 1] = -(-predictions // seq_len)
    np.cumsum(first, out=first)
    if first[-1] == 0:
        raise bad_input("no document has a token to predict", file=source.path)
    lengths = np.full(first[-1], seq_len, dtype=np.int32)
    for docs, predictions in _predictions(source):
        last = first[docs.start + 1 : docs.stop + 1] - 1
        kept = predictions > 0
        lengths[last[kept]] = (predictions[kept] - 1) % seq_len + 1
    return Windows(source, seq_len, first, lengths)


def _predictions(source: TokenizedSource) -> Iterator[tuple[slice, np.ndarray]]:
    """Documents and how many tokens each has after its first, int64; in blocks, for the memory's sake."""
    for start in range(0, source.num_docs, _BLOCK):
        docs = slice(start, min(start + _BLOCK, source.num_docs))
        yield docs, np.diff(source.offsets[docs.start : docs.stop + 1]) - 1
