"""The memory plan beside torch's FSDPMemTracker on fake tensors: 7B and 72B shapes on 8 and 64 ranks, in one process.

    python -m medtrain.benchmarks.plan_simulation --out benchmarks/results

One forward and backward of the policy in bf16 with activation checkpointing, by the CPU's SDPA; no optimizer, whose states the
tracker cannot take. What happens inside the head op is not seen by fake tensors: its inputs, outputs and what it keeps are.
"""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from medtrain.trainer.config.settings import config_from_dict
from medtrain.trainer.data.batch import windows_batch
from medtrain.trainer.distributed import World
from medtrain.trainer.model import attention
from medtrain.trainer.model.policy import build_model, load_model_config
from medtrain.trainer.plan.command import MODELS
from medtrain.trainer.plan.memory import Machine, Step, moments, read_model
from medtrain.trainer.processes import clean_context
from medtrain.trainer.run.folder import commit, versions

CASES = [
    ("qwen2.5-7b", 8, 8192, {}),
    ("qwen2.5-7b", 64, 8192, {}),
    ("qwen2.5-72b", 8, 8192, {}),
    ("qwen2.5-72b", 64, 8192, {}),
    ("qwen2.5-7b", 8, 4096, {"weights": "bf16"}),
]


def simulate(name: str, ranks: int, tokens: int, precision: dict[str, Any]) -> dict[str, Any]:
    """Tracked and planned peak, bytes, of one document of ``tokens``; ``precision``: settings of that section."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    init = json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))
    config = config_from_dict(
        "cpt",
        {
            "model": {"init": init, "tokenizer": "none", "activation_checkpointing": "full"},
            "run": {"out": "none"},
            "data": {"sources": [{"path": "none"}]},
            "optim": {"steps": 1},
            "precision": {"compute": "bfloat16"} | precision,
        },
    )
    hf_config = load_model_config(config.model, None)
    batch = windows_batch([np.zeros(tokens + 1, dtype=np.int64)])
    layout = attention.packed_layout(batch, "sdpa")
    started = time.perf_counter()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value):
            if isinstance(value, torch.Tensor):
                return mode.from_tensor(value)
            return tuple(map(fake, value)) if isinstance(value, tuple) else value

        def faked(record):
            return type(record)(**{f.name: fake(getattr(record, f.name)) for f in dataclasses.fields(record)})

        policy = build_model(
            config.model,
            hf_config,
            World(0, ranks, torch.device("cpu"), mesh),
            torch.bfloat16,
            backend="sdpa",
            weights_dtype=torch.bfloat16 if config.precision.weights == "bf16" else torch.float32,
        )
        fake_layout, fake_batch = faked(layout), faked(batch)
        attention.packed_layout = lambda *_: fake_layout  # it reads lengths, which fake tensors do not have
        tracker = FSDPMemTracker(policy)
        tracker.track_inputs((fake_batch.input_ids,))
        with tracker:
            (-policy(fake_batch).sum()).backward()
        snapshot = tracker.get_tracker_snapshot("peak")
    tracked = {str(key): value for parts in snapshot.values() for key, value in parts.items()}
    step = Step(tokens, tokens, tokens, accumulates=False, rows=(1, tokens))
    found = moments(config, read_model(config, hf_config), Machine(ranks, "cpu"), step)
    # The tracker sees no optimizer, and of the head op no temporaries: the layers' moments are what can be compared.
    totals = {m.name: m.total - m.parts.get("optimizer", 0) for m in found if "layer" in m.name or "embedding" in m.name}
    total = next(value for key, value in tracked.items() if key.lower().endswith("total"))
    return {
        "model": name,
        "ranks": ranks,
        "tokens": tokens,
        "precision": precision,
        "tracked": tracked,
        "tracked_bytes": total,
        "planned_bytes": max(totals.values()),
        "moment": max(totals, key=totals.get),
        "error": max(totals.values()) / total - 1,
        "seconds": time.perf_counter() - started,
    }


def _in_child(case, queue) -> None:
    torch.set_num_threads(1)
    queue.put(simulate(*case))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(out: Path) -> None:
    """Simulate all cases and write plan-simulation-DATE.json."""
    rows, context = [], clean_context("medtrain.benchmarks.plan_simulation")
    for case in CASES:
        queue = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(case, queue))
        child.start()
        child.join(timeout=600)
        if child.exitcode != 0:
            raise RuntimeError(f"{case}: ended with {child.exitcode}")
        rows.append(row := queue.get())
        tracked, planned = row["tracked_bytes"] / 2**30, row["planned_bytes"] / 2**30
        case = f"{row['model']}, {row['ranks']} ranks, {row['precision']}"
        click.echo(
            f"{case}: tracked {tracked:.2f} GiB, planned {planned:.2f} ({row['moment']}), {row['error']:+.1%}, "
            f"{row['seconds']:.0f} s"
        )
    path = out / f"plan-simulation-{date.today().isoformat()}.json"
    result = {"date": date.today().isoformat(), "commit": commit(), "versions": versions(), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(path)


if __name__ == "__main__":
    main()
