"""The global order of samples, a pure function of (seed, step): which items each optimizer step takes.

Each source is an endless stream: epoch e is a permutation of all its items seeded by (seed, source, e), and an item starts
where the lengths before it in the stream end. With step size B (CPT: target tokens; RPO: pairs, each of length 1), step s
takes from source i the items that start in [ floor(s B share_i), floor((s + 1) B share_i) ), in exact arithmetic. So every
step holds each source's share to within one item, nothing is lost or repeated within an epoch, any step is found without
those before it, and nothing depends on the number of ranks or on how the step is packed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from medtrain.trainer.errors import bad_input

_BLOCK = 1024  # items between two starts that are kept


@dataclass(frozen=True)
class StepItems:
    """The items of one step: three arrays [n], int64. ``lengths`` are those the order was made with."""

    source_ids: np.ndarray
    item_ids: np.ndarray
    lengths: np.ndarray


def source_shares(weights: Sequence[float | None], totals: Sequence[int]) -> list[Fraction]:
    """Return the share of each source in every step, ``weight / sum(weights)``; without weights the shares follow ``totals``,
    so that all sources are used up together. Raises InputError if some sources have a weight and others have none."""
    given = [weight is not None for weight in weights]
    if any(given) and not all(given):
        found = f"a weight for {sum(given)} of {len(given)} sources"
        raise bad_input("weights for some sources only", field="weight", found=found, expected="for all or for none")
    # Through str, 0.1 is 1/10 and not the nearest binary fraction.
    parts = [Fraction(str(weight)) for weight in weights] if all(given) else [Fraction(int(t)) for t in totals]
    whole = sum(parts)
    return [part / whole for part in parts]


class GlobalOrder:
    """The order over sources with item ``lengths`` (an int array [num_items] per source, all at least 1).

    ``shares`` sum to 1; ``step_size`` in the unit of the lengths; ``setting`` is its name in messages. Raises InputError if
    a step could be empty: some source's share of a step must be at least its longest item.
    """

    def __init__(self, lengths, shares: Sequence[Fraction], step_size: int, seed: int, *, setting="optim.batch_tokens"):
        self.lengths: list[np.ndarray] = list(lengths)
        self.shares, self.step_size, self.seed = list(shares), step_size, seed
        self.totals = [int(ls.sum(dtype=np.int64)) for ls in self.lengths]
        least = min(math.ceil(int(ls.max()) / share) for ls, share in zip(self.lengths, self.shares, strict=True))
        if step_size < least:
            raise bad_input("too small: a step could be empty", field=setting, found=step_size, expected=f"at least {least}")
        # Two epochs of each source: a step at the seam reads both.
        self._epochs = [functools.lru_cache(maxsize=2)(functools.partial(self._make_epoch, i)) for i in range(len(self.lengths))]

    def step(self, step: int) -> StepItems:
        """Return the items of step ``step`` (from 0), by source and within it in stream order."""
        parts = []
        for i, share in enumerate(self.shares):
            begin, end = (math.floor(s * self.step_size * share) for s in (step, step + 1))
            items = self._slice(i, begin, end)
            parts.append((np.full(len(items), i), items, self.lengths[i][items].astype(np.int64)))
        return StepItems(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _slice(self, i: int, begin: int, end: int) -> np.ndarray:
        """Return the items of source ``i`` whose start lies in [begin, end) of its stream."""
        total = self.totals[i]
        parts = [np.empty(0, dtype=np.int64)]
        for epoch in range(begin // total, -(-end // total)):
            low, high = (self._place(i, epoch, position - epoch * total) for position in (begin, end))
            parts.append(self._epochs[i](epoch)[0][low:high].astype(np.int64))
        return np.concatenate(parts)

    def _place(self, i: int, epoch: int, position: int) -> int:
        """Return how many items of the epoch start before ``position``."""
        permutation, block_starts = self._epochs[i](epoch)
        block = int(np.searchsorted(block_starts, position)) - 1
        if block < 0:
            return 0
        lengths = self.lengths[i][permutation[block * _BLOCK : (block + 1) * _BLOCK]].astype(np.int64)
        starts = int(block_starts[block]) + np.cumsum(lengths) - lengths
        return block * _BLOCK + int(np.searchsorted(starts, position))

    def _make_epoch(self, i: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the permutation of an epoch and where each ``_BLOCK`` of its items starts: all starts would be large. numpy
        keeps a bit generator's raw stream the same in every version, but not what Generator.permutation makes of it."""
        keys = np.random.PCG64(np.random.SeedSequence([self.seed, i, epoch])).random_raw(len(self.lengths[i]))
        permutation = sorting_permutation(keys)
        sums = np.add.reduceat(self.lengths[i][permutation], np.arange(0, len(keys), _BLOCK), dtype=np.int64)
        return permutation, np.cumsum(sums) - sums


def sorting_permutation(keys: np.ndarray) -> np.ndarray:
    """Return ``argsort(keys, kind="stable")`` of uint64 keys, int32 where that suffices, in a fifth of the time: numbers sort
    faster than they argsort, so each key's low bits give way to its index, and the few keys then equal are sorted again."""
    bits = np.uint64(max(len(keys) - 1, 1).bit_length())
    low = (np.uint64(1) << bits) - np.uint64(1)
    mixed = keys & ~low
    mixed |= np.arange(len(keys), dtype=np.uint32 if len(keys) < 2**32 else np.uint64)
    mixed.sort()
    permutation = np.empty(len(keys), dtype=np.int32 if len(keys) < 2**31 else np.int64)
    np.bitwise_and(mixed, low, out=permutation, casting="unsafe")
    mixed >>= bits
    equal = np.flatnonzero(mixed[1:] == mixed[:-1])
    for run in np.split(equal, np.flatnonzero(np.diff(equal) > 1) + 1) if len(equal) else ():
        items = permutation[run[0] : run[-1] + 2]
        items[:] = items[np.argsort(keys[items], kind="stable")]
    return permutation
