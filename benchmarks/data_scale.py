"""Data at size: how long a run over 10 B tokens takes to start and what memory that takes a rank; speed of tokenisation.

    python -m medtrain.benchmarks.data_scale [--text FILE.jsonl --tokenizer DIR] [--out benchmarks/results]

``start`` rows: a token cache of made-up documents (lognormal lengths; the token files are holes, their tables are real) is
opened, cut into windows, put in order and planned, in a process of its own for each window length. Seconds are of the wall
and, where other work shares the machine, of processor time; ``peak_mib`` is the process's peak so far less what it had
before, mapped pages included, ``own_mib`` what it holds at that moment without them. ``tokenise`` rows: a text repeated to a
given size, tokenised into an empty cache in turn by one process with the tokenizer's own threads and by worker processes,
their start included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
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
from medtrain.trainer.data.parts import part_path, write_index, write_part
from medtrain.trainer.data.pieces import NUM_PARTS
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.data.tokens import cache_folder, tokenize_source
from medtrain.trainer.data.windows import make_windows
from medtrain.trainer.processes import clean_context

SOURCES = {"medical": (0.9, 0.8), "replay": (0.1, 0.2)}  # share of the tokens, weight
MEAN_LENGTH, SIGMA = 1250, 1.2  # tokens of a document: mean, and standard deviation of its logarithm
BATCH_TOKENS, MICRO_BATCH_TOKENS, WORLD_SIZE = 4_194_304, 16_384, 64
STEPS = 20


def write_cache(cache: Path, name: str, num_tokens: int, seed: int) -> str:
    """A cache of made-up documents, about ``num_tokens`` of them; returns its key. Tokens are holes in the files."""
    key = hashlib.sha256(name.encode()).hexdigest()
    folder = cache_folder(cache, key)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    num_docs = num_tokens // MEAN_LENGTH
    lengths = rng.lognormal(np.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA, num_docs).astype(np.uint32).clip(2)
    for k, mine in enumerate(np.array_split(lengths, NUM_PARTS)):
        path = part_path(folder, k)
        write_part(path, bytes(32), [])
        tail = bytearray(path.read_bytes())
        tail[8:24] = np.array([mine.sum(dtype=np.int64), len(mine)], "<i8").tobytes()
        with open(path, "r+b") as file:
            file.truncate(4 * int(mine.sum(dtype=np.int64)))
            file.seek(0, os.SEEK_END)
            file.write(np.stack([mine, 4 * mine], axis=1).astype("<u4").tobytes() + tail)
    write_index(folder, {}, NUM_PARTS)
    return key


def measure_start(cache: str, keys: dict[str, str], seq_len: int, results) -> None:
    before, own_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _own_mib()
    row: dict = {
        "what": "start",
        "seq_len": seq_len,
        "batch_tokens": BATCH_TOKENS,
        "world_size": WORLD_SIZE,
        "seconds": {},
        "cpu_seconds": {},
        "peak_mib": {},
        "own_mib": {},
    }
    began = last = np.array(_clocks())

    def mark(phase: str) -> None:
        nonlocal last
        now = np.array(_clocks())
        row["seconds"][phase], row["cpu_seconds"][phase] = (now - last).round(3).tolist()
        last = now
        row["peak_mib"][phase] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        row["own_mib"][phase] = _own_mib() - own_before

    sources = [tokenize_source(Source(name, SOURCES[name][1], name), None, cache, key=key) for name, key in keys.items()]
    mark("open")
    windows = [make_windows(source, seq_len) for source in sources]
    mark("windows")
    lengths = [w.lengths for w in windows]
    totals = [int(n.sum(dtype=np.int64)) for n in lengths]
    order = GlobalOrder(lengths, source_shares([s.weight for s in sources], totals), BATCH_TOKENS, 0)

    def step(number: int) -> int:
        items = order.step(number)
        plan = pack(items.lengths, MICRO_BATCH_TOKENS, WORLD_SIZE)
        pairs = list(zip(items.source_ids.tolist(), items.item_ids.tolist(), strict=True))
        for by_rank in plan:
            cpt_batch(windows, [pairs[i] for i in by_rank[0]])
        return len(items)

    row["windows_in_a_step"] = step(0)
    mark("first step")
    row["seconds"]["start"], row["cpu_seconds"]["start"] = (last - began).round(3).tolist()
    times = []
    for number in range(1, 1 + STEPS):
        started = np.array(_clocks())
        step(number)
        times.append(1e3 * (np.array(_clocks()) - started))
    row["step_ms_median"], row["step_cpu_ms_median"] = np.median(times, axis=0).round(1).tolist()
    last = np.array(_clocks())
    # In the middle of the second pass over the first source: another permutation of each.
    late = int(1.5 * totals[0] / (BATCH_TOKENS * SOURCES["medical"][1]))
    row["late_step"] = late
    step(late)
    mark("late step")
    row["tokens"], row["documents"] = sum(s.num_tokens for s in sources), sum(s.num_docs for s in sources)
    row["windows"] = sum(map(len, windows))
    results.put(row)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _own_mib() -> int:
    """Memory of this process alone, now: without pages of files, which ranks share and the system takes back."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) // 1024


