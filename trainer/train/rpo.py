"""Reasoning preference optimization on pairs: DPO + alpha * NLL of the chosen side, and the other losses of
:mod:`medtrain.kernels.losses`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medtrain.kernels.losses import LOSSES
from medtrain.kernels.preference import preference_loss, sum_by_sequence
from medtrain.trainer.config.settings import Config, RpoConfig
from medtrain.trainer.data.batch import MicroBatch, pair_batch
from medtrain.trainer.data.ledger import describe, pair_ledger
from medtrain.trainer.data.order import GlobalOrder, source_shares
from medtrain.trainer.data.packing import TokenCounts, check_capacity, plan_pairs
from medtrain.trainer.data.pairs import PairSet, load_pairs
from medtrain.trainer.data.sources import name_sources
from medtrain.trainer.distributed import World
from medtrain.trainer.model.lora import without_adapters
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.train.pair_metrics import num_sums, pair_metrics, pair_sums
from medtrain.trainer.train.reference import ReferenceCache, micro_batches, part_starts
from medtrain.trainer.train.stage import Denominators, RunIdentity, warn_unknown_tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairData:
    """Pairs of the training and held-out sources, and the order in which steps take them."""

    sources: tuple[PairSet, ...]
    heldout: tuple[PairSet, ...]
    order: GlobalOrder
    capacity: int  # tokens per micro-batch
    share_prompts: bool
    step_size: int  # pairs per step
    tokenizer: dict[str, Any]  # of the ledger

    @property
    def epoch_size(self) -> int:
        """Pairs of the training sources."""
        return sum(pairs.num_pairs for pairs in self.sources)

    @property
    def ledger(self) -> dict[str, Any]:
        heldout = pair_ledger(self.heldout)["sources"]
        return pair_ledger(self.sources) | {"heldout": heldout, "tokenizer": self.tokenizer}

    @property
    def digests(self) -> dict[str, str]:
        parts = (("pairs", self.sources), ("heldout", self.heldout))
        return {f"data.{name}.{i}": pairs.digest for name, sources in parts for i, pairs in enumerate(sources)}

    def micro_batches(self, step: int, world: World) -> tuple[list[MicroBatch], Denominators]:
        """See :class:`medtrain.trainer.train.stage.StageData`."""
        items, share = self.order.step(step), self.share_prompts
        ids = list(zip(items.source_ids.tolist(), items.item_ids.tolist(), strict=True))
        plan, inputs = plan_pairs(self.sources, ids, share=share, capacity=self.capacity, world_size=world.size)
        batches = [pair_batch(self.sources, [ids[i] for i in by_rank[world.rank]], share=share) for by_rank in plan]
        completions = [pairs.completion_lengths.reshape(-1, 2) for pairs in self.sources]
        lengths = np.array([completions[s][i] for s, i in ids])
        return batches, Denominators(int(lengths.sum()), inputs, len(ids), int(lengths[:, 0].sum()))

    def heldout_batches(self, world: World) -> tuple[list[MicroBatch], Denominators]:
        """This rank's batches of all held-out pairs, in the reference's own micro-batches: where the policy is the reference,
        so are its numbers, bit for bit."""
        queue = [
            [(s, i) for i in mine]
            for s, pairs in enumerate(self.heldout)
            for start in part_starts(pairs)
            for mine in micro_batches(pairs, start, self.capacity, self.share_prompts)
        ]
        queue += [[]] * (-len(queue) % world.size)  # as many on every rank
        lengths = np.concatenate([pairs.completion_lengths.reshape(-1, 2) for pairs in self.heldout])
        n = Denominators(int(lengths.sum()), TokenCounts(0, 0, 0, 0, 0), len(lengths), int(lengths[:, 0].sum()))
        mine = queue[world.rank :: world.size]
        return [pair_batch(self.heldout, items, share=self.share_prompts) for items in mine], n


class PreferenceLoss:
    """The loss of a step and the held-out numbers.

    Args:
        settings: ``rpo`` of the configuration.
        data: names of the sources, held-out batches.
        reference, heldout_reference: of each source float64 [P, 2], summed log-probabilities (nats) of chosen and rejected.
    """

    def __init__(
        self,
        settings: RpoConfig,
        data: PairData,
        reference: Sequence[torch.Tensor],
        heldout_reference: Sequence[torch.Tensor] = (),
    ):
        self.settings, self.data = settings, data
        self.reference, self.heldout_reference = reference, heldout_reference
        self.num_sums = num_sums(len(data.sources))
        self.validates = bool(data.heldout)

    def __call__(self, policy: PolicyModel, batch: MicroBatch, n: Denominators) -> tuple[torch.Tensor, torch.Tensor]:
        return self._loss(policy, batch, n, self.reference)

    def metrics(self, sums: torch.Tensor, n: Denominators) -> dict[str, Any]:
        return self._metrics(sums, n, self.data.sources)

    @torch.no_grad()
    def evaluate(self, policy: PolicyModel, world: World) -> dict[str, float | None]:
        """Over all held-out pairs together: ``heldout/loss`` and the means of the training metrics' names."""
        if not self.data.heldout:
            return {}
        batches, n = self.data.heldout_batches(world)
        sums = torch.zeros(num_sums(len(self.data.heldout)), dtype=torch.float64, device=world.device)
        for batch in batches:
            world.raise_if_stopping()
            sums += self._loss(policy, batch, n, self.heldout_reference)[1]
        row = self._metrics(world.sum(sums), n, self.data.heldout)
        return {f"heldout/{name}": row[name] for name in row if name != "pairs"}

    def _loss(self, policy, batch: MicroBatch, n: Denominators, reference) -> tuple[torch.Tensor, torch.Tensor]:
        # Lengths and ids stay on the host: reading them from a GPU would wait for it.
        moved = batch.to(policy.device)
        assert moved.sides is not None and batch.pair_ids is not None, "a batch of pairs"
        sums = sum_by_sequence(policy(moved), batch.target_cu_seqlens).index_select(0, moved.sides)
        ids = zip(batch.source_ids.tolist(), batch.pair_ids.tolist(), strict=True)
        rows = [reference[s][i] for s, i in ids]
        reference_logps = torch.stack(rows).view(-1) if rows else torch.zeros(0, dtype=torch.float64)
        lengths = batch.target_cu_seqlens.diff()[batch.sides]
        denominators = {"num_pairs": n.pairs, "num_chosen_tokens": n.chosen_tokens}
        loss, stats = preference_loss(sums, lengths, reference_logps.to(sums.device), **denominators, **asdict(self.settings))
        return loss, pair_sums(loss, stats, lengths, batch.source_ids, len(reference))

    def _metrics(self, sums: torch.Tensor, n: Denominators, sources: Sequence[PairSet]) -> dict[str, Any]:
        nll_denominator = n.chosen_tokens if self.settings.nll_norm == "token" else n.pairs
        names = [pairs.name for pairs in sources]
        return pair_metrics(sums, names, nll_denominator=nll_denominator, beta=self.settings.beta)


