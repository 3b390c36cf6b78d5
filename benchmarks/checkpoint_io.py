"""Memory of loading, proving and exporting a checkpoint larger than a cap on each rank, and how long saving holds training up.

Linux refuses a rank more private memory than the cap (RLIMIT_DATA). That counts the one weights file that safetensors maps at
a time, too; what is resident is told apart: anonymous memory, and pages of files (RssFile), which can be dropped at any time.

python -m medtrain.benchmarks.checkpoint_io --out benchmarks/results
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

from medtrain.trainer.config.settings import ModelConfig, config_from_dict
from medtrain.trainer.distributed import World, join_world, local_part
from medtrain.trainer.model.policy import PolicyModel, build_model, load_model_config, load_tokenizer, parameter_shapes
from medtrain.trainer.processes import clean_context
from medtrain.trainer.run.folder import commit, device_name, versions
from medtrain.trainer.train.optimizer import make_optimizer
from medtrain.trainer.weights import load as weights
from medtrain.trainer.weights.checkpoint import Saver
from medtrain.trainer.weights.load import CHECKSUMS, Checkpoint, export_model, init_weights, load_weights
from medtrain.trainer.weights.verify import prove

SIZES = {
    "model_type": "qwen2",
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 32768,
    "tie_word_embeddings": False,
}
SMALL = SIZES | {"num_hidden_layers": 4, "vocab_size": 8192}  # of what is saved with its moments
FILE_BYTES = 200 * 2**20
MIB = 2**20


def write_checkpoint(folder: Path) -> dict[str, int]:
    """A float32 checkpoint of random weights in several files, written tensor by tensor; its sizes in bytes."""
    hf_config = AutoConfig.for_model(**SIZES)
    hf_config.architectures = ["Qwen2ForCausalLM"]
    shapes = parameter_shapes(hf_config)
    folder.mkdir()
    hf_config.save_pretrained(folder)
    files = weights._files_of(shapes, torch.float32)
    for file, names in files.items():
        parts = {name: shapes[name] for name in names}
        weights._write_file(folder / file, parts, torch.float32, lambda name: torch.randn(shapes[name]) * 0.02)
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    sizes = [4 * torch.Size(shape).numel() for shape in shapes.values()]
    return {"files": len(files), "checkpoint_bytes": sum(sizes), "largest_tensor_bytes": max(sizes)}


def _status(*names: str) -> list[int]:
    """Bytes of these lines of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return [1024 * int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1]) for name in names]


