"""What a run warns of while it trains, and its report afterwards: pure functions of the rows of metrics.jsonl.

An alarm's ``watch`` takes each row in turn and returns a line where that row shows a problem, once per source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medtrain.kernels.losses import LOSSES


def alarm_of(stage: str, rpo: Mapping[str, Any], ledger: Mapping[str, Any]) -> ForgettingAlarm | LikelihoodAlarm:
    """The alarm of a run with these ``rpo`` settings and this ledger."""
    if stage == "rpo":
        return LikelihoodAlarm([*ledger["sources"]], rpo["beta"], has_reference=LOSSES[rpo["loss"]].needs_reference)
    return ForgettingAlarm([*ledger.get("heldout", {})])


class ForgettingAlarm:
    """Warns that a source's held-out text became less likely than at the start while another's became likelier, each by more
    than three standard errors."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self._warned: set[str] = set()

    def watch(self, row: dict[str, Any]) -> str | None:
        changes = {}
        for name in self.names:
            key = f"heldout/{name}/bits_per_byte"
            change, error = row.get(f"{key}_change"), row.get(f"{key}_change_stderr")
            if change is not None and error is not None and abs(change) > 3 * error:
                changes[name] = (change, error, row[key])
        learned = [name for name, (change, *_) in changes.items() if change < 0]
        lines = []
        for name, (change, error, now) in changes.items():
            if change > 0 and learned and name not in self._warned:
                self._warned.add(name)
                lines.append(
                    f"warning: {name} is being forgotten: at step {row['step']} its held-out text takes {change:.4f} bits per "
                    f"byte more than at the start ({change / (now - change):+.1%}; standard error {error:.4f}), while "
                    f"{', '.join(learned)} takes less (more weight on such text in data.sources, or a lower optim.lr, holds it)"
                )
        return "\n".join(lines) or None


class LikelihoodAlarm:
    """Warns that a source's chosen answers grow less likely while their margin grows: the loss only asks that the rejected
    answers fall faster.

    It does so when, over the last ``WINDOW`` steps that had pairs of the source, the chosen side's mean reward is below the
    start and the margin above it, each by more than three standard errors of the steps' means, and the fall is at least a
    tenth of the margin's rise. The start is 0, where policy == reference, or without a reference the first ``WINDOW`` steps.
    """

    WINDOW = 10

    def __init__(self, names: Sequence[str], beta: float, *, has_reference: bool):
        self.prefixes = {name: f"sources/{name}/" if len(names) > 1 else "" for name in names}
        self.beta, self.has_reference = beta, has_reference
        self._seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        self._warned: set[str] = set()

    def watch(self, row: dict[str, Any]) -> str | None:
        lines = []
        for name, prefix in self.prefixes.items():
            if f"{prefix}rewards/chosen" not in row:
                continue
            seen = self._seen[name]
            seen.append((row[f"{prefix}rewards/chosen"], row[f"{prefix}rewards/margin"]))
            if name in self._warned or len(seen) < self.WINDOW * (1 if self.has_reference else 2):
                continue
            (chosen, chosen_error), (margin, margin_error) = (self._change([values[k] for values in seen]) for k in (0, 1))
            if chosen < min(-3 * chosen_error, -margin / 10) and margin > 3 * margin_error:
                self._warned.add(name)
                unit = "nats" if self.has_reference else "nats per token"
                lines.append(
                    f"warning: {name}: the chosen answers grow less likely while their margin grows: over the last "
                    f"{self.WINDOW} steps to step {row['step']} their log-prob is {-chosen / self.beta:.3g} {unit} below the "
                    f"start, the reward margin {margin:.3g} above it (a larger rpo.alpha holds them up)"
                )
        return "\n".join(lines) or None

    def _change(self, values: list[float]) -> tuple[float, float]:
        """(mean of the last steps less the start, its standard error)."""
        recent = values[-self.WINDOW :]
        start = 0.0 if self.has_reference else sum(values[: self.WINDOW]) / self.WINDOW
        mean = sum(recent) / self.WINDOW
        variance = sum((value - mean) ** 2 for value in recent) / (self.WINDOW - 1)
        return mean - start, math.sqrt(variance / self.WINDOW)
