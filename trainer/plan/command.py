"""``medtrain plan``: the memory plan of a configuration, what to change where it does not fit, and what is known of its speed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtrain.kernels.losses import LOSSES
from medtrain.trainer.config.settings import Config, ModelConfig
from medtrain.trainer.errors import bad_input, user_path
from medtrain.trainer.model.flops import PEAK_FLOPS, FlopsPerToken, num_parameters
from medtrain.trainer.plan.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    Machine,
    Model,
    Moment,
    allowance,
    checkpoint_copy,
    compute_dtype,
    moments,
    planned_step,
    read_model,
)
from medtrain.trainer.plan.sizes import Sizes, read_sizes
from medtrain.trainer.run.console import count

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Beside this folder's parent, in a checkout as in an installed package.
MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
H100_TFLOPS = PEAK_FLOPS["H100"] / 1e12
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def model_sizes(config: ModelConfig, sizes: str | None = None) -> tuple[PreTrainedConfig | Sizes, str]:
    """(the model's sizes, where they are from), without reading a weight.

    In this order: ``sizes`` (a name in configs/models, or a config.json), ``model.init`` (the tokenizer is read only where it
    names no vocab_size), config.json in ``model.path``, and a known model whose name stands in ``model.path``.

    Raises:
        InputError: none of these, or sizes that ``medtrain check`` would refuse too.
    """
    if sizes is not None:
        with user_path(sizes, field="--sizes"):
            known = (MODELS / f"{sizes}.json").is_file()
        if known:
            return _from_file(MODELS / f"{sizes}.json"), f"configs/models/{sizes}.json"
        return _from_file(Path(sizes)), sizes
    if config.init is not None:
        return read_sizes(config.init, from_user=True) or _by_transformers(config), "model.init"
    file = Path(config.path) / "config.json"
    with user_path(file, field="model.path"):
        text = file.read_bytes() if file.is_file() else None
    if text is not None:
        try:
            plain = read_sizes(json.loads(text), from_user=False)
        except (ValueError, AttributeError):
            plain = None
        return plain or _by_transformers(config), str(file)
    known = sorted((file.stem for file in MODELS.glob("*.json")), key=len, reverse=True)
    for name in known:
        if name in config.path.lower():
            return _from_file(MODELS / f"{name}.json"), f"configs/models/{name}.json, for model.path is not on this machine"
    raise bad_input(
        "no config.json here to take the model's sizes from",
        field="model.path",
        found=config.path,
        expected=f"a checkpoint, a path with the name of a known model ({', '.join(sorted(known))}) in it, or "
        "--sizes NAME_OR_FILE",
    )


def _by_transformers(config: ModelConfig) -> PreTrainedConfig:
    from medtrain.trainer.model.policy import load_model_config, load_tokenizer

    unknown = config.init is not None and "vocab_size" not in config.init
    return load_model_config(config, load_tokenizer(config) if unknown else None)


def _from_file(file: Path) -> PreTrainedConfig | Sizes:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and (plain := read_sizes(content, from_user=True)) is not None:
            return plain
        from transformers import AutoConfig

        AutoConfig.for_model(content["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = ", ".join(sorted(path.stem for path in MODELS.glob("*.json")))
        raise bad_input(
            "no sizes of a model", field="--sizes", found=f"{file}: {error}", expected=f"one of {known}, or a config.json"
        ) from None
    from medtrain.trainer.model.policy import load_model_config

    return load_model_config(ModelConfig(init=content), None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of one configuration on ``machine``, bytes a rank."""

    config: Config
    model: Model
    machine: Machine
    moments: list[Moment]

    @property
    def largest(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """The largest moment with the allowance."""
        return self.largest.total + allowance(self.largest.total, self.machine.device)


def make_plan(config: Config, model: Model, machine: Machine) -> Plan:
    found = moments(config, model, machine, planned_step(config, machine.world_size))
    if config.stage == "cpt" or not LOSSES[config.rpo.loss].needs_reference:
        found = [moment for moment in found if moment.name != "reference pass"]
    return Plan(config, model, machine, found)


def _changed(config: Config, **changes: Any) -> Config:
    for name, value in changes.items():
        section, key = name.split("__")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    return config


def _without_small(config: Config) -> Config:
    """Without what is not to be had with adapters (config_checks.py)."""
    return _changed(config, precision__weights="fp32", precision__fp8="none", precision__fp8_all_gather=False)


def longest_item(config: Config) -> int:
    """Tokens that a micro-batch must hold at least: a window, or the longest pair that ``data.max_length`` allows (both sides
    of it; a shared prompt makes it less)."""
    return config.data.seq_len if config.stage == "cpt" else 2 * config.data.max_length


def largest_micro_batch(plan: Plan, limit: int) -> int | None:
    """The largest ``optim.micro_batch_tokens`` (a multiple of 256, up to 2**20) whose peak stays within ``limit`` bytes; None
    where even 256 tokens do not."""
    low, high = 0, 4096
    while low < high:
        middle = (low + high + 1) // 2
        tried = _changed(plan.config, optim__micro_batch_tokens=256 * middle)
        if make_plan(tried, plan.model, plan.machine).peak <= limit:
            low = middle
        else:
            high = middle - 1
    return 256 * low or None


def alternatives(plan: Plan, limit: int) -> list[dict[str, Any]]:
    """Other settings, each planned anew: ``change``, ``peak_gib``, ``fits``. Those that change no result come first."""
    config, found = plan.config, []

    def attempt(change: str, tried: Config, world_size: int = plan.machine.world_size) -> bool:
        model = plan.model if tried.lora == config.lora else read_model(tried, plan.model.hf_config)
        peak = make_plan(tried, model, dataclasses.replace(plan.machine, world_size=world_size)).peak
        found.append({"change": change, "peak_gib": peak / GIB, "fits": peak <= limit})
        return peak <= limit

    saving = config
    if config.model.activation_checkpointing == "none":
        saving = _changed(saving, model__activation_checkpointing="full")
        attempt("model.activation_checkpointing=full", saving)
    if config.model.keep_bytes is None and not config.lora.on:
        attempt("model.keep_bytes=0", _changed(config, model__keep_bytes=0))
        saving = _changed(saving, model__keep_bytes=0)
    tokens = config.optim.micro_batch_tokens // 2
    while tokens >= longest_item(config):
        if attempt(f"optim.micro_batch_tokens={tokens}", _changed(config, optim__micro_batch_tokens=tokens)):
            break
        tokens //= 2
    least = min(config.optim.micro_batch_tokens, max(longest_item(config), 1))
    saving = _changed(saving, optim__micro_batch_tokens=least)
    if saving != config:
        attempt(f"all of these, micro_batch_tokens={least}", saving)
    world_size = plan.machine.world_size
    while world_size < 512:
        world_size = min(512, 2 * world_size)
        if attempt(f"{world_size} ranks", config, world_size):
            break
    if not config.lora.on:
        small = {}
        if config.optim.state == "fp32":
            small["optim.state"] = "8bit"
        if config.precision.weights == "fp32" and config.precision.compute != "float32":
            small["precision.weights"] = "bf16"
        for name, value in small.items():
            attempt(f"{name}={value}", _changed(config, **{name.replace(".", "__"): value}))
        changes = {name.replace(".", "__"): value for name, value in small.items()}
        both = " ".join(f"{name}={value}" for name, value in small.items())
        fitted = len(small) == 2 and attempt(both, _changed(config, **changes))
        if small and saving != config and not fitted:
            attempt(f"{both}, with all of the savings above", _changed(saving, **changes))
        attempt("lora.rank=16", _changed(_without_small(config), lora__rank=16))
    if config.lora.base != "nf4":
        rank = {} if config.lora.on else {"lora__rank": 16}
        config = _without_small(config)
        names = " ".join([*("lora.rank=16" for _ in rank), "lora.base=nf4"])
        attempt(names, _changed(config, **rank, lora__base="nf4"))
    return found


def measured_rates(config: Config, model: Model, precision: str) -> list[dict[str, Any]]:
    """Rows of our own training benchmarks for this stage and precision, and for a model of this size trained in this way:
    tokens/s of one device, each with its ``file``."""
    return [
        {"tokens_per_second": row["tokens_per_second"], "file": file}
        for file, row in _measured(config, precision)
        if row["parameters"] == model.num_parameters and row["trained"] == _trained(config)
    ]


def expected_speed(
    config: Config, model: Model, machine: Machine, precision: str, mfu: float | None, peak_tflops: float
) -> dict[str, Any] | None:
    """Tokens/s of all ranks together at a share ``mfu`` of ``peak_tflops`` (dense bf16, a rank): the one given, else the one of
    the largest model that was measured for this stage, precision and way of training; None without either.

    FLOPs as the training loop counts them (flops.FlopsPerToken), documents as long as ``data.seq_len`` or ``data.max_length``.
    """
    source = "given"
    if mfu is None:
        rows = [(file, row) for file, row in _measured(config, precision) if row["mfu"] and row["trained"] == _trained(config)]
        if not rows:
            return None
        file, row = max(rows, key=lambda each: each[1]["parameters"])
        mfu, source = row["mfu"], f"{file}, {row['model']} on one device"
    length = config.data.seq_len if config.stage == "cpt" else config.data.max_length
    _, multiplied = num_parameters(model.shapes)
    flops = FlopsPerToken(model.hf_config, multiplied, model.adapters)(1, length)
    rate = mfu * peak_tflops * 1e12 * machine.world_size / flops
    return {"tokens_per_second": rate, "mfu": mfu, "peak_tflops": peak_tflops, "from": source}


def _measured(config: Config, precision: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for file in sorted(RESULTS.glob(f"train-{config.stage}-*.json")):
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            if row["impl"] == "medtrain" and row["precision"] == precision and row["tokens_per_second"]:
                found.append((file.name, row))
    return found


def _trained(config: Config) -> str:
    """As the training benchmark's rows say it."""
    return f"LoRA rank {config.lora.rank}" if config.lora.on else "all weights"


def _refuse_unplanned(config: Config) -> None:
    """No number is better than one that leaves out what a setting is there to change."""
    if config.model.compile:
        raise bad_input("medtrain plan has no formula for it yet", field="model.compile", found=True, expected="false")


def plan_config(
    config: Config,
    *,
    world_size: int,
    gpu_memory_gib: float,
    sizes: str | None = None,
    mfu: float | None = None,
    peak_tflops: float = H100_TFLOPS,
) -> dict[str, Any]:
    """The whole plan as plain data, as ``medtrain plan --json`` prints it; ``mfu``, ``peak_tflops``: see :func:`expected_speed`.

    Raises:
        InputError: sizes that cannot be found, settings that do not fit the model.
    """
    _refuse_unplanned(config)
    if world_size % config.parallel.replicate:
        raise bad_input(
            "does not divide the number of ranks",
            field="parallel.replicate",
            found=config.parallel.replicate,
            expected=f"a divisor of {world_size}",
        )
    hf_config, source = model_sizes(config.model, sizes)
    model = read_model(config, hf_config)
    machine = Machine(world_size)
    plan = make_plan(config, model, machine)
    limit = int(gpu_memory_gib * GIB)
    step = planned_step(config, world_size)
    precision = str(compute_dtype(config, "cuda")).removeprefix("torch.")
    measured_as = precision if config.precision.fp8 == "none" else f"fp8-{config.precision.fp8}"
    rates = measured_rates(config, model, measured_as)
    fits = plan.peak <= limit
    return {
        "stage": config.stage,
        "world_size": world_size,
        "gpu_memory_gib": gpu_memory_gib,
        "model": {
            "type": hf_config.model_type,
            "parameters": model.num_parameters,
            "trained": model.num_trained,
            "sizes_from": source,
        },
        "compute": precision,
        "tokens_a_micro_batch": step.tokens,
        "peak_gib": plan.peak / GIB,
        "fits": fits,
        "moment": plan.largest.name,
        "parts_gib": {
            **{name: value / GIB for name, value in plan.largest.parts.items()},
            "allowance": allowance(plan.largest.total, "cuda") / GIB,
        },
        "moments_gib": {moment.name: moment.total / GIB for moment in plan.moments},
        "checkpoint_copy_gib": checkpoint_copy(config, model, machine) / GIB,
        "largest_micro_batch_tokens": largest_micro_batch(plan, limit),
        "least_micro_batch_tokens": longest_item(config),
        "alternatives": [] if fits else alternatives(plan, limit),
        "measured_rates": rates,
        "expected_speed": expected_speed(config, model, machine, measured_as, mfu, peak_tflops),
        "assumptions": [
            f"allowance: {CONTEXT_BYTES / GIB:g} GiB for CUDA, NCCL, cuBLAS and {FRAGMENTATION:.0%} for fragmentation, assumed",
            "flash attention; a micro-batch as full as packing allows"
            + (", its prompts counted too" if config.stage == "rpo" else ""),
            *(["layers as torch's own; Liger's norms and SwiGLU keep less"] if config.model.kernels != "torch" else []),
            "the parts' formulas were held against measurements on a CPU only (docs/plan.md)"
            + (", FP8's emulated" if config.precision.fp8 != "none" else ""),
        ],
    }


def as_text(result: dict[str, Any]) -> str:
    """A plan for people: parts of the largest moment, the largest moments, what to change."""
    model = result["model"]
    trained = "" if model["trained"] == model["parameters"] else f", {count(model['trained'])} trained"
    lines = [
        f"{result['stage']}, {model['type']}, {model['parameters'] / 1e9:,.2f} B parameters{trained}, {result['compute']}, "
        f"{result['world_size']} ranks, {result['tokens_a_micro_batch']:,} tokens a micro-batch",
        f"sizes from {model['sizes_from']}",
        "",
        f"{'peak, at: ' + result['moment']:<46}{'GiB a rank':>11}",
    ]
    lines += [f"  {name:<44}{value:11.2f}" for name, value in result["parts_gib"].items()]
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    lines += [f"  {'total':<44}{result['peak_gib']:11.2f}   {verdict} {result['gpu_memory_gib']:g} GiB", ""]
    lines.append(f"{'other moments, without allowance':<46}{'GiB a rank':>11}")
    order = sorted(result["moments_gib"].items(), key=lambda item: -item[1])
    named = ("reference pass", "optimizer step")
    lines += [f"  {name:<44}{value:11.2f}" for i, (name, value) in enumerate(order) if i < 6 or name in named]
    if result["checkpoint_copy_gib"]:
        lines += [
            "",
            f"{'host memory, the copy of a checkpoint':<46}{result['checkpoint_copy_gib']:11.2f}   "
            "checkpoint.async_save=false needs none",
        ]
    largest, least = result["largest_micro_batch_tokens"], result["least_micro_batch_tokens"]
    some = "none" if largest is None else f"{largest:,}" if largest < 2**20 else "any, for a step has no more tokens a rank"
    lines += ["", f"largest optim.micro_batch_tokens that fits: {some}"]
    if largest is None or largest < least:
        what = "a window of data.seq_len" if result["stage"] == "cpt" else "two sides of data.max_length"
        lines.append(f"  {what} takes {least:,}")
    if result["alternatives"]:
        lines += ["", f"{'instead':<46}{'GiB a rank':>11}"]
        lines += [
            f"  {each['change']:<44}{each['peak_gib']:11.2f}   {'fits' if each['fits'] else 'does not fit'}"
            for each in result["alternatives"]
        ]
    speed = result["expected_speed"]
    rates = [f"{rate['tokens_per_second']:,.0f} tokens/s of one device ({rate['file']})" for rate in result["measured_rates"]]
    lines += ["", "speed: " + ("; ".join(rates) if rates else "no rate has been measured for this model and precision")]
    if speed is not None:
        lines.append(
            f"expected: {speed['tokens_per_second']:,.0f} tokens/s of all ranks, at {speed['mfu']:.0%} of "
            f"{speed['peak_tflops']:g} TFLOP/s a rank ({speed['from']})"
        )
    lines += [f"note: {line}" for line in result["assumptions"]]
    return "\n".join(lines)
