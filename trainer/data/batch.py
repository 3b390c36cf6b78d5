"""Micro-batches: packs windows or pairs one after the other into the tensors that the model and the losses take.

Both are laid out as groups: a prompt, computed once, and the completions that go on from it. A window is a group of one
completion (all after its first token). Positions restart after the prompt for every completion, and a completion sees the
prompt and itself, nothing else. A completion's first token is a target at the last token of the prompt, which so counts once
per completion; its last token is a target and no input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medtrain.trainer.data.pairs import PairSet, token_key
from medtrain.trainer.data.tokens import Windows


@dataclass(frozen=True)
class MicroBatch:
    """One packed micro-batch of T input tokens in S segments, C completions, N counted tokens and, in RPO, P pairs.

    ``input_ids``, ``position_ids`` int64 [T]. ``cu_seqlens`` int32 [S+1]: segment s is the tokens
    cu_seqlens[s]:cu_seqlens[s+1], a prompt and its first completion or a further completion. It attends to
    ``key_index[key_cu_seqlens[s]:key_cu_seqlens[s+1]]`` (int64 [K], int32 [S+1]), the last of which are its own tokens;
    ``key_index`` is None where every segment attends to itself alone. ``max_seqlen``, ``max_key_seqlen``: the longest.
    ``counted`` int64 [N]: positions in ``input_ids`` whose next token is a target; ``targets`` int64 [N]: that token.
    ``target_cu_seqlens`` int64 [C+1]: the N by completion. ``source_ids`` int64: the source of each window [C] or pair [P].
    RPO, None in CPT: ``sides`` int64 [2P]: the completion of chosen_0, rejected_0, chosen_1, ...; ``pair_ids`` int64 [P]:
    index of each pair in its source.

    A micro-batch without items is one segment of one token (id 0) of which nothing counts: N = 0, P = 0, and
    ``target_cu_seqlens`` is [0, 0] in CPT and [0] in RPO.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    key_cu_seqlens: torch.Tensor
    max_key_seqlen: int
    key_index: torch.Tensor | None
    counted: torch.Tensor
    targets: torch.Tensor
    target_cu_seqlens: torch.Tensor
    source_ids: torch.Tensor
    sides: torch.Tensor | None = None
    pair_ids: torch.Tensor | None = None

    @property
    def attended(self) -> int:
        """Twice the query-key products that causal attention needs, up to the diagonal: n * n for a plain document."""
        keys = self.key_cu_seqlens.diff().long()
        return int((keys.square() - (keys - self.cu_seqlens.diff()).square()).sum())

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the batch on ``device``; to a GPU through pinned memory, without waiting."""
        device = torch.device(device)
        moved: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        for name, value in moved.items():
            pinned = device.type == "cuda" and value.device.type == "cpu"
            moved[name] = value.pin_memory().to(device, non_blocking=True) if pinned else value.to(device)
        return dataclasses.replace(self, **moved)


def windows_batch(windows: Sequence[np.ndarray], source_ids: Sequence[int] | None = None) -> MicroBatch:
    """Pack windows (each int [length + 1], as :meth:`Windows.window` returns it); of source 0 by default."""
    return _pack([(window[:1], [window[1:]]) for window in windows], source_ids or [0] * len(windows))


def cpt_batch(sources: Sequence[Windows], items: Iterable[tuple[int, int]]) -> MicroBatch:
    """Pack the windows ``items``, each (source index, window index)."""
    items = list(items)
    return windows_batch([sources[s].window(i) for s, i in items], [s for s, _ in items])


def pair_batch(sources: Sequence[PairSet], items: Iterable[tuple[int, int]], *, share: bool = True) -> MicroBatch:
    """Pack the pairs ``items``, each (source index, pair index). With ``share`` equal prompts are computed once, and so are equal
    completions of one prompt, in the order in which they first come. Without, each side stands after its own prompt."""
    items = list(items)
    groups: dict[object, tuple[np.ndarray, dict[bytes, np.ndarray]]] = {}
    sides = []
    for k, (s, i) in enumerate(items):
        prompt = sources[s].prompt(i)
        for side, completion in enumerate((sources[s].chosen(i), sources[s].rejected(i))):
            group, name = token_key(prompt) if share else (k, side), token_key(completion)
            groups.setdefault(group, (prompt, {}))[1].setdefault(name, completion)
            sides.append((group, name))
    names = [(group, name) for group, (_, completions) in groups.items() for name in completions]
    number = {name: k for k, name in enumerate(names)}
    return _pack(
        [(prompt, list(completions.values())) for prompt, completions in groups.values()],
        source_ids=[s for s, _ in items],
        sides=[number[side] for side in sides],
        pair_ids=[i for _, i in items],
    )


def _pack(groups: Sequence[tuple[np.ndarray, list[np.ndarray]]], source_ids, sides=None, pair_ids=None) -> MicroBatch:
    """Pack (prompt, completions) groups, each prompt and completion of at least one token."""
    inputs, positions, counted, targets, lengths, keys, key_lengths = [], [], [], [], [], [], []
    start = 0
    for prompt, completions in groups:
        context = np.arange(start, start + len(prompt))
        for k, completion in enumerate(completions):
            own = completion[:-1] if k else np.concatenate([prompt, completion[:-1]])
            seen = context if k else context[:0]
            place = np.arange(start, start + len(own))
            inputs.append(own)
            positions.append(np.arange(len(seen), len(seen) + len(own)))
            counted.append(np.concatenate([context[-1:], place[len(own) - len(completion) + 1 :]]))
            targets.append(completion)
            if len(own):  # a further completion of one token is found at the prompt and adds no input
                lengths.append(len(own))
                keys += [seen, place]
                key_lengths.append(len(seen) + len(own))
            start += len(own)
    if not groups:
        inputs, positions, lengths, key_lengths, keys = [[0]], [[0]], [1], [1], [[0]]
    shared = key_lengths != lengths
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    target_lengths = [len(target) for target in targets] or ([0] if sides is None else [])
    return MicroBatch(
        input_ids=_long(inputs),
        position_ids=_long(positions),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        key_cu_seqlens=torch.tensor([0, *np.cumsum(key_lengths)], dtype=torch.int32) if shared else cu_seqlens,
        max_key_seqlen=max(key_lengths),
        key_index=_long(keys) if shared else None,
        counted=_long(counted),
        targets=_long(targets),
        target_cu_seqlens=torch.tensor([0, *np.cumsum(target_lengths)], dtype=torch.int64),
        source_ids=_long([source_ids]),
        sides=None if sides is None else _long([sides]),
        pair_ids=None if pair_ids is None else _long([pair_ids]),
    )


def _long(parts: Sequence) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts] or [np.empty(0, np.int64)]))
