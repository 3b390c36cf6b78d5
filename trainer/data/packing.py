"""Packing: deals the items of one step into micro-batches, the same number for every rank and each within capacity.

The number of micro-batches is what best-fit decreasing needs, rounded up to a multiple of the ranks. Then the items are
spread evenly over that many (longest first, onto the least loaded): the ranks wait for each other in every micro-batch.
Where spreading would overfill one, nearly all are full, and best fit's own filling stays, made up with empty ones.

Pairs of one prompt form a unit whose cost is the prompt once and each distinct completion once. A unit over the capacity, or
over one rank's even part of the step, is split between pairs: each part then computes the prompt again.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medtrain.trainer.data.pairs import PairSet, token_key
from medtrain.trainer.errors import bad_input


def check_capacity(longest: int, capacity: int, *, what: str) -> None:
    """Raise InputError unless an item of ``longest`` tokens fits a micro-batch. ``what`` names it (``a window``)."""
    if longest > capacity:
        expected = f"at least {longest}, the longest"
        raise bad_input(f"too small for {what}", field="optim.micro_batch_tokens", found=capacity, expected=expected)


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, world_size: int) -> list[list[list[int]]]:
    """Return ``plan[micro_batch][rank]``: the indices into ``lengths`` of the items that rank takes there.

    Every item is in exactly one, none holds more than ``capacity`` tokens, and all ranks have the same number of
    micro-batches; a rank may have nothing in the last. Bins of similar load share a micro-batch. A function of its arguments
    alone.
    """
    sizes: list[int] = np.asarray(lengths).tolist()
    assert sizes and world_size > 0 and max(sizes) <= capacity
    longest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    bins = _best_fit(sizes, longest_first, capacity)
    num_bins = -(-len(bins) // world_size) * world_size
    bins = _spread(sizes, longest_first, capacity, num_bins) or bins + [[] for _ in range(num_bins - len(bins))]
    by_load = sorted(bins, key=lambda items: -sum(sizes[i] for i in items))
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


@dataclass(frozen=True)
class TokenCounts:
    """Input tokens of one plan, over all ranks. A completion's last token is only a target. ``padding``: the one token of each
    empty micro-batch. ``needed``: each distinct prompt and completion once. ``separate``: each side after its own prompt."""

    prompt: int
    completion: int
    padding: int
    needed: int
    separate: int

    @property
    def computed(self) -> int:
        return self.prompt + self.completion + self.padding

    def metrics(self) -> dict[str, int | float]:
        return {
            "tokens_computed": self.computed,
            "tokens_prompt": self.prompt,
            "tokens_completion": self.completion,
            "tokens_padding": self.padding,
            "tokens_saved": self.separate - self.prompt - self.completion,
            "useful_token_share": self.needed / self.computed,
        }


@dataclass
class _Unit:
    """Pairs that are computed together: one prompt (its tokens) and distinct completions (their inputs, by key)."""

    prompt: int
    pairs: list[int]
    completions: dict[object, int]

    @property
    def cost(self) -> int:
        return self.prompt + sum(self.completions.values())


_Pair = tuple[object, int, dict[object, int]]  # prompt's key and tokens, completions' keys and inputs


def plan_pairs(
    sources: Sequence[PairSet], items: Sequence[tuple[int, int]], *, share: bool, capacity: int, world_size: int
) -> tuple[list[list[list[int]]], TokenCounts]:
    """Deal pairs ``items``, each (source index, pair index), into micro-batches; see :func:`pack`.

    Returns ``plan[micro_batch][rank]``, indices into ``items``, and what the plan computes. ``share`` as in
    ``batch.pair_batch``. No pair may cost more than ``capacity``.
    """
    shared = [_pair(sources[s], i) for s, i in items]
    separate = [_pair(sources[s], i, alone=k) for k, (s, i) in enumerate(items)]
    pairs = shared if share else separate
    needed = sum(unit.cost for unit in _units(range(len(items)), shared))
    units = _units(range(len(items)), pairs)
    if share:
        units = [part for unit in units for part in _split(unit, pairs, min(capacity, -(-needed // world_size)))]
    packed = pack([unit.cost for unit in units], capacity, world_size)
    plan = [[[k for u in mine for k in units[u].pairs] for mine in by_rank] for by_rank in packed]
    computed = [unit for by_rank in plan for mine in by_rank for unit in _units(mine, pairs)]
    return plan, TokenCounts(
        prompt=sum(unit.prompt for unit in computed),
        completion=sum(unit.cost - unit.prompt for unit in computed),
        padding=sum(not mine for by_rank in plan for mine in by_rank),
        needed=needed,
        separate=sum(prompt + sum(sides.values()) for _, prompt, sides in separate),
    )


def distinct_tokens(pairs: PairSet) -> tuple[int, int]:
    """(distinct prompts, input tokens where every distinct prompt and completion of ``pairs`` is computed once)."""
    units = _units(range(pairs.num_pairs), [_pair(pairs, i) for i in range(pairs.num_pairs)])
    return len(units), sum(unit.cost for unit in units)


def _pair(source: PairSet, i: int, alone: int | None = None) -> _Pair:
    """``alone``: the key of a pair that shares nothing, not even the prompt between its sides."""
    prompt, sides = source.prompt(i), (source.chosen(i), source.rejected(i))
    if alone is not None:
        return alone, 2 * len(prompt), {k: len(side) - 1 for k, side in enumerate(sides)}
    return token_key(prompt), len(prompt), {token_key(side): len(side) - 1 for side in sides}


def _units(indices: Iterable[int], pairs: Sequence[_Pair]) -> list[_Unit]:
    """One unit per prompt, in the order in which they first come."""
    units: dict[object, _Unit] = {}
    for k in indices:
        name, prompt, completions = pairs[k]
        unit = units.setdefault(name, _Unit(prompt, [], {}))
        unit.pairs.append(k)
        unit.completions |= completions
    return list(units.values())


def _split(whole: _Unit, pairs: Sequence[_Pair], limit: int) -> list[_Unit]:
    """Cut a unit between pairs into parts of at most ``limit``; a single pair may cost more."""
    parts: list[_Unit] = []
    for k in whole.pairs:
        completions = pairs[k][2]
        if not parts or _Unit(whole.prompt, [], parts[-1].completions | completions).cost > limit:
            parts.append(_Unit(whole.prompt, [], {}))
        parts[-1].pairs.append(k)
        parts[-1].completions |= completions
    return parts
