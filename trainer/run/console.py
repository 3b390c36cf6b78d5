"""What a run shows: a live line on a terminal, plain lines now and then elsewhere, and the closing lines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medtrain.trainer.config.settings import Config
from medtrain.trainer.exam.scoring import INVALID, unread_note
from medtrain.trainer.run.folder import RunFolder

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0  # where the output is not a terminal


class _ConsoleHandler(logging.Handler):
    """Writes log lines through a rich console, so that they do not tear a live progress bar."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self._console.print(prefix + record.getMessage(), markup=False)


@contextmanager
def console_logging(*, enabled: bool, name: str = "medtrain") -> Iterator[Display]:
    """Show what the modules below ``name`` log on stderr, and yield the progress display; ``enabled``: on rank 0 of a run
    that is not quiet, elsewhere nothing is shown. Lines of INFO stand as they are, warnings begin with "warning: "."""
    display = Display(enabled=enabled)
    logger = logging.getLogger(name)
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers = [_ConsoleHandler(display.console) if enabled else logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield display
    finally:
        display.stop()
        logger.handlers, logger.level, logger.propagate = before


class Display:
    """A live line with the step on a terminal, a plain line now and then elsewhere."""

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._printed = 0.0

    def start(self, step: int, steps: int) -> None:
        self._printed = time.monotonic()
        if not self.enabled or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            transient=True,
        )
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
            log.info(f"step {step}/{steps}  {numbers}  {duration(seconds_left)} left")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def count(number: float) -> str:
    """A number in short: 7.6 B, 20.2 M, 9.4 K."""
    for scale, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= scale:
            return f"{number / scale:,.1f}{unit}"
    return f"{number:.0f}"


def describe(row: dict[str, Any]) -> str:
    """The few numbers of a metrics row that are watched."""
    parts = [f"loss {row['loss']:.4f}"]
    if "rewards/accuracy" in row:
        parts.append(f"reward acc {row['rewards/accuracy']:.2f} margin {row['rewards/margin']:+.3f}")
    parts += [f"lr {row['lr']:.2e}", f"|g| {row['grad_norm']:.2f}", f"{row['tokens_per_second']:,.0f} tok/s"]
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    parts.append(f"{row['max_memory_gib']:.2f} GiB")
    return "  ".join(parts)


def evaluation_lines(row: dict[str, Any], outputs: Path) -> list[str]:
    """The held-out numbers and the exam of one row of metrics.jsonl, a line each where they are there. ``outputs``: of the
    exam at this step."""
    lines, shown = [], []
    for key, value in row.items():
        if not key.startswith("heldout/") or value is None or key.endswith(("_change", "_stderr")):
            continue
        change, error = row.get(f"{key}_change"), row.get(f"{key}_change_stderr")
        since = "" if not row["step"] or change is None else f" ({change:+.4f}" + (f" ± {error:.4f})" if error else ")")
        shown.append(f"{key.removeprefix('heldout/')} {value:.4f}{since}")
    if shown:
        lines.append(f"held-out at step {row['step']}: {'  '.join(shown)}")
    if "exam/explanation_gap" in row:
        answer, explain = (row[f"exam/{mode}/points_ratio"] for mode in ("answer", "explain"))
        lines.append(
            f"exam at step {row['step']}: answer {answer:.3f}  explain {explain:.3f}  gap {row['exam/explanation_gap']:+.3f}"
            f"  (cut off {row['exam/answer/truncated']} and {row['exam/explain/truncated']}, unread "
            f"{row['exam/answer/parse_failures']} and {row['exam/explain/parse_failures']}, {duration(row['exam/seconds'])})"
        )
        for mode in ("answer", "explain"):
            counts = {name: row[f"exam/{mode}/{name}"] for name in ("parse_failures", "truncated")}
            lines += filter(None, [unread_note(mode, counts | {"questions": row["exam/questions"]}, outputs)])
        if "exam/invalid" in row:
            lines.append(f"the exam's figures at step {row['step']} are invalid: {INVALID}")
    return lines


def summary(folder: RunFolder, config: Config, steps: int, seconds: float) -> str:
    """The closing lines: first and last value of what matters, over the whole run and all its starts; of held-out bits per
    byte also the best, where it is not the last."""
    rows = folder.rows()
    trained = [row for row in rows if "loss" in row]
    heldout = [row for row in rows if any(name.startswith("heldout/") for name in row)]
    lines = [f"done: {steps:,} steps in {duration(seconds)}" if steps else "already complete"]

    def span(name: str, within: list[dict[str, Any]]) -> str:
        line = f"{name} {within[0][name]:.4f} -> {within[-1][name]:.4f}"
        if not name.endswith("bits_per_byte"):
            return line
        best = min(within, key=lambda row: row[name])
        return line if best is within[-1] else f"{line} (best {best[name]:.4f} at step {best['step']})"

    names = [name for name in ("loss", "rewards/margin", "rewards/accuracy") if name in trained[-1]]
    lines.append("  ".join(span(name, trained) for name in names))
    if heldout:
        watched = ("bits_per_byte", "heldout/loss", "rewards/margin", "rewards/accuracy")
        lines.append("  ".join(span(name, heldout) for name in heldout[-1] if "heldout/" in name and name.endswith(watched)))
    exams = [row for row in rows if "exam/explanation_gap" in row]
    if exams:
        names = ("exam/answer/points_ratio", "exam/explain/points_ratio", "exam/explanation_gap")
        lines.append("  ".join(span(name, exams) for name in names))
    computed, saved = (sum(row[name] for row in trained) for name in ("tokens_computed", "tokens_saved"))
    lines.append(
        f"{trained[-1]['tokens_total']:,} tokens counted, {computed:,} computed"
        + (f", {saved:,} saved by sharing prompts, " if saved else ", ")
        + f"{sum(row['seconds'] for row in trained) / len(trained):.2f} s per step, peak {trained[-1]['max_memory_gib']:.2f} GiB"
    )
    from medtrain.kernels.logps import clamped_rows  # with torch, which `medtrain report` does without

    if clamped_rows():
        lines.append(f"{clamped_rows():,} log-probabilities lay so low that the head computed them a second time, exactly")
    made = "   ".join(f"{path.name}: {path}" for path in reversed(folder.results(config.lora)))
    lines.append(f"{made}   metrics: {folder.metrics}   ledger: {folder.ledger}")
    if folder.report.is_file():
        lines.append(f"report: {folder.report}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    seconds = int(seconds + 0.5)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
