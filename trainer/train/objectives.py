"""CPT and RPO: which micro-batches a step takes, and what loss and metrics come of them. All that differs between the stages.

Both objects have the same face, and the loop knows nothing else of a stage:

- ``prepare(policy, world, folder)``: what must be known before the first step (RPO: the reference log-probs);
- ``micro_batches(step, world)``: this rank's batches (on the host), as many on every rank, and the step's denominators;
- ``loss(policy, batch, denominators)``: this batch's part of the step's loss, and sums for the metrics;
- ``metrics(sums, denominators)``: the step's numbers, from sums (``num_sums`` of them) over all ranks and micro-batches;
- ``watch(row)``: is shown each row of metrics.jsonl in turn, and returns a warning to print, or None;
- ``evaluate(policy, world)``: held-out numbers;
- ``epoch_size`` and ``step_size`` in the same unit, ``ledger``, ``digests``.

Denominators belong to the whole optimizer step, so the result does not depend on micro-batches or ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medtrain.kernels.preference import preference_loss, sum_by_sequence
from medtrain.trainer.config.settings import Config
from medtrain.trainer.data.batch import MicroBatch, cpt_batch, pair_batch
from medtrain.trainer.data.ledger import cpt_ledger, describe, pair_ledger
from medtrain.trainer.data.order import GlobalOrder, source_shares
from medtrain.trainer.data.packing import check_capacity, pack
from medtrain.trainer.data.pairs import PairSet, load_pairs
from medtrain.trainer.data.sharing import TokenCounts, plan_pairs
from medtrain.trainer.data.sources import name_sources
from medtrain.trainer.data.tokens import tokenize_source
from medtrain.trainer.data.windows import Windows, make_windows
from medtrain.trainer.data.workers import Progress, default_workers
from medtrain.trainer.distributed import World, local_size
from medtrain.trainer.model.lora import without_adapters
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.run.alarms import ForgettingAlarm, LikelihoodAlarm
from medtrain.trainer.train.heldout import HeldoutText
from medtrain.trainer.train.pair_metrics import num_sums, pair_metrics, pair_sums
from medtrain.trainer.train.reference import ReferenceCache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Denominators:
    """Of one optimizer step, over all ranks: ``tokens`` counted, ``pairs`` and ``chosen_tokens`` (RPO), each pair's own
    also where they are computed once for several; ``inputs``: what the model computes."""

    tokens: int
    inputs: TokenCounts
    pairs: int = 0
    chosen_tokens: int = 0


class Cpt:
    """Next-token prediction on documents: loss = -sum(logps) / counted tokens of the step."""

    stage = "cpt"
    num_sums = 1

    def __init__(self, config: Config, tokenizer, world: World, *, verify: bool = False):
        """``verify``: read input and token cache whole, and trust no file for its size and times."""
        workers = config.data.workers or default_workers(local_size())
        cache = Path(config.data.cache or os.environ.get("MEDTRAIN_CACHE") or Path.home() / ".cache" / "medtrain")
        self.capacity = config.optim.micro_batch_tokens

        def load(sources, what: str = "") -> list[Windows]:
            found = []
            for source in name_sources(sources):
                report = _now_and_then(lambda progress, name=source.name: log.info(f"{name}: {progress}"))
                options = {"workers": workers, "progress": report}
                key = world.from_main(
                    lambda source=source, options=options: (
                        tokenize_source(source, tokenizer, cache / "tokens", verify=verify, **options).digest
                    )
                )
                tokenized = tokenize_source(source, tokenizer, cache / "tokens", key=key, **options)
                found.append(make_windows(tokenized, config.data.seq_len))
                log.info(f"{what}{source.name}: {tokenized.num_docs:,} documents, {tokenized.num_tokens:,} tokens")
                _tell_unknown(tokenized.head(10_000_000), tokenizer, source.name)
            return found

        self.sources = load(config.data.sources)
        heldout = load(config.data.heldout, "held-out ")
        self.heldout = [HeldoutText(windows, self.capacity) for windows in heldout]
        self.alarm = ForgettingAlarm([windows.source.name for windows in heldout])
        lengths = [windows.lengths for windows in self.sources]
        longest = max(int(windows.lengths.max()) for windows in [*self.sources, *heldout])
        check_capacity(longest, self.capacity, what="a window")
        self.epoch_size = sum(int(n.sum(dtype=np.int64)) for n in lengths)
        shares = source_shares([w.source.weight for w in self.sources], [int(n.sum(dtype=np.int64)) for n in lengths])
        self.step_size = config.optim.batch_tokens
        self.order = GlobalOrder(lengths, shares, self.step_size, config.run.seed)
        self.ledger = cpt_ledger(self.sources) | {"heldout": cpt_ledger(heldout)["sources"]}
        self.digests = {f"data.sources.{i}": windows.source.digest for i, windows in enumerate(self.sources)}
        self.digests |= {f"data.heldout.{i}": windows.source.digest for i, windows in enumerate(heldout)}

    def prepare(self, policy: PolicyModel, world: World, folder: Path) -> None:
        """What the starting weights, which ``policy`` must hold, make of the held-out text: changes are against it."""
        for text in self.heldout:
            text.prepare(policy, world, folder)

    def micro_batches(self, step: int, world: World) -> tuple[list[MicroBatch], Denominators]:
        items = self.order.step(step)
        pairs = list(zip(items.source_ids.tolist(), items.item_ids.tolist(), strict=True))
        plan = pack(items.lengths, self.capacity, world.size)
        batches = [cpt_batch(self.sources, [pairs[i] for i in by_rank[world.rank]]) for by_rank in plan]
        tokens = int(items.lengths.sum())
        padding = sum(not mine for by_rank in plan for mine in by_rank)
        return batches, Denominators(tokens, TokenCounts(0, tokens, padding, needed=tokens, separate=tokens))

    def loss(self, policy: PolicyModel, batch: MicroBatch, n: Denominators) -> tuple[torch.Tensor, torch.Tensor]:
        nll = -policy(batch.to(policy.device)).sum()
        return nll / n.tokens, nll.detach().double().view(1)

    def metrics(self, sums: torch.Tensor, n: Denominators) -> dict[str, Any]:
        return {"loss": float(sums[0]) / n.tokens}

    def watch(self, row: dict[str, Any]) -> str | None:
        return self.alarm.watch(row)

    def evaluate(self, policy: PolicyModel, world: World) -> dict[str, float | None]:
        """Of each held-out source: bits per byte, and their change since the start."""
        return {name: value for text in self.heldout for name, value in text.evaluate(policy, world).items()}


class Rpo:
    """Reasoning preference optimization on pairs (medtrain.kernels.preference): DPO + alpha * NLL of the chosen side."""

    stage = "rpo"

    def __init__(self, config: Config, tokenizer, world: World):
        self.config = config.rpo
        self.capacity = config.optim.micro_batch_tokens

        def load(sources, what: str = "") -> list[PairSet]:
            found = []
            for source in name_sources(sources):
                data = config.data
                pairs = load_pairs(source, tokenizer, max_length=data.max_length, overlong=data.overlong, unusable=data.unusable)
                log.info(f"{what}{source.name}: {pairs.num_pairs:,} pairs, {len(pairs.tokens):,} tokens")
                for line in describe(pair_ledger([pairs])):
                    log.warning(f"{what}{line}")
                _tell_unknown(pairs.tokens, tokenizer, source.name)
                found.append(pairs)
            return found

        self.sources = load(config.data.pairs)
        self.heldout = load(config.data.heldout, "held-out ")
        self.share = config.data.share_prompts
        longest = max(
            int((pairs.lengths if self.share else pairs.separate_lengths).max()) for pairs in [*self.sources, *self.heldout]
        )
        check_capacity(longest, self.capacity, what="a pair, both sides")
        self.epoch_size = sum(pairs.num_pairs for pairs in self.sources)
        shares = source_shares([p.weight for p in self.sources], [p.num_pairs for p in self.sources])
        self.step_size = config.optim.batch_pairs
        ones = [np.ones(pairs.num_pairs, dtype=np.int64) for pairs in self.sources]
        self.order = GlobalOrder(ones, shares, self.step_size, config.run.seed, setting="optim.batch_pairs")
        self.completion_lengths = [pairs.completion_lengths.reshape(-1, 2) for pairs in self.sources]
        self.ledger = pair_ledger(self.sources) | {"heldout": pair_ledger(self.heldout)["sources"]}
        self.ledger["tokenizer"] = {
            "eos": tokenizer.eos_token,
            "bos": tokenizer.bos_token,
            "pad_is_eos": tokenizer.pad_token_id == tokenizer.eos_token_id,
        }
        if self.ledger["tokenizer"]["pad_is_eos"]:
            log.info(f"note: pad is eos, {tokenizer.eos_token}: nothing is padded or masked by it, and eos is learned")
        self.digests = {f"data.pairs.{i}": pairs.digest for i, pairs in enumerate(self.sources)}
        self.digests |= {f"data.heldout.{i}": pairs.digest for i, pairs in enumerate(self.heldout)}
        self.num_sums = num_sums(len(self.sources))
        names = [pairs.name for pairs in self.sources]
        self.alarm = LikelihoodAlarm(names, config.rpo.beta, has_reference=config.rpo.loss != "simpo")
        self.start_digest = ""  # of the policy before its first step; the loop sets it
        self.reference: dict[int, torch.Tensor] = {}  # id(PairSet) -> float64 [P, 2]

    def prepare(self, policy: PolicyModel, world: World, folder: Path) -> None:
        """Reference log-probs of all pairs from the starting weights, which ``policy`` must hold; proves them at step 0."""
        if self.config.loss == "simpo":
            log.info("reference: none, simpo does without")
            for pairs in [*self.sources, *self.heldout]:
                self.reference[id(pairs)] = torch.zeros(pairs.num_pairs, 2, dtype=torch.float64)
            return
        for pairs in [*self.sources, *self.heldout]:
            cache = ReferenceCache(folder, pairs, self.start_digest, policy.compute_dtype, policy.backend)
            layout = {"capacity": self.capacity, "share": self.share}
            # Adapters that begin at zero stay out; the check has them in, and so proves that they change nothing.
            with without_adapters(policy) if "lora.path" not in self.digests else contextlib.nullcontext():
                missing, parts = cache.fill(policy, world, **layout), len(cache.parts())
            off = cache.check(policy, world, **layout)
            what = f"{missing} of {parts} parts computed" if missing else "from the cache"
            log.info(f"reference of {pairs.name}: {what}; policy == reference within {off:.1e} nats")
            self.reference[id(pairs)] = torch.from_numpy(cache.load())

    def micro_batches(self, step: int, world: World) -> tuple[list[MicroBatch], Denominators]:
        items = self.order.step(step)
        ids = list(zip(items.source_ids.tolist(), items.item_ids.tolist(), strict=True))
        plan, inputs = self._plan(self.sources, ids, world)
        batches = [pair_batch(self.sources, [ids[i] for i in by_rank[world.rank]], share=self.share) for by_rank in plan]
        completions = np.array([self.completion_lengths[s][i] for s, i in ids])
        return batches, Denominators(int(completions.sum()), inputs, len(ids), int(completions[:, 0].sum()))

    def _plan(self, sources, ids, world: World):
        return plan_pairs(sources, ids, share=self.share, capacity=self.capacity, world_size=world.size)

    def loss(self, policy: PolicyModel, batch: MicroBatch, n: Denominators) -> tuple[torch.Tensor, torch.Tensor]:
        return self._loss(policy, batch, n, self.sources)

    def _loss(self, policy, batch: MicroBatch, n: Denominators, sources) -> tuple[torch.Tensor, torch.Tensor]:
        # Lengths and ids stay on the host: reading them from a GPU would wait for it.
        moved = batch.to(policy.device)
        sums = sum_by_sequence(policy(moved), batch.target_cu_seqlens).index_select(0, moved.sides)
        rows = [self.reference[id(sources[s])][i] for s, i in _ids(batch)]
        reference = torch.stack(rows).view(-1) if rows else torch.zeros(0, dtype=torch.float64)
        lengths = batch.target_cu_seqlens.diff()[batch.sides]
        settings = {
            "beta": self.config.beta,
            "num_pairs": n.pairs,
            "num_chosen_tokens": n.chosen_tokens,
            "nll_norm": self.config.nll_norm,
        }
        if self.config.loss == "sft":
            _, stats = preference_loss(sums.detach(), lengths, reference.to(sums.device), alpha=0.0, **settings)
            token = self.config.nll_norm == "token"
            nll = -(sums[0::2] if token else sums[0::2] / lengths[0::2].to(sums.device)).sum()
            loss = nll / (n.chosen_tokens if token else n.pairs)
        else:
            loss, stats = preference_loss(
                sums,
                lengths,
                reference.to(sums.device),
                alpha=self.config.alpha,
                loss=self.config.loss,
                label_smoothing=self.config.label_smoothing,
                simpo_gamma=self.config.simpo_gamma,
                **settings,
            )
        return loss, pair_sums(loss, stats, lengths, batch.source_ids, len(sources))

    def metrics(self, sums: torch.Tensor, n: Denominators) -> dict[str, Any]:
        return self._metrics(sums, n, self.sources)

    def _metrics(self, sums: torch.Tensor, n: Denominators, sources) -> dict[str, Any]:
        nll_denominator = n.chosen_tokens if self.config.nll_norm == "token" else n.pairs
        names = [pairs.name for pairs in sources]
        return pair_metrics(sums, names, nll_denominator=nll_denominator, beta=self.config.beta)

    def watch(self, row: dict[str, Any]) -> str | None:
        return self.alarm.watch(row)

    @torch.no_grad()
    def evaluate(self, policy: PolicyModel, world: World) -> dict[str, float]:
        """Over all held-out pairs together: ``heldout/loss`` and the means of the training metrics' names."""
        if not self.heldout:
            return {}
        ids = [(s, i) for s, pairs in enumerate(self.heldout) for i in range(pairs.num_pairs)]
        completions = np.concatenate([pairs.completion_lengths for pairs in self.heldout])
        plan, inputs = self._plan(self.heldout, ids, world)
        n = Denominators(int(completions.sum()), inputs, len(ids), int(completions[0::2].sum()))
        sums = torch.zeros(num_sums(len(self.heldout)), dtype=torch.float64, device=world.device)
        for by_rank in plan:
            batch = pair_batch(self.heldout, [ids[i] for i in by_rank[world.rank]], share=self.share)
            sums += self._loss(policy, batch, n, self.heldout)[1]
        row = self._metrics(world.sum(sums), n, self.heldout)
        return {f"heldout/{name}": row[name] for name in row if name != "pairs"}


def _tell_unknown(tokens: np.ndarray, tokenizer, name: str) -> None:
    """Warn of text that the tokenizer cannot spell: the model would learn from blanks."""
    unknown = tokenizer.unk_token_id
    # Where <unk> is also the end or padding token (GPT-2's way), it stands for itself.
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        return
    sample = tokens[:10_000_000]  # they tell enough
    share = float(np.mean(sample == unknown)) if len(sample) else 0.0
    if share > 0.001:
        log.warning(f"{share:.1%} of the tokens of {name} are {tokenizer.unk_token}: this tokenizer cannot spell its text")


def _now_and_then(report: Callable[[Progress], None], seconds: float = 10.0) -> Callable[[Progress], None]:
    """``report``, but not within ``seconds`` of the start or of the last time."""
    last = time.monotonic()

    def maybe(done: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            report(done)

    return maybe


def _ids(batch: MicroBatch) -> list[tuple[int, int]]:
    return list(zip(batch.source_ids.tolist(), batch.pair_ids.tolist(), strict=True))


Objective = Cpt | Rpo
