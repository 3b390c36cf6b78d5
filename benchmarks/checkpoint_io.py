"""Memory of loading, verifying and exporting a checkpoint larger than a cap per rank, and how long saving holds training up.

``python -m medtrain.benchmarks.checkpoint_io`` starts itself again as ranks. Linux refuses a rank more private memory than the
cap (RLIMIT_DATA, in which the one weights file that safetensors maps at a time counts too); measured is anonymous memory.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from medtrain.benchmarks.report import free_path, header
from medtrain.benchmarks.train_inputs import qwen, write_tokenizer
from medtrain.trainer.config.settings import ModelConfig, config_from_dict
from medtrain.trainer.distributed import World, join_world, local_part
from medtrain.trainer.files import write_json
from medtrain.trainer.model.hf_config import load_model_config, load_tokenizer
from medtrain.trainer.model.policy import PolicyModel, build_model
from medtrain.trainer.train.optimizer import make_optimizer
from medtrain.trainer.weights import export
from medtrain.trainer.weights import load as weights
from medtrain.trainer.weights.checkpoint import Saver
from medtrain.trainer.weights.verify import verify_weights

SIZES = qwen(1024, 16, 16, 16, 4096, 32_768) | {"tie_word_embeddings": False}
SMALL = SIZES | {"num_hidden_layers": 4, "vocab_size": 8192}  # of what is saved with its moments
MIB = 2**20
CAP_BYTES = 1200 * MIB  # beyond the bare process
CPU = torch.device("cpu")
export.MAX_FILE_BYTES = 200 * MIB


def _build(settings: ModelConfig, world: World) -> PolicyModel:
    return build_model(settings, load_model_config(settings, None), world, torch.float32, backend="sdpa")


def write_checkpoint(folder: Path, sizes: dict[str, Any] = SIZES) -> int:
    """``folder/source``, a checkpoint of random float32 weights in several files; returns their bytes."""
    write_tokenizer(sizes["vocab_size"], folder / "tokenizer")
    settings, world = ModelConfig(init=sizes, tokenizer=str(folder / "tokenizer")), World(0, 1, CPU, None)
    policy = _build(settings, world)
    weights.init_weights(policy, 0)
    export.export_model(policy, load_tokenizer(settings), folder / "source", world, dtype=torch.float32)
    return sum(4 * p.numel() for p in policy.parameters())


def _proc(file: str, name: str) -> int:
    """A number of /proc/self."""
    lines = Path("/proc/self", file).read_text(encoding="ascii").splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0])


def load_prove_export(world: World, folder: Path, cap: int) -> dict[str, int]:
    """Bytes on this rank: its share of the weights, those read from the disk while loading, and of each part the most
    anonymous memory beyond that of the bare process."""
    settings, checkpoint = ModelConfig(path=str(folder / "source")), weights.Checkpoint(folder / "source")
    tokenizer, read = load_tokenizer(settings), _proc("io", "read_bytes")
    base, limit = 1024 * _proc("status", "RssAnon"), 1024 * _proc("status", "VmData") + cap
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    found: dict[str, int] = {}

    def part(name: str, do: Callable[[], Any]) -> Any:
        world.barrier()
        found[name] = 0
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(do)
            while not result.done():
                found[name] = max(found[name], 1024 * _proc("status", "RssAnon") - base)
                time.sleep(0.001)
        return result.result()

    def load() -> PolicyModel:
        policy = _build(settings, world)
        weights.load_weights(policy, checkpoint)
        return policy

    policy = part("load", load)
    found["read"] = _proc("io", "read_bytes") - read
    found["share"] = sum(local_part(p)[0].numel() * 4 for p in policy.parameters())
    part("prove", lambda: verify_weights(policy, checkpoint, None, world, forward=False))
    part("export", lambda: export.export_model(policy, tokenizer, folder / "out", world, dtype=torch.float32))
    return found


def saves(world: World, folder: Path, _: int) -> dict[str, Any]:
    """Seconds of training held up by each of five saves of trained weights and moments, at once and in the background."""
    tree = {"model": {"init": SMALL, "tokenizer": "-"}, "data": {"sources": [{"path": "-"}]}, "optim": {"steps": 1}}
    config = config_from_dict("cpt", tree | {"run": {"out": "-"}})
    policy = _build(config.model, world)
    weights.init_weights(policy, 0)
    optimizer = make_optimizer(policy, config)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    found: dict[str, Any] = {"rank_bytes": sum(local_part(p)[0].numel() * 12 for p in policy.parameters())}
    for name in ("at_once", "async"):
        saver = Saver(folder / name, world, keep=1, background=name == "async")
        held_up, whole = [], []
        for step in range(5):
            started = time.perf_counter()
            held_up.append(saver.begin(step, policy, optimizer, {}))
            saver.commit()
            saver.finish()
            whole.append(time.perf_counter() - started)
        saver.close()
        # The first copy in the background takes its host memory.
        found[name] = {"first_seconds": held_up[0], "median_seconds": statistics.median(held_up[1:])}
        found[name]["until_complete_median_seconds"] = statistics.median(whole[1:])
    return found


def on_ranks(size: int, job: Callable, folder: Path, cap: int = CAP_BYTES) -> list[Any]:
    """What the job finds on each rank; from one without enough memory the text of its error."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)] if size > 1 else []
    command = [sys.executable, *launch, "-m", "medtrain.benchmarks.checkpoint_io", job.__name__, str(folder), str(cap)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def _rank(job: str, folder: str, cap: str) -> None:
    with join_world(device_type="cpu") as world:
        try:
            found = globals()[job](world, Path(folder), int(cap))
        except (MemoryError, RuntimeError) as error:
            found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        everything = world.gather(found)
        if world.is_main:
            write_json(Path(folder, "found.json"), everything)


def main() -> None:
    result = header("checkpoint-io", CPU) | {"sizes": SIZES, "saved_sizes": SMALL, "cap_bytes": CAP_BYTES, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["checkpoint_bytes"] = write_checkpoint(folder)
        for size in (2, 4):
            for path in (folder / "source").glob("*.safetensors"):
                with open(path, "rb") as file:  # leaves the page cache
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = on_ranks(size, load_prove_export, folder)
            row: dict[str, Any] = {"ranks": size} | {key: max(rank[key] for rank in found) for key in found[0]}
            row["reads_of_each_byte"] = sum(rank["read"] for rank in found) / result["checkpoint_bytes"]
            sums = {(folder / copy / weights.CHECKSUMS).read_text(encoding="utf-8") for copy in ("source", "out")}
            result["rows"].append(row | {"export_is_the_source": len(sums) == 1})
        (result["one_process_under_the_cap"],) = on_ranks(1, load_prove_export, folder)
        result["saves"] = {"ranks": 2, **on_ranks(2, saves, folder)[0]}
    write_json(free_path("benchmarks/results", "checkpoint-io", CPU), result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    _rank(*sys.argv[1:]) if len(sys.argv) > 1 else main()
