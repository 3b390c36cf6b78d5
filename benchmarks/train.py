"""Our step beside its peers on the same weights, rows and precision: time, memory, padding and loss.

medtrain bench train --stage rpo [--model tiny|1.5b|7b] [--quick] [--out DIR]             beside TRL's DPOTrainer
medtrain bench train --stage cpt [--model tiny|0.5b|1.5b|7b] [--quick] [--out DIR]        beside Hugging Face's Trainer
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

import medtrain
from medtrain.benchmarks import report
from medtrain.benchmarks.measure import times_of
from medtrain.benchmarks.train_arms import Arm, Measured, steps_to_run
from medtrain.benchmarks.train_inputs import CPT_MODELS, MODELS, Inputs, Model, Work, config, make_inputs, most_tokens, token_ids
from medtrain.trainer.config.settings import Config
from medtrain.trainer.data.pairs import load_pairs
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.errors import bad_input
from medtrain.trainer.files import write_json
from medtrain.trainer.model.flops import FlopsPerToken, num_parameters, peak_flops
from medtrain.trainer.model.lora import plan_adapters
from medtrain.trainer.model.policy import parameter_shapes
from medtrain.trainer.model.precision import LEAST_CAPABILITY

OURS = Arm("medtrain", note="one micro-batch a step, each layer recomputed in the backward")
SEPARATE = Arm(
    "medtrain", "separate prompts", "as medtrain, but a prompt is computed anew for each completion", share_prompts=False
)
TRL = Arm("trl", note="one padded micro-batch a step, gradient checkpointing, transformers' own layers")
TRL_LIGER = Arm("trl", "Liger layers", "as trl, its layers Liger's", liger=True)
KEPT = Arm("medtrain", "no recomputing", "all activations are kept", checkpointing=False)
FP8 = Arm("medtrain", "FP8 tensorwise", "as medtrain, its linear layers in FP8 by torchao", fp8="tensorwise")
ROWWISE = Arm("medtrain", "FP8 rowwise", "as medtrain, its linear layers in FP8 by torchao", fp8="rowwise")
COMPILED = Arm("medtrain", "compiled", "as medtrain, its layers by torch.compile", compiled=True)
FP8_COMPILED = Arm(
    "medtrain", "FP8 tensorwise, compiled", "as FP8 tensorwise, its layers by torch.compile", fp8="tensorwise", compiled=True
)
TRAINER = Arm("trainer", note="one packed row a step, documents apart, gradient checkpointing, transformers' own layers")
TRAINER_LIGER = Arm("trainer", "Liger", "as trainer, with use_liger_kernel: layers and fused cross-entropy", liger=True)
TITAN = Arm("torchtitan")
RPO_ARMS = {
    "small": (OURS, SEPARATE, TRL),
    "quick": (OURS, TRL, TRL_LIGER),
    "full": (
        OURS,
        SEPARATE,
        Arm("medtrain", "no recomputing", "micro-batches within a small token budget", checkpointing=False, few=True),
        TRL,
        TRL_LIGER,
        Arm(
            "trl",
            "few pairs",
            "1 or 2 pairs a micro-batch, which pads less; it pools the NLL over each micro-batch, so that its loss is another",
            few=True,
        ),
        Arm("trl", "few pairs, no recomputing", "as before, without gradient checkpointing", checkpointing=False, few=True),
        Arm(
            "trl",
            "few pairs, no recomputing, Liger layers",
            "as before, its layers Liger's",
            checkpointing=False,
            few=True,
            liger=True,
        ),
    ),
}
CPT_ARMS = {
    "small": (OURS, KEPT, FP8, ROWWISE, COMPILED, TRAINER, TITAN),
    "quick": (OURS, TRAINER_LIGER, COMPILED, FP8_COMPILED, FP8, ROWWISE, TITAN),
    "full": (
        OURS,
        KEPT,
        COMPILED,
        Arm("medtrain", "compiled, no recomputing", COMPILED.note, compiled=True, checkpointing=False),
        FP8,
        FP8_COMPILED,
        Arm(
            "medtrain",
            "FP8 tensorwise, compiled, no recomputing",
            FP8_COMPILED.note,
            fp8="tensorwise",
            compiled=True,
            checkpointing=False,
        ),
        Arm("medtrain", "FP8 tensorwise, no recomputing", FP8.note, fp8="tensorwise", checkpointing=False),
        ROWWISE,
        TRAINER,
        TRAINER_LIGER,
        Arm("trainer", "Liger, no recomputing", TRAINER_LIGER.note, liger=True, checkpointing=False),
        Arm(
            "trainer",
            "Liger, no recomputing, documents not apart",
            "as before, but a document attends to those before it in the row: another loss, and what SDPA needs no mask for",
            liger=True,
            checkpointing=False,
            apart=False,
        ),
        TITAN,
    ),
}
ARMS = {"rpo": RPO_ARMS, "cpt": CPT_ARMS}
OF_STAGE = {"rpo": MODELS, "cpt": CPT_MODELS}
ON_GPU = {"rpo": ("1.5b", "7b"), "cpt": ("0.5b", "1.5b", "7b")}
# Of each form: steps that are not counted, steps that are, seconds after which no row is begun, and most of one row.
STEPS = {"small": (2, 6), "quick": (3, 6), "full": (3, 12)}
BEGIN_SECONDS = {"small": math.inf, "quick": 300.0, "full": math.inf}
ROW_SECONDS = 900.0
FIRST_STEPS = 5  # whose losses are compared


def choose(name: str | None, device: torch.device, stage: str = "rpo") -> tuple[Model, ...]:
    """The models of ``--model``; without it, tiny on a CPU and the others on a GPU.

    Raises:
        InputError: an unknown one, or one that needs a GPU where there is none.
    """
    models = OF_STAGE[stage]
    if name is None:
        return (models["tiny"],) if device.type == "cpu" else tuple(models[name] for name in ON_GPU[stage])
    if name not in models:
        raise bad_input("unknown model", field="--model", found=name, expected=" | ".join(models))
    if device.type == "cpu" and name != "tiny":
        raise bad_input("needs a GPU, and there is none", field="--model", found=name, expected="tiny")
    return (models[name],)


def run_train(
    out: str | Path,
    *,
    stage: str = "rpo",
    models: tuple[Model, ...] | None = None,
    quick: bool = False,
    commit: str | None = None,
    arms: Iterable[Arm] | None = None,
    device: torch.device | None = None,
    echo: Callable[[str], None] = print,
) -> tuple[dict[str, Any], Path]:
    """Run the benchmark; write ``OUT/train-STAGE-DEVICE-DATE.json`` and, beside it, its table as Markdown.

    Args:
        stage: ``rpo`` or ``cpt``.
        out: folder, made if need be. Files there are never overwritten: a second run of a day gets a number.
        models: instead of the usual ones of the device.
        quick: on CUDA, fewer rows and steps, and no row begun after ``BEGIN_SECONDS``; the CPU has one form.
        commit: recorded where the source tree is not a git checkout.
        arms: rows to run, instead of those of the form.
        device: where to run; the GPU if there is one.

    Returns:
        (what the JSON holds, its path). The file is written anew after every row, so a killed run leaves what it had.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    form = "small" if device.type == "cpu" else "quick" if quick else "full"
    warm_up, counted = STEPS[form]
    deadline = time.monotonic() + BEGIN_SECONDS[form]
    result = report.header(f"train-{stage}", device, commit) | {"form": form, "rows": []}
    path = report.free_path(out, f"train-{stage}", device)
    for model in models or choose(None, device, stage):
        echo(f"{model.name}, {model.how}, {model.precision} on {result['device']}")
        with tempfile.TemporaryDirectory(prefix="medtrain-bench-") as folder:
            steps = warm_up + counted
            inputs, work = make_inputs(model, Path(folder), steps_to_run(device, steps), device)
            if device.type == "cuda":
                gc.collect()  # what the weights were drawn in: the rows' processes need it
                torch.cuda.empty_cache()
            about = _about(model, inputs, work[:steps], device)
            for arm in ARMS[stage][form] if arms is None else arms:
                found: Measured | str | None = _unfit(arm, device)
                if found is None and time.monotonic() >= deadline:
                    found = "left out: the time of the quick form was up"
                if found is None:
                    found = _run_arm(arm, model, inputs, steps, device, Path(folder))
                result["rows"].append(_row(arm, model, about, found, warm_up))
                label = f"{arm.impl} {arm.variant}".strip()
                echo(f"  {label}: {found if isinstance(found, str) else 'timed'}")
                _compare_losses(result["rows"])
                write_json(path, result)
                path.with_suffix(".md").write_text(report.markdown(result), encoding="utf-8")
    return result, path


