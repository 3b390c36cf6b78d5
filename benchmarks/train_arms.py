"""One side of the training benchmark in a process of its own: some real optimizer steps, each timed whole.

``python -m medtrain.benchmarks.train_arms JOB RESULT``, pickled files. A fresh process for each, so that no side finds the
other's memory, patches or settings, and one that dies is a line of the table.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils.import_utils import is_flash_attn_2_available

from medtrain.benchmarks.measure import clocks, cpu_memory, why_not
from medtrain.benchmarks.train_inputs import RPO, SEED, Inputs, Job, Measured, config, token_ids
from medtrain.trainer.config.settings import OptimConfig
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.distributed import join_world
from medtrain.trainer.train.schedule import lr_factor
from medtrain.trainer.train.setup import build, prepare
from medtrain.trainer.train.step import optimizer_step


class Meter(TrainerCallback):
    """Times steps from the end of one to the end of the next, the device idle at both; the one after the last is
    profiled for memory on the CPU instead."""

    def __init__(self, job: Job, found: Measured):
        self.device, self.steps, self.found = job.device, job.steps, found
        self._profile, self._memory, self._last = ExitStack(), [], 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._lap()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        found, ms = self.found, self._lap()
        if len(found.ms) == self.steps:  # the step after the last
            self._profile.close()
            found.extra_bytes = self._memory[0].peak
            return
        found.ms.append(ms)
        if self.device.type == "cuda":
            found.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        if len(found.ms) == self.steps and self.device.type == "cuda":
            found.clocks = clocks(self.device)
        elif len(found.ms) == self.steps:
            self._memory = self._profile.enter_context(cpu_memory())

    def _lap(self) -> float:
        """Milliseconds since the last call, once the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self._last = self._last, time.perf_counter()
        return 1e3 * (self._last - before)


def run_medtrain(job: Job) -> Measured:
    """Our step, as the training loop takes it."""
    arm, model, total = job.arm, job.model, job.total_steps
    settings, found = config(model, job.inputs, total, arm), Measured()
    optim = settings.optim
    with join_world(needs_group=model.precision != "float32", device_type=job.device.type) as world:
        prepared = prepare(settings, world)
        data = prepared.data
        found.paths = prepared.backends | ({"fp8": arm.fp8} if arm.fp8 else {})
        for step in range(job.steps):
            batches, _ = data.micro_batches(step, world)
            found.computed.append(sum(batch.input_ids.numel() for batch in batches))
            found.micro_batches.append(len(batches))
        with tempfile.TemporaryDirectory() as folder:
            built = build(settings, prepared, world, Path(folder), verify=False)
            parts = (built.policy, data, built.loss, built.optimizer)
            meter = Meter(job, found)
            meter.on_train_begin()
            for step in range(total):
                lr = optim.lr * lr_factor(optim, step, total)
                result = optimizer_step(*parts, step, world, lr=lr, grad_clip=optim.grad_clip, guard=built.guard)
                meter.on_step_end()
                found.losses.append(result.metrics["loss"])
                if model.stage == "rpo":
                    found.margins.append(result.metrics["rewards/margin"])
    return found


