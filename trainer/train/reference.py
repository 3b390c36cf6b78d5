"""Reference log-probabilities: computed once from the starting weights, stored in parts, checked before use.

One float64 file of [n, 2] (chosen, rejected; sums over completion tokens, nats) a part of pairs, under a folder named by
the digest of everything that decides them: weights, token ids of the pairs, their packing, compute precision, attention
backend. A part appears whole or not at all, so a pass that was killed goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
import torch

from medtrain.kernels.preference import sum_by_sequence
from medtrain.trainer.data.batch import pair_batch
from medtrain.trainer.data.packing import plan_pairs
from medtrain.trainer.data.pairs import PairSet
from medtrain.trainer.distributed import World
from medtrain.trainer.errors import bad_input
from medtrain.trainer.files import write_bytes, write_json
from medtrain.trainer.model.policy import PolicyModel

PAIRS_A_PART = 256
# Where stored numbers are not recomputed bit for bit (another device or library since), they may differ by this multiple of
# what the model's own numbers differ between two packings of the same pairs, or of so many nats per root of a token.
TIMES_THE_NOISE = 4.0
LEAST_NOISE = 5e-5


@torch.no_grad()
def _micro_batch_logps(policy: PolicyModel, pairs: PairSet, indices: list[int], share: bool) -> torch.Tensor:
    """Summed completion log-probs (nats), float64 [n, 2], of one micro-batch of pairs, as a training step has them."""
    batch = pair_batch([pairs], [(0, i) for i in indices], share=share).to(policy.device)
    assert batch.sides is not None, "a batch of pairs"
    sums = sum_by_sequence(policy(batch), batch.target_cu_seqlens).index_select(0, batch.sides)
    return sums.double().view(-1, 2).cpu()


def part_starts(pairs: PairSet) -> range:
    return range(0, pairs.num_pairs, PAIRS_A_PART)


def micro_batches(pairs: PairSet, start: int, capacity: int, share: bool) -> list[list[int]]:
    """Indices of the pairs in each micro-batch of the part that begins at ``start``, packed by itself and as for one rank: in
    these, and on any number of ranks, log-probs are the same bits."""
    indices = range(start, min(start + PAIRS_A_PART, pairs.num_pairs))
    plan, _ = plan_pairs([pairs], [(0, i) for i in indices], share=share, capacity=capacity, world_size=1)
    return [[indices[k] for k in mine] for (mine,) in plan]


class ReferenceCache:
    """The reference log-probs of one set of pairs under ``root``; see the module for the form on disk."""

    def __init__(self, root: Path, pairs: PairSet, weights_digest: str, policy: PolicyModel, *, capacity: int, share: bool):
        self.pairs, self.policy, self.capacity, self.share = pairs, policy, capacity, share
        self.about = {
            "weights": weights_digest,
            "pairs": pairs.digest,
            "num_pairs": pairs.num_pairs,
            "pairs_a_part": PAIRS_A_PART,
            "micro_batch_tokens": capacity,
            "share_prompts": share,
            "compute": str(policy.compute_dtype).removeprefix("torch."),
            "attention": policy.backend,
        }
        self.folder = root / hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]

    def parts(self) -> list[tuple[Path, int, int]]:
        """(file, first pair, number of pairs) of every part."""
        num = self.pairs.num_pairs
        return [(self.folder / f"part-{k:06d}.npy", s, min(PAIRS_A_PART, num - s)) for k, s in enumerate(part_starts(self.pairs))]

    def missing(self) -> list[tuple[Path, int, int]]:
        return [(path, start, size) for path, start, size in self.parts() if not self._whole(path, size)]

    @staticmethod
    def _whole(path: Path, num_pairs: int) -> bool:
        try:
            return np.load(path, mmap_mode="r").shape == (num_pairs, 2)
        except (OSError, ValueError):
            return False

    def fill(self, world: World) -> int:
        """Compute the parts that are missing with the policy, which must hold the starting weights; returns how many. The
        micro-batches are dealt out to the ranks."""
        missing = world.from_main(self.missing)
        if world.is_main and missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "about.json", self.about)
        sums, ends, queue = torch.zeros(self.pairs.num_pairs, 2, dtype=torch.float64), [], []
        for _, start, _ in missing:
            queue += micro_batches(self.pairs, start, self.capacity, self.share)
            ends.append(len(queue))
        written = 0
        for first in range(0, len(queue), world.size):
            world.raise_if_stopping()
            mine = queue[first + world.rank] if first + world.rank < len(queue) else []
            sums[mine] = _micro_batch_logps(self.policy, self.pairs, mine, self.share)
            while written < len(missing) and ends[written] <= first + world.size:
                path, start, size = missing[written]
                whole = world.sum(sums[start : start + size].view(-1)).view(-1, 2)
                if world.is_main:
                    buffer = io.BytesIO()
                    np.save(buffer, whole.numpy())
                    write_bytes(path, buffer.getvalue())
                written += 1
        world.barrier()
        return len(missing)

    def load(self) -> np.ndarray:
        """float64 [num_pairs, 2], chosen and rejected."""
        return np.concatenate([np.load(path) for path, *_ in self.parts()])

    def check(self, world: World) -> float:
        """Recompute the first and the last micro-batch with the policy (the starting weights) and compare: policy ==
        reference at step 0. Collective.

        Returns the largest difference in nats, 0 where this device and these libraries computed what is stored.

        Raises InputError: a difference beyond what packing alone makes with this model.
        """
        starts = part_starts(self.pairs)
        ends = [micro_batches(self.pairs, start, self.capacity, self.share) for start in (starts[0], starts[-1])]
        picked = [ends[0][0], ends[1][-1]]
        # Every rank computes the same: they must call the model equally often.
        now = torch.cat([_micro_batch_logps(self.policy, self.pairs, mine, self.share) for mine in picked]).numpy()
        indices = [i for mine in picked for i in mine]
        off = world.from_main(lambda: np.abs(now - self.load()[indices]))
        if not off.any():
            return 0.0
        alone = torch.cat([_micro_batch_logps(self.policy, self.pairs, [i], self.share) for i in indices]).numpy()
        lengths = np.asarray(self.pairs.completion_lengths).reshape(-1, 2)[indices]
        noise = max(float(np.abs(now - alone).max()), LEAST_NOISE * math.sqrt(lengths.max()))
        if not off.max() <= TIMES_THE_NOISE * noise:  # so that NaN is wrong too
            raise bad_input(
                "stored reference log-probs are not those of the starting weights",
                file=self.folder,
                found=f"pair {indices[int(off.max(axis=1).argmax())]} of '{self.pairs.name}' {off.max():.3g} nats off",
                expected=f"at most {TIMES_THE_NOISE:g} x {noise:.1e}, what packing makes; remove the folder to compute it again",
            )
        return float(off.max())
