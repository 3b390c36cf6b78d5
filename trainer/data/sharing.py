"""Sharing: plans micro-batches of pairs so that pairs of one prompt come together, and counts what that saves.

Pairs of one prompt form a unit whose cost is the prompt once and each distinct completion once. A unit over the budget,
or over one rank's even part of the step, is split between pairs: each part then computes the prompt again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from medtrain.trainer.data.packing import pack
from medtrain.trainer.data.pairs import PairSet, token_key


@dataclass(frozen=True)
class TokenCounts:
    """Input tokens of one plan, over all ranks: ``computed`` = ``prompt`` + ``completion`` + ``padding``.

    A completion of n tokens has n - 1 inputs: its last token is only a target. ``padding``: the one token of each empty
    micro-batch. ``needed``: each distinct prompt and completion once, the least that could be computed. ``separate``:
    what each side after its own prompt would take, without padding.
    """

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
    """Deal pairs ``items``, each (source index, pair index), into micro-batches; see ``packing.pack``.

    Returns ``plan[micro_batch][rank]``, indices into ``items``, and what the plan computes. ``share`` as in
    ``batch.pair_batch``. No pair may cost more than ``capacity``.
    """
    pairs = [_pair(sources[s], i) for s, i in items]
    separate: list[_Pair] = []
    for k, (s, i) in enumerate(items):
        sides: dict[object, int] = {"chosen": len(sources[s].chosen(i)) - 1, "rejected": len(sources[s].rejected(i)) - 1}
        separate.append((k, 2 * len(sources[s].prompt(i)), sides))
    wholes = _units(range(len(pairs)), pairs)
    needed = sum(whole.cost for whole in wholes)
    if share:
        units = [part for whole in wholes for part in _split(whole, pairs, min(capacity, -(-needed // world_size)))]
    else:
        pairs = separate
        units = _units(range(len(pairs)), pairs)
    packed = pack([unit.cost for unit in units], capacity, world_size)
    plan = [[[k for u in mine for k in units[u].pairs] for mine in by_rank] for by_rank in packed]
    computed = [unit for by_rank in plan for mine in by_rank for unit in _units(mine, pairs)]
    return plan, TokenCounts(
        prompt=sum(unit.prompt for unit in computed),
        completion=sum(unit.cost - unit.prompt for unit in computed),
        padding=sum(not mine for by_rank in plan for mine in by_rank),
        needed=needed,
        separate=sum(unit.cost for unit in _units(range(len(separate)), separate)),
    )


def distinct_tokens(pairs: PairSet) -> tuple[int, int]:
    """(distinct prompts, input tokens where every distinct prompt and completion of ``pairs`` is computed once)."""
    units = _units(range(pairs.num_pairs), [_pair(pairs, i) for i in range(pairs.num_pairs)])
    return len(units), sum(unit.cost for unit in units)


def _pair(source: PairSet, i: int) -> _Pair:
    prompt, sides = source.prompt(i), (source.chosen(i), source.rejected(i))
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