def _bytes_from_disk() -> int:
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(encoding="ascii"), re.MULTILINE)[1])


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Fills in the most resident bytes while it lasts, ``anonymous`` and of mapped ``file``s, looked at every millisecond."""
    peak = {"anonymous": 0, "file": 0}
    over = threading.Event()

    def watch() -> None:
        while True:
            ended = over.wait(0.001)
            anonymous, file = _status("RssAnon", "RssFile")
            peak["anonymous"], peak["file"] = max(peak["anonymous"], anonymous), max(peak["file"], file)
            if ended:
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _limit(cap: int | None) -> int:
    """Allow this process ``cap`` bytes of private memory beside what it has; returns what is resident of that now."""
    data, anonymous = _status("VmData", "RssAnon")
    if cap is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (data + cap, data + cap))
    return anonymous


def load_prove_export(world: World, folder: Path, out: Path, cap: int) -> dict[str, Any]:
    """Bytes beside those of the bare process, at the most of each part, on this rank; and its share of the weights."""
    settings = ModelConfig(path=str(folder))
    tokenizer = load_tokenizer(settings)
    hf_config = load_model_config(settings, tokenizer)
    checkpoint = Checkpoint(folder)
    world.barrier()
    base = _limit(cap)
    found: dict[str, Any] = {}

    def part(name: str, do: Callable[[], Any]) -> Any:
        world.barrier()
        started, read = time.perf_counter(), _bytes_from_disk()
        with peak_memory() as peak:
            result = do()
        found[name] = {
            "anonymous_bytes": peak["anonymous"] - base,
            "file_bytes": peak["file"],
            "from_disk_bytes": _bytes_from_disk() - read,
            "seconds": time.perf_counter() - started,
        }
        return result

    def load() -> PolicyModel:
        policy = build_model(settings, hf_config, world, torch.float32, backend="sdpa")
        load_weights(policy, checkpoint)
        return policy

    policy = part("load", load)
    found["share_bytes"] = sum(local_part(p)[0].numel() * 4 for p in policy.parameters())
    part("prove", lambda: prove(policy, checkpoint, None, world, forward=False))
    part("export", lambda: export_model(policy, tokenizer, out, world, dtype=torch.float32))
    return found


def load_alone(folder: Path, cap: int) -> str:
    """What comes of loading the checkpoint into one process under the same cap."""
    settings = ModelConfig(path=str(folder))
    hf_config = load_model_config(settings, None)
    _limit(cap)
    try:
        policy = build_model(settings, hf_config, World(0, 1, torch.device("cpu"), None), torch.float32, backend="sdpa")
        load_weights(policy, Checkpoint(folder))
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "loaded"


def saves(world: World, folder: Path) -> dict[str, Any]:
    """Seconds of training held up by each of five saves of trained weights and moments, at once and in the background."""
    tree = {
        "model": {"init": SMALL, "tokenizer": "-"},
        "data": {"sources": [{"path": "-"}]},
        "optim": {"steps": 1},
        "run": {"out": "-"},
    }
    config = config_from_dict("cpt", tree)
    policy = build_model(config.model, load_model_config(config.model, None), world, torch.float32, backend="sdpa")
    init_weights(policy, 0)
    optimizer = make_optimizer(policy, config)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    found: dict[str, Any] = {"rank_bytes": sum(local_part(p)[0].numel() * 12 for p in policy.parameters())}
    for name, background in (("at_once", False), ("async", True)):
        saver = Saver(folder / name, world, keep=1, background=background)
        held_up, whole = [], []
        for step in range(5):
            started = time.perf_counter()
            held_up.append(saver.begin(step, policy, optimizer, {}))
            saver.commit()
            saver.finish()
            whole.append(time.perf_counter() - started)
        saver.close(click.echo)
        # The first copy in the background takes its host memory.
        found[name] = {
            "first_seconds": held_up[0],
            "median_seconds": statistics.median(held_up[1:]),
            "until_complete_median_seconds": statistics.median(whole[1:]),
        }
    return found


def _rank(rank: int, size: int, store: str, function, args, queue) -> None:
    torch.set_num_threads(1)
    weights.MAX_FILE_BYTES = FILE_BYTES
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    with join_world(device_type="cpu") as world:
        queue.put((rank, function(world, *args)))
        world.barrier()
    dist.destroy_process_group()


def _alone(function, args, queue) -> None:
    torch.set_num_threads(1)
    queue.put((0, function(*args)))


def _on_processes(targets: list[tuple[Callable, tuple]]) -> list[Any]:
    """What each of the fresh processes has to say, in order."""
    context = clean_context("medtrain.benchmarks.checkpoint_io")
    queue = context.SimpleQueue()
    processes = [context.Process(target=target, args=(*args, queue)) for target, args in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=900)
    if any(process.exitcode != 0 for process in processes):
        raise RuntimeError(f"processes ended with {[process.exitcode for process in processes]}")
    return [found for _, found in sorted((queue.get() for _ in processes), key=lambda item: item[0])]


def _on_ranks(size: int, folder: Path, function, *args) -> list[Any]:
    store = folder / "store"
    store.unlink(missing_ok=True)
    return _on_processes([(_rank, (rank, size, str(store), function, args)) for rank in range(size)])


def _leave_page_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, ranks: list[int], cap_bytes: int) -> dict[str, Any]:
    """All rows; ``folder`` needs room for two checkpoints."""
    weights.MAX_FILE_BYTES = FILE_BYTES
    source, out = folder / "source", folder / "out"
    result: dict[str, Any] = {"cap_bytes": cap_bytes, **write_checkpoint(source), "rows": []}
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    for size in ranks:
        _leave_page_cache(source)
        found = _on_ranks(size, folder, load_prove_export, source, out, cap_bytes)
        rows = {"ranks": size, "share_bytes": max(f["share_bytes"] for f in found)}
        for part in ("load", "prove", "export"):
            rows[part] = {key: max(f[part][key] for f in found) for key in found[0][part]}
            rows[part]["from_disk_bytes"] = sum(f[part]["from_disk_bytes"] for f in found)
        rows["load"]["reads_of_each_byte"] = rows["load"]["from_disk_bytes"] / sum(sizes)
        sums = dict(reversed(line.split("  ")) for line in (out / CHECKSUMS).read_text().splitlines())
        rows["export_is_the_source"] = all(weights.file_sha256(source / name) == sums[name] for name in sums)
        result["rows"].append(rows)
        shutil.rmtree(out)
    (result["one_process_under_the_cap"],) = _on_processes([(_alone, (load_alone, (source, cap_bytes)))])
    shutil.rmtree(source)
    result["saves"] = {"ranks": 2, **_on_ranks(2, folder, saves, folder / "saves")[0]}
    return result


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
@click.option("--ranks", type=int, multiple=True, default=(2, 4), show_default=True)
@click.option("--cap-mib", type=int, default=1200, show_default=True, help="Private memory a rank, beside the bare process.")
def main(out: Path, ranks: tuple[int, ...], cap_mib: int) -> None:
    """Load, prove and export under the cap, time saves, and write checkpoint-io-cpu-DATE.json."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), list(ranks), cap_mib * MIB)
    click.echo(
        f"checkpoint {result['checkpoint_bytes'] / MIB:,.0f} MiB in {result['files']} files, cap {cap_mib} MiB a rank; "
        f"one process under the cap: {result['one_process_under_the_cap']}"
    )
    for row in result["rows"]:
        one = row["share_bytes"] + result["largest_tensor_bytes"]
        parts = ", ".join(f"{part} {row[part]['anonymous_bytes'] / MIB:,.0f}" for part in ("load", "prove", "export"))
        click.echo(
            f"{row['ranks']} ranks: share {row['share_bytes'] / MIB:,.0f} MiB, with one tensor {one / MIB:,.0f}; peak {parts}; "
            f"each byte read {row['load']['reads_of_each_byte']:.2f} times; export is the source: {row['export_is_the_source']}"
        )
    click.echo(f"saves: {json.dumps(result['saves'])}")
    path = out / f"checkpoint-io-cpu-{date.today().isoformat()}.json"
    about = {
        "device": device_name(torch.device("cpu")),
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "sizes": SIZES,
        "saved_sizes": SMALL,
    }
    path.write_text(json.dumps(about | result, indent=1) + "\n", encoding="utf-8")
    click.echo(path)


if __name__ == "__main__":
    main()
