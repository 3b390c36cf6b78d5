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
from medtrain.trainer.data.chat import fix_time, now
from medtrain.trainer.distributed import World, join_world
from medtrain.trainer.errors import StopRequested, bad_input
from medtrain.trainer.exam.during import sit_exam
from medtrain.trainer.files import PARTIAL, replace_folder, write_json
from medtrain.trainer.libraries import quiet_libraries
from medtrain.trainer.model.flops import num_parameters
from medtrain.trainer.model.lora import export_adapters
from medtrain.trainer.model.policy import PolicyModel, load_tokenizer
from medtrain.trainer.run.console import Display, console_logging, count, evaluation_lines, summary
from medtrain.trainer.run.export import export_dtype
from medtrain.trainer.run.folder import RunFolder, commit, device_name, last_step, versions
from medtrain.trainer.train.record import Recorder, Throughput
from medtrain.trainer.train.schedule import lr_factor
from medtrain.trainer.train.setup import Built, Prepared, build, compute_dtype_of, prepare
from medtrain.trainer.train.signals import stop_on_signals
from medtrain.trainer.train.step import optimizer_step
from medtrain.trainer.weights.checkpoint import Saver, load_checkpoint
from medtrain.trainer.weights.load import export_model
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
        try:
            return _run(config, prepare(config, world), world, display)
        except StopRequested:
            log.info(f"stopped by a signal before the first step; {_GOES_ON}")
            folder = RunFolder(config.run.out)
            return TrainResult(folder.root, folder.results(config)[-1], {}, interrupted=True)


def _run(config: Config, prepared: Prepared, world: World, display: Display) -> TrainResult:
    folder, steps = RunFolder(config.run.out), prepared.steps
    last, complete = world.from_main(lambda: _inspect(folder, config, prepared))
    if complete:
        log.info(summary(folder, config, 0, 0.0))
        return TrainResult(folder.root, folder.results(config)[-1], last_step(folder.rows()))
    if world.is_main:
        _start_folder(folder, config, prepared, world, 0 if last is None else last[0])
    _check_shared(folder, world)
    _log_start(config, prepared, world)
    # Weights that a checkpoint does not hold come from the files at every start.
    verify = last is None or prepared.adapters is not None
    built = build(config, prepared, world, folder.reference, verify=verify)
    if built.verification is not None and world.is_main:
        folder.add_to_start({"proof": built.verification})

    state, done = {"tokens_total": 0, "pairs_total": 0}, 0
    if last is not None:
        loaded = load_checkpoint(last[1], built.policy, built.optimizer, world)
        state, done = {key: loaded[key] for key in state}, loaded["step"]
        log.info(f"going on from {last[1].name} of {steps:,} steps")
    began = time.monotonic()
    recorder = Recorder(folder, built.loss, world, done, resumed=last is not None)
    try:
        finished = _train_steps(config, prepared, built, world, display, folder, recorder, state, done)
    except RuntimeError as error:
        recorder.report.write(str(error))
        raise
    finally:
        recorder.close()
    if not finished:
        recorder.report.write(f"by a signal; {_GOES_ON}")
        return TrainResult(folder.root, folder.results(config)[-1], recorder.last_row, interrupted=True)
    _export(config, prepared, built.policy, world, folder, trained=done < steps)
    recorder.report.write()
    if world.is_main:
        log.info(summary(folder, config, steps - done, time.monotonic() - began))
    return TrainResult(folder.root, folder.results(config)[-1], recorder.last_row)


