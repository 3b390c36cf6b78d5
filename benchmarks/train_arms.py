"""One side of the training benchmark in a process of its own: some real optimizer steps, each timed whole.

``python -m medtrain.benchmarks.train_arms JOB.json RESULT.json``. A fresh process for each, so that no side finds the
other's memory, patches or settings, and one that dies is a line of the table.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from medtrain.benchmarks.measure import clocks, cpu_memory, why_not
from medtrain.benchmarks.train_inputs import RPO, SEED, Inputs, Model, config, most_tokens, token_ids


@dataclass(frozen=True)
class Arm:
    """One row to be: ``variant`` tells rows of one impl apart ("" is its default). ``few``: small micro-batches (of
    ``Model.few_tokens`` or ``few_pairs``) instead of one a step; ``share_prompts``, ``fp8`` (a recipe), ``compiled``: ours;
    ``liger``: TRL or Trainer with Liger's layers; ``apart`` false: Trainer's documents attend to those before them in the row."""

    impl: str
    variant: str = ""
    note: str = ""
    checkpointing: bool = True
    few: bool = False
    share_prompts: bool = True
    liger: bool = False
    fp8: str | None = None
    compiled: bool = False
    apart: bool = True


@dataclass
class Measured:
    """What a side found, by step: ``ms`` wall clock, ``losses`` and ``margins`` before the update, ``computed`` tokens the
    model was given, padding included, ``micro_batches``. ``peak_bytes``: CUDA's allocator, over all steps;
    ``extra_bytes``: on the CPU, most beyond what was there before it, over one more step. ``clocks``: of a GPU, right after
    the last step."""

    ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    paths: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, str] | None = None


class Meter:
    """Times steps from the end of one to the end of the next, the device idle at both; the one after the last is
    profiled for memory on the CPU instead."""

    def __init__(self, device: torch.device, steps: int, found: Measured):
        self.device, self.steps, self.found = device, steps, found
        self._profile, self._memory = ExitStack(), []

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._mark()

    def step_done(self) -> None:
        before = self._at
        self._mark()
        if len(self.found.ms) < self.steps:
            self.found.ms.append(1e3 * (self._at - before))
            if self.device.type == "cuda":
                self.found.peak_bytes = torch.cuda.max_memory_allocated(self.device)
                if len(self.found.ms) == self.steps:
                    self.found.clocks = clocks(self.device)
            elif len(self.found.ms) == self.steps:
                self._memory = self._profile.enter_context(cpu_memory())
        else:
            self._profile.close()
            self.found.extra_bytes = self._memory[0].peak

    def _mark(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._at = time.perf_counter()


def steps_to_run(device: torch.device, steps: int) -> int:
    """The timed steps, and on the CPU one more for memory."""
    return steps + (device.type == "cpu")


def run_medtrain(arm: Arm, model: Model, inputs: Inputs, steps: int, device: torch.device) -> Measured:
    """Our step, as the training loop takes it."""
    from medtrain.trainer.distributed import join_world
    from medtrain.trainer.train.schedule import lr_factor
    from medtrain.trainer.train.setup import build, prepare
    from medtrain.trainer.train.step import optimizer_step

    total = steps_to_run(device, steps)
    budget = model.few_tokens if arm.few else most_tokens(model)
    settings = config(
        model,
        inputs,
        total,
        micro_batch_tokens=budget,
        checkpointing=arm.checkpointing,
        share_prompts=arm.share_prompts,
        fp8=arm.fp8,
        compiled=arm.compiled,
    )
    optim, found = settings.optim, Measured()
    with join_world(needs_group=model.precision != "float32", device_type=device.type) as world:
        prepared = prepare(settings, world)
        data, found.paths = prepared.data, prepared.backends
        for step in range(steps):
            batches, _ = data.micro_batches(step, world)
            found.computed.append(sum(batch.input_ids.numel() for batch in batches))
            found.micro_batches.append(len(batches))
        with tempfile.TemporaryDirectory() as folder:
            built = build(settings, prepared, world, Path(folder), verify=False)
            meter = Meter(world.device, steps, found)
            meter.start()
            for step in range(total):
                lr = optim.lr * lr_factor(optim, step, total)
                result = optimizer_step(
                    built.policy,
                    data,
                    built.loss,
                    built.optimizer,
                    step,
                    world,
                    lr=lr,
                    grad_clip=optim.grad_clip,
                    guard=built.guard,
                )
                meter.step_done()
                found.losses.append(result.metrics["loss"])
                if model.stage == "rpo":
                    found.margins.append(result.metrics["rewards/margin"])
    if arm.fp8 is not None:
        found.paths["fp8"] = arm.fp8
    return found


def run_trl(arm: Arm, model: Model, inputs: Inputs, steps: int, device: torch.device) -> Measured:
    """TRL's DPOTrainer on the same pairs in the same order, with the same loss, optimizer settings and precision.

    Reference log-probs are computed before, as ours are. The order is kept by a sequential sampler over rows that stand in
    our order. ``padding_free`` does nothing in TRL 1.16 (its documentation says so), so its batches are padded.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available
    from trl import DPOConfig, DPOTrainer

    from medtrain.trainer.data.tokenizer import read_tokenizer

    disable_progress_bars()
    found, total = Measured(), steps_to_run(device, steps)
    meter = Meter(device, steps, found)
    on_cuda, low = device.type == "cuda", model.precision == "bfloat16"
    pairs_at_once = model.few_pairs if arm.few else model.pairs_a_step
    attention = "flash_attention_2" if on_cuda and low and is_flash_attn_2_available() else "sdpa"
    found.paths = {"attention": attention, "layers": "liger" if arm.liger else "transformers"}

    class Recorder(_recorder(DPOTrainer, found)):
        def training_step(self, model, inputs, *args):
            loss = super().training_step(model, inputs, *args)
            if len(found.margins) == self.state.global_step:
                found.margins.append(0)
            found.margins[-1] += self._metrics["train"]["rewards/margins"][-1] * pairs_at_once / pairs_a_step
            return loss

    pairs_a_step = model.pairs_a_step
    lines = inputs.rows.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(lines[i]) for items in inputs.order for i in items]
    # What is trained has float32 masters and computes in the precision by autocast; a frozen base lies in it.
    hf_model = AutoModelForCausalLM.from_pretrained(
        inputs.checkpoint,
        dtype=torch.bfloat16 if low and inputs.adapter else torch.float32,
        attn_implementation=attention,
        local_files_only=True,
    )
    peft = {}
    if inputs.adapter is not None:
        from peft import PeftConfig

        peft["peft_config"] = PeftConfig.from_pretrained(inputs.adapter)
        peft["peft_config"].inference_mode = False
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            **_trainer_settings(arm, model, folder, total, device),
            per_device_train_batch_size=pairs_at_once,
            gradient_accumulation_steps=pairs_a_step // pairs_at_once,
            loss_type=[RPO["loss"], "sft"],
            loss_weights=[1.0, RPO["alpha"]],
            beta=RPO["beta"],
            max_length=None,
            precompute_ref_log_probs=True,
        )
        trainer = Recorder(
            model=hf_model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=read_tokenizer(inputs.checkpoint),
            callbacks=[_timer(meter)],
            **peft,
        )
        for row, seen in zip(rows, trainer.train_dataset, strict=True):
            eos = {"prompt": [], "chosen": [0], "rejected": [0]}
            if any(seen[f"{name}_ids"] != token_ids(row[name]) + end for name, end in eos.items()):
                raise ValueError("TRL was given other tokens")
        if inputs.adapter is not None:
            from peft import load_peft_weights, set_peft_model_state_dict

            # Only now: given as a PeftModel, TRL would keep a second copy of the adapter as the reference. B is zero, so
            # that the reference log-probs, which it has just computed, are those of this adapter too.
            set_peft_model_state_dict(trainer.model, load_peft_weights(str(inputs.adapter)))
        trainer.train()
    found.losses = [float(loss) for loss in found.losses]
    return found


