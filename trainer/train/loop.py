"""The one training loop, for both stages, alone and on many ranks.

Reads from top to bottom as a run does: what was read and checked (``setup.py``) -> run folder -> model, weights -> last
checkpoint, if any -> steps -> export. Each step is a pure function of (weights, optimizer state, step number), so a run
started again goes on as if it had never stopped.
"""

from __future__ import annotations

import logging
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medtrain.trainer.config.settings import Config
from medtrain.trainer.data.chat import fix_time, now
from medtrain.trainer.distributed import World, join_world
from medtrain.trainer.errors import bad_input
from medtrain.trainer.exam.during import sit_exam
from medtrain.trainer.files import PARTIAL, replace_folder, write_json
from medtrain.trainer.libraries import quiet_libraries
from medtrain.trainer.model.flops import FlopsPerToken, num_parameters, peak_flops
from medtrain.trainer.model.lora import export_adapters
from medtrain.trainer.model.policy import load_tokenizer
from medtrain.trainer.run.console import Display, console_logging, count, evaluation_lines, summary
from medtrain.trainer.run.export import export_dtype
from medtrain.trainer.run.folder import RunFolder, commit, device_name, last_step, versions
from medtrain.trainer.run.report import LiveReport
from medtrain.trainer.train.schedule import lr_factor
from medtrain.trainer.train.setup import Prepared, compute_dtype_of, prepare, start
from medtrain.trainer.train.step import optimizer_step
from medtrain.trainer.weights.checkpoint import Saver, load_checkpoint
from medtrain.trainer.weights.load import export_model
from medtrain.trainer.weights.small_files import write_small_files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """``model_dir``: the exported HF folder (``lora.merge`` false: the PEFT folder); ``metrics``: what
    metrics.jsonl holds of the last step; ``interrupted``: stopped by a signal after saving, with no export."""

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
    compute_dtype = compute_dtype_of(config)
    needs_group = compute_dtype != torch.float32 or config.precision.fp8_all_gather
    with join_world(needs_group=needs_group, replicate=config.parallel.replicate) as world:
        with console_logging(enabled=world.is_main and not quiet) as display:
            return _run(config, prepare(config, world), world, display)


