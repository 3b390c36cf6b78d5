"""What the loop knows of a stage: a data object and a loss object, and the identity of the run.

The data object is read once and frozen; the loss object is made once the starting weights are there. A new stage is a module
with ``read_data`` and ``make_loss`` and one entry in :mod:`medtrain.trainer.train.stages`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from medtrain.trainer.data.batch import MicroBatch
from medtrain.trainer.data.packing import TokenCounts
from medtrain.trainer.distributed import World
from medtrain.trainer.model.policy import PolicyModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunIdentity:
    """Digests of everything a run began with; made once, before anything is written.

    Attributes:
        digests: by name, of data, weights, exam and precision: a run goes on only where all are as they were.
        start: of the policy before its first step, with its adapters.
        adapters_are_new: there are no adapters, or they begin at zero and change nothing before the first step.
    """

    digests: Mapping[str, str]
    start: str
    adapters_are_new: bool


@dataclass(frozen=True)
class Denominators:
    """Of one optimizer step, over all ranks and micro-batches, so that the result depends on neither.

    Attributes:
        tokens: tokens in the loss; of pairs both sides.
        inputs: tokens that the model computes, saves and pads.
        pairs, chosen_tokens: of preference pairs; tokens of a prompt shared by several completions count for each.
    """

    tokens: int
    inputs: TokenCounts
    pairs: int = 0
    chosen_tokens: int = 0


class StageData(Protocol):
    """Frozen. Sizes are in tokens or in pairs; ``digests`` by name; ``ledger`` as in ledger.json."""

    sources: Any
    epoch_size: Any
    step_size: Any
    digests: Any
    ledger: Any

    def micro_batches(self, step: int, world: World) -> tuple[list[MicroBatch], Denominators]:
        """This rank's batches of step ``step`` (from 0), on the host and as many on every rank, and the step's denominators."""
        ...


class StageLoss(Protocol):
    """``num_sums``: length of the sums; ``validates``: whether there is held-out data."""

    num_sums: int
    validates: bool

    def __call__(self, policy: PolicyModel, batch: MicroBatch, n: Denominators) -> tuple[torch.Tensor, torch.Tensor]:
        """(this batch's part of the step's loss, 0-d and differentiable; its sums, float64 [num_sums], on the device)."""
        ...

    def metrics(self, sums: torch.Tensor, n: Denominators) -> dict[str, Any]:
        """The step's row, from sums (float64 [num_sums], on the host) over all ranks and micro-batches."""
        ...

    def evaluate(self, policy: PolicyModel, world: World) -> dict[str, float | None]:
        """The held-out numbers, ``heldout/...``; collective."""
        ...


def warn_unknown_tokens(tokens: np.ndarray, tokenizer, name: str) -> None:
    """Warn of text that the tokenizer cannot spell: the model would learn from blanks. ``tokens``: ids of the source ``name``."""
    unknown = tokenizer.unk_token_id
    # Where <unk> is also the end or padding token (GPT-2's way), it stands for itself.
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        return
    sample = tokens[:10_000_000]
    share = float(np.mean(sample == unknown)) if len(sample) else 0.0
    if share > 0.001:
        log.warning(f"{share:.1%} of the tokens of {name} are {tokenizer.unk_token}: this tokenizer cannot spell its text")
