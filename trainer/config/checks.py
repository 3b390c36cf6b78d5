"""What settings must hold beyond their types: ranges, and settings that would do nothing beside others."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from medtrain.trainer.errors import bad_input

if TYPE_CHECKING:
    from medtrain.trainer.config.settings import Config, LoraConfig


def check_settings(config: Config, file) -> None:
    """Raise InputError at the first setting that cannot be meant."""

    def require(condition: bool, name: str, found: object, expected: str) -> None:
        if not condition:
            raise bad_input("out of range", file=file, field=name, found=found, expected=expected)

    model, data, optim, rpo = config.model, config.data, config.optim, config.rpo
    if (model.path is None) == (model.init is None):
        found = "neither" if model.path is None else "both"
        raise bad_input(
            "where the weights come from",
            file=file,
            field="model",
            found=found,
            expected="either model.path (a checkpoint folder) or model.init (sizes for random weights)",
        )
    if model.init is not None and "model_type" not in model.init:
        raise bad_input("missing", file=file, field="model.init.model_type", expected="as in a HF config, e.g. qwen2")
    if model.init is not None and model.tokenizer is None:
        raise bad_input("missing", file=file, field="model.tokenizer", expected="a folder, since model.init has none")
    require(model.keep_bytes is None or model.keep_bytes >= 0, "model.keep_bytes", model.keep_bytes, "0 or more")
    rows = "data.sources" if config.stage == "cpt" else "data.pairs"
    if not (data.sources if config.stage == "cpt" else data.pairs):
        raise bad_input("missing", file=file, field=rows, expected=f"a list of {{path, weight, name}} for {config.stage}")
    if config.run.out is None:
        raise bad_input("missing", file=file, field="run.out", expected="the run folder")
    if (optim.steps is None) == (optim.epochs is None):
        found = "neither" if optim.steps is None else "both"
        raise bad_input("how long to train", file=file, field="optim", found=found, expected="steps or epochs, one of them")
    require(optim.steps is None or optim.steps >= 1, "optim.steps", optim.steps, "1 or more")
    require(optim.epochs is None or optim.epochs > 0, "optim.epochs", optim.epochs, "more than 0")
    for name in ("batch_tokens", "batch_pairs", "micro_batch_tokens"):
        require(getattr(optim, name) >= 1, f"optim.{name}", getattr(optim, name), "1 or more")
    require(0 < optim.lr < float("inf"), "optim.lr", optim.lr, "more than 0")
    require(optim.warmup_steps >= 0, "optim.warmup_steps", optim.warmup_steps, "0 or more")
    require(optim.decay_steps is None or optim.decay_steps >= 1, "optim.decay_steps", optim.decay_steps, "1 or more")
    require(0 <= optim.min_lr_ratio <= 1, "optim.min_lr_ratio", optim.min_lr_ratio, "0 to 1")
    require(0 <= optim.beta1 < 1, "optim.beta1", optim.beta1, "0 to below 1")
    require(0 <= optim.beta2 < 1, "optim.beta2", optim.beta2, "0 to below 1")
    require(optim.eps > 0, "optim.eps", optim.eps, "more than 0")
    require(optim.weight_decay >= 0, "optim.weight_decay", optim.weight_decay, "0 or more")
    require(optim.grad_clip >= 0, "optim.grad_clip", optim.grad_clip, "0 (no clipping) or more")
    if optim.schedule == "wsd" and optim.steps is not None and optim.decay_steps is not None:
        least = optim.warmup_steps + optim.decay_steps
        require(least <= optim.steps, "optim.decay_steps", optim.decay_steps, "warm-up and decay within optim.steps")
    require(data.seq_len >= 2, "data.seq_len", data.seq_len, "2 or more")
    require(data.workers is None or data.workers >= 1, "data.workers", data.workers, "1 or more")
    require(data.max_length >= 3, "data.max_length", data.max_length, "3 or more")
    for i, source in enumerate([*data.sources, *data.pairs]):
        require(source.weight is None or source.weight > 0, f"data.*.{i}.weight", source.weight, "more than 0")
    require(rpo.beta > 0, "rpo.beta", rpo.beta, "more than 0")
    require(rpo.alpha >= 0, "rpo.alpha", rpo.alpha, "0 or more")
    require(0 <= rpo.label_smoothing < 0.5, "rpo.label_smoothing", rpo.label_smoothing, "0 to below 0.5")
    if rpo.label_smoothing > 0 and rpo.loss not in ("sigmoid", "robust", "simpo"):
        raise bad_input(
            "has no effect with this loss",
            file=file,
            field="rpo.label_smoothing",
            found=f"rpo.loss={rpo.loss}",
            expected="rpo.loss sigmoid, robust or simpo",
        )
    _check_lora(config.lora, file)
    _check_precision(config, file)
    _check_speed(config, file)
    require(config.eval.every >= 0, "eval.every", config.eval.every, "0 or more")
    for name in ("exam_questions", "exam_max_new_tokens", "exam_max_answer_tokens"):
        require(getattr(config.eval, name) >= 1, f"eval.{name}", getattr(config.eval, name), "1 or more")
    require(config.eval.exam_every >= 0, "eval.exam_every", config.eval.exam_every, "0 or more")
    for f in dataclasses.fields(config.eval):
        value = getattr(config.eval, f.name)
        if data.exam is None and f.name.startswith("exam_") and value != getattr(type(config.eval)(), f.name):
            raise bad_input(
                "has no effect without an exam",
                file=file,
                field=f"eval.{f.name}",
                found=value,
                expected="data.exam, a file of questions",
            )
    require(config.checkpoint.every >= 1, "checkpoint.every", config.checkpoint.every, "1 or more")
    require(config.checkpoint.keep >= 1, "checkpoint.keep", config.checkpoint.keep, "1 or more")


def _check_lora(lora: LoraConfig, file) -> None:
    if lora.rank < 0:
        raise bad_input("out of range", file=file, field="lora.rank", found=lora.rank, expected="0 (off) or more")
    if lora.alpha is not None and not 0 < lora.alpha < float("inf"):
        raise bad_input("out of range", file=file, field="lora.alpha", found=lora.alpha, expected="more than 0")
    changed = {f.name: getattr(lora, f.name) for f in dataclasses.fields(lora)}
    changed = {name: value for name, value in changed.items() if value != getattr(type(lora)(), name)}
    for name, value in changed.items():
        if not lora.on:
            raise bad_input(
                "has no effect without adapters",
                file=file,
                field=f"lora.{name}",
                found=value,
                expected="lora.rank above 0, or lora.path",
            )
        if lora.path is not None and name in ("rank", "alpha", "target_modules"):
            raise bad_input(
                "has no effect with lora.path",
                file=file,
                field=f"lora.{name}",
                found=value,
                expected="nothing: the adapter brings its own",
            )


def _check_precision(config: Config, file) -> None:
    precision = config.precision

    def refuse(name: str, found: object, problem: str, expected: str) -> None:
        raise bad_input(problem, file=file, field=f"precision.{name}", found=found, expected=expected)

    for f in dataclasses.fields(precision):
        value = getattr(precision, f.name)
        if precision.fp8 == "none" and f.name.startswith("fp8_") and value != f.default:
            refuse(f.name, value, "has no effect without FP8", "precision.fp8 tensorwise or rowwise")
    if precision.fp8_all_gather and precision.fp8 != "tensorwise":
        refuse(
            "fp8_all_gather",
            f"precision.fp8={precision.fp8}",
            "one scale a weight is gathered with it",
            "precision.fp8=tensorwise",
        )
    if precision.fp8_check_every < 0:
        refuse("fp8_check_every", precision.fp8_check_every, "out of range", "0 (no checks) or more")
    if not 0 < precision.fp8_tolerance < float("inf"):
        refuse("fp8_tolerance", precision.fp8_tolerance, "out of range", "more than 0")
    if config.lora.on and precision.fp8 != "none":
        refuse("fp8", precision.fp8, "not supported with adapters", "precision.fp8=none, or training all weights")
    if config.lora.on and precision.weights != "fp32":
        refuse(
            "weights",
            precision.weights,
            "has no effect with adapters: the base lies in the compute precision, and adapters are float32",
            "precision.weights=fp32",
        )
    if precision.weights == "bf16" and precision.compute == "float32":
        refuse("weights", "bf16", "weights in bfloat16 are computed with as they are", "precision.compute=bfloat16")


def _check_speed(config: Config, file) -> None:
    model, parallel = config.model, config.parallel

    def refuse(name: str, found: object, problem: str, expected: str) -> None:
        raise bad_input(problem, file=file, field=name, found=found, expected=expected)

    if parallel.replicate < 1:
        refuse("parallel.replicate", parallel.replicate, "out of range", "1 (no copies) or more")
    if parallel.prefetch < 0:
        refuse("parallel.prefetch", parallel.prefetch, "out of range", "0 (FSDP2's own order) or more")
    if parallel.replicate > 1 and config.precision.fp8_all_gather:
        refuse("precision.fp8_all_gather", True, "torchao has it on a mesh of one dim only", "parallel.replicate=1")
    budget = model.activation_checkpointing == "budget"
    if budget and not model.compile:
        refuse("model.activation_checkpointing", "budget", "the compiler keeps the budget", "model.compile=true")
    if budget and model.activation_budget is None:
        refuse("model.activation_budget", None, "missing", "a number from 0 to 1")
    if model.activation_budget is not None and not budget:
        refuse(
            "model.activation_budget",
            model.activation_budget,
            "has no effect without a budget",
            "model.activation_checkpointing=budget",
        )
    if model.activation_budget is not None and not 0 <= model.activation_budget <= 1:
        refuse("model.activation_budget", model.activation_budget, "out of range", "0 to 1")
    if model.compile and config.lora.base == "nf4":
        refuse("model.compile", True, "not supported with NF4", "lora.base=dense, or model.compile=false")
    if model.kernels == "liger" and model.compile:
        refuse("model.kernels", "liger", "compiled layers have the compiler's own", "model.kernels=auto or torch")
