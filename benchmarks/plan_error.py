"""The memory plan beside the measured peak: real steps of small models on a CPU, one and two ranks, every allocation counted.

python -m medtrain.benchmarks.plan_error --out benchmarks/results
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedTokenizerFast

from medtrain.trainer.config.settings import Config, config_from_dict
from medtrain.trainer.distributed import World, join_world, local_tensor, unwrapped
from medtrain.trainer.model.attention import packed_layout
from medtrain.trainer.model.lora import fill_adapters
from medtrain.trainer.model.policy import build_model
from medtrain.trainer.plan.memory import Machine, Step, moments, read_model
from medtrain.trainer.processes import clean_context
from medtrain.trainer.run.folder import commit, device_name, versions
from medtrain.trainer.train.cpt import CptLoss
from medtrain.trainer.train.optimizer import make_optimizer
from medtrain.trainer.train.rpo import PreferenceLoss
from medtrain.trainer.train.setup import prepare
from medtrain.trainer.train.step import _clip
from medtrain.trainer.weights.load import init_weights

SIZES = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
LENGTH, DOCUMENTS = 255, 4  # every micro-batch: four documents of 256 tokens with their end

Case = tuple[int, str, dict[str, Any]]  # ranks, stage, settings changed; a step has two micro-batches unless it says batch_tokens

SELECTIVE = {"model.activation_checkpointing": "selective"}
COPIES, WHOLE = {"parallel.replicate": 2}, {"parallel.reshard_after_forward": False}
BF16, FULL = {"precision.compute": "bfloat16"}, {"model.activation_checkpointing": "full"}
TIED, FEW_WORDS, RANK = {"model.init.tie_word_embeddings": True}, {"model.init.vocab_size": 512}, {"lora.rank": 8}
WIDE = {"model.init.hidden_size": 1024, "model.init.intermediate_size": 2816}
SMALL_WEIGHTS, EIGHT_BIT = {"precision.weights": "bf16"}, {"optim.state": "8bit"}
FP8 = {"precision.fp8": "tensorwise", "precision.fp8_emulate": True}

CASES: dict[str, Case] = {
    "CPT, float32, alone": (1, "cpt", {}),
    "CPT, float32, alone, checkpointing": (1, "cpt", FULL),
    "CPT, float32": (2, "cpt", {}),
    "CPT, float32, one micro-batch": (2, "cpt", {"optim.batch_tokens": 2 * LENGTH * DOCUMENTS}),
    "CPT, float32, no kept exponentials": (2, "cpt", {"model.keep_bytes": 0}),
    "CPT, bf16, alone": (1, "cpt", BF16),
    "CPT, bf16": (2, "cpt", BF16),
    "CPT, bf16, checkpointing": (2, "cpt", BF16 | FULL),
    "CPT, bf16, checkpointing, 8 ranks": (8, "cpt", BF16 | FULL),
    "CPT, tied head, float32": (2, "cpt", TIED),
    "CPT, tied head, bf16": (2, "cpt", TIED | BF16),
    "CPT, few words, bf16": (2, "cpt", FEW_WORDS | BF16),
    "CPT, few words, bf16, checkpointing": (2, "cpt", FEW_WORDS | BF16 | FULL),
    "CPT, few words, float32, alone, checkpointing": (1, "cpt", FEW_WORDS | FULL),
    "CPT, few words, wide layers, bf16, checkpointing": (2, "cpt", FEW_WORDS | WIDE | BF16 | FULL),
    "CPT, Qwen3, float32, alone": (1, "cpt", {"model.init.model_type": "qwen3"}),
    "CPT, float32, alone, selective checkpointing": (1, "cpt", SELECTIVE),
    "CPT, few words, bf16, selective checkpointing": (2, "cpt", FEW_WORDS | BF16 | SELECTIVE),
    "CPT, bf16, two copies": (4, "cpt", BF16 | COPIES),
    "CPT, few words, wide layers, bf16, two copies, checkpointing": (8, "cpt", FEW_WORDS | WIDE | BF16 | COPIES | FULL),
    "CPT, few words, wide layers, bf16 weights, two copies, checkpointing": (
        8,
        "cpt",
        FEW_WORDS | WIDE | BF16 | COPIES | FULL | SMALL_WEIGHTS,
    ),
    "CPT, few words, wide layers, bf16, layers kept whole": (4, "cpt", FEW_WORDS | WIDE | BF16 | WHOLE | FULL),
    "CPT, few words, wide layers, bf16, 2 layers ahead": (4, "cpt", FEW_WORDS | WIDE | BF16 | FULL | {"parallel.prefetch": 2}),
    "RPO, float32": (2, "rpo", {}),
    "RPO, bf16, alone, checkpointing": (1, "rpo", BF16 | FULL),
    "CPT, bf16 weights, alone": (1, "cpt", BF16 | SMALL_WEIGHTS),
    "CPT, bf16 weights, checkpointing": (2, "cpt", BF16 | FULL | SMALL_WEIGHTS),
    "CPT, bf16 weights, checkpointing, one micro-batch": (
        2,
        "cpt",
        BF16 | FULL | SMALL_WEIGHTS | {"optim.batch_tokens": 2 * LENGTH * DOCUMENTS},
    ),
    "CPT, 8-bit moments, float32, alone": (1, "cpt", EIGHT_BIT),
    "CPT, 8-bit moments, bf16, 8 ranks": (8, "cpt", BF16 | EIGHT_BIT),
    "CPT, bf16 weights, 8-bit moments, 8 ranks": (8, "cpt", BF16 | FULL | SMALL_WEIGHTS | EIGHT_BIT),
    "RPO, bf16 weights, 8-bit moments, checkpointing": (2, "rpo", BF16 | FULL | SMALL_WEIGHTS | EIGHT_BIT),
    "CPT, few words, wide layers, bf16 weights, 8-bit moments, 8 ranks": (
        8,
        "cpt",
        FEW_WORDS | WIDE | BF16 | FULL | SMALL_WEIGHTS | EIGHT_BIT,
    ),
    "CPT, FP8 tensorwise (emulated), bf16, checkpointing": (2, "cpt", FEW_WORDS | BF16 | FULL | FP8),
    "CPT, FP8 tensorwise (emulated), bf16": (2, "cpt", BF16 | FP8),
    "CPT, FP8 rowwise (emulated), bf16, checkpointing": (2, "cpt", FEW_WORDS | BF16 | FULL | FP8 | {"precision.fp8": "rowwise"}),
    "CPT, FP8 all-gather (emulated), wide layers, bf16, checkpointing": (
        2,
        "cpt",
        FEW_WORDS | WIDE | BF16 | FULL | FP8 | {"precision.fp8_all_gather": True},
    ),
    "CPT, LoRA, float32, alone": (1, "cpt", RANK),
    "CPT, LoRA, bf16, checkpointing": (2, "cpt", RANK | BF16 | FULL),
    "RPO, QLoRA, bf16": (2, "rpo", RANK | {"lora.base": "nf4"} | BF16),
}


def settings_of(stage: str, changes: dict[str, Any], world_size: int, folder: Path) -> Config:
    """The settings of one case, its made-up data below ``folder`` (written by :func:`write_data`)."""
    capacity = LENGTH * DOCUMENTS
    tree: dict[str, Any] = {
        "model": {"init": dict(SIZES), "tokenizer": str(folder / "tokenizer")},
        "data": {"cache": str(folder / "cache")},
        "optim": {"steps": 3, "micro_batch_tokens": capacity},
        "run": {"out": str(folder / "run")},
    }
    if stage == "cpt":
        tree["data"] |= {"sources": [{"path": str(folder / "text.jsonl")}], "seq_len": LENGTH + 1}
        tree["optim"]["batch_tokens"] = 2 * world_size * capacity
    else:
        tree["data"] |= {"pairs": [{"path": str(folder / "pairs.jsonl")}], "max_length": LENGTH + 1}
        tree["optim"]["batch_pairs"] = 2 * world_size * DOCUMENTS
    for name, value in changes.items():
        node = tree
        *sections, key = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return config_from_dict(stage, tree)


def write_data(folder: Path) -> None:
    """A word-level tokenizer, documents of LENGTH words, and pairs that come to LENGTH tokens of one prompt and two sides."""
    words = [f"w{i}" for i in range(20)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "</s>", "<unk>"])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder / "tokenizer")

    def text(seed: int, num: int) -> str:
        return " ".join(words[i] for i in torch.randint(20, (num,), generator=torch.Generator().manual_seed(seed)).tolist())

    with (folder / "text.jsonl").open("w") as file:
        for i in range(128):
            file.write(json.dumps({"text": text(i, LENGTH)}) + "\n")
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(64):
            row = {"prompt": text(1000 + i, 95), "chosen": text(2000 + i, 80), "rejected": text(3000 + i, 80)}
            file.write(json.dumps(row) + "\n")


def measure(config: Config, world: World) -> tuple[dict[str, int], Step]:
    """Bytes of one step after the first, by the profiler's count of every allocation: ``held`` before it, and the most in
    ``forward`` and ``backward`` of its last micro-batch and in ``step`` (clipping and optimizer)."""
    torch.manual_seed(0)
    prepared = prepare(config, world)
    backend = prepared.backends["attention"]
    policy = build_model(
        config.model,
        prepared.hf_config,
        world,
        prepared.compute_dtype,
        backend=backend,
        adapters=prepared.adapters,
        fp8=prepared.fp8,
        parallel=config.parallel,
        weights_dtype=torch.bfloat16 if config.precision.weights == "bf16" else torch.float32,
    )
    init_weights(policy, 0)
    if prepared.adapters is not None:
        fill_adapters(policy, prepared.adapters, 0)
    data = prepared.data
    # Any reference will do for memory.
    zeros = [torch.zeros(pairs.num_pairs, 2, dtype=torch.float64) for pairs in data.sources] if config.stage == "rpo" else []
    loss_of = PreferenceLoss(config.rpo, data, zeros) if config.stage == "rpo" else CptLoss(data)
    optimizer = make_optimizer(policy, config)
    guard = None
    if prepared.fp8 is not None:
        from medtrain.trainer.model.fp8 import Guard  # torchao, for the cases that need it

        guard = Guard(config.precision, policy, world)
    seen: list[Any] = []

    def micro_batches(step: int) -> None:
        batches, n = data.micro_batches(step, world)
        seen[:] = [batches[-1], len(batches)]
        for i, batch in enumerate(batches):
            if world.replicas > 1:
                policy.set_requires_all_reduce(i == len(batches) - 1)
            with record_function("plan: forward"):
                loss, _ = loss_of(policy, batch, n)
            with record_function("plan: backward"):
                (loss * world.size).backward()
            del loss
        with record_function("plan: step"):
            _clip(policy, config.optim.grad_clip)
            optimizer.step()
            if guard is not None:
                guard.rescale()
            optimizer.zero_grad(set_to_none=True)

    micro_batches(0)
    gc.collect()
    gc.disable()
    held = _held(policy, optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        micro_batches(1)
    gc.enable()
    batch, num_batches = seen
    return _peaks(profiled, held), _step_of(batch, policy, num_batches > 1)


def _held(policy, optimizer) -> int:
    storages = {}
    tensors = [*policy.parameters(), *policy.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        storage = unwrapped(local_tensor(tensor)).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _peaks(profiled, held: int) -> dict[str, int]:
    events = profiled.profiler.kineto_results.events()
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda e: e[0])
    peaks = {"held": held}
    for name in ("forward", "backward", "step"):
        spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == f"plan: {name}"]
        start, end = max(spans)
        now = peak = 0
        for time, nbytes in changes:
            if time > end:
                break
            now += nbytes
            if time >= start:
                peak = max(peak, now)
        peaks[name] = held + peak
    peaks["peak"] = max(peaks.values())
    return peaks


def _step_of(batch, policy, accumulates: bool) -> Step:
    layout = packed_layout(batch, policy.backend)
    keys = len(batch.input_ids) if batch.key_index is None else len(batch.key_index)
    rows = (1, sum(r * length for r, length, _ in layout.groups))
    if len(layout.groups) > 1 or layout.groups[0][0] > 1:
        rows = (2, rows[1] // 2)
    return Step(len(batch.input_ids), batch.num_counted, keys, accumulates, rows)


def compare(case: Case, folder: Path, world: World) -> dict[str, Any]:
    """Measured and planned bytes of one case on this rank, and their relative ``error`` at the peak."""
    world_size, stage, changes = case
    config = settings_of(stage, changes, world_size, folder)
    measured, step = measure(config, world)
    hf_config = prepare(config, world).hf_config
    found = moments(config, read_model(config, hf_config), Machine(world_size, "cpu"), step)
    planned = {"held": found[-1].parts["weights"] + found[-1].parts["optimizer"]}
    for part, first in (("forward", "forward"), ("backward", "backward"), ("step", "optimizer")):
        planned[part] = max(moment.total for moment in found if moment.name.startswith(first))
    planned["peak"] = max(planned.values())
    return {
        "stage": stage,
        "ranks": world_size,
        "settings": changes,
        "tokens": step.tokens,
        "measured_bytes": measured,
        "planned_bytes": planned,
        "planned_moments": {m.name: m.total for m in found},
        "error": planned["peak"] / measured["peak"] - 1,
    }


def _rank(rank: int, backend: str, case: Case, folder: str, queue) -> None:
    torch.set_num_threads(1)
    os.environ["KINETO_LOG_LEVEL"] = "99"
    size = case[0]
    if backend == "fake":
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    elif size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    config = settings_of(*case[1:], size, Path(folder))
    with join_world(
        needs_group=config.precision.compute == "bfloat16", device_type="cpu", replicate=config.parallel.replicate
    ) as world:
        row = compare(case, Path(folder), world)
        if rank == 0:
            queue.put(row | {"group": backend if size > 1 else None})
        world.barrier()
    if size > 1:
        dist.destroy_process_group()


def run_case(case: Case, folder: Path, backend: str = "fake") -> dict[str, Any]:
    """Measure and plan one case in fresh processes; ``folder`` holds what :func:`write_data` wrote.

    ``backend``: with ``fake`` one process is rank 0 of a group whose collectives move nothing, and allocates as a rank does.
    With ``gloo`` every rank runs; gloo's threads give memory back unseen by the profiler, which then counts too much.
    """
    context = clean_context("medtrain.benchmarks.plan_error")
    queue, size = context.SimpleQueue(), case[0]
    (folder / "store").unlink(missing_ok=True)
    ranks = [
        context.Process(target=_rank, args=(r, backend if size > 1 else "", case, str(folder), queue))
        for r in range(size if backend == "gloo" else 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    if any(process.exitcode != 0 for process in ranks):
        raise RuntimeError(f"{case}: ranks ended with {[process.exitcode for process in ranks]}")
    return queue.get()


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
@click.option("--case", "names", multiple=True, help="Only these cases.")
@click.option("--backend", type=click.Choice(["fake", "gloo"]), default="fake", show_default=True)
@click.option("--verbose", is_flag=True, help="Every moment of the plan.")
def main(out: Path, names: tuple[str, ...], backend: str, verbose: bool) -> None:
    """Compare plan and measurement for all cases and write plan-error-cpu-DATE.json."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for name in names or CASES:
            row = {"case": name} | run_case(CASES[name], Path(folder), backend)
            rows.append(row)
            parts = ", ".join(
                f"{part} {row['measured_bytes'][part] / 2**20:.1f}/{row['planned_bytes'][part] / 2**20:.1f}"
                for part in row["planned_bytes"]
            )
            click.echo(f"{name}: {row['error']:+.1%}  (measured/planned MiB: {parts})")
            if verbose:
                for moment, nbytes in row["planned_moments"].items():
                    click.echo(f"    {moment}: {nbytes / 2**20:.1f}")
    if not names:
        path = out / f"plan-error-cpu-{date.today().isoformat()}.json"
        result = {
            "device": device_name(torch.device("cpu")),
            "date": date.today().isoformat(),
            "commit": commit(),
            "versions": versions(),
            "sizes": SIZES,
            "rows": rows,
        }
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(path)


if __name__ == "__main__":
    main()