def _unfit(arm: Arm, device: torch.device) -> str | None:
    """Why this row cannot be measured here, whatever the model."""
    if arm.impl == "torchtitan":
        if importlib.util.find_spec("torchtitan") is None:
            return "not installed: torchtitan"
        return (
            "left out: its Trainer is built from a configuration of its own that changes between releases, and takes no rows "
            "of ours. Compare by its own command: torchrun --nproc-per-node 1 -m torchtitan.train on the same sizes, with "
            "tokens/s and mfu from its log"
        )
    if arm.compiled and device.type != "cuda":
        return "left out: on a CPU compiling would take longer than all other rows"
    if arm.fp8 is not None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
            return "left out: this device has no FP8, and emulated it is slow by design"
        if importlib.util.find_spec("torchao") is None:
            return "left out: torchao is not installed"
    return None


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of our own step that have no result, but for want of memory or time: what must not pass unseen."""
    return [
        f"{row['model']} {row['variant']}".strip() + f": {row['reason']}"
        for row in rows
        if row["impl"] == "medtrain" and row["reason"] and not row["reason"].startswith(("out of memory", "left out"))
    ]


def _run_arm(arm: Arm, model: Model, inputs: Inputs, steps: int, device: torch.device, folder: Path) -> Measured | str:
    """What a process of its own found, or the reason why there is nothing."""
    job, result, log = (folder / name for name in ("job.json", "result.json", "log.txt"))
    result.unlink(missing_ok=True)
    job.write_text(
        json.dumps(
            {"arm": asdict(arm), "model": asdict(model), "inputs": asdict(inputs), "steps": steps, "device": device.type},
            default=str,
        ),
        encoding="utf-8",
    )
    # The process must find the same medtrain, installed or not, and datasets must keep its files within the folder.
    root = str(Path(medtrain.__file__).resolve().parent.parent)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HOME": str(folder / "hf"),
    }
    env = {name: value for name, value in env.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if device.type == "cuda":  # with several in sight, Hugging Face's Trainer would use them all
        env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = [sys.executable, "-m", "medtrain.benchmarks.train_arms", str(job), str(result)]
    with open(log, "w", encoding="utf-8") as output:
        try:
            done = subprocess.run(command, env=env, stdout=output, stderr=output, timeout=ROW_SECONDS)
        except subprocess.TimeoutExpired:
            return f"left out: not done after {ROW_SECONDS:.0f} seconds"
    if not result.exists():
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return f"its process ended with status {done.returncode}: {lines[-1][:160] if lines else 'no output'}"
    found = json.loads(result.read_text(encoding="utf-8"))
    return found["reason"] if "reason" in found else Measured(**found)


def _about(model: Model, inputs: Inputs, work: list[Work], device: torch.device) -> dict[str, Any]:
    """What the rows of one model share, and ``work`` and FLOPs of its steps."""
    settings: Config = config(model, inputs, 1, micro_batch_tokens=most_tokens(model), checkpointing=True)
    hf_config = AutoConfig.from_pretrained(inputs.checkpoint, local_files_only=True)
    shapes = parameter_shapes(hf_config)
    total, multiplied = num_parameters(shapes)
    flops = FlopsPerToken(hf_config, multiplied, plan_adapters(settings.lora, shapes))
    # The head is no work for the tokens of prompts; the loop's own mfu counts it for every token.
    head = (4 if model.lora_rank else 6) * hf_config.hidden_size * hf_config.vocab_size
    if model.stage == "cpt":
        texts = inputs.rows.read_text(encoding="utf-8").splitlines()
        lengths = {"document": np.array([len(token_ids(json.loads(line)["text"])) + 1 for line in texts])}
    else:
        tokenizer = read_tokenizer(inputs.checkpoint)
        pairs = load_pairs(settings.data.pairs[0], tokenizer, max_length=settings.data.max_length)
        prompt, *sides = np.diff(pairs.offsets).reshape(-1, 3).T
        lengths = {"prompt": prompt, "completion": np.concatenate(sides)}
    peak = peak_flops(device) if model.precision == "bfloat16" else None
    return {
        "parameters": total,
        "work": work,
        "flops": [flops(w.tokens, w.attended) - head * (w.tokens - w.head_tokens) for w in work],
        "peak": peak,
        "lengths": {name: _spread(found) for name, found in lengths.items()},
    }


def _spread(lengths: np.ndarray) -> dict[str, int]:
    return {"min": int(lengths.min()), "median": int(np.median(lengths)), "max": int(lengths.max())}


def _row(arm: Arm, model: Model, about: dict[str, Any], found: Measured | str, warm_up: int) -> dict[str, Any]:
    """One row of the benchmark file."""
    row: dict[str, Any] = {
        "impl": arm.impl,
        "variant": arm.variant,
        "model": model.name,
        "precision": model.precision if arm.fp8 is None else f"fp8-{arm.fp8}",
        "trained": model.how,
        "parameters": about["parameters"],
        "lr": model.lr,
        **({"pairs_a_step": model.pairs_a_step} if model.stage == "rpo" else {"tokens_a_step": model.tokens_a_step}),
        "lengths": about["lengths"],
        "activation_checkpointing": arm.checkpointing,
        "same_pooling": arm.impl == "medtrain" or not arm.few and arm.apart,
        "tokens_per_second": None,
        "pairs_per_second": None,
        "mfu": None,
        "max_memory_gib": None,
        "step_extra_bytes": None,
        "useful_token_share": None,
        "ms_median": None,
        "ms_spread": None,
        "steps": 0,
        "micro_batches_a_step": None,
        "losses": None,
        "margins": None,
        "loss_difference": None,
        "paths": None,
        "clocks": None,
        "note": arm.note,
        "reason": found if isinstance(found, str) else None,
    }
    if isinstance(found, str):
        return row
    work, flops = about["work"][warm_up:], about["flops"][warm_up:]
    seconds = np.array(found.ms[warm_up:]) / 1e3
    times = times_of(found.ms[warm_up:])
    useful = np.array([w.tokens for w in work])
    computed = np.array(found.computed[warm_up : len(found.ms)])
    return row | {
        "tokens_per_second": float(np.median(useful / seconds)),
        "pairs_per_second": 1e3 * model.pairs_a_step / times.median if model.stage == "rpo" else None,
        "mfu": float(np.median(np.array(flops) / seconds)) / about["peak"] if about["peak"] else None,
        "max_memory_gib": None if found.peak_bytes is None else found.peak_bytes / 2**30,
        "step_extra_bytes": found.extra_bytes,
        "useful_token_share": float(useful.sum() / computed.sum()),
        "ms_median": times.median,
        "ms_spread": times.spread,
        "steps": times.rounds,
        "micro_batches_a_step": float(np.mean(found.micro_batches[warm_up : len(found.ms)])),
        "losses": found.losses[:FIRST_STEPS],
        "margins": found.margins[:FIRST_STEPS] or None,
        "paths": found.paths,
        "clocks": found.clocks,
    }


def _compare_losses(rows: list[dict[str, Any]]) -> None:
    """Fill in ``loss_difference``: the largest of the first steps, relative, to our first row of the same model."""
    for row in rows:
        ours = [r for r in rows if r["impl"] == "medtrain" and r["model"] == row["model"] and r["losses"]]
        if ours and row["losses"]:
            pairs = zip(row["losses"], ours[0]["losses"], strict=True)
            row["loss_difference"] = max(abs(theirs / our - 1) for theirs, our in pairs)
