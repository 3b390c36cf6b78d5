"""``medtrain plan``: whether a configuration fits into a GPU, and what to change where it does not."""

from __future__ import annotations

import bisect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from medtrain.trainer.config.settings import Config
from medtrain.trainer.errors import bad_input
from medtrain.trainer.model.flops import FlopsPerToken
from medtrain.trainer.plan.memory import GIB, adapters_of, micro_batch, plan_memory, read_sizes

# Tried in this order where a configuration does not fit.
FULL: dict[str, Any] = {"model.activation_checkpointing": "full"}
EIGHT_BIT, BF16 = FULL | {"optim.state": "8bit"}, {"precision.compute": "bfloat16", "precision.weights": "bf16"}
LORA = FULL | {"lora.rank": 16, "precision.weights": "fp32", "precision.fp8": "none", "precision.fp8_all_gather": False}
NF4 = {"lora.base": "nf4"}


def plan_config(config: Config, *, world_size: int, gpu_memory_gib: float, sizes: str | None = None) -> dict[str, Any]:
    """The plan as plain data, as ``medtrain plan`` prints it; ``sizes``: ``source`` of :func:`read_sizes`.

    Raises:
        InputError: sizes that are not found, settings that do not fit the model or have no formula.
    """
    if config.model.compile:
        raise bad_input("medtrain plan has no formula for it", field="model.compile", found=True, expected="false")
    if world_size % (copies := config.parallel.replicate):
        raise bad_input(
            "does not divide the number of ranks", field="parallel.replicate", found=copies, expected=f"a divisor of {world_size}"
        )
    model, limit = read_sizes(config.model, sizes), gpu_memory_gib * GIB
    plan, adapters = plan_memory(config, model, world_size), adapters_of(config, model)
    trained = adapters.num_parameters if adapters else model.parameters
    # An embedding that is only looked up multiplies nothing.
    multiplied = model.parameters - (0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size)
    length = config.data.seq_len if config.stage == "cpt" else config.data.max_length
    least = length if config.stage == "cpt" else 2 * length  # a window, or both sides of the longest pair
    return {
        "stage": config.stage,
        "model": {"type": model.model_type, "parameters": model.parameters, "trained": trained, "sizes_from": model.source},
        "world_size": world_size,
        "gpu_memory_gib": gpu_memory_gib,
        "peak_gib": plan.peak / GIB,
        "fits": plan.peak <= limit,
        "would_fit": [] if plan.peak <= limit else would_fit(config, model, world_size, limit, least),
        "moment": plan.phase,
        "parts_gib": {name: value / GIB for name, value in plan.parts.items()},
        "checkpoint_copy_gib": plan.host / GIB,
        "tokens_a_micro_batch": micro_batch(config, world_size)[0],
        "largest_micro_batch_tokens": largest_micro_batch(config, model, world_size, limit),
        "least_micro_batch_tokens": least,
        "flops_a_token": FlopsPerToken(model, multiplied, adapters)(1, length),
    }


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """``config`` with settings changed, by dotted name."""
    for name, value in changes.items():
        section, key = name.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def largest_micro_batch(config: Config, model: SimpleNamespace, world_size: int, limit: float) -> int | None:
    """The largest ``optim.micro_batch_tokens`` (a multiple of 256, up to 2**20) within ``limit`` bytes; None where none is."""

    def peak(blocks: int) -> float:
        return plan_memory(changed(config, {"optim.micro_batch_tokens": 256 * blocks}), model, world_size).peak

    return 256 * bisect.bisect_right(range(1, 4097), limit, key=peak) or None


def would_fit(config: Config, model: SimpleNamespace, world_size: int, limit: float, least: int) -> list[str]:
    """The first settings with which ``least`` tokens or more fit, and the number of ranks that does as it is."""
    found = []
    for changes in ({}, FULL, FULL | NF4) if config.lora.on else ({}, FULL, EIGHT_BIT, EIGHT_BIT | BF16, LORA, LORA | NF4):
        most = largest_micro_batch(changed(config, changes), model, world_size, limit) or 0
        if most >= least:
            changes = changes | {"optim.micro_batch_tokens": min(most, config.optim.micro_batch_tokens)}
            words = [f"{name}={value}" for name, value in changes.items() if changed(config, {name: value}) != config]
            found = [" ".join(words)]
            break
    ranks = (2**k * world_size for k in range(1, 10))
    return found + [f"{n} ranks" for n in ranks if plan_memory(config, model, n).peak <= limit][:1]
