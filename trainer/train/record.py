"""What a run writes of its steps: rows of metrics.jsonl with their throughput, TensorBoard, alarms and the report."""

from __future__ import annotations

import logging
import resource
import sys
from typing import Any

import torch

from medtrain.trainer.distributed import World
from medtrain.trainer.model.flops import FlopsPerToken, num_parameters, peak_flops
from medtrain.trainer.run.alarms import ForgettingAlarm, LikelihoodAlarm
from medtrain.trainer.run.folder import RunFolder, last_step
from medtrain.trainer.run.report import LiveReport
from medtrain.trainer.train.setup import Prepared
from medtrain.trainer.train.step import StepResult

log = logging.getLogger(__name__)


class Recorder:
    """Takes each row in turn. Only rank 0 writes; every rank knows the last row.

    Args:
        done: steps that the run had done before this start. Rows after them are dropped: they will be computed again.
        resumed: whether it goes on from a checkpoint.
    """

    def __init__(self, folder: RunFolder, alarm: ForgettingAlarm | LikelihoodAlarm, world: World, done: int, *, resumed: bool):
        self.folder, self._alarm = folder, alarm
        self.report = LiveReport(folder.root, enabled=world.is_main)
        rows: list[dict[str, Any]] = []
        self._board = None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            folder.cut_metrics(done if resumed else -1)
            self._board = SummaryWriter(folder.tensorboard, purge_step=done + 1 if done else 0)
            rows = folder.rows() if resumed else []
        for row in rows:
            alarm.watch(row)
        self.last_row: dict[str, Any] = world.from_main(lambda: last_step(rows))

    def evaluation_pending(self, done: int) -> bool:
        """Whether no held-out numbers and no exam were recorded at step ``done``."""
        return self.last_row.get("step") != done or not any(key.startswith(("heldout/", "exam/")) for key in self.last_row)

    def record(self, row: dict[str, Any]) -> None:
        self.last_row = last_step([self.last_row, row])
        if self._board is None:
            return
        self.folder.append_metrics(row)
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, row["step"])
        if warning := self._alarm.watch(row):
            log.info(warning)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class Throughput:
    """Makes the row of a step, and predicts how long the rest takes."""

    def __init__(self, prepared: Prepared, world: World):
        _, multiplied = num_parameters(prepared.shapes)
        self.world = world
        self._flops = FlopsPerToken(prepared.hf_config, multiplied, prepared.adapters)
        self._peak = peak_flops(world.device) if prepared.compute_dtype == torch.bfloat16 else None
        self._num_steps, self._seconds = 0, 0.0

    def row(self, step: int, result: StepResult, lr: float, tokens_total: int, seconds: float) -> dict[str, Any]:
        """The row of metrics.jsonl for ``step`` (from 1), which took ``seconds``."""
        self._num_steps += 1
        self._seconds += seconds
        n = result.denominators
        flops = self._flops(n.inputs.computed, result.attention_pairs)
        return {
            "step": step,
            **result.metrics,
            "lr": lr,
            "tokens": n.tokens,
            "tokens_total": tokens_total,
            "seconds": seconds,
            **n.inputs.metrics(),
            "tokens_per_second": n.inputs.computed / seconds,
            "mfu": flops / seconds / (self._peak * self.world.size) if self._peak else None,
            "max_memory_gib": _max_memory_gib(self.world.device),
        }

    def seconds_left(self, steps_left: int) -> float:
        return steps_left * self._seconds / self._num_steps


def _max_memory_gib(device: torch.device) -> float:
    """Peak so far: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
