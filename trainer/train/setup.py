"""What stands before the first step: settings, tokenizer, weights' headers and data, read and checked, then the model built.

Every mistake of the user's shows in :func:`prepare`, before anything is written; :func:`check` is that alone.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medtrain.kernels.logps import reset_clamped_rows, select_path
from medtrain.trainer.config.settings import Config, ModelConfig
from medtrain.trainer.data.chat import fix_time
from medtrain.trainer.distributed import World, join_world
from medtrain.trainer.errors import bad_input
from medtrain.trainer.exam.during import read_training_exam
from medtrain.trainer.exam.prepare import Exam
from medtrain.trainer.libraries import quiet_libraries
from medtrain.trainer.model.attention import select_backend
from medtrain.trainer.model.flops import num_parameters
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer, parameter_shapes
from medtrain.trainer.model.liger import select_layers
from medtrain.trainer.model.lora import Adapters, plan_adapters
from medtrain.trainer.model.policy import PolicyModel, build_model
from medtrain.trainer.model.precision import Fp8, plan_fp8
from medtrain.trainer.model.verify import verify_architecture
from medtrain.trainer.run.console import console_logging, count
from medtrain.trainer.run.export import export_dtype
from medtrain.trainer.run.folder import RunFolder, device_name
from medtrain.trainer.train import cpt, rpo
from medtrain.trainer.train.optimizer import check_state, make_optimizer
from medtrain.trainer.train.samples import decoded_samples
from medtrain.trainer.train.stage import RunIdentity, StageData, StageLoss
from medtrain.trainer.weights.adapters import adapter_digest, fill_adapters, start_digest
from medtrain.trainer.weights.load import Checkpoint, digest_of_init, init_weights, load_weights
from medtrain.trainer.weights.small_files import rehearse
from medtrain.trainer.weights.verify import describe, verify_weights

if TYPE_CHECKING:  # torchao comes with it, for those who ask for it
    from medtrain.trainer.model.fp8 import Guard

log = logging.getLogger(__name__)

STAGES = {"cpt": cpt, "rpo": rpo}  # each with read_data and make_loss, see stage.py


@dataclass(frozen=True)
class Prepared:
    """Everything read and checked, nothing yet written.

    Attributes:
        checkpoint: the files of the starting weights; None for random ones, and where they are gone and no longer needed.
        architecture: what its verification found; None without one.
        first_start: what the chat template has for now.
    """

    tokenizer: Any
    hf_config: Any
    shapes: dict[str, tuple[int, ...]]
    checkpoint: Checkpoint | None
    adapters: Adapters | None
    data: StageData
    exam: Exam | None
    identity: RunIdentity
    steps: int
    compute_dtype: torch.dtype
    fp8: Fp8 | None
    backends: dict[str, str]
    architecture: dict[str, Any] | None
    first_start: datetime


@dataclass(frozen=True)
class Built:
    """The policy with its starting weights, and what trains it. ``guard``: of an FP8 run; ``verification``: what the
    comparison with the files and with Hugging Face's model found, None without one."""

    policy: PolicyModel
    loss: StageLoss
    optimizer: torch.optim.Optimizer
    guard: Guard | None
    verification: dict[str, Any] | None


