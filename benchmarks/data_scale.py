"""Data at size: how long a run over many tokens takes to start, the memory of that per rank, the speed of tokenisation.

    python -m medtrain.benchmarks.data_scale [--text FILE.jsonl --tokenizer DIR] [--out benchmarks/results]

``start`` rows: a token cache of made-up documents (lognormal lengths; the tokens are holes in the files) is opened, cut into
windows, put in order and planned, in a process of its own. Seconds are of the wall and of the processor; ``peak_mib`` is the
process's peak so far less what it had before, mapped pages included, ``own_mib`` what it holds then without them.
``tokenise`` rows: a text repeated to a given size, by the tokenizer's own threads or by workers, their start included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from medtrain.benchmarks.report import free_path, header
from medtrain.trainer.config.source import Source
from medtrain.trainer.data.batch import cpt_batch
from medtrain.trainer.data.order import GlobalOrder, source_shares
from medtrain.trainer.data.packing import pack
from medtrain.trainer.data.tokenizer import read_tokenizer
from medtrain.trainer.data.tokens import cache_folder, make_windows, tokenize_source
from medtrain.trainer.processes import clean_context

SOURCES = {"medical": (0.9, 0.8), "replay": (0.1, 0.2)}  # share of the tokens, weight
MEAN_LENGTH, SIGMA = 1250, 1.2  # tokens of a document: mean, and standard deviation of its logarithm
BATCH_TOKENS, MICRO_BATCH_TOKENS, WORLD_SIZE, PART_TOKENS = 4_194_304, 16_384, 64, 2**26


def write_cache(cache: Path, name: str, num_tokens: int, seed: int) -> None:
    """A cache of made-up documents, about ``num_tokens`` of them, under the key ``name``."""
    folder = cache_folder(cache, name)
    folder.mkdir(parents=True)
    shape = np.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA, num_tokens // MEAN_LENGTH
    lengths = np.random.default_rng(seed).lognormal(*shape).astype("<u4").clip(2)
    parts = np.array_split(lengths, -(-num_tokens // PART_TOKENS))
    for number, mine in enumerate(parts):
        with open(folder / f"part-{number:05d}.bin", "wb") as file:
            file.seek(4 * int(mine.sum(dtype=np.int64)))
            file.write(np.stack([mine, 4 * mine], axis=1).tobytes() + np.array([len(mine)], "<u4").tobytes())
    (folder / "complete").write_text(str(len(parts)))


def clocks_and_memory() -> np.ndarray:
    """Seconds of the wall and the processor; MiB at the peak and now, without pages of files, which ranks share."""
    own = int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return np.array([time.perf_counter(), time.process_time(), peak / 1024, own / 1024])


def measure_start(cache: str, seq_len: int) -> dict:
    row: dict = {"what": "start", "seq_len": seq_len}
    marks = [clocks_and_memory()]

    def mark(phase: str) -> None:
        marks.append(clocks_and_memory())
        used = *(marks[-1] - marks[-2])[:2].round(3), *(marks[-1] - marks[0])[2:].round()
        row[phase] = dict(zip(("seconds", "cpu_seconds", "peak_mib", "own_mib"), used, strict=True))

    sources = [tokenize_source(Source(name, weight), None, cache, key=name) for name, (_, weight) in SOURCES.items()]
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
    return row | {"tokens": sum(s.num_tokens for s in sources), "num_windows": sum(map(len, windows))}


def measure_tokenising(text: str, folder: str, tokenizer_dir: str, workers: int) -> dict:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers == 1 else "false"
    tokenizer = read_tokenizer(tokenizer_dir)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = time.perf_counter()
        tokens = tokenize_source(Source(text), tokenizer, cache, workers=workers).num_tokens
        seconds = round(time.perf_counter() - began, 2)
    row = {"what": "tokenise", "workers": workers, "tokens": tokens, "megabytes": round(os.path.getsize(text) / 1e6, 1)}
    return row | {"seconds": seconds, "peak_mib": round(clocks_and_memory()[2])}


def in_clean_process(function, *args) -> dict:
    with ProcessPoolExecutor(1, clean_context(__name__)) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tokens", type=float, default=10e9)
    parser.add_argument("--text", help="JSON Lines to tokenise, repeated to --megabytes")
    parser.add_argument("--tokenizer")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--out", default="benchmarks/results")
    args = parser.parse_args()
    result = header("data-scale", torch.device("cpu")) | {"what": " ".join(str(__doc__).split("\n\n")[2].split())}
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, (share, _)) in enumerate(SOURCES.items()):
            write_cache(Path(folder), name, int(share * args.tokens), seed)
        rows += [in_clean_process(measure_start, folder, seq_len) for seq_len in (4096, 8192)]
        if args.text:
            content, text = Path(args.text).read_bytes(), Path(folder) / "text.jsonl"
            text.write_bytes(content * -(-int(args.megabytes * 1e6) // len(content)))
            rows += [in_clean_process(measure_tokenising, str(text), folder, args.tokenizer, workers) for workers in (1, 2)]
    path = free_path(args.out, "data-scale", torch.device("cpu"))
    path.write_text(json.dumps(result | {"cpus": os.cpu_count(), "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
