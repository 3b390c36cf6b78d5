"""What a run warns of while it trains, and its report afterwards: pure functions of the rows of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class ForgettingAlarm:
    """Says, once a source, that its held-out text became less likely than at the start while another's became likelier,
    each by more than three standard errors. A pure function of the rows of metrics.jsonl."""

    def __init__(self, names: list[str]):
        self.names = names
        self._said: set[str] = set()

    def watch(self, row: dict[str, Any]) -> str | None:
        """Take one row; return a line to print, if this is the row that shows it."""
        changes = {}
        for name in self.names:
            key = f"heldout/{name}/bits_per_byte"
            found, error = row.get(f"{key}_change"), row.get(f"{key}_change_stderr")
            if found is not None and error is not None and abs(found) > 3 * error:
                changes[name] = (found, error, row[key])
        learned = [name for name, (found, *_) in changes.items() if found < 0]
        lines = []
        for name, (found, error, now) in changes.items():
            if found > 0 and learned and name not in self._said:
                self._said.add(name)
                lines.append(
                    f"warning: {name} is being forgotten: at step {row['step']} its held-out text takes {found:.4f} bits per "
                    f"byte more than at the start ({found / (now - found):+.1%}; standard error {error:.4f}), while "
                    f"{', '.join(learned)} takes less (more weight on such text in data.sources, or a lower optim.lr, holds it)"
                )
        return "\n".join(lines) or None


class LikelihoodAlarm:
    """Says, once a source, that its chosen answers grow less likely while their margin grows.

    The loss is content with that: the rejected answers only have to fall faster. A source is told of when, over the last
    ``WINDOW`` steps that had pairs of it, the chosen side's mean reward lies below the start and the margin above it, each
    by more than three standard errors of the steps' means, and the fall is at least a tenth of the margin's rise. The
    start is 0, where policy == reference, or without a reference the first ``WINDOW`` steps. A pure function of the rows
    of metrics.jsonl.
    """

    WINDOW = 10

    def __init__(self, names: Sequence[str], beta: float, *, has_reference: bool):
        self.prefixes = {name: f"sources/{name}/" if len(names) > 1 else "" for name in names}
        self.beta = beta
        self.has_reference = has_reference
        self._seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        self._said: set[str] = set()

    def watch(self, row: dict[str, Any]) -> str | None:
        """Take one row; return a line to print, if this is the step that shows it."""
        lines = []
        for name, prefix in self.prefixes.items():
            if f"{prefix}rewards/chosen" not in row:
                continue
            seen = self._seen[name]
            seen.append((row[f"{prefix}rewards/chosen"], row[f"{prefix}rewards/margin"]))
            if name in self._said or len(seen) < self.WINDOW * (1 if self.has_reference else 2):
                continue
            (chosen, chosen_error), (margin, margin_error) = (self._change(seen, k) for k in (0, 1))
            if chosen < min(-3 * chosen_error, -margin / 10) and margin > 3 * margin_error:
                self._said.add(name)
                unit = "nats" if self.has_reference else "nats a token"
                lines.append(
                    f"warning: {name}: the chosen answers grow less likely while their margin grows: over the last "
                    f"{self.WINDOW} steps to step {row['step']} their log-prob lies {-chosen / self.beta:.3g} {unit} below the "
                    f"start, the reward margin {margin:.3g} above it (a larger rpo.alpha holds them up)"
                )
        return "\n".join(lines) or None

    def _change(self, seen: list[tuple[float, float]], k: int) -> tuple[float, float]:
        """(mean of the last steps less the start, its standard error)."""
        recent = [row[k] for row in seen[-self.WINDOW :]]
        start = 0.0 if self.has_reference else sum(row[k] for row in seen[: self.WINDOW]) / self.WINDOW
        mean = sum(recent) / self.WINDOW
        variance = sum((value - mean) ** 2 for value in recent) / (self.WINDOW - 1)
        return mean - start, math.sqrt(variance / self.WINDOW)
