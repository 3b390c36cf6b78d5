"""What settings must hold beyond their types: ranges, and settings that contradict each other or would have no effect."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.kernels.losses import LOSSES
from medtrain.trainer.errors import bad_input

if TYPE_CHECKING:
    from medtrain.trainer.config.settings import Config

# (what a number must be, test, settings); a setting that is None has no number to test.
_RANGES = (
    (
        "1 or more",
        lambda value: value >= 1,
        "optim.steps optim.batch_tokens optim.batch_pairs optim.micro_batch_tokens optim.decay_steps data.workers "
        "eval.exam_questions eval.exam_max_new_tokens eval.exam_max_answer_tokens checkpoint.every checkpoint.keep "
        "parallel.replicate",
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        "model.keep_bytes optim.warmup_steps optim.weight_decay optim.grad_clip rpo.alpha lora.rank eval.every eval.exam_every "
        "precision.fp8_check_every parallel.prefetch run.seed",
    ),
    (
        "more than 0",
        lambda value: 0 < value < math.inf,
        "optim.epochs optim.lr optim.eps rpo.beta lora.alpha precision.fp8_tolerance",
    ),
    ("0 to 1", lambda value: 0 <= value <= 1, "optim.min_lr_ratio model.activation_budget"),
    ("0 to below 1", lambda value: 0 <= value < 1, "optim.beta1 optim.beta2"),
    ("0 to below 0.5", lambda value: 0 <= value < 0.5, "rpo.label_smoothing"),
    ("2 or more", lambda value: value >= 2, "data.seq_len"),
    ("3 or more", lambda value: value >= 3, "data.max_length"),
)


def check_settings(config: Config, file: str | Path | None) -> None:
    """Raise InputError at the first setting that cannot be meant."""
    for expected, holds, names in _RANGES:
        for name in names.split():
            value = attrgetter(name)(config)
            if value is not None and not holds(value):
                raise bad_input("out of range", file=file, field=name, found=value, expected=expected)
    for rules in (_required, _contradictions, _without_effect):
        for broken, name, value, problem, expected in rules(config):
            if broken:
                raise bad_input(problem, file=file, field=name, found=value, expected=expected)


Rule = tuple[bool, str, Any, str, str]  # (whether it is broken, setting, what was found, problem, what was expected)


def _required(config: Config) -> Iterator[Rule]:
    model, optim, data = config.model, config.optim, config.data
    number = "neither" if model.path is None else "both"
    weights = "model.path, a checkpoint folder, or model.init, sizes for random weights"
    yield (model.path is None) == (model.init is None), "model", number, "set exactly one of model.path and model.init", weights
    init = model.init or {"model_type": ""}
    yield "model_type" not in init, "model.init.model_type", None, "missing", "as in a HF config, e.g. qwen2"
    needs_tokenizer = model.init is not None and model.tokenizer is None
    yield needs_tokenizer, "model.tokenizer", None, "missing", "a folder, since model.init has none"
    yield config.rpo.loss not in LOSSES, "rpo.loss", config.rpo.loss, "not a known choice", " | ".join(LOSSES)
    name = "sources" if config.stage == "cpt" else "pairs"
    rows = f"a list of {{path, weight, name}} for {config.stage}"
    yield not getattr(data, name), f"data.{name}", None, "missing", rows
    yield not config.run.out, "run.out", None, "missing", "the run folder"
    number = "neither" if optim.steps is None else "both"
    both = (optim.steps is None) == (optim.epochs is None)
    yield both, "optim", number, "set exactly one of optim.steps and optim.epochs", "one of them"
    if optim.schedule == "wsd" and optim.steps is not None and optim.decay_steps is not None:
        too_long = optim.warmup_steps + optim.decay_steps > optim.steps
        yield too_long, "optim.decay_steps", optim.decay_steps, "out of range", "warm-up and decay within optim.steps"


def _contradictions(config: Config) -> Iterator[Rule]:
    model, precision, lora, parallel = config.model, config.precision, config.lora, config.parallel
    gather = precision.fp8_all_gather
    yield (
        gather and precision.fp8 != "tensorwise",
        "precision.fp8_all_gather",
        f"precision.fp8={precision.fp8}",
        "needs one scale per weight",
        "precision.fp8=tensorwise",
    )
    yield (
        gather and parallel.replicate > 1,
        "precision.fp8_all_gather",
        True,
        "torchao supports it on a mesh of one dimension only",
        "parallel.replicate=1",
    )
    yield (
        lora.on and precision.fp8 != "none",
        "precision.fp8",
        precision.fp8,
        "not supported with adapters",
        "precision.fp8=none, or training all weights",
    )
    yield (
        lora.on and precision.weights != "fp32",
        "precision.weights",
        precision.weights,
        "has no effect with adapters: the base is kept in the compute precision, and adapters in float32",
        "precision.weights=fp32",
    )
    yield (
        precision.weights == "bf16" and precision.compute == "float32",
        "precision.weights",
        "bf16",
        "weights in bfloat16 are computed with as they are",
        "precision.compute=bfloat16",
    )
    budget = model.activation_checkpointing == "budget"
    yield (
        budget and not model.compile,
        "model.activation_checkpointing",
        "budget",
        "only the compiler can keep to a budget",
        "model.compile=true",
    )
    yield budget and model.activation_budget is None, "model.activation_budget", None, "missing", "a number from 0 to 1"
    yield (
        model.compile and lora.base == "nf4",
        "model.compile",
        True,
        "not supported with NF4",
        "lora.base=dense, or model.compile=false",
    )
    yield (
        model.kernels == "liger" and model.compile,
        "model.kernels",
        "liger",
        "compiled layers have the compiler's own kernels",
        "model.kernels=auto or torch",
    )


def _without_effect(config: Config) -> Iterator[Rule]:
    model, rpo, lora = config.model, config.rpo, config.lora
    yield (
        rpo.label_smoothing > 0 and LOSSES[rpo.loss].smoothing_limit == 0,
        "rpo.label_smoothing",
        f"rpo.loss={rpo.loss}",
        "has no effect with this loss",
        "rpo.loss=" + " | ".join(name for name, row in LOSSES.items() if row.smoothing_limit),
    )
    for name, value in _changed(lora):
        field = f"lora.{name}"
        yield not lora.on, field, value, "has no effect without adapters", "lora.rank above 0, or lora.path"
        replaced = lora.path is not None and name in ("rank", "alpha", "target_modules")
        yield replaced, field, value, "has no effect with lora.path", "nothing: the adapter brings its own"
    for name, value in _changed(config.precision):
        idle = config.precision.fp8 == "none" and name.startswith("fp8_")
        yield idle, f"precision.{name}", value, "has no effect without FP8", "precision.fp8 tensorwise or rowwise"
    for name, value in _changed(config.eval):
        idle = config.data.exam is None and name.startswith("exam_")
        yield idle, f"eval.{name}", value, "has no effect without an exam", "data.exam, a file of questions"
    idle = model.activation_budget is not None and model.activation_checkpointing != "budget"
    expected = "model.activation_checkpointing=budget"
    yield idle, "model.activation_budget", model.activation_budget, "has no effect without a budget", expected


def _changed(section: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the settings of a section that are not the default."""
    default = type(section)()
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if value != getattr(default, f.name):
            yield f.name, value
