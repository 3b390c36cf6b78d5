"""What stands before the first step: settings, tokenizer, weights' headers and data, read and checked, then the model built.

Every mistake of the user's shows in :func:`prepare`, before anything is written; :func:`check` is that alone.
"""

from __future__ import annotations

import itertools
import json
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
from medtrain.trainer.config.settings import Config
from medtrain.trainer.data.chat import fix_time
from medtrain.trainer.distributed import World, join_world
from medtrain.trainer.errors import bad_input
from medtrain.trainer.exam.during import Exam, read_exam
from medtrain.trainer.libraries import quiet_libraries
from medtrain.trainer.model.attention import select_backend
from medtrain.trainer.model.flops import num_parameters
from medtrain.trainer.model.liger import select_layers
from medtrain.trainer.model.lora import Adapters, adapter_digest, fill_adapters, plan_adapters, rehearse_adapters, start_digest
from medtrain.trainer.model.policy import PolicyModel, build_model, load_model_config, load_tokenizer, parameter_shapes
from medtrain.trainer.model.precision import Fp8, plan_fp8
from medtrain.trainer.model.verify import prove_architecture
from medtrain.trainer.run.console import console_logging, count
from medtrain.trainer.run.export import export_dtype
from medtrain.trainer.run.folder import RunFolder, device_name
from medtrain.trainer.train.objectives import Cpt, Objective, Rpo
from medtrain.trainer.train.optimizer import check_state, make_optimizer
from medtrain.trainer.train.samples import decoded_samples
from medtrain.trainer.weights.load import Checkpoint, digest_of_init, init_weights, load_weights
from medtrain.trainer.weights.small_files import rehearse
from medtrain.trainer.weights.verify import describe, prove

log = logging.getLogger(__name__)


if TYPE_CHECKING:  # torchao comes with it, for those who ask for it
    from medtrain.trainer.model.fp8 import Guard


@dataclass(frozen=True)
class Prepared:
    """Everything read and checked, nothing yet written. ``first_start``: what the chat template has for now."""

    tokenizer: Any
    hf_config: Any
    shapes: dict[str, tuple[int, ...]]
    checkpoint: Checkpoint | None
    adapters: Adapters | None
    objective: Objective
    exam: Exam | None
    steps: int
    compute_dtype: torch.dtype
    fp8: Fp8 | None
    paths: dict[str, str]
    architecture: dict[str, Any] | None  # its proof; None where none was asked for
    first_start: datetime


def prepare(config: Config, world: World, *, verify: bool = False) -> Prepared:
    """Read and check settings, tokenizer, weights' headers and data; writes nothing but the token cache. ``verify``: all
    of the raw input and of the token cache is read, also where sizes and times say that nothing has changed."""
    for name in config.unused():
        log.info(f"note: {name} has no effect here")
    if world.size == 1:
        for name in sorted(config.given & {"parallel.reshard_after_forward", "parallel.prefetch"}):
            log.info(f"note: {name} has no effect on one rank")
    compute_dtype = compute_dtype_of(config)
    folder, model = RunFolder(config.run.out), config.model
    # Of all ranks: a folder may be on some nodes alone, and what follows is for all ranks to do alike.
    missing = world.gather([p for p in (model.path, model.tokenizer) if p is not None and not os.path.exists(p)])
    gone = list(dict.fromkeys(itertools.chain.from_iterable(missing)))
    if gone and (kept := world.from_main(lambda: folder.kept(model))) != model:
        log.info(f"note: {gone[0]} is gone; config and tokenizer are those kept in {folder.base}")
        model = kept
    tokenizer = load_tokenizer(model)
    hf_config = load_model_config(model, tokenizer)
    shapes = parameter_shapes(hf_config)
    has_files = config.model.path is not None and (model == config.model or config.model.path not in gone)
    checkpoint = Checkpoint(config.model.path) if has_files else None
    if checkpoint is not None:
        world.from_main(lambda: checkpoint.check(shapes, tied=hf_config.tie_word_embeddings))
    adapters = plan_adapters(config.lora, shapes)
    dtype = export_dtype(config, compute_dtype)
    if not world.from_main(lambda: rehearse(hf_config, tokenizer, dtype=dtype, source=model.path)):
        log.info(
            f"note: transformers' AutoTokenizer makes other tokens of this tokenizer.json in a {hf_config.model_type} "
            "folder: read what is exported with PreTrainedTokenizerFast"
        )
    if adapters is not None:
        world.from_main(lambda: rehearse_adapters(adapters, config.model.path))
    fp8 = plan_fp8(config.precision, shapes, world.device, compute_dtype)
    check_state(config.optim.state, shapes)
    if config.precision.weights == "bf16" and compute_dtype != torch.bfloat16:
        raise bad_input(
            "weights in bfloat16 are computed with as they are",
            field="precision.weights",
            found="bf16",
            expected="precision.compute=bfloat16",
        )
    limit = hf_config.max_position_embeddings
    name = "seq_len" if config.stage == "cpt" else "max_length"
    if getattr(config.data, name) > limit:
        raise bad_input(
            "longer than the model's positions",
            field=f"data.{name}",
            found=getattr(config.data, name),
            expected=f"at most max_position_embeddings, {limit}",
        )
    architecture = None
    if config.model.proof != "none":
        where = {"field": "model.init"} if config.model.path is None else {"file": Path(config.model.path) / "config.json"}
        architecture = world.from_main(lambda: prove_architecture(hf_config, getattr(config.data, name), where))
    first_start = world.from_main(RunFolder(config.run.out).first_start)
    renderer = fix_time(tokenizer, first_start)
    exam = world.from_main(lambda: read_exam(config, renderer, hf_config))
    if renderer is not tokenizer and (config.stage == "rpo" or (exam is not None and exam.style.chat)):
        log.info(f"the chat template writes a date: {first_start:%Y-%m-%d}, that of the run's first start")
    if config.stage == "cpt":
        objective: Objective = Cpt(config, tokenizer, world, verify=verify)
    else:
        objective = Rpo(config, renderer, world)
    if exam is not None:
        objective.digests["data.exam"] = exam.digest
    if checkpoint is not None:
        digest = world.from_main(checkpoint.digest)
    elif config.model.init is not None:
        digest = digest_of_init(config.model.init | {"vocab_size": hf_config.vocab_size}, config.run.seed)
    else:  # gone; below, what is not finished is refused
        digest = world.from_main(lambda: json.loads(folder.manifest.read_text(encoding="utf-8"))["digests"]["weights"])
    objective.digests |= {"weights": digest, "precision": str(compute_dtype).removeprefix("torch.")}
    trained = world.from_main(lambda: adapter_digest(adapters))
    if trained is not None:
        objective.digests["lora.path"] = trained
    objective.start_digest = start_digest(digest, adapters, trained)
    steps = config.optim.steps
    if steps is None:
        steps = max(1, math.ceil(config.optim.epochs * objective.epoch_size / objective.step_size))
    if config.optim.warmup_steps >= steps:
        raise bad_input(
            "no step is left after the warm-up",
            field="optim.warmup_steps",
            found=config.optim.warmup_steps,
            expected=f"below the {steps} steps",
        )
    if not has_files and config.model.path is not None and not world.from_main(lambda: folder.finished(config, steps)):
        raise bad_input(
            "the weights the run began with are gone",
            field="model.path",
            found=config.model.path,
            expected="where they are now" + ("" if config.lora.on else "; medtrain export does without"),
        )
    paths = {
        "attention": select_backend(world.device, compute_dtype, config.model.compile),
        "layers": select_layers(config.model, hf_config, world.device),
        "head": select_path(torch.empty(0, 1, dtype=compute_dtype, device=world.device)),
        "compute": str(compute_dtype).removeprefix("torch."),
    }
    return Prepared(
        tokenizer,
        hf_config,
        shapes,
        checkpoint,
        adapters,
        objective,
        exam,
        steps,
        compute_dtype,
        fp8,
        paths,
        architecture,
        first_start,
    )


