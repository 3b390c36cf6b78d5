"""``medtrain bench train``: our step beside TRL's DPOTrainer (rpo) or Hugging Face's Trainer (cpt), on the same weights, rows
and precision: time, memory, padding and loss."""

from __future__ import annotations

import gc
import importlib.util
import logging
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

import medtrain
from medtrain.benchmarks import report
from medtrain.benchmarks.measure import spread_of
from medtrain.benchmarks.tables import name_of
from medtrain.benchmarks.train_inputs import CPT_MODELS, MODELS, Arm, Inputs, Job, Measured, Model, config, make_inputs
from medtrain.trainer.errors import bad_input
from medtrain.trainer.model.flops import FlopsPerToken, num_parameters, peak_flops
from medtrain.trainer.model.hf_config import parameter_shapes
from medtrain.trainer.model.lora import plan_adapters
from medtrain.trainer.model.precision import LEAST_CAPABILITY

log = logging.getLogger(__name__)

OURS = Arm("medtrain", note="one micro-batch a step, each layer recomputed in the backward")
SEPARATE = Arm(
    "medtrain", "separate prompts", "as medtrain, but a prompt is computed anew for each completion", share_prompts=False
)
KEPT = Arm("medtrain", "no recomputing", "all activations are kept", checkpointing=False)
KEPT_FEW = replace(KEPT, note="micro-batches within a small token budget", few=True)
FP8 = Arm("medtrain", "FP8 tensorwise", "as medtrain, its linear layers in FP8 by torchao", fp8="tensorwise")
ROWWISE = replace(FP8, variant="FP8 rowwise", fp8="rowwise")
COMPILED = Arm("medtrain", "compiled", "as medtrain, its layers by torch.compile", compiled=True)
FP8_COMPILED = replace(
    FP8, variant="FP8 tensorwise, compiled", note="as FP8 tensorwise, its layers by torch.compile", compiled=True
)
TRL = Arm("trl", note="one padded micro-batch a step, gradient checkpointing, transformers' own layers")
TRL_LIGER = Arm("trl", "Liger layers", "as trl, its layers Liger's", liger=True)
_FEW = "1 or 2 pairs a micro-batch, which pads less; it pools the NLL over each micro-batch, so that its loss is another"
TRL_FEW = Arm("trl", "few pairs", _FEW, few=True)
TRAINER = Arm("trainer", note="one packed row a step, documents apart, gradient checkpointing, transformers' own layers")
TRAINER_LIGER = Arm("trainer", "Liger", "as trainer, with use_liger_kernel: layers and fused cross-entropy", liger=True)
_TOGETHER = "as before, but a document attends to those before it in the row: another loss, and what SDPA needs no mask for"


def _kept(arm: Arm, note: str | None = None) -> Arm:
    return replace(arm, variant=f"{arm.variant}, no recomputing", note=note or arm.note, checkpointing=False)


TRL_KEPT = _kept(TRL_FEW, "as before, without gradient checkpointing")
TRL_KEPT_LIGER = replace(TRL_KEPT, variant=f"{TRL_KEPT.variant}, Liger layers", note="as before, its layers Liger's", liger=True)
TRAINER_KEPT = _kept(TRAINER_LIGER)
TRAINER_TOGETHER = replace(TRAINER_KEPT, variant=f"{TRAINER_KEPT.variant}, documents not apart", note=_TOGETHER, apart=False)
ARMS = {
    ("rpo", "small"): (OURS, SEPARATE, TRL),
    ("rpo", "quick"): (OURS, TRL, TRL_LIGER),
    ("rpo", "full"): (OURS, SEPARATE, KEPT_FEW, TRL, TRL_LIGER, TRL_FEW, TRL_KEPT, TRL_KEPT_LIGER),
    ("cpt", "small"): (OURS, KEPT, FP8, ROWWISE, COMPILED, TRAINER),
    ("cpt", "quick"): (OURS, TRAINER_LIGER, COMPILED, FP8_COMPILED, FP8, ROWWISE),
    ("cpt", "full"): (
        *(OURS, KEPT, COMPILED, _kept(COMPILED), FP8, FP8_COMPILED, _kept(FP8_COMPILED), _kept(FP8), ROWWISE),
        *(TRAINER, TRAINER_LIGER, TRAINER_KEPT, TRAINER_TOGETHER),
    ),
}
OF_STAGE = {"rpo": MODELS, "cpt": CPT_MODELS}
# Of each form: steps that are not counted, steps that are, seconds after which no row is begun, and most of one row.
STEPS = {"small": (2, 6), "quick": (3, 6), "full": (3, 12)}
BEGIN_SECONDS = {"small": math.inf, "quick": 300.0, "full": math.inf}
ROW_SECONDS = 900.0
FIRST_STEPS = 5  # whose losses are compared


