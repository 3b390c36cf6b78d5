"""Continued pretraining: next-token prediction on documents, loss = -sum(logps) / tokens in the loss of the step."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medtrain.trainer.config.settings import Config
from medtrain.trainer.data.batch import MicroBatch, cpt_batch
from medtrain.trainer.data.ledger import cpt_ledger
from medtrain.trainer.data.order import GlobalOrder, source_shares
from medtrain.trainer.data.packing import TokenCounts, check_capacity, pack
from medtrain.trainer.data.sources import name_sources
from medtrain.trainer.data.tokens import Windows, default_workers, make_windows, tokenize_source
from medtrain.trainer.distributed import World, local_size
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.train.heldout import HeldoutText
from medtrain.trainer.train.stage import Denominators, RunIdentity, warn_unknown_tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CptData:
    """Windows of the training and held-out sources, and the order in which steps take them."""

    sources: tuple[Windows, ...]
    heldout: tuple[Windows, ...]
    order: GlobalOrder
    capacity: int  # tokens per micro-batch
    step_size: int  # tokens per step

    @property
    def epoch_size(self) -> int:
        """Tokens of the training sources."""
        return sum(_num_tokens(windows) for windows in self.sources)

    @property
    def ledger(self) -> dict[str, Any]:
        return cpt_ledger(self.sources) | {"heldout": cpt_ledger(self.heldout)["sources"]}

    @property
    def digests(self) -> dict[str, str]:
        parts = (("sources", self.sources), ("heldout", self.heldout))
        return {f"data.{name}.{i}": w.source.digest for name, all_windows in parts for i, w in enumerate(all_windows)}

    def micro_batches(self, step: int, world: World) -> tuple[list[MicroBatch], Denominators]:
        """See :class:`medtrain.trainer.train.stage.StageData`."""
        items = self.order.step(step)
        ids = list(zip(items.source_ids.tolist(), items.item_ids.tolist(), strict=True))
        plan = pack(items.lengths, self.capacity, world.size)
        batches = [cpt_batch(self.sources, [ids[i] for i in by_rank[world.rank]]) for by_rank in plan]
        tokens = int(items.lengths.sum())
        padding = sum(not of_rank for by_rank in plan for of_rank in by_rank)
        return batches, Denominators(tokens, TokenCounts(0, tokens, padding, needed=tokens, separate=tokens))


class CptLoss:
    """The loss of a step and the held-out numbers."""

    num_sums = 1

    def __init__(self, data: CptData):
        self.heldout = [HeldoutText(windows, data.capacity) for windows in data.heldout]
        self.validates = bool(self.heldout)

    def __call__(self, policy: PolicyModel, batch: MicroBatch, n: Denominators) -> tuple[torch.Tensor, torch.Tensor]:
        nll = -policy(batch.to(policy.device)).sum()
        return nll / n.tokens, nll.detach().double().view(1)

    def metrics(self, sums: torch.Tensor, n: Denominators) -> dict[str, Any]:
        return {"loss": float(sums[0]) / n.tokens}

    def evaluate(self, policy: PolicyModel, world: World) -> dict[str, float | None]:
        """Bits per byte of each held-out source, and their change since the starting weights."""
        return {name: value for text in self.heldout for name, value in text.evaluate(policy, world).items()}


def read_data(config: Config, tokenizer, world: World) -> CptData:
    """Tokenise the sources, or open what an earlier run made of them; all ranks must call this."""
    sources, heldout = (
        tuple(_read_source(source, what, config, tokenizer, world) for source in name_sources(sources))
        for sources, what in ((config.data.sources, ""), (config.data.heldout, "held-out "))
    )
    capacity, step_size = config.optim.micro_batch_tokens, config.optim.batch_tokens
    longest = max(int(windows.lengths.max()) for windows in (*sources, *heldout))
    check_capacity(longest, capacity, what="a window")
    shares = source_shares([windows.source.weight for windows in sources], [_num_tokens(windows) for windows in sources])
    order = GlobalOrder([windows.lengths for windows in sources], shares, step_size, config.run.seed)
    return CptData(sources, heldout, order, capacity, step_size)


def make_loss(config: Config, data: CptData, policy: PolicyModel, world: World, identity: RunIdentity, folder: Path) -> CptLoss:
    """The loss, with the starting weights' nats on held-out text, which ``policy`` must hold; they are kept in ``folder``."""
    loss = CptLoss(data)
    for text in loss.heldout:
        text.measure_start(policy, world, folder)
    return loss


def _read_source(source, what: str, config: Config, tokenizer, world: World) -> Windows:
    cache = Path(config.data.cache or os.environ.get("MEDTRAIN_CACHE") or Path.home() / ".cache" / "medtrain") / "tokens"
    workers = config.data.workers or default_workers(local_size())
    key = world.from_main(lambda: tokenize_source(source, tokenizer, cache, workers=workers).digest)
    tokenized = tokenize_source(source, tokenizer, cache, key=key, workers=workers)
    windows = make_windows(tokenized, config.data.seq_len)
    log.info(f"{what}{source.name}: {tokenized.num_docs:,} documents, {tokenized.num_tokens:,} tokens")
    warn_unknown_tokens(tokenized.parts[0], tokenizer, source.name)
    return windows


def _num_tokens(windows: Windows) -> int:
    return int(windows.lengths.sum(dtype=np.int64))
