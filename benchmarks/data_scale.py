"""Data at size: how long a run over many tokens takes to start, what memory that takes per rank, and the speed of tokenisation.

    python -m medtrain.benchmarks.data_scale [--text FILE.jsonl --tokenizer DIR] [--out benchmarks/results]

``start`` rows: a token cache of made-up documents (lognormal lengths; the tokens are holes in the files) is opened, cut into
windows, put in order and planned, in a process of its own per window length. Seconds are of the wall and, where other work
shares the machine, of processor time; ``peak_mib`` is the process's peak so far less what it had before, mapped pages
included, ``own_mib`` what it holds at that moment without them. ``tokenise`` rows: a text repeated to a given size,
tokenised into an empty cache in a process of its own, by the tokenizer's own threads or by worker processes, their start
included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from medtrain.benchmarks.report import free_path, header
from medtrain.trainer.config.source import Source
from medtrain.trainer.data.batch import cpt_batch
from medtrain.trainer.data.order import GlobalOrder, source_shares
from medtrain.trainer.data.packing import pack
from medtrain.trainer.data.token_cache import part_path, write_index
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.data.tokens import cache_folder, tokenize_source
from medtrain.trainer.data.windows import make_windows
from medtrain.trainer.processes import clean_context

SOURCES = {"medical": (0.9, 0.8), "replay": (0.1, 0.2)}  # share of the tokens, weight
MEAN_LENGTH, SIGMA = 1250, 1.2  # tokens of a document: mean, and standard deviation of its logarithm
BATCH_TOKENS, MICRO_BATCH_TOKENS, WORLD_SIZE = 4_194_304, 16_384, 64
PART_TOKENS = 2**26


def write_cache(cache: Path, name: str, num_tokens: int, seed: int) -> None:
    """A cache of made-up documents, about ``num_tokens`` of them, under the key ``name``."""
    folder = cache_folder(cache, name)
    folder.mkdir(parents=True)
    num_docs = num_tokens // MEAN_LENGTH
    lengths = np.random.default_rng(seed).lognormal(np.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA, num_docs).astype("<u4").clip(2)
    entries = []
    for number, mine in enumerate(np.array_split(lengths, -(-num_tokens // PART_TOKENS))):
        path, size = part_path(folder, number), int(mine.sum(dtype=np.int64))
        with open(path, "wb") as file:
            file.seek(4 * size)
            file.write(np.stack([mine, 4 * mine], axis=1).tobytes())
        entries.append({"num_tokens": size, "num_docs": len(mine), "mtime_ns": path.stat().st_mtime_ns, "sha256": ""})
    write_index(folder, {"complete": True, "parts": entries})


def measure_start(cache: str, seq_len: int, results) -> None:
    status = Path("/proc/self/status")
    row: dict = {"what": "start", "seq_len": seq_len, "seconds": {}, "cpu_seconds": {}, "peak_mib": {}, "own_mib": {}}
    last = (time.perf_counter(), time.process_time())

    def memory() -> tuple[int, int]:
        own = int(status.read_text().split("RssAnon:")[1].split()[0])  # without pages of files, which ranks share
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, own // 1024

    def mark(phase: str) -> None:
        nonlocal last
        now = (time.perf_counter(), time.process_time())
        row["seconds"][phase], row["cpu_seconds"][phase] = (round(b - a, 3) for a, b in zip(last, now, strict=True))
        row["peak_mib"][phase], row["own_mib"][phase] = (b - a for a, b in zip(before, memory(), strict=True))
        last = now

    before = memory()
    sources = [tokenize_source(Source(name, weight, name), None, cache, key=name) for name, (_, weight) in SOURCES.items()]
    mark("open")
    windows = [make_windows(source, seq_len) for source in sources]
    mark("windows")
    lengths = [w.lengths for w in windows]
    totals = [int(n.sum(dtype=np.int64)) for n in lengths]
    order = GlobalOrder(lengths, source_shares([s.weight for s in sources], totals), BATCH_TOKENS, 0)
    # The last is in the middle of the second pass over the first source: another permutation of each.
    late = int(1.5 * totals[0] / (BATCH_TOKENS * SOURCES["medical"][1]))
    for phase, step in (("first step", 0), ("second step", 1), ("late step", late)):
        items = order.step(step)
        pairs = list(zip(items.source_ids.tolist(), items.item_ids.tolist(), strict=True))
        for by_rank in pack(items.lengths, MICRO_BATCH_TOKENS, WORLD_SIZE):
            cpt_batch(windows, [pairs[i] for i in by_rank[0]])
        mark(phase)
    row |= {"tokens": sum(s.num_tokens for s in sources), "documents": sum(s.num_docs for s in sources)}
    results.put(row | {"windows": sum(map(len, windows))})


def measure_tokenising(text: str, folder: str, tokenizer_dir: str, workers: int, results) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers == 1 else "false"
    tokenizer = read_tokenizer(tokenizer_dir)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = time.perf_counter()
        tokens = tokenize_source(Source(text), tokenizer, cache, workers=workers).num_tokens
        seconds = time.perf_counter() - began
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu, megabytes = sum(use.ru_utime + use.ru_stime for use in usage), os.path.getsize(text) / 1e6
    row = {"what": "tokenise", "workers": workers, "tokens": tokens, "megabytes": round(megabytes, 1)}
    results.put(row | {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mib": usage[0].ru_maxrss // 1024})


def in_clean_process(function, *args) -> dict:
    context = clean_context(__name__)
    results = context.SimpleQueue()
    process = context.Process(target=function, args=(*args, results))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{function.__name__} ended with status {process.exitcode}")
    row = results.get()
    print(json.dumps(row), file=sys.stderr)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=10e9)
    parser.add_argument("--seq-len", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--text", help="JSON Lines to tokenise, repeated to --megabytes")
    parser.add_argument("--tokenizer")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", default="benchmarks/results")
    args = parser.parse_args()
    result = header("data-scale", torch.device("cpu"))
    result |= {"what": " ".join(__doc__.split("\n\n")[2].split()), "load_at_start": os.getloadavg()[0], "rows": []}
    result |= {"cpus": len(os.sched_getaffinity(0)), "batch_tokens": BATCH_TOKENS, "world_size": WORLD_SIZE}
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, (share, _)) in enumerate(SOURCES.items()):
            write_cache(Path(folder), name, int(share * args.tokens), seed)
        result["rows"] += [in_clean_process(measure_start, folder, seq_len) for seq_len in args.seq_len]
        if args.text:
            content = Path(args.text).read_bytes()
            text = Path(folder) / "text.jsonl"
            text.write_bytes(content * -(-int(args.megabytes * 1e6) // len(content)))
            for workers in args.workers:
                result["rows"].append(in_clean_process(measure_tokenising, str(text), folder, args.tokenizer, workers))
    path = free_path(args.out, "data-scale", torch.device("cpu"))
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