def run_trainer(arm: Arm, model: Model, inputs: Inputs, steps: int, device: torch.device) -> Measured:
    """Hugging Face's Trainer on the same documents in the same steps, one packed row each (DataCollatorWithFlattening)."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments
    from transformers.utils import is_flash_attn_2_available

    found, total = Measured(), steps_to_run(device, steps)
    meter, low = Meter(device, steps, found), model.precision == "bfloat16"
    flash = device.type == "cuda" and low and is_flash_attn_2_available()
    attention = "flash_attention_2" if flash else "sdpa"
    found.paths = {"attention": attention, "layers": "liger" if arm.liger else "transformers"}
    lines = inputs.rows.read_text(encoding="utf-8").splitlines()
    eos = [0]
    rows = [[{"input_ids": token_ids(json.loads(lines[i])["text"]) + eos} for i in items] for items in inputs.order]
    flatten = DataCollatorWithFlattening(return_position_ids=arm.apart, return_flash_attn_kwargs=flash and arm.apart)
    # Float32 masters, computed in the precision by autocast.
    hf_model = AutoModelForCausalLM.from_pretrained(
        inputs.checkpoint, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            **_trainer_settings(arm, model, folder, total, device), per_device_train_batch_size=1, remove_unused_columns=False
        )
        trainer = _recorder(Trainer, found)(
            model=hf_model,
            args=args,
            train_dataset=rows,
            data_collator=lambda batch: flatten(batch[0]),
            callbacks=[_timer(meter)],
        )
        trainer.train()
    found.losses = [float(loss) for loss in found.losses]
    return found


def _trainer_settings(arm: Arm, model: Model, folder: str, steps: int, device: torch.device) -> dict[str, Any]:
    """Settings of Hugging Face's Trainer and TRL's that make its step ours."""
    from medtrain.trainer.config.settings import OptimConfig

    ours = OptimConfig()
    return {
        "output_dir": folder,
        "seed": SEED,
        "max_steps": steps,
        "gradient_checkpointing": arm.checkpointing,
        "bf16": model.precision == "bfloat16",
        "use_cpu": device.type == "cpu",
        "use_liger_kernel": arm.liger,
        "learning_rate": model.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": ours.beta1,
        "adam_beta2": ours.beta2,
        "adam_epsilon": ours.eps,
        "weight_decay": 0.0,
        "max_grad_norm": ours.grad_clip,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
    }


def _recorder(trainer: type, found: Measured) -> type:
    """A Trainer that takes its rows as they stand and notes what each step computes and loses."""

    class Recorder(trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model, inputs, *args):
            step = self.state.global_step
            if len(found.losses) == step:
                for sums in (found.losses, found.computed, found.micro_batches):
                    sums.append(0)
            found.computed[step] += inputs["input_ids"].numel()
            found.micro_batches[step] += 1
            loss = super().training_step(model, inputs, *args)
            found.losses[step] += loss.detach()  # a tensor until the end: reading it here would wait for the device
            return loss

    return Recorder


def _timer(meter: Meter):
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_train_begin(self, *_, **__):
            meter.start()

        def on_step_end(self, *_, **__):
            meter.step_done()

    return Timer()


RUNS = {"medtrain": run_medtrain, "trl": run_trl, "trainer": run_trainer}


def main(job: str, result: str) -> None:
    """Run what the job file says; the result holds ``Measured``, or the ``reason`` why there is none."""
    about: dict[str, Any] = json.loads(Path(job).read_text(encoding="utf-8"))
    paths = {name: about["inputs"][name] and Path(about["inputs"][name]) for name in ("checkpoint", "rows", "adapter")}
    inputs = Inputs(**paths, order=about["inputs"]["order"])
    arm, model = Arm(**about["arm"]), Model(**about["model"])
    try:
        found = asdict(RUNS[arm.impl](arm, model, inputs, about["steps"], torch.device(about["device"])))
    except Exception as error:  # whatever happens here is a line of the table
        found = {"reason": why_not(error)}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
