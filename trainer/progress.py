"""What a person sees while a run goes on: a live line on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0  # where the output is not a terminal


class Display:
    """Progress of one run on stderr; silent on ranks other than 0 and where ``quiet``."""

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._printed = 0.0

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.enabled:
            self.console.print(text, markup=False)

    def start(self, step: int, steps: int) -> None:
        self._printed = time.monotonic()
        if not self.enabled or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[numbers]}"), console=self.console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, completed=step, numbers="")
        self._bar.start()

    def step(self, step: int, steps: int, row: dict[str, Any], seconds_left: float) -> None:
        """Show one step's row of metrics.jsonl."""
        if not self.enabled:
            return
        numbers = describe(row)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step == steps or time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self.say(f"step {step}/{steps}  {numbers}  {duration(seconds_left)} left")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(row: dict[str, Any]) -> str:
    """The few numbers of a metrics row that a person watches."""
    parts = [f"loss {row['loss']:.4f}"]
    if "rewards/accuracy" in row:
        parts.append(f"reward acc {row['rewards/accuracy']:.2f} margin {row['rewards/margin']:+.3f}")
    parts += [f"lr {row['lr']:.2e}", f"|g| {row['grad_norm']:.2f}", f"{row['tokens_per_second']:,.0f} tok/s"]
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    parts.append(f"{row['max_memory_gib']:.2f} GiB")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    seconds = int(seconds + 0.5)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