def _run(config: Config, prepared: Prepared, world: World, display: Display) -> TrainResult:
    objective, steps = prepared.objective, prepared.steps
    folder = RunFolder(config.run.out)

    def look() -> tuple[tuple[int, Path] | None, bool]:
        folder.check(config.settings(), objective.digests)
        return folder.last_checkpoint(), folder.finished(config, steps)

    last, complete = world.from_main(look)
    if complete:
        if world.is_main:
            log.info(summary(folder, config, 0, 0.0))
        return TrainResult(folder.root, folder.results(config)[-1], last_step(folder.rows()))
    if world.is_main:
        _start_folder(folder, config, prepared, world, 0 if last is None else last[0])
    _check_shared(folder, world)

    total, multiplied = num_parameters(prepared.shapes)
    log.info(
        f"{config.stage}: {count(total)} parameters, {steps:,} steps, {world.size} x {device_name(world.device)}\n"
        + "paths: "
        + ", ".join(f"{name} {path}" for name, path in prepared.paths.items())
    )
    adapters = prepared.adapters
    if adapters is not None:
        log.info(adapters.describe(total))
    if prepared.fp8 is not None:
        log.info(prepared.fp8.describe())
    if prepared.exam is not None:
        log.info(prepared.exam.describe())
    # Weights that a checkpoint does not hold come from the files at every start.
    prove_it = last is None or adapters is not None
    policy, optimizer, guard, proof = start(config, prepared, world, folder.reference, prove_it=prove_it)
    if proof is not None and world.is_main:
        folder.add_to_start({"proof": proof})
    # Held-out numbers are those of the model that is exported.
    exactly = guard.without_fp8 if guard is not None else nullcontext

    state = {"tokens_total": 0, "pairs_total": 0}
    done = 0
    if last is not None:
        loaded = load_checkpoint(last[1], policy, optimizer, world)
        state, done = {key: loaded[key] for key in state}, loaded["step"]
        log.info(f"going on from {last[1].name} of {steps:,} steps")
    if world.is_main:
        folder.cut_metrics(done if last is not None else -1)
    board = _Tensorboard(folder, done) if world.is_main else None
    earlier = folder.rows() if world.is_main and last is not None else []
    for row in earlier:
        objective.watch(row)
    last_row = world.from_main(lambda: last_step(earlier))
    renderer = fix_time(prepared.tokenizer, prepared.first_start)
    report = LiveReport(folder.root, enabled=world.is_main)

    def record(row: dict[str, Any]) -> None:
        nonlocal last_row
        last_row = last_step([last_row, row])
        if world.is_main:
            folder.append_metrics(row)
            board.write(row)
            if warning := objective.watch(row):
                log.info(warning)

    def evaluate(step: int) -> None:
        """Compute and record what is due at this step of the held-out numbers and the exam."""

        def due(every: int) -> bool:
            return step in (0, steps) or bool(every and step % every == 0)

        found: dict[str, Any] = {}
        with exactly():
            if objective.heldout and due(config.eval.every):
                found |= objective.evaluate(policy, world)
            if prepared.exam is not None and due(config.eval.exam_every):
                found |= sit_exam(policy, renderer, prepared.exam, world, folder.exam(step), folder.base)
        if found:
            row = {"step": step} | found
            record(row)
            for line in evaluation_lines(row, folder.exam(step)):
                log.info(line)
            report.refresh()

    owed = last_row.get("step") != done or not any(key.startswith(("heldout/", "exam/")) for key in last_row)
    flops = FlopsPerToken(prepared.hf_config, multiplied, adapters)
    peak = peak_flops(world.device) if prepared.compute_dtype == torch.bfloat16 else None
    began, spent = time.monotonic(), 0.0
    saver = Saver(folder.checkpoints, world, keep=config.checkpoint.keep, background=config.checkpoint.async_save)
    display.start(done, steps)
    try:
        if owed:  # before the first step, or where a run was stopped after a checkpoint and before what was due then
            evaluate(done)
        with _stop_signal() as stop:
            for step in range(done, steps):
                started = time.perf_counter()
                lr = config.optim.lr * lr_factor(config.optim, step, steps)
                this = optimizer_step(
                    policy,
                    objective,
                    optimizer,
                    step,
                    world,
                    lr=lr,
                    grad_clip=config.optim.grad_clip,
                    guard=guard,
                    asked=lambda: stop.asked or saver.failed,
                    advice=f"the last checkpoint stands in {folder.checkpoints}",
                )
                n = this.denominators
                state["tokens_total"] += n.tokens
                state["pairs_total"] += n.pairs
                seconds = time.perf_counter() - started
                work = flops(n.inputs.computed, this.squared_lengths)
                row = {
                    "step": step + 1,
                    **this.metrics,
                    "lr": lr,
                    "tokens": n.tokens,
                    "tokens_total": state["tokens_total"],
                    "seconds": seconds,
                    **n.inputs.metrics(),
                    "tokens_per_second": n.inputs.computed / seconds,
                    "mfu": work / seconds / (peak * world.size) if peak else None,
                    "max_memory_gib": _max_memory_gib(world.device),
                }
                stopping = this.asked and step + 1 < steps
                save_now = this.asked or (step + 1) % config.checkpoint.every == 0 or step + 1 == steps
                if save_now:
                    row["checkpoint_seconds"] = saver.begin(step + 1, policy, optimizer, state)
                record(row)
                spent += seconds
                display.step(step + 1, steps, row, (steps - step - 1) * spent / (step + 1 - done))
                if save_now:
                    if world.is_main:
                        folder.sync_metrics()  # a checkpoint says that the rows up to its step are there
                    saver.commit()
                    report.refresh()
                if stopping:
                    saver.finish()
                    log.info(f"stopped by a signal after step {step + 1}; the same command goes on from here")
                    report.write("by a signal; the same command goes on from here")
                    return TrainResult(folder.root, folder.results(config)[-1], last_row, interrupted=True)
                # After the checkpoint, which an exam that fails must not take with it.
                evaluate(step + 1)
        saver.finish()
    except RuntimeError as error:
        report.write(str(error))
        raise
    finally:
        display.stop()
        saver.close()
        if board is not None:
            board.close()

    # Rank 0 looks for all, lest ranks take different ways.
    missing = folder.results(config) if done < steps else world.from_main(lambda: folder.missing_results(config))
    if folder.adapter in missing:
        export_adapters(policy, adapters, folder.adapter, world, base=config.model.path)
    if folder.model in missing:
        dtype = export_dtype(config, prepared.compute_dtype)
        # As it was at the start, whatever its folder holds by now.
        tokenizer = load_tokenizer(folder.kept(config.model))
        export_model(policy, tokenizer, folder.model, world, dtype=dtype, source=folder.base, adapters=adapters)
    report.write()
    if world.is_main:
        log.info(summary(folder, config, steps - done, time.monotonic() - began))
    return TrainResult(folder.root, folder.results(config)[-1], last_row)


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
        "paths": prepared.paths,
    }
    total, _ = num_parameters(prepared.shapes)
    trained = prepared.adapters.num_parameters if prepared.adapters else 0
    folder.write_manifest(
        {
            "stage": config.stage,
            "settings": config.settings(),
            "steps": prepared.steps,
            "digests": prepared.objective.digests,
            "parameters": {"all": total + trained, "trained": trained or total},
            "adapters": None if prepared.adapters is None else prepared.adapters.about(),
            "fp8": None if prepared.fp8 is None else prepared.fp8.about(),
            # One entry each time the run was started, so that a curve can be traced to what computed it.
            "starts": [*earlier, start],
        }
    )
    write_json(folder.ledger, prepared.objective.ledger)
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


def _max_memory_gib(device: torch.device) -> float:
    """Peak so far: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class _Tensorboard:
    """metrics.jsonl's numbers again, for those who watch with TensorBoard."""

    def __init__(self, folder: RunFolder, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder.tensorboard, purge_step=done + 1 if done else 0)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _Stop:
    asked = False


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """SIGTERM and SIGUSR1 (what schedulers send before the end) ask for a checkpoint and a clean end after this step."""
    stop = _Stop()
    old = {}

    def ask(*_: object) -> None:
        stop.asked = True

    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            old[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread: the embedding program handles signals
        pass
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
