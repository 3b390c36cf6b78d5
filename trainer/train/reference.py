"""Reference log-probabilities: computed once from the starting weights, stored in parts, checked before use.

One float64 file of [n, 2] (chosen, rejected; sums over completion tokens, nats) a part of pairs, under a folder named by
the digest of everything that decides them: weights, token ids of the pairs, compute precision, attention backend. A part
appears whole or not at all, so a pass that was killed goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from medtrain.kernels.preference import sum_by_sequence
from medtrain.trainer.data.batch import pair_batch
from medtrain.trainer.data.packing import plan_pairs
from medtrain.trainer.data.pairs import PairSet
from medtrain.trainer.distributed import World
from medtrain.trainer.files import write_bytes, write_json
from medtrain.trainer.model.policy import PolicyModel

PAIRS_A_PART = 256
SPOT_CHECKS = 4

# How far a recomputed sum may be off, in nats times the square root of its tokens (rounding is a random walk): packing
# changes the order of float sums, nothing else may.
TOLERANCE_NATS = {torch.float32: 2e-4, torch.bfloat16: 3e-2}


@torch.no_grad()
def _micro_batch_logps(policy: PolicyModel, pairs: PairSet, indices: list[int], share: bool) -> torch.Tensor:
    """Summed completion log-probs (nats), float64 [n, 2], of one micro-batch of pairs, as a training step has them."""
    batch = pair_batch([pairs], [(0, i) for i in indices], share=share).to(policy.device)
    assert batch.sides is not None, "a batch of pairs"
    sums = sum_by_sequence(policy(batch), batch.target_cu_seqlens).index_select(0, batch.sides)
    return sums.double().view(-1, 2).cpu()


class ReferenceCache:
    """The reference log-probs of one set of pairs under ``root``; see the module for the form on disk."""

    def __init__(self, root: Path, pairs: PairSet, weights_digest: str, compute_dtype: torch.dtype, backend: str):
        self.pairs = pairs
        self.compute_dtype = compute_dtype
        self.about = {
            "weights": weights_digest,
            "pairs": pairs.digest,
            "num_pairs": pairs.num_pairs,
            "pairs_a_part": PAIRS_A_PART,
            "compute": str(compute_dtype).removeprefix("torch."),
            "attention": backend,
        }
        self.folder = root / hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]

    def parts(self) -> list[tuple[Path, list[int]]]:
        """(file, pair indices) of every part."""
        starts = range(0, self.pairs.num_pairs, PAIRS_A_PART)
        return [
            (self.folder / f"part-{k:06d}.npy", list(range(s, min(s + PAIRS_A_PART, self.pairs.num_pairs))))
            for k, s in enumerate(starts)
        ]

    def missing(self) -> list[tuple[Path, list[int]]]:
        return [(path, indices) for path, indices in self.parts() if not self._whole(path, len(indices))]

    @staticmethod
    def _whole(path: Path, num_pairs: int) -> bool:
        try:
            return np.load(path, mmap_mode="r").shape == (num_pairs, 2)
        except (OSError, ValueError):
            return False

    def fill(self, policy: PolicyModel, world: World, *, capacity: int, share: bool) -> int:
        """Compute the parts that are missing with ``policy``, which must hold the starting weights; returns how many.

        A part is packed by itself and as for one rank, and its micro-batches are dealt out to the ranks: its numbers do
        not depend on the world size, nor on which parts were there. On ``capacity`` and ``share`` they depend by rounding.
        """
        missing = world.from_main(self.missing)
        if world.is_main and missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "about.json", self.about)
        sums, ends, queue = torch.zeros(self.pairs.num_pairs, 2, dtype=torch.float64), [], []
        for _, indices in missing:
            queue += self._micro_batches(indices, capacity, share)
            ends.append(len(queue))
        written = 0
        for first in range(0, len(queue), world.size):
            world.raise_if_stopping()
            mine = queue[first + world.rank] if first + world.rank < len(queue) else []
            sums[mine] = _micro_batch_logps(policy, self.pairs, mine, share)
            while written < len(missing) and ends[written] <= first + world.size:
                path, indices = missing[written]
                whole = world.sum(sums[indices].view(-1)).view(-1, 2)
                if world.is_main:
                    buffer = io.BytesIO()
                    np.save(buffer, whole.numpy())
                    write_bytes(path, buffer.getvalue())
                written += 1
        world.barrier()
        return len(missing)

    def _micro_batches(self, indices: list[int], capacity: int, share: bool) -> list[list[int]]:
        items = [(0, i) for i in indices]
        plan, _ = plan_pairs([self.pairs], items, share=share, capacity=capacity, world_size=1)
        return [[indices[k] for k in mine] for (mine,) in plan]

    def load(self) -> np.ndarray:
        """float64 [num_pairs, 2], chosen and rejected."""
        return np.concatenate([np.load(path) for path, _ in self.parts()])

    def check(self, policy: PolicyModel, world: World, *, capacity: int, share: bool) -> float:
        """Recompute a few pairs with ``policy`` (the starting weights) and compare: policy == reference at step 0.

        Returns the largest difference in nats.

        Raises:
            RuntimeError: a difference beyond rounding.
        """
        picked = sorted(set(np.linspace(0, self.pairs.num_pairs - 1, SPOT_CHECKS).astype(int).tolist()))
        # Every rank computes the same: they must call the model equally often.
        sums = torch.zeros(self.pairs.num_pairs, 2, dtype=torch.float64)
        for mine in self._micro_batches(picked, capacity, share):
            sums[mine] = _micro_batch_logps(policy, self.pairs, mine, share)
        now, stored = sums[picked].numpy(), self.load()[picked]
        lengths = np.asarray(self.pairs.completion_lengths).reshape(-1, 2)[picked]
        off = np.abs(now - stored)
        limit = TOLERANCE_NATS[self.compute_dtype] * np.sqrt(lengths)
        if not (off <= limit).all():
            worst = int(np.argmax((off - limit).max(axis=1)))
            raise RuntimeError(
                f"{self.folder}: stored reference log-probs are not those of the starting weights: pair {picked[worst]} "
                f"of '{self.pairs.name}' is {stored[worst].tolist()} stored and {now[worst].tolist()} recomputed (nats)"
            )
        return float(off.max())
