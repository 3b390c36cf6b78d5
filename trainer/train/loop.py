"""The one training loop, for every stage, alone and on many ranks.

Reads from top to bottom as a run does: what was read and checked (``setup.py``) -> run folder -> model, weights -> last
checkpoint, if any -> steps -> export. Each step is a pure function of (weights, optimizer state, step number), so a run
started again goes on as if it had never stopped.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medtrain.trainer.config.settings import Config
from medtrain.trainer.data.chat import now
from medtrain.trainer.distributed import World, join_world
from medtrain.trainer.errors import StopRequested, bad_input
from medtrain.trainer.exam.during import evaluate_policy
from medtrain.trainer.files import PARTIAL, replace_folder, write_json
from medtrain.trainer.libraries import quiet_libraries
from medtrain.trainer.model.flops import num_parameters
from medtrain.trainer.model.hf_config import load_tokenizer
from medtrain.trainer.run.alarms import alarm_of
from medtrain.trainer.run.console import Display, console_logging, count, evaluation_lines, summary
from medtrain.trainer.run.export import export_dtype
from medtrain.trainer.run.folder import RunFolder, commit, device_name, last_step, versions
from medtrain.trainer.train.record import Recorder, Throughput
from medtrain.trainer.train.schedule import lr_factor
from medtrain.trainer.train.setup import Prepared, build, compute_dtype_of, prepare
from medtrain.trainer.train.signals import stop_on_signals
from medtrain.trainer.train.step import optimizer_step
from medtrain.trainer.weights.adapters import export_adapters
from medtrain.trainer.weights.checkpoint import Saver, load_checkpoint
from medtrain.trainer.weights.export import export_model
from medtrain.trainer.weights.small_files import write_small_files

log = logging.getLogger(__name__)

_GOES_ON = "the same command goes on from here"


@dataclass(frozen=True)
class TrainResult:
    """``model_dir``: the exported HF folder (``lora.merge`` false: the PEFT folder); ``metrics``: what
    metrics.jsonl holds of the last step; ``interrupted``: stopped by a signal, with no export."""

    run_dir: Path
    model_dir: Path
    metrics: dict[str, Any]
    interrupted: bool = False


def train(config: Config, *, quiet: bool = False) -> TrainResult:
    """Run one stage to its end (or go on with it) and export the model; every rank calls this.

    Raises:
        InputError: a mistake of the user's, found before the run folder is touched.
        RuntimeError: a loss or gradient that is not finite, a reference that does not match.
    """
    quiet_libraries()
    needs_group = compute_dtype_of(config) != torch.float32 or config.precision.fp8_all_gather
    with (
        join_world(needs_group=needs_group, replicate=config.parallel.replicate) as world,
        console_logging(enabled=world.is_main and not quiet) as display,
        stop_on_signals(world.stop),
    ):
        run = _Run(config, world, display)
        try:
            return run.start()
        except StopRequested:
            log.info(f"stopped by a signal; {_GOES_ON}")
            return run.result({}, interrupted=True)


class _Run:
    """One start of a run, on one rank."""

    def __init__(self, config: Config, world: World, display: Display):
        self.config, self.world, self.display = config, world, display
        self.folder = RunFolder(config.run.out)

    def start(self) -> TrainResult:
        config, world, folder = self.config, self.world, self.folder
        self.prepared = prepared = prepare(config, world)
        self.steps = prepared.steps

        def inspect() -> tuple[tuple[int, Path] | None, bool]:
            folder.check(config.settings(), dict(prepared.identity.digests))
            return folder.last_checkpoint(), folder.finished(config, self.steps)

        last, complete = world.from_main(inspect)
        if complete:
            if world.is_main:
                log.info(summary(folder, config, 0, 0.0))
            return self.result(last_step(folder.rows()))
        if world.is_main:
            _start_folder(folder, config, prepared, world, 0 if last is None else last[0])
        _check_shared(folder, world)
        self._log_start()
        # Weights that a checkpoint does not hold come from the files at every start.
        verify = last is None or prepared.adapters is not None
        self.built = build(config, prepared, world, folder.reference, verify=verify)
        if self.built.verification is not None and world.is_main:
            folder.add_to_start({"proof": self.built.verification})
        done, self.totals = 0, {"tokens_total": 0, "pairs_total": 0}
        if last is not None:
            loaded = load_checkpoint(last[1], self.built.policy, self.built.optimizer, world)
            done, self.totals = loaded["step"], {key: loaded[key] for key in self.totals}
            log.info(f"going on from {last[1].name} of {self.steps:,} steps")
        began = time.monotonic()
        alarm = alarm_of(config.stage, config.settings()["rpo"], prepared.data.ledger)
        self.recorder = Recorder(folder, alarm, world, done, resumed=last is not None)
        self.saver = Saver(folder.checkpoints, world, keep=config.checkpoint.keep, background=config.checkpoint.async_save)
        self.display.start(done, self.steps)
        try:
            finished = self._train(done)
            self.saver.finish()
        except RuntimeError as error:
            self.recorder.report.write(str(error))
            raise
        finally:
            self.display.stop()
            self.saver.close()
            self.recorder.close()
        if finished:
            self._export(trained=done < self.steps)
        self.recorder.report.write("" if finished else f"by a signal; {_GOES_ON}")
        if finished and world.is_main:
            log.info(summary(folder, config, self.steps - done, time.monotonic() - began))
        return self.result(self.recorder.last_row, interrupted=not finished)

    def result(self, metrics: dict[str, Any], *, interrupted: bool = False) -> TrainResult:
        return TrainResult(self.folder.root, self.folder.results(self.config.lora)[-1], metrics, interrupted)

    def _train(self, done: int) -> bool:
        """Steps from ``done`` to the last, with the checkpoints and evaluations due; False where a signal stopped them."""
        optim, world, built = self.config.optim, self.world, self.built
        throughput = Throughput(self.prepared, world)
        # Before the first step, or where a run was stopped after a checkpoint and before what was due then.
        if self.recorder.evaluation_pending(done) and not self._evaluate(done):
            log.info(f"stopped by a signal in the evaluation at step {done}; {_GOES_ON}")
            return False
        for step in range(done, self.steps):
            started = time.perf_counter()
            lr = optim.lr * lr_factor(optim, step, self.steps)
            result = optimizer_step(
                built.policy,
                self.prepared.data,
                built.loss,
                built.optimizer,
                step,
                world,
                lr=lr,
                grad_clip=optim.grad_clip,
                guard=built.guard,
                stop_requested=lambda: world.stop.requested or self.saver.failed,
                error_hint=f"the last checkpoint stands in {self.folder.checkpoints}",
            )
            self.totals["tokens_total"] += result.denominators.tokens
            self.totals["pairs_total"] += result.denominators.pairs
            row = throughput.row(step + 1, result, lr, self.totals["tokens_total"], time.perf_counter() - started)
            is_last = step + 1 == self.steps
            save_now = result.stop_requested or is_last or (step + 1) % self.config.checkpoint.every == 0
            if save_now:
                row["checkpoint_seconds"] = self.saver.begin(step + 1, built.policy, built.optimizer, self.totals)
            self.recorder.record(row)
            self.display.step(step + 1, self.steps, row, throughput.seconds_left(self.steps - step - 1))
            if save_now:
                self._commit_checkpoint()
            stopping = result.stop_requested and not is_last
            # After the checkpoint, which an exam that fails must not take with it.
            if not stopping and not self._evaluate(step + 1):
                stopping = True
                if not save_now:
                    self.saver.begin(step + 1, built.policy, built.optimizer, self.totals)
                    self._commit_checkpoint()
            if stopping:
                log.info(f"stopped by a signal after step {step + 1}; {_GOES_ON}")
                return False
        return True

    def _commit_checkpoint(self) -> None:
        if self.world.is_main:
            self.folder.sync_metrics()  # a checkpoint says that the rows up to its step are there
        self.saver.commit()
        self.recorder.report.refresh()

    def _evaluate(self, step: int) -> bool:
        """Compute and record what is due at ``step`` of the held-out numbers and the exam; False where a signal broke it off."""
        policy, settings, exam, row = self.built.policy, self.config.eval, self.prepared.exam, {}
        outputs = self.folder.exam(step)

        def is_due(every: int) -> bool:
            return step in (0, self.steps) or bool(every and step % every == 0)

        try:
            # Held-out numbers are those of the model that is exported.
            with self.built.guard.without_fp8() if self.built.guard is not None else nullcontext():
                if self.built.loss.validates and is_due(settings.every):
                    row |= self.built.loss.evaluate(policy, self.world)
                if exam is not None and is_due(settings.exam_every):
                    row |= evaluate_policy(policy, self.prepared.tokenizer, exam, self.world, outputs, self.folder.base)
        except StopRequested:
            return False
        if row:
            row = {"step": step} | row
            self.recorder.record(row)
            for line in evaluation_lines(row, outputs):
                log.info(line)
            self.recorder.report.refresh()
        return True

    def _log_start(self) -> None:
        prepared = self.prepared
        total, _ = num_parameters(prepared.shapes)
        device = f"{self.world.size} x {device_name(self.world.device)}"
        log.info(f"{self.config.stage}: {count(total)} parameters, {self.steps:,} steps, {device}")
        log.info("paths: " + ", ".join(f"{name} {backend}" for name, backend in prepared.backends.items()))
        if prepared.adapters is not None:
            log.info(prepared.adapters.describe(total))
        for part in (prepared.fp8, prepared.exam):
            if part is not None:
                log.info(part.describe())

    def _export(self, *, trained: bool) -> None:
        """Write the run's results; where this start ``trained`` nothing, those that are missing."""
        config, folder, adapters, policy = self.config, self.folder, self.prepared.adapters, self.built.policy
        # Rank 0 decides for all, so that ranks do not part.
        missing = folder.results(config.lora) if trained else self.world.from_main(lambda: folder.missing_results(config.lora))
        if adapters is not None and folder.adapter in missing:
            export_adapters(policy, adapters, folder.adapter, self.world, base=config.model.path)
        if folder.model in missing:
            dtype = export_dtype(config, self.prepared.compute_dtype)
            # As it was at the start, whatever its folder holds by now.
            tokenizer = load_tokenizer(folder.kept(config.model))
            export_model(policy, tokenizer, folder.model, self.world, dtype=dtype, source=folder.base, adapters=adapters)