def in_clean_process(function, *args):
    context = clean_context(__name__)
    results = context.SimpleQueue()
    process = context.Process(target=function, args=(*args, results))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{function.__name__} ended with status {process.exitcode}")
    return results.get()


def measure_tokenising(text: str, folder: str, tokenizer_dir: str, workers: int, threads: bool, results) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads else "false"
    tokenizer = read_tokenizer(tokenizer_dir)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = time.perf_counter()
        found = tokenize_source(Source(text), tokenizer, cache, workers=workers)
        seconds = time.perf_counter() - began
    results.put((seconds, found.num_tokens, len(found.parts), found.digest))


def tokenise_rows(args: argparse.Namespace, folder: str) -> list[dict]:
    content = Path(args.text).read_bytes()
    text = Path(folder) / "text.jsonl"
    text.write_bytes(content * -(-int(args.megabytes * 1e6) // len(content)))
    forms = {(n, n == 1): [] for n in args.workers}
    for _ in range(args.rounds):
        for workers, threads in forms:
            found = in_clean_process(measure_tokenising, str(text), folder, args.tokenizer, workers, threads)
            forms[workers, threads].append(found)
            print(f"{workers} workers, threads {threads}: {found[0]:.1f} s", file=sys.stderr)
    rows, size = [], text.stat().st_size
    for (workers, threads), found in forms.items():
        seconds = [round(f[0], 2) for f in found]
        median = statistics.median(seconds)
        rows.append(
            {
                "what": "tokenise",
                "workers": workers,
                "tokenizer_threads": threads,
                "megabytes": round(size / 1e6, 1),
                "tokens": found[0][1],
                "parts": found[0][2],
                "seconds": seconds,
                "tokens_per_second": round(found[0][1] / median),
                "megabytes_per_second": round(size / 1e6 / median, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=10e9)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--text", help="JSON Lines to tokenise, repeated to --megabytes")
    parser.add_argument("--tokenizer")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results")
    args = parser.parse_args()
    device = torch.device("cpu")
    result = header("data-scale", device)
    result |= {
        "what": " ".join(__doc__.split("\n\n")[2].split()),
        "cpus": len(os.sched_getaffinity(0)),
        "load_at_start": os.getloadavg()[0],
        "parts": NUM_PARTS,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        keys = {
            name: write_cache(Path(folder), name, int(share * args.tokens), seed)
            for seed, (name, (share, _)) in enumerate(SOURCES.items())
        }
        for seq_len in args.seq_len:
            row = in_clean_process(measure_start, folder, keys, seq_len)
            print(json.dumps(row), file=sys.stderr)
            result["rows"].append(row)
        if args.text:
            result["rows"] += tokenise_rows(args, folder)
    path = free_path(args.out, "data-scale", device)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
