"""Micro-batches: packs windows or pairs one after the other into the tensors that the model and the losses take.

Sequences never see each other: ``cu_seqlens`` says where each begins and positions restart there. Logits are wanted
only at ``counted``; ``targets`` are the tokens to find there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medtrain.trainer.data.pairs import PairSet
from medtrain.trainer.data.windows import Windows


@dataclass(frozen=True)
class MicroBatch:
    """One packed micro-batch of D sequences, T input tokens, N counted tokens and, in RPO, P pairs (D = 2P).

    ``input_ids``, ``position_ids`` int64 [T]; ``cu_seqlens`` int32 [D+1]; ``max_seqlen`` the longest sequence.
    ``counted`` int64 [N]: positions in ``input_ids`` whose next token counts; ``targets`` int64 [N]: that token.
    ``target_cu_seqlens`` int64 [D+1]: the N by sequence (pairs: chosen_0, rejected_0, chosen_1, ...).
    ``source_ids`` int64: the source of each window [D] or pair [P]. ``pair_ids`` int64 [P]: index of each pair in its
    source; None in CPT.

    A micro-batch without items is one sequence of one token (id 0) of which nothing counts: N = 0, P = 0, and
    ``target_cu_seqlens`` is [0, 0] in CPT and [0] in RPO.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    counted: torch.Tensor
    targets: torch.Tensor
    target_cu_seqlens: torch.Tensor
    source_ids: torch.Tensor
    pair_ids: torch.Tensor | None = None

    @property
    def num_counted(self) -> int:
        return self.targets.numel()

    @property
    def num_pairs(self) -> int:
        return 0 if self.pair_ids is None else self.pair_ids.numel()

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the batch on ``device``; to a GPU through pinned memory, without waiting."""
        device = torch.device(device)

        def move(value):
            if not isinstance(value, torch.Tensor):
                return value
            if device.type == "cuda" and value.device.type == "cpu":
                return value.pin_memory().to(device, non_blocking=True)
            return value.to(device)

        return MicroBatch(**{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})


def windows_batch(windows: Sequence[np.ndarray], source_ids: Sequence[int] | None = None) -> MicroBatch:
    """Pack windows (each int [length + 1], as :meth:`Windows.window` returns it), of source 0 if not said otherwise."""
    if not windows:
        return _empty(target_cu_seqlens=[0, 0], pair_ids=None)
    return _pack(windows, [0] * len(windows), [0] * len(windows) if source_ids is None else source_ids, pair_ids=None)


def cpt_batch(sources: Sequence[Windows], items: Iterable[tuple[int, int]]) -> MicroBatch:
    """Pack the windows ``items``, each (source index, window index)."""
    items = [(int(s), int(i)) for s, i in items]
    return windows_batch([sources[s].window(i) for s, i in items], [s for s, _ in items])


def pair_batch(sources: Sequence[PairSet], items: Iterable[tuple[int, int]]) -> MicroBatch:
    """Pack the pairs ``items``, each (source index, pair index), as chosen_0, rejected_0, chosen_1, ...

    A side's inputs are prompt and completion without the last token; its targets are exactly the completion's tokens.
    """
    items = [(int(s), int(i)) for s, i in items]
    if not items:
        return _empty(target_cu_seqlens=[0], pair_ids=[])
    sequences, context = [], []
    for s, i in items:
        prompt = sources[s].prompt(i)
        for completion in (sources[s].chosen(i), sources[s].rejected(i)):
            sequences.append(np.concatenate([prompt, completion]))
            context.append(len(prompt) - 1)
    return _pack(sequences, context, [s for s, _ in items], pair_ids=[i for _, i in items])


def _pack(sequences, context: list[int], source_ids, pair_ids) -> MicroBatch:
    """Pack sequences of tokens; the targets of one are its tokens after the first ``context + 1``."""
    lengths = np.array([len(sequence) - 1 for sequence in sequences])
    num_targets = lengths - context
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    return MicroBatch(
        input_ids=_long(np.concatenate([sequence[:-1] for sequence in sequences])),
        position_ids=_long(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        counted=_long(np.flatnonzero(position_ids >= np.repeat(context, lengths))),
        targets=_long(np.concatenate([sequence[c + 1 :] for sequence, c in zip(sequences, context, strict=True)])),
        target_cu_seqlens=_long(np.concatenate([[0], np.cumsum(num_targets)])),
        source_ids=_long(source_ids),
        pair_ids=None if pair_ids is None else _long(pair_ids),
    )


def _empty(target_cu_seqlens: list[int], pair_ids: list[int] | None) -> MicroBatch:
    return MicroBatch(
        input_ids=_long([0]),
        position_ids=_long([0]),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        max_seqlen=1,
        counted=_long([]),
        targets=_long([]),
        target_cu_seqlens=_long(target_cu_seqlens),
        source_ids=_long([]),
        pair_ids=None if pair_ids is None else _long(pair_ids),
    )


def _long(values) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values).astype(np.int64))