def start(
    config: Config, prepared: Prepared, world: World, reference: Path, *, prove_it: bool
) -> tuple[PolicyModel, torch.optim.Optimizer, Guard | None, dict | None]:
    """The policy with its starting weights, what its objective must know of them (kept under ``reference``), the
    optimizer, the guard of an FP8 run, and the proof of what was loaded where there is one: what stands before step 0."""
    torch.manual_seed(config.run.seed)
    reset_clamped_rows()
    torch.use_deterministic_algorithms(config.run.deterministic and world.device.type == "cuda")
    policy = build_model(
        config.model,
        prepared.hf_config,
        world,
        prepared.compute_dtype,
        backend=prepared.paths["attention"],
        layers=prepared.paths["layers"],
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
    guard = None
    if prepared.fp8 is not None:
        from medtrain.trainer.model.fp8 import Guard  # torchao, for those who ask for it

        guard = Guard(config.precision, policy, world)
    proof = None if prepared.architecture is None else {"architecture": prepared.architecture}
    with guard.without_fp8() if guard is not None else nullcontext():  # the reference is of the model that is exported
        if proof is not None:
            if prove_it and prepared.checkpoint is not None:
                proof |= prove(policy, prepared.checkpoint, prepared.adapters, world, forward=config.model.proof == "auto")
            log.info(describe(proof))
        prepared.objective.prepare(policy, world, reference)
    return policy, make_optimizer(policy, config), guard, proof


def check(config: Config, samples: int = 0) -> str:
    """Everything a run does before its folder is touched; returns a summary to print, and the run's first ``samples``
    windows or pairs, decoded.

    Raises:
        InputError: whatever ``train`` would raise.
    """
    quiet_libraries()
    # Copies of the model are left out: what many ranks will train is often checked on one.
    with join_world() as world, console_logging(enabled=world.is_main):
        prepared = prepare(config, world, verify=True)
        RunFolder(config.run.out).check(config.settings(), prepared.objective.digests)
        hf_config = prepared.hf_config
        total, _ = num_parameters(prepared.shapes)
        ledger = prepared.objective.ledger["total"]
        lines = [
            f"stage:  {config.stage}, {prepared.steps:,} steps",
            f"model:  {hf_config.model_type}, {count(total)} parameters, vocabulary {hf_config.vocab_size:,}",
            f"data:   {ledger['kept']['rows']:,} rows kept, {ledger['refused']['rows']:,} refused, "
            f"{ledger['cut']['tokens']:,} tokens cut",
            f"device: {world.size} x {device_name(world.device)}",
            "paths:  " + ", ".join(f"{name} {path}" for name, path in prepared.paths.items()),
            "nothing is wrong",
        ]
        if prepared.architecture is not None:
            lines.insert(-1, describe({"architecture": prepared.architecture}).replace("proof:", "proof: "))
        if prepared.fp8 is not None:
            lines.insert(2, "fp8:    " + prepared.fp8.describe())
        if prepared.adapters is not None:
            lines.insert(2, "lora:   " + prepared.adapters.describe(total))
        if prepared.exam is not None:
            lines.insert(-1, prepared.exam.describe().replace("exam:", "exam:  "))
        if samples:
            lines += ["", decoded_samples(prepared.objective, prepared.tokenizer, samples)]
        return "\n".join(lines)


def compute_dtype_of(config: Config) -> torch.dtype:
    choice = config.precision.compute
    if choice == "auto":
        choice = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, choice)
