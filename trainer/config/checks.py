"""What settings must hold beyond their types: ranges, and settings that contradict each other or would have no effect."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.kernels.losses import LOSSES
from medtrain.trainer.errors import bad_input

if TYPE_CHECKING:
    from medtrain.trainer.config.settings import Config

# What a number must be, the test, and the settings; one that is None has no number to test.
_RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    ("1 or more", lambda value: value >= 1, "optim.steps optim.batch_tokens optim.batch_pairs optim.micro_batch_tokens"),
    ("1 or more", lambda value: value >= 1, "optim.decay_steps data.workers checkpoint.every checkpoint.keep parallel.replicate"),
    ("1 or more", lambda value: value >= 1, "eval.exam_questions eval.exam_max_new_tokens eval.exam_max_answer_tokens"),
    ("0 or more", lambda value: value >= 0, "model.keep_bytes optim.warmup_steps optim.weight_decay optim.grad_clip rpo.alpha"),
    ("0 or more", lambda value: value >= 0, "lora.rank eval.every eval.exam_every precision.fp8_check_every run.seed"),
    ("0 or more", lambda value: value >= 0, "parallel.prefetch"),
    ("more than 0", lambda value: 0 < value < math.inf, "optim.epochs optim.lr optim.eps rpo.beta lora.alpha"),
    ("more than 0", lambda value: 0 < value < math.inf, "precision.fp8_tolerance"),
    ("0 to 1", lambda value: 0 <= value <= 1, "optim.min_lr_ratio model.activation_budget"),
    ("0 to below 1", lambda value: 0 <= value < 1, "optim.beta1 optim.beta2"),
    ("0 to below 0.5", lambda value: 0 <= value < 0.5, "rpo.label_smoothing"),
    ("2 or more", lambda value: value >= 2, "data.seq_len"),
    ("3 or more", lambda value: value >= 3, "data.max_length"),
]
Rule = tuple[Any, str, str, str]  # (whether it is broken, setting, problem, what was expected)


def check_settings(config: Config, file: str | Path | None) -> None:
    """Raise InputError at the first setting that cannot be meant."""
    for expected, holds, names in _RANGES:
        for name in names.split():
            value = attrgetter(name)(config)
            if value is not None and not holds(value):
                raise bad_input("out of range", file=file, field=name, found=value, expected=expected)
    for rules in (_required, _contradictions, _without_effect):
        for broken, name, problem, expected in rules(config):
            if broken:
                found = None if problem == "missing" or name in ("model", "optim") else attrgetter(name)(config)
                raise bad_input(problem, file=file, field=name, found=found, expected=expected)


def _required(config: Config) -> Iterator[Rule]:
    model, optim, data = config.model, config.optim, config.data
    weights = "model.path, a checkpoint folder, or model.init, sizes for random weights"
    yield model.path is None and model.init is None, "model", "missing", weights
    yield model.path is not None and model.init is not None, "model", "set exactly one of model.path and model.init", weights
    yield model.init and "model_type" not in model.init, "model.init.model_type", "missing", "as in a HF config, e.g. qwen2"
    yield model.init and model.tokenizer is None, "model.tokenizer", "missing", "a folder, since model.init has none"
    yield config.rpo.loss not in LOSSES, "rpo.loss", "not a known choice", " | ".join(LOSSES)
    name = "sources" if config.stage == "cpt" else "pairs"
    yield not getattr(data, name), f"data.{name}", "missing", f"a list of {{path, weight, name}} for {config.stage}"
    yield not config.run.out, "run.out", "missing", "the run folder"
    problem = "set exactly one of optim.steps and optim.epochs"
    yield optim.steps is None and optim.epochs is None, "optim", "missing", problem
    yield optim.steps is not None and optim.epochs is not None, "optim", problem, "one of them"
    if optim.schedule == "wsd" and optim.steps is not None and optim.decay_steps is not None:
        too_long = optim.warmup_steps + optim.decay_steps > optim.steps
        yield too_long, "optim.decay_steps", "out of range", "warm-up and decay within optim.steps"


def _contradictions(config: Config) -> Iterator[Rule]:
    model, precision, lora, parallel = config.model, config.precision, config.lora, config.parallel
    gather, fp8, low = precision.fp8_all_gather, precision.fp8, precision.weights == "bf16"
    budget = model.activation_checkpointing == "budget"
    one_dim = "torchao supports it on a mesh of one dimension only"
    yield gather and fp8 != "tensorwise", "precision.fp8_all_gather", "needs one scale per weight", "precision.fp8=tensorwise"
    yield gather and parallel.replicate > 1, "precision.fp8_all_gather", one_dim, "parallel.replicate=1"
    yield lora.on and fp8 != "none", "precision.fp8", "not supported with adapters", "precision.fp8=none, or no adapters"
    problem = "has no effect with adapters: the base is kept in the compute precision, and adapters in float32"
    yield lora.on and low, "precision.weights", problem, "precision.weights=fp32"
    problem = "weights in bfloat16 are computed with as they are"
    yield low and precision.compute == "float32", "precision.weights", problem, "precision.compute=bfloat16"
    problem = "only the compiler can keep to a budget"
    yield budget and not model.compile, "model.activation_checkpointing", problem, "model.compile=true"
    yield budget and model.activation_budget is None, "model.activation_budget", "missing", "a number from 0 to 1"
    nf4 = lora.base == "nf4"
    yield model.compile and nf4, "model.compile", "not supported with NF4", "lora.base=dense, or model.compile=false"
    problem = "compiled layers have the compiler's own kernels"
    yield model.kernels == "liger" and model.compile, "model.kernels", problem, "model.kernels=auto or torch"


def _without_effect(config: Config) -> Iterator[Rule]:
    model, rpo, lora, precision = config.model, config.rpo, config.lora, config.precision
    smoothed = " | ".join(name for name, row in LOSSES.items() if row.smoothing_limit)
    idle = rpo.label_smoothing > 0 and LOSSES[rpo.loss].smoothing_limit == 0
    yield idle, "rpo.label_smoothing", f"has no effect with rpo.loss={rpo.loss}", f"rpo.loss={smoothed}"
    for name in _changed(lora):
        yield not lora.on, f"lora.{name}", "has no effect without adapters", "lora.rank above 0, or lora.path"
        replaced = lora.path is not None and name in ("rank", "alpha", "target_modules")
        yield replaced, f"lora.{name}", "has no effect with lora.path", "nothing: the adapter brings its own"
    for name in _changed(precision):
        idle = precision.fp8 == "none" and name.startswith("fp8_")
        yield idle, f"precision.{name}", "has no effect without FP8", "precision.fp8 tensorwise or rowwise"
    for name in _changed(config.eval):
        idle = config.data.exam is None and name.startswith("exam_")
        yield idle, f"eval.{name}", "has no effect without an exam", "data.exam, a file of questions"
    idle = model.activation_budget is not None and model.activation_checkpointing != "budget"
    problem = "has no effect without a budget"
    yield idle, "model.activation_budget", problem, "model.activation_checkpointing=budget"


def _changed(section: Any) -> list[str]:
    """Names of the settings of a section that are not the default."""
    default = type(section)()
    return [f.name for f in dataclasses.fields(section) if getattr(section, f.name) != getattr(default, f.name)]