def _train_steps(
    config: Config,
    prepared: Prepared,
    built: Built,
    world: World,
    display: Display,
    folder: RunFolder,
    recorder: Recorder,
    state: dict[str, int],
    done: int,
) -> bool:
    """Steps from ``done`` to the last, with checkpoints and evaluations as they are due; False where a signal stopped them."""
    policy, steps = built.policy, prepared.steps
    evaluator = _Evaluator(config, prepared, built, world, folder, recorder)
    throughput = Throughput(prepared, world)
    saver = Saver(folder.checkpoints, world, keep=config.checkpoint.keep, background=config.checkpoint.async_save)
    display.start(done, steps)

    def commit_checkpoint() -> None:
        if world.is_main:
            folder.sync_metrics()  # a checkpoint says that the rows up to its step are there
        saver.commit()
        recorder.report.refresh()

    try:
        # Before the first step, or where a run was stopped after a checkpoint and before what was due then.
        if recorder.evaluation_pending(done) and not evaluator.evaluate(done):
            log.info(f"stopped by a signal in the evaluation at step {done}; {_GOES_ON}")
            return False
        for step in range(done, steps):
            started = time.perf_counter()
            lr = config.optim.lr * lr_factor(config.optim, step, steps)
            result = optimizer_step(
                policy,
                prepared.data,
                built.loss,
                built.optimizer,
                step,
                world,
                lr=lr,
                grad_clip=config.optim.grad_clip,
                guard=built.guard,
                stop_requested=lambda: world.stop.requested or saver.failed,
                error_hint=f"the last checkpoint stands in {folder.checkpoints}",
            )
            state["tokens_total"] += result.denominators.tokens
            state["pairs_total"] += result.denominators.pairs
            row = throughput.row(step + 1, result, lr, state["tokens_total"], time.perf_counter() - started)
            is_last = step + 1 == steps
            save_now = result.stop_requested or is_last or (step + 1) % config.checkpoint.every == 0
            if save_now:
                row["checkpoint_seconds"] = saver.begin(step + 1, policy, built.optimizer, state)
            recorder.record(row)
            display.step(step + 1, steps, row, throughput.seconds_left(steps - step - 1))
            if save_now:
                commit_checkpoint()
            stopping = result.stop_requested and not is_last
            # After the checkpoint, which an exam that fails must not take with it.
            if not stopping and not evaluator.evaluate(step + 1):
                stopping = True
                if not save_now:
                    saver.begin(step + 1, policy, built.optimizer, state)
                    commit_checkpoint()
            if stopping:
                saver.finish()
                log.info(f"stopped by a signal after step {step + 1}; {_GOES_ON}")
                return False
        saver.finish()
        return True
    finally:
        display.stop()
        saver.close()


class _Evaluator:
    """Computes and records what is due at a step of the held-out numbers and the exam."""

    def __init__(self, config: Config, prepared: Prepared, built: Built, world: World, folder: RunFolder, recorder: Recorder):
        self.settings, self.steps, self.exam = config.eval, prepared.steps, prepared.exam
        self.built, self.world, self.folder, self.recorder = built, world, folder, recorder
        self.tokenizer = fix_time(prepared.tokenizer, prepared.first_start)
        # Held-out numbers are those of the model that is exported.
        self.full_precision = built.guard.without_fp8 if built.guard is not None else nullcontext

    def is_due(self, step: int, every: int) -> bool:
        return step in (0, self.steps) or bool(every and step % every == 0)

    def evaluate(self, step: int) -> bool:
        """False where a signal broke the evaluation off; it is pending then. All ranks must call this."""
        policy, row = self.built.policy, {}
        try:
            with self.full_precision():
                if self.built.loss.validates and self.is_due(step, self.settings.every):
                    row |= self.built.loss.evaluate(policy, self.world)
                if self.exam is not None and self.is_due(step, self.settings.exam_every):
                    row |= sit_exam(policy, self.tokenizer, self.exam, self.world, self.folder.exam(step), self.folder.base)
        except StopRequested:
            return False
        if row:
            row = {"step": step} | row
            self.recorder.record(row)
            for line in evaluation_lines(row, self.folder.exam(step)):
                log.info(line)
            self.recorder.report.refresh()
        return True


def _inspect(folder: RunFolder, config: Config, prepared: Prepared) -> tuple[tuple[int, Path] | None, bool]:
    """(step and folder of the last checkpoint, whether nothing is left to do); refuses the folder of another run."""
    folder.check(config.settings(), dict(prepared.identity.digests))
    return folder.last_checkpoint(), folder.finished(config, prepared.steps)


def _log_start(config: Config, prepared: Prepared, world: World) -> None:
    total, _ = num_parameters(prepared.shapes)
    log.info(
        f"{config.stage}: {count(total)} parameters, {prepared.steps:,} steps, {world.size} x {device_name(world.device)}\n"
        + "paths: "
        + ", ".join(f"{name} {path}" for name, path in prepared.backends.items())
    )
    if prepared.adapters is not None:
        log.info(prepared.adapters.describe(total))
    if prepared.fp8 is not None:
        log.info(prepared.fp8.describe())
    if prepared.exam is not None:
        log.info(prepared.exam.describe())


def _export(config: Config, prepared: Prepared, policy: PolicyModel, world: World, folder: RunFolder, *, trained: bool) -> None:
    """Write the run's results; where this start ``trained`` nothing, those that are missing."""
    # Rank 0 decides for all, so that ranks do not part.
    missing = folder.results(config) if trained else world.from_main(lambda: folder.missing_results(config))
    if folder.adapter in missing:
        export_adapters(policy, prepared.adapters, folder.adapter, world, base=config.model.path)
    if folder.model in missing:
        dtype = export_dtype(config, prepared.compute_dtype)
        # As it was at the start, whatever its folder holds by now.
        tokenizer = load_tokenizer(folder.kept(config.model))
        export_model(policy, tokenizer, folder.model, world, dtype=dtype, source=folder.base, adapters=prepared.adapters)


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
