"""Windows of CPT documents: the items of the global order, each token after a document's first in exactly one of them.

With ``seq_len`` L, a document ``d`` of n tokens has n - 1 predictions. Its window k has the inputs
``d[kL : min((k + 1)L, n - 1)]`` and as targets the same shifted by one. So windows of one document share no input and
no target, the eos is a target, no window holds two documents, and a window's length is the number of tokens it counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medtrain.trainer.data.tokens import TokenizedSource
from medtrain.trainer.errors import bad_input


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
    predictions = np.diff(source.offsets) - 1
    first = np.zeros(source.num_docs + 1, dtype=np.int64)
    np.cumsum(-(-predictions // seq_len), out=first[1:])
    if first[-1] == 0:
        raise bad_input("no document has a token to predict", file=source.path)
    lengths = np.full(first[-1], seq_len, dtype=np.int32)
    kept = predictions > 0
    lengths[first[1:][kept] - 1] = (predictions[kept] - 1) % seq_len + 1
    return Windows(source, seq_len, first, lengths)
