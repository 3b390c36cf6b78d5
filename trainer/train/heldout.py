"""Held-out text: bits per byte by source, and how they changed since the starting weights.

Bits per byte: nats of all predicted tokens / ln 2 / UTF-8 bytes of the texts. The first token of a document is not predicted,
its eos is. The change is taken document by document against the starting weights on the same text, so its standard error
(of a ratio of sums, documents as draws) holds the scatter of the change alone, not that of the documents.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch

from medtrain.kernels.preference import sum_by_sequence
from medtrain.trainer.data.batch import cpt_batch
from medtrain.trainer.data.packing import pack
from medtrain.trainer.data.tokens import Windows
from medtrain.trainer.distributed import World
from medtrain.trainer.files import write_bytes
from medtrain.trainer.model.policy import PolicyModel


class HeldoutText:
    """One held-out source. ``capacity``: tokens of a micro-batch; it changes no number but by rounding."""

    def __init__(self, windows: Windows, capacity: int):
        self.windows, self.capacity = windows, capacity
        predicted = np.diff(windows.first) > 0
        self.num_bytes = windows.source.num_bytes[predicted].astype(np.float64)
        self.first_windows = windows.first[:-1][predicted]
        self.start: np.ndarray | None = None

    @torch.no_grad()
    def nats(self, policy: PolicyModel, world: World) -> np.ndarray:
        """-log p of each document with a token to predict, float64 [n], over all its windows; the same on every rank."""
        found = torch.zeros(len(self.windows), dtype=torch.float64, device=world.device)
        for by_rank in pack(self.windows.lengths, self.capacity, world.size):
            world.raise_if_stopping()
            mine = by_rank[world.rank]
            batch = cpt_batch([self.windows], [(0, i) for i in mine])
            sums = sum_by_sequence(policy(batch.to(policy.device)).double(), batch.target_cu_seqlens)
            found[torch.tensor(mine, dtype=torch.int64, device=world.device)] = -sums[: len(mine)]
        return np.add.reduceat(world.sum(found).numpy(), self.first_windows)

    def measure_start(self, policy: PolicyModel, world: World, folder: Path) -> None:
        """Measure the nats of the starting weights, which ``policy`` must hold, or read from ``folder`` what an earlier start
        of the run has measured."""
        file = folder / f"heldout-{self.windows.source.digest[:16]}.npy"

        def stored() -> np.ndarray | None:
            try:
                nats = np.load(file)
            except (OSError, ValueError):
                return None
            return nats if nats.shape == self.num_bytes.shape else None

        self.start = world.from_main(stored)
        if self.start is None:
            self.start = self.nats(policy, world)
            if world.is_main:
                content = io.BytesIO()
                np.save(content, self.start)
                folder.mkdir(parents=True, exist_ok=True)
                write_bytes(file, content.getvalue())

    def evaluate(self, policy: PolicyModel, world: World) -> dict[str, float | None]:
        """``heldout/NAME/bits_per_byte``, ``..._change`` since the start and ``..._change_stderr`` (None of one document)."""
        nats = self.nats(policy, world)
        name = f"heldout/{self.windows.source.name}/bits_per_byte"
        row: dict[str, float | None] = {name: float(nats.sum()) / math.log(2) / float(self.num_bytes.sum())}
        if self.start is not None:
            row[f"{name}_change"], row[f"{name}_change_stderr"] = change(nats - self.start, self.num_bytes)
        return row


def change(nats: np.ndarray, num_bytes: np.ndarray) -> tuple[float, float | None]:
    """Bits per byte that these nats of documents (float64 [n]) come to, and their standard error; None for n = 1."""
    bits, total = nats / math.log(2), float(num_bytes.sum())
    ratio = float(bits.sum()) / total
    if len(bits) < 2:
        return ratio, None
    scatter = float(np.square(bits - ratio * num_bytes).sum()) * len(bits) / (len(bits) - 1)
    return ratio, math.sqrt(scatter) / total