def run_trl(job: Job) -> Measured:
    """TRL's DPOTrainer on the same pairs in the same order, with the same loss, optimizer settings and precision.

    Reference log-probs are computed before, as ours are. The order is kept by a sequential sampler over rows that stand in
    our order. ``padding_free`` does nothing in TRL 1.16 (its documentation says so), so its batches are padded.
    """
    from datasets import Dataset, disable_progress_bars
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]  (it exports them lazily)

    disable_progress_bars()
    found, adapter, pairs_a_step = Measured(), job.inputs.adapter, job.model.pairs_a_step
    pairs_at_once = job.model.few_pairs if job.arm.few else pairs_a_step

    class Recorder(_recorder(DPOTrainer, found)):
        def training_step(self, model, inputs, *args):
            loss = super().training_step(model, inputs, *args)
            if len(found.margins) == self.state.global_step:
                found.margins.append(0)
            found.margins[-1] += self._metrics["train"]["rewards/margins"][-1] * pairs_at_once / pairs_a_step
            return loss

    peft = PeftConfig.from_pretrained(str(adapter)) if adapter is not None else None
    if peft is not None:
        peft.inference_mode = False
    args = DPOConfig(
        **_trainer_settings(job),
        per_device_train_batch_size=pairs_at_once,
        gradient_accumulation_steps=pairs_a_step // pairs_at_once,
        loss_type=[RPO["loss"], "sft"],
        loss_weights=[1.0, RPO["alpha"]],
        beta=RPO["beta"],
        max_length=None,
        precompute_ref_log_probs=True,
    )
    rows = [row for step in _rows_of_steps(job.inputs) for row in step]
    tokenizer = read_tokenizer(job.inputs.checkpoint)
    given = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer, "peft_config": peft}
    trainer = Recorder(model=_hf_model(job, found), args=args, callbacks=[Meter(job, found)], **given)
    for row, seen in zip(rows, trainer.train_dataset, strict=True):
        eos = {"prompt": [], "chosen": [0], "rejected": [0]}
        if any(seen[f"{name}_ids"] != token_ids(row[name]) + end for name, end in eos.items()):
            raise ValueError("TRL was given other tokens")
    if adapter is not None:
        # Only now: given as a PeftModel, TRL would keep a second copy of the adapter as the reference. B is zero, so
        # that the reference log-probs, which it has just computed, are those of this adapter too.
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(adapter)))
    trainer.train()
    return found


def run_trainer(job: Job) -> Measured:
    """Hugging Face's Trainer on the same documents in the same steps, one packed row each (DataCollatorWithFlattening)."""
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    found, eos = Measured(), [0]
    hf_model = _hf_model(job, found)
    flash = found.paths["attention"] == "flash_attention_2"
    flatten = DataCollatorWithFlattening(return_position_ids=job.arm.apart, return_flash_attn_kwargs=flash and job.arm.apart)
    rows = [[{"input_ids": token_ids(row["text"]) + eos} for row in step] for step in _rows_of_steps(job.inputs)]
    args = TrainingArguments(**_trainer_settings(job), per_device_train_batch_size=1, remove_unused_columns=False)
    given = {"train_dataset": rows, "data_collator": lambda batch: flatten(batch[0])}
    _recorder(Trainer, found)(model=hf_model, args=args, callbacks=[Meter(job, found)], **given).train()
    return found


def _rows_of_steps(inputs: Inputs) -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in inputs.rows.read_text(encoding="utf-8").splitlines()]
    return [[rows[i] for i in items] for items in inputs.order]


def _hf_model(job: Job, found: Measured) -> Any:
    """What is trained has float32 masters and computes in the precision by autocast; a frozen base lies in it."""
    low, checkpoint = job.model.precision == "bfloat16", job.inputs.checkpoint
    attention = "flash_attention_2" if job.device.type == "cuda" and low and is_flash_attn_2_available() else "sdpa"
    found.paths = {"attention": attention, "layers": "liger" if job.arm.liger else "transformers"}
    dtype = torch.bfloat16 if low and job.inputs.adapter else torch.float32
    options = {"attn_implementation": attention, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **options)


def _trainer_settings(job: Job) -> dict[str, Any]:
    """Settings of Hugging Face's Trainer and TRL's that make its step ours."""
    ours, device = OptimConfig(), job.device
    adam = {"optim": "adamw_torch_fused", "adam_beta1": ours.beta1, "adam_beta2": ours.beta2, "adam_epsilon": ours.eps}
    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return {
        "output_dir": str(job.inputs.checkpoint.parent / "trainer"),
        "seed": SEED,
        "max_steps": job.total_steps,
        "gradient_checkpointing": job.arm.checkpointing,
        "bf16": job.model.precision == "bfloat16",
        "use_cpu": device.type == "cpu",
        "use_liger_kernel": job.arm.liger,
        "learning_rate": job.model.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": ours.grad_clip,
        "dataloader_pin_memory": device.type == "cuda",
        **adam,
        **quiet,
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


RUNS = {"medtrain": run_medtrain, "trl": run_trl, "trainer": run_trainer}


def main(job_file: str, result_file: str) -> None:
    """The result is what the job measured, or the reason why there is nothing."""
    job: Job = pickle.loads(Path(job_file).read_bytes())
    try:
        found = RUNS[job.arm.impl](job)
        found.losses = [float(loss) for loss in found.losses]
    except Exception as error:  # whatever happens here is a line of the table
        found = why_not(error)
    Path(result_file).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