def choose(name: str | None, device: torch.device, stage: str = "rpo") -> tuple[Model, ...]:
    """The models of ``--model``; without it, tiny on a CPU and the others on a GPU. InputError for one that is unknown, or
    needs a GPU where there is none."""
    models = OF_STAGE[stage]
    if name is None:
        return tuple(model for key, model in models.items() if (key == "tiny") == (device.type == "cpu"))
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
) -> tuple[dict[str, Any], Path]:
    """Run the benchmark; write ``OUT/train-STAGE-DEVICE-DATE.json``, a new file on every run, and its tables as Markdown.

    ``stage`` is cpt or rpo; ``models`` and ``arms`` replace the usual ones; ``quick``, on CUDA alone: fewer rows and steps, and
    no row begun after ``BEGIN_SECONDS``; ``commit`` is recorded where the source tree is not a git checkout. Returns what the
    JSON holds and its path; the file is written anew after every row, so a killed run leaves what it had.
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
        log.info(f"{model.name}, {model.how}, {model.precision} on {result['device']}")
        with tempfile.TemporaryDirectory(prefix="medtrain-bench-") as folder:
            inputs = make_inputs(model, Path(folder), warm_up + counted + 1, device)
            if device.type == "cuda":
                gc.collect()  # what the weights were drawn in: the rows' processes need it
                torch.cuda.empty_cache()
            shared, flops = _shared(model, inputs)
            for arm in ARMS[stage, form] if arms is None else arms:
                found: Measured | str | None = _unfit(arm, device)
                if found is None and time.monotonic() >= deadline:
                    found = "left out: the time of the quick form was up"
                if found is None:
                    found = _run_job(Job(arm, model, inputs, warm_up + counted, device), Path(folder))
                row = _row(arm, model, shared)
                if isinstance(found, str):
                    row["reason"] = found
                else:
                    row |= _results(model, inputs, flops, found, warm_up, peak_flops(device))
                result["rows"].append(row)
                log.info(f"  {name_of(row)}: {row['reason'] or 'timed'}")
                _compare_losses(result["rows"])
                report.save(path, result)
    return result, path


def _unfit(arm: Arm, device: torch.device) -> str | None:
    """Why this row cannot be measured here, whatever the model."""
    if arm.compiled and device.type != "cuda":
        return "left out: on a CPU compiling would take longer than all other rows"
    if arm.fp8 is not None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
            return "left out: this device has no FP8, and emulated it is slow by design"
        if importlib.util.find_spec("torchao") is None:
            return "left out: torchao is not installed"
    return None


def _run_job(job: Job, folder: Path) -> Measured | str:
    """What a process of its own found, or the reason why there is nothing."""
    job_file, result, log_file = (folder / name for name in ("job", "result", "log.txt"))
    result.unlink(missing_ok=True)
    job_file.write_bytes(pickle.dumps(job))
    # The process must find the same medtrain, installed or not, and datasets must keep its files within the folder.
    root = str(Path(medtrain.__file__).resolve().parent.parent)
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if job.device.type == "cuda":  # with several in sight, Hugging Face's Trainer would use them all
        env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = [sys.executable, "-m", "medtrain.benchmarks.train_arms", str(job_file), str(result)]
    with open(log_file, "w", encoding="utf-8") as output:
        try:
            done = subprocess.run(command, env=env, stdout=output, stderr=output, timeout=ROW_SECONDS)
        except subprocess.TimeoutExpired:
            return f"left out: not done after {ROW_SECONDS:.0f} seconds"
    if not result.exists():
        lines = [line for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return f"its process ended with status {done.returncode}: {lines[-1][:160] if lines else 'no output'}"
    return pickle.loads(result.read_bytes())


def _shared(model: Model, inputs: Inputs) -> tuple[dict[str, Any], np.ndarray]:
    """What the rows of one model share, and the model FLOPs of each step. The head is no work for the tokens of prompts;
    the loop's own mfu counts it for every token."""
    hf_config = AutoConfig.from_pretrained(inputs.checkpoint, local_files_only=True)
    shapes = parameter_shapes(hf_config)
    total, multiplied = num_parameters(shapes)
    flops = FlopsPerToken(hf_config, multiplied, plan_adapters(config(model, inputs, 1).lora, shapes))
    head = (4 if model.lora_rank else 6) * hf_config.hidden_size * hf_config.vocab_size
    size = "pairs_a_step" if model.stage == "rpo" else "tokens_a_step"
    shared = {
        "trained": model.how,
        "parameters": total,
        "lr": model.lr,
        size: getattr(model, size),
        "lengths": {name: {"min": min(n), "median": int(np.median(n)), "max": max(n)} for name, n in inputs.lengths.items()},
    }
    return shared, np.array([flops(w.tokens, w.attended) - head * (w.tokens - w.head_tokens) for w in inputs.works])