def prepare(config: Config, world: World) -> Prepared:
    """Read and check settings, tokenizer, weights' headers and data; writes nothing but the token cache. Collective.

    Raises:
        InputError: a mistake of the user's.
    """
    _log_settings_without_effect(config, world)
    compute_dtype = compute_dtype_of(config)
    folder = RunFolder(config.run.out)
    model, gone = _find_model(config, folder, world)
    tokenizer = load_tokenizer(model)
    hf_config = load_model_config(model, tokenizer)
    shapes = parameter_shapes(hf_config)
    path = config.model.path
    checkpoint = Checkpoint(path) if path is not None and (model == config.model or path not in gone) else None
    if checkpoint is not None:
        world.from_main(lambda: checkpoint.check(shapes, tied=hf_config.tie_word_embeddings))
    adapters = plan_adapters(config.lora, shapes)
    _rehearse_export(config, tokenizer, hf_config, compute_dtype, model, world)
    fp8 = plan_fp8(config.precision, shapes, world.device, compute_dtype)
    check_state(config.optim.state, shapes)
    if config.precision.weights == "bf16" and compute_dtype != torch.bfloat16:
        raise bad_input(
            "weights in bfloat16 are computed with as they are",
            field="precision.weights",
            found="bf16",
            expected="precision.compute=bfloat16",
        )
    length = _check_positions(config, hf_config)
    architecture = None
    if config.model.proof != "none":
        where = {"field": "model.init"} if path is None else {"file": Path(path) / "config.json"}
        architecture = world.from_main(lambda: verify_architecture(hf_config, length, where))
    first_start = world.from_main(folder.first_start)
    renderer = fix_time(tokenizer, first_start)
    exam = world.from_main(lambda: read_training_exam(config, renderer, hf_config))
    if renderer is not tokenizer and (config.stage == "rpo" or (exam is not None and exam.style.chat)):
        log.info(f"the chat template writes a date: {first_start:%Y-%m-%d}, that of the run's first start")
    data = STAGES[config.stage].read_data(config, renderer, world)
    identity = _identify(config, data, exam, checkpoint, adapters, hf_config, compute_dtype, folder, world)
    steps = config.optim.steps
    if steps is None:
        steps = max(1, math.ceil(config.optim.epochs * data.epoch_size / data.step_size))
    if config.optim.warmup_steps >= steps:
        raise bad_input(
            "no step is left after the warm-up",
            field="optim.warmup_steps",
            found=config.optim.warmup_steps,
            expected=f"below the {steps} steps",
        )
    if checkpoint is None and path is not None and not world.from_main(lambda: folder.finished(config, steps)):
        raise bad_input(
            "the weights the run began with are gone",
            field="model.path",
            found=path,
            expected="where they are now" + ("" if config.lora.on else "; medtrain export does without"),
        )
    return Prepared(
        tokenizer=tokenizer,
        hf_config=hf_config,
        shapes=shapes,
        checkpoint=checkpoint,
        adapters=adapters,
        data=data,
        exam=exam,
        identity=identity,
        steps=steps,
        compute_dtype=compute_dtype,
        fp8=fp8,
        backends={
            "attention": select_backend(world.device, compute_dtype, config.model.compile),
            "layers": select_layers(config.model, hf_config, world.device),
            "head": select_path(torch.empty(0, 1, dtype=compute_dtype, device=world.device)),
            "compute": str(compute_dtype).removeprefix("torch."),
        },
        architecture=architecture,
        first_start=first_start,
    )


def build(config: Config, prepared: Prepared, world: World, reference: Path, *, verify: bool) -> Built:
    """Build the policy with its starting weights, the loss, and the optimizer.

    Args:
        reference: a folder for what the loss must know of the starting weights.
        verify: compare the weights with their files, and the forward with Hugging Face's.
    """
    torch.manual_seed(config.run.seed)
    reset_clamped_rows()
    torch.use_deterministic_algorithms(config.run.deterministic and world.device.type == "cuda")
    policy = build_model(
        config.model,
        prepared.hf_config,
        world,
        prepared.compute_dtype,
        backend=prepared.backends["attention"],
        layers=prepared.backends["layers"],
        adapters=prepared.adapters,
        fp8=prepared.fp8,
        weights_dtype=torch.bfloat16 if config.precision.weights == "bf16" else torch.float32,
        parallel=config.parallel,
    )
    if prepared.checkpoint is not None:
        load_weights(policy, prepared.checkpoint)
    else:
        init_weights(policy, config.run.seed)
    if prepared.adapters is not None:
        fill_adapters(policy, prepared.adapters, config.run.seed)
    world.raise_if_stopping()
    guard = None
    if prepared.fp8 is not None:
        from medtrain.trainer.model.fp8 import Guard  # torchao, for those who ask for it

        guard = Guard(config.precision, policy, world)
    verification = None if prepared.architecture is None else {"architecture": prepared.architecture}
    with guard.without_fp8() if guard is not None else nullcontext():  # the reference is of the model that is exported
        if verification is not None:
            if verify and prepared.checkpoint is not None:
                forward = config.model.proof == "auto"
                verification |= verify_weights(policy, prepared.checkpoint, prepared.adapters, world, forward=forward)
            log.info(describe(verification))
        loss = STAGES[config.stage].make_loss(config, prepared.data, policy, world, prepared.identity, reference)
    return Built(policy, loss, make_optimizer(policy, config), guard, verification)