def _start_folder(folder: RunFolder, config: Config, prepared: Prepared, world: World, step: int) -> None:
    earlier = folder.starts()
    start = {
        "from_step": step,
        "time": (now() if earlier else prepared.first_start).isoformat(),
        "command": sys.argv,
        "commit": commit(),
        "versions": versions(),
        "device": device_name(world.device),
        "world_size": world.size,
        "paths": prepared.backends,
    }
    total, _ = num_parameters(prepared.shapes)
    trained = prepared.adapters.num_parameters if prepared.adapters else 0
    folder.write_manifest(
        {
            "stage": config.stage,
            "settings": config.settings(),
            "steps": prepared.steps,
            "digests": dict(prepared.identity.digests),
            "parameters": {"all": total + trained, "trained": trained or total},
            "adapters": None if prepared.adapters is None else prepared.adapters.about(),
            "fp8": None if prepared.fp8 is None else prepared.fp8.about(),
            # One entry each time the run was started, so that a curve can be traced to what computed it.
            "starts": [*earlier, start],
        }
    )
    write_json(folder.ledger, prepared.data.ledger)
    if not folder.base.is_dir():
        partial = folder.base.with_name(folder.base.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_small_files(
            partial,
            prepared.hf_config,
            prepared.tokenizer,
            dtype=export_dtype(config, prepared.compute_dtype),
            source=config.model.path,
        )
        replace_folder(partial, folder.base)


def _check_shared(folder: RunFolder, world: World) -> None:
    """Every rank must see what rank 0 has just written, or checkpoints would lie in pieces on several machines."""
    if world.size == 1:
        return
    written = world.from_main(lambda: folder.manifest.read_text(encoding="utf-8"))
    seen = folder.manifest.is_file() and folder.manifest.read_text(encoding="utf-8") == written
    blind = int(world.sum(torch.tensor([0.0 if seen else 1.0], dtype=torch.float64)))
    if blind:
        raise bad_input(
            "not a folder that all nodes share",
            field="run.out",
            found=f"{blind} of {world.size} ranks do not see {folder.manifest}",
            expected="a shared file system",
        )