_RESULTS = ("tokens_per_second", "pairs_per_second", "mfu", "max_memory_gib", "step_extra_bytes", "useful_token_share")
_STEPS = ("ms_median", "ms_spread", "steps", "micro_batches_a_step", "losses", "margins", "loss_difference", "paths", "clocks")


def _row(arm: Arm, model: Model, shared: dict[str, Any]) -> dict[str, Any]:
    """One row of the benchmark file, as yet without results."""
    return {
        "impl": arm.impl,
        "variant": arm.variant,
        "model": model.name,
        "precision": model.precision if arm.fp8 is None else f"fp8-{arm.fp8}",
        **shared,
        "activation_checkpointing": arm.checkpointing,
        "same_pooling": arm.impl == "medtrain" or not arm.few and arm.apart,
        **dict.fromkeys(_RESULTS + _STEPS),
        "steps": 0,
        "note": arm.note,
        "reason": None,
    }


def _results(
    model: Model, inputs: Inputs, flops: np.ndarray, found: Measured, warm_up: int, peak: float | None
) -> dict[str, Any]:
    counted = slice(warm_up, len(found.ms))
    times, seconds = spread_of(found.ms[counted]), np.array(found.ms[counted]) / 1e3
    useful = np.array([work.tokens for work in inputs.works[counted]])
    per_second = float(np.median(flops[counted] / seconds))
    return {
        "tokens_per_second": float(np.median(useful / seconds)),
        "pairs_per_second": 1e3 * model.pairs_a_step / times["ms_median"] if model.stage == "rpo" else None,
        "mfu": per_second / peak if peak and model.precision == "bfloat16" else None,
        "max_memory_gib": None if found.peak_bytes is None else found.peak_bytes / 2**30,
        "step_extra_bytes": found.extra_bytes,
        "useful_token_share": float(useful.sum() / sum(found.computed[counted])),
        "steps": times.pop("rounds"),
        **times,
        "micro_batches_a_step": float(np.mean(found.micro_batches[counted])),
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
