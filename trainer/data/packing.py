"""Packing: deals the items of one step into micro-batches, the same number for every rank and each within capacity.

The number of micro-batches is what best-fit decreasing needs, rounded up to a multiple of the ranks. Then the items are
spread evenly over that many (longest first, onto the least loaded): the ranks wait for each other in every micro-batch,
so a step takes as long as its fullest ones, and evenly filled ones need less memory too. Where spreading would overfill
one, nearly all are full, and best fit's own filling stays, made up with empty ones.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from medtrain.trainer.errors import bad_input


def check_capacity(longest: int, capacity: int, *, what: str) -> None:
    """Raise InputError unless an item of ``longest`` tokens fits a micro-batch. ``what`` names it (``a window``)."""
    if longest > capacity:
        raise bad_input(
            f"too small for {what}", field="optim.micro_batch_tokens", found=capacity, expected=f"at least {longest}, the longest"
        )


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, world_size: int) -> list[list[list[int]]]:
    """Return ``plan[micro_batch][rank]``: the indices into ``lengths`` of the items that rank takes there.

    Every item is in exactly one, no one holds more than ``capacity`` tokens, and all ranks have the same number of
    micro-batches; a rank may have nothing in the last. Bins of similar load share a micro-batch, so the ranks are balanced in
    each. A function of its arguments alone.
    """
    sizes: list[int] = np.asarray(lengths).tolist()
    assert sizes and world_size > 0 and max(sizes) <= capacity
    longest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    bins = _best_fit(sizes, longest_first, capacity)
    num_bins = -(-len(bins) // world_size) * world_size
    bins = _spread(sizes, longest_first, capacity, num_bins) or bins + [[] for _ in range(num_bins - len(bins))]
    loads = [sum(sizes[i] for i in items) for items in bins]
    by_load = [bins[b] for b in sorted(range(num_bins), key=lambda b: -loads[b])]
    plan = [by_load[j : j + world_size] for j in range(0, num_bins, world_size)]
    # Back and forth, so that the fullest of a micro-batch is not always rank 0's.
    return [ranks if j % 2 == 0 else ranks[::-1] for j, ranks in enumerate(plan)]


def _best_fit(lengths: list[int], longest_first: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for i in longest_first:
        k = bisect_left(free, (lengths[i], -1))
        if k < len(free):
            left, b = free.pop(k)
        else:
            left, b = capacity, len(bins)
            bins.append([])
        bins[b].append(i)
        insort(free, (left - lengths[i], b))
    return bins


def _spread(lengths: list[int], longest_first: list[int], capacity: int, num_bins: int) -> list[list[int]] | None:
    """Put each item on the least loaded of ``num_bins``; None if one would be overfilled."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for i in longest_first:
        load, b = heap[0]
        if load + lengths[i] > capacity:
            return None
        bins[b].append(i)
        heapq.heapreplace(heap, (load + lengths[i], b))
    return bins
