"""What is watched of preference pairs: sums that add up over micro-batches and ranks, and metrics of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

MEANS = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen", "logps/rejected")
BY_SOURCE = ("rewards/chosen", "rewards/margin", "rewards/accuracy", "logps/chosen")
_LOSSES = ("objective", "dpo_loss", "nll_loss")
_COLUMNS = 1 + len(MEANS) + 4

# Below this many nats margins spread by rounding alone, as they do at the first step, where policy == reference.
LEAST_SPREAD_NATS = 1e-3


def num_sums(num_sources: int) -> int:
    return len(_LOSSES) + num_sources * _COLUMNS


def pair_sums(
    loss: torch.Tensor, stats: dict[str, Any], lengths: torch.Tensor, source_ids: torch.Tensor, num_sources: int
) -> torch.Tensor:
    """Sums of one micro-batch, float64 [num_sums].

    Args:
        loss: this micro-batch's part of the step's loss, 0-d.
        stats: of ``preference_loss``.
        lengths: int64 [2P] on the host, completion tokens of chosen_0, rejected_0, ...
        source_ids: int64 [P] on the host.
    """
    device = loss.device
    longer = (lengths[0::2] - lengths[1::2]).to(device, torch.float64)
    margin = stats["rewards/margin"].double()
    columns = [torch.ones_like(margin), *(stats[name].double() for name in MEANS)]
    columns += [margin.square(), longer, longer.square(), margin * longer]
    of_source = (source_ids == torch.arange(num_sources).unsqueeze(1)).to(device, torch.float64)
    by_source = of_source @ torch.stack(columns, dim=1)
    losses = [loss.detach().double(), stats["dpo_loss"].double(), stats["nll_loss"].double()]
    return torch.cat([torch.stack(losses), by_source.view(-1)])


def pair_metrics(sums: torch.Tensor, names: Sequence[str], *, nll_denominator: int, beta: float) -> dict[str, Any]:
    """Metrics of a step or of a held-out pass, from ``pair_sums`` summed over micro-batches and ranks.

    ``rewards/length_correlation`` is Pearson's, of the reward margin and the tokens that the chosen side has more than
    the rejected one; None for fewer than three pairs and where one of the two does not vary. With several sources also
    ``sources/NAME/...``, for those that the step has pairs of.
    """
    objective, dpo_loss, nll_loss = sums[: len(_LOSSES)].tolist()
    by_source = sums[len(_LOSSES) :].view(len(names), _COLUMNS)
    pairs, *rest = by_source.sum(dim=0).tolist()
    row: dict[str, Any] = {"loss": objective, "dpo_loss": dpo_loss / pairs, "nll_loss": nll_loss / nll_denominator}
    row |= {name: value / pairs for name, value in zip(MEANS, rest, strict=False)}
    row["rewards/length_correlation"] = _correlation(pairs, rest, beta)
    row["pairs"] = int(pairs)
    if len(names) > 1:
        for name, (count, *values) in zip(names, by_source.tolist(), strict=True):
            means = dict(zip(MEANS, values, strict=False)) if count else {}
            row |= {f"sources/{name}/{key}": means[key] / count for key in BY_SOURCE if count}
    return row


def _correlation(pairs: float, sums: Sequence[float], beta: float) -> float | None:
    margin = sums[MEANS.index("rewards/margin")] / pairs
    margin2, longer, longer2, product = (value / pairs for value in sums[len(MEANS) :])
    variance, variance_longer = margin2 - margin * margin, longer2 - longer * longer
    if pairs < 3 or variance <= (beta * LEAST_SPREAD_NATS) ** 2 or variance_longer <= 1e-9 * longer2:
        return None
    return (product - margin * longer) / math.sqrt(variance * variance_longer)
