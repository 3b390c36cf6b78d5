"""Helpers of the tests: made-up text, tiny sizes, metrics without timing, and a function run on several gloo ranks."""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORDS = [
    "熱",
    "咳",
    "の",
    "患者",
    "に",
    "薬",
    "を",
    "与える",
    "与えない",
    "病",
    "は",
    "答え",
    ":",
    "a",
    "b",
    "c",
    "。",
    "理由",
]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def made_up_text(seed: int, num_words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (num_words,), generator=generator).tolist())


SIZES = {
    "model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24, "initializer_range": 0.2,
}  # fmt: skip


def read_metrics(run: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


# What depends on speed and on how a step is packed.
TIMING = (
    "seconds", "tokens_per_second", "mfu", "max_memory_gib",
    "tokens_computed", "tokens_prompt", "tokens_padding", "tokens_saved", "tokens_completion", "useful_token_share",
)  # fmt: skip


def without_timing(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def _rank_main(rank: int, size: int, store: str, function, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        function(*args)
        dist.barrier()
        dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # a forked child must not run the parent's exit handlers


def run_on_ranks(size: int, tmp_path: Path, function, *args) -> None:
    """Call ``function(*args)`` in ``size`` forked processes that form a gloo group; an exception in one fails the test."""
    store = tmp_path / f"store-{len(list(tmp_path.glob('store-*')))}"
    context = mp.get_context("fork")
    processes = [context.Process(target=_rank_main, args=(r, size, str(store), function, args)) for r in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size