def check(config: Config, samples: int = 0) -> str:
    """Everything a run does before its folder is touched; returns a summary to print, and the run's first ``samples``
    windows or pairs, decoded.

    Raises:
        InputError: whatever ``train`` would raise.
    """
    quiet_libraries()
    # Copies of the model are left out: what many ranks will train is often checked on one.
    with join_world() as world, console_logging(enabled=world.is_main):
        prepared = prepare(config, world)
        RunFolder(config.run.out).check(config.settings(), dict(prepared.identity.digests))
        hf_config = prepared.hf_config
        total, _ = num_parameters(prepared.shapes)
        ledger = prepared.data.ledger["total"]
        lines = [
            f"stage:  {config.stage}, {prepared.steps:,} steps",
            f"model:  {hf_config.model_type}, {count(total)} parameters, vocabulary {hf_config.vocab_size:,}",
        ]
        if prepared.adapters is not None:
            lines.append("lora:   " + prepared.adapters.describe(total))
        if prepared.fp8 is not None:
            lines.append("fp8:    " + prepared.fp8.describe())
        lines += [
            f"data:   {ledger['kept']['rows']:,} rows kept, {ledger['refused']['rows']:,} refused, "
            f"{ledger['cut']['tokens']:,} tokens cut",
            f"device: {world.size} x {device_name(world.device)}",
            "paths:  " + ", ".join(f"{name} {path}" for name, path in prepared.backends.items()),
        ]
        if prepared.architecture is not None:
            lines.append(describe({"architecture": prepared.architecture}).replace("proof:", "proof: "))
        if prepared.exam is not None:
            lines.append(prepared.exam.describe().replace("exam:", "exam:  "))
        lines.append("OK")
        if samples:
            lines += ["", decoded_samples(prepared.data, prepared.tokenizer, samples)]
        return "\n".join(lines)


def compute_dtype_of(config: Config) -> torch.dtype:
    choice = config.precision.compute
    if choice == "auto":
        choice = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, choice)


def _log_settings_without_effect(config: Config, world: World) -> None:
    for name in config.unused():
        log.info(f"note: {name} has no effect here")
    if world.size == 1:
        for name in sorted(config.given & {"parallel.reshard_after_forward", "parallel.prefetch"}):
            log.info(f"note: {name} has no effect on one rank")


def _find_model(config: Config, folder: RunFolder, world: World) -> tuple[ModelConfig, list[str]]:
    """(where config and tokenizer are read from, folders named by the settings that are gone on any rank)."""
    model = config.model
    # Of all ranks: a folder may be on some nodes alone, and what follows is for all ranks to do alike.
    missing = world.gather([p for p in (model.path, model.tokenizer) if p is not None and not os.path.exists(p)])
    gone = list(dict.fromkeys(itertools.chain.from_iterable(missing)))
    if gone and (kept := world.from_main(lambda: folder.kept(config.model))) != model:
        log.info(f"note: {gone[0]} is gone; config and tokenizer are those kept in {folder.base}")
        model = kept
    return model, gone


def _rehearse_export(config: Config, tokenizer, hf_config, compute_dtype: torch.dtype, model: ModelConfig, world: World) -> None:
    """Write and read back what the export will hold besides weights, so that it fails now or not at all."""
    dtype = export_dtype(config, compute_dtype)
    if not world.from_main(lambda: rehearse(hf_config, tokenizer, dtype=dtype, source=model.path)):
        log.info(
            f"note: transformers' AutoTokenizer makes other tokens of this tokenizer.json in a {hf_config.model_type} "
            "folder: read what is exported with PreTrainedTokenizerFast"
        )


def _check_positions(config: Config, hf_config) -> int:
    """The longest sequence of the run, in tokens, which the model must have positions for."""
    name = "seq_len" if config.stage == "cpt" else "max_length"
    length, limit = getattr(config.data, name), hf_config.max_position_embeddings
    if length > limit:
        raise bad_input(
            "longer than the model's positions",
            field=f"data.{name}",
            found=length,
            expected=f"at most max_position_embeddings, {limit}",
        )
    return length


def _identify(
    config: Config,
    data: StageData,
    exam: Exam | None,
    checkpoint: Checkpoint | None,
    adapters: Adapters | None,
    hf_config,
    compute_dtype: torch.dtype,
    folder: RunFolder,
    world: World,
) -> RunIdentity:
    digests = dict(data.digests)
    if exam is not None:
        digests["data.exam"] = exam.digest
    if checkpoint is not None:
        weights = world.from_main(checkpoint.digest)
    elif config.model.init is not None:
        weights = digest_of_init(config.model.init | {"vocab_size": hf_config.vocab_size}, config.run.seed)
    else:  # the files are gone: a finished run needs them no more, any other is refused
        weights = world.from_main(lambda: (folder.read_manifest() or {"digests": {"weights": ""}})["digests"]["weights"])
    digests |= {"weights": weights, "precision": str(compute_dtype).removeprefix("torch.")}
    trained = world.from_main(lambda: adapter_digest(adapters))
    if trained is not None:
        digests["lora.path"] = trained
    return RunIdentity(digests, start_digest(weights, adapters, trained), adapters_are_new=trained is None)
