"""The table of losses over pairs. A new loss is a function here and a row of ``LOSSES``.

Nothing of torch is imported before a loss is computed: settings are checked against this table when a command starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NLL_NORMS = ("sequence", "token")


@dataclass(frozen=True)
class Pairs:
    """What a loss sees of P pairs; columns are chosen (w) and rejected (l).

    Attributes:
        log_ratios: [P, 2], nats: log pi(y|x) - log ref(y|x), summed over tokens; without a reference log pi(y|x).
        tokens: [P, 2], completion tokens, in log_ratios' dtype.
    """

    log_ratios: Tensor
    tokens: Tensor

    @property
    def gap(self) -> Tensor:
        """[P]: h = w - l."""
        return self.log_ratios[:, 0] - self.log_ratios[:, 1]

    @property
    def mean_gap(self) -> Tensor:
        """[P]: w / |y_w| - l / |y_l|."""
        means = self.log_ratios / self.tokens
        return means[:, 0] - means[:, 1]


@dataclass(frozen=True)
class LossSettings:
    """Raises ValueError, in check(), for a value that its loss does not take."""

    beta: float
    alpha: float
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    nll_norm: str = "sequence"
    simpo_gamma: float = 0.5

    def check(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}: choose one of {', '.join(LOSSES)}")
        if self.nll_norm not in NLL_NORMS:
            raise ValueError(f"unknown nll_norm {self.nll_norm!r}: choose one of {', '.join(NLL_NORMS)}")
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta must be positive; found {self.beta}")
        if not (self.alpha >= 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha must be 0 or more; found {self.alpha}")
        limit, smoothing = LOSSES[self.loss].smoothing_limit, self.label_smoothing
        if limit == 0 and smoothing != 0:
            raise ValueError(f"loss {self.loss!r} has no label_smoothing; found {smoothing}")
        if not 0 <= smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1; found {smoothing}")
        if 0 < limit < 1 and smoothing >= limit:
            raise ValueError(f"label_smoothing of loss {self.loss!r} must be at least 0 and below {limit}; found {smoothing}")


@dataclass(frozen=True)
class Loss:
    """One row of the table.

    Attributes:
        per_pair: (pairs, settings) -> [P], the preference loss of each pair.
        needs_reference: whether ``Pairs.log_ratios`` are against a reference; else rewards are means over tokens.
        smoothing_limit: label_smoothing lies below it, or is at most 1; 0: the loss takes none.
        likelihood_only: the preference loss is reported and not learned; alpha has no effect.
    """

    per_pair: Callable[[Pairs, LossSettings], Tensor]
    needs_reference: bool = True
    smoothing_limit: float = 0
    likelihood_only: bool = False


def sigmoid(pairs: Pairs, settings: LossSettings) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): -(1-e) log s(beta h) - e log s(-beta h); e > 0: conservative DPO (Mitchell 2023, eq. 3)."""
    return _smoothed_logistic(settings.beta * pairs.gap, settings.label_smoothing)


def robust(pairs: Pairs, settings: LossSettings) -> Tensor:
    """(-(1-e) log s(beta h) + e log s(-beta h)) / (1-2e): unbiased under labels flipped with probability e (arXiv 2403.00409)."""
    e, score = settings.label_smoothing, settings.beta * pairs.gap
    return (-(1 - e) * _log_sigmoid(score) - -e * _log_sigmoid(-score)) / (1 - 2 * e)


def hinge(pairs: Pairs, settings: LossSettings) -> Tensor:
    """max(0, 1 - beta h): SLiC (arXiv 2305.10425) on DPO's reward."""
    return (1 - settings.beta * pairs.gap).relu()


def ipo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """(w / |y_w| - l / |y_l| - 1 / (2 beta))^2: arXiv 2310.12036, eq. 17, beta being its tau.

    Averaged over tokens as in TRL's DPOTrainer, whose source says that the authors confirmed it. The target is nats per token:
    beta is typically far above DPO's.
    """
    return (pairs.mean_gap - 1 / (2 * settings.beta)).square()


def simpo(pairs: Pairs, settings: LossSettings) -> Tensor:
    """-(1-e) log s(r) - e log s(-r), r = beta (w / |y_w| - l / |y_l|) - gamma: arXiv 2405.14734, eq. 6; default gamma: TRL's."""
    return _smoothed_logistic(settings.beta * pairs.mean_gap - settings.simpo_gamma, settings.label_smoothing)


LOSSES = {
    "sigmoid": Loss(sigmoid, smoothing_limit=1),
    "robust": Loss(robust, smoothing_limit=0.5),
    "hinge": Loss(hinge),
    "ipo": Loss(ipo),
    "simpo": Loss(simpo, needs_reference=False, smoothing_limit=1),
    "sft": Loss(sigmoid, likelihood_only=True),
}


def _log_sigmoid(score: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(score)


def _smoothed_logistic(score: Tensor, label_smoothing: float) -> Tensor:
    loss = -_log_sigmoid(score)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * _log_sigmoid(-score)
    return loss