def read_data(config: Config, tokenizer, world: World) -> PairData:
    """Read and tokenise the pairs; every rank reads all of them."""
    settings = config.data

    def read(source, what: str) -> PairSet:
        pairs = load_pairs(
            source, tokenizer, max_length=settings.max_length, overlong=settings.overlong, unusable=settings.unusable
        )
        log.info(f"{what}{source.name}: {pairs.num_pairs:,} pairs, {len(pairs.tokens):,} tokens")
        for line in describe(pair_ledger([pairs])):
            log.warning(f"{what}{line}")
        warn_unknown_tokens(pairs.tokens, tokenizer, source.name)
        return pairs

    sources = tuple(read(source, "") for source in name_sources(settings.pairs))
    heldout = tuple(read(source, "held-out ") for source in name_sources(settings.heldout))
    capacity, share, step_size = config.optim.micro_batch_tokens, settings.share_prompts, config.optim.batch_pairs
    longest = max(int((pairs.lengths if share else pairs.separate_lengths).max()) for pairs in (*sources, *heldout))
    check_capacity(longest, capacity, what="a pair, both sides")
    shares = source_shares([pairs.weight for pairs in sources], [pairs.num_pairs for pairs in sources])
    ones = [np.ones(pairs.num_pairs, dtype=np.int64) for pairs in sources]
    order = GlobalOrder(ones, shares, step_size, config.run.seed, setting="optim.batch_pairs")
    pad_is_eos = tokenizer.pad_token_id == tokenizer.eos_token_id
    if pad_is_eos:
        log.info(f"note: pad is eos, {tokenizer.eos_token}: nothing is padded or masked by it, and eos is learned")
    about = {"eos": tokenizer.eos_token, "bos": tokenizer.bos_token, "pad_is_eos": pad_is_eos}
    return PairData(sources, heldout, order, capacity, share, step_size, about)


def make_loss(
    config: Config, data: PairData, policy: PolicyModel, world: World, identity: RunIdentity, folder: Path
) -> PreferenceLoss:
    """The loss, with the reference log-probabilities: those of the starting weights, which ``policy`` must hold. They are kept
    in ``folder``, and a few are compared with what the policy computes now.

    Raises:
        InputError: policy and reference differ before the first step.
    """
    settings = config.rpo
    if not LOSSES[settings.loss].needs_reference:
        log.info(f"reference: none, {settings.loss} does without")
        reference = [torch.zeros(pairs.num_pairs, 2, dtype=torch.float64) for pairs in (*data.sources, *data.heldout)]
        return PreferenceLoss(settings, data, reference[: len(data.sources)], reference[len(data.sources) :])

    def reference_of(pairs: PairSet) -> torch.Tensor:
        cache = ReferenceCache(folder, pairs, identity.start, policy, capacity=data.capacity, share=data.share_prompts)
        # Adapters that begin at zero stay out; the check has them in, and so shows that they change nothing.
        with without_adapters(policy) if identity.adapters_are_new else contextlib.nullcontext():
            missing, parts = cache.fill(world), len(cache.parts())
        difference = cache.check(world)
        what = f"{missing} of {parts} parts computed" if missing else "from the cache"
        same = f"policy within {difference:.1e} nats of it" if difference else "policy == reference, bit for bit"
        log.info(f"reference of {pairs.name}: {what}; {same}")
        return torch.from_numpy(cache.load())

    return PreferenceLoss(
        settings, data, [reference_of(pairs) for pairs in data.sources], [reference_of(pairs) for pairs in data.heldout]
    )
