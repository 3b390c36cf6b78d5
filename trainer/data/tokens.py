"""Tokens of CPT documents: each source is tokenised once, into a cache that later starts find again.

A document's tokens are those of its text, after the BOS where the tokenizer puts one before every text, and eos. The cache
of a source is a folder named by the sha256 of everything that decides the tokens: the bytes of its files, the tokenizer, the
field, the format. It holds parts, and ``index.json``, which lists those that are made and whether they are all. A part is the
tokens (uint32) of some documents, one after the other, then of each document its tokens and the UTF-8 bytes of its text
(uint32 [n, 2]). One process reads the rows in order, deals them to workers and writes what comes back, so neither the number
of workers nor a kill changes a bit; rows of parts that are there are passed over.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import numpy as np

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.digests import files_digest
from medtrain.trainer.data.encode import eos_id, tokenize_starts, tokenizer_digest
from medtrain.trainer.data.sources import check_text, is_url, read_rows, source_files, source_name
from medtrain.trainer.errors import InputError, user_path
from medtrain.trainer.files import PARTIAL, replacing
from medtrain.trainer.processes import clean_context

log = logging.getLogger(__name__)

PART_BYTES = 2**28  # of text in a part: what a kill can cost
BATCH_BYTES = 2**21  # of text in a tokenizer call: bounds its memory, keeps its threads busy
PROGRESS_SECONDS = 10.0
_FEW_BATCHES = 4  # for these, workers are not worth their start
_FORMAT = 1  # of what the tokens are
_LAYOUT = 3  # of how they lie on the disk; another PART_BYTES is another layout

Index = dict  # "complete": bool; "parts": an entry (dict) of each, None where it must be made
Batch = tuple[int, np.ndarray, np.ndarray]  # number of the part, tokens, documents


@dataclass(frozen=True)
class TokenizedSource:
    """The documents of one source, memory-mapped.

    Its tokens, eos after every document, are ``parts`` one after the other, each uint32 [n]; no document lies in two.
    Document ``i`` is tokens ``offsets[i]`` to ``offsets[i + 1]`` of them all, ``offsets`` int64 [num_docs + 1];
    ``num_bytes`` uint32 [num_docs]: UTF-8 bytes of its text. ``digest``: sha256 of what decided the tokens.
    """

    name: str
    weight: float | None
    path: str
    parts: Sequence[np.ndarray]
    offsets: np.ndarray
    num_bytes: np.ndarray
    digest: str

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Tokens before each part, int64 [num_parts + 1]."""
        return np.cumsum([0, *map(len, self.parts)], dtype=np.int64)

    @property
    def num_docs(self) -> int:
        return len(self.num_bytes)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start`` to ``stop``, uint32, which must lie within one document."""
        k = int(np.searchsorted(self._starts, start, side="right")) - 1
        before = int(self._starts[k])
        return self.parts[k][start - before : stop - before]


def default_workers(local_ranks: int = 1) -> int:
    """Workers for this machine: one per CPU that this process may use, less one per other rank, which waits busily."""
    return max(1, len(os.sched_getaffinity(0)) - (local_ranks - 1))


def tokenize_source(
    source: Source, tokenizer, cache_dir: str | Path, *, field: str = "text", key: str | None = None, workers: int = 1
) -> TokenizedSource:
    """Return the tokenised documents of ``source``, from the cache in ``cache_dir`` where it holds them.

    Any number of processes may call this at once. ``key`` is the ``digest`` that another process has just got for the
    same source: where its cache is here too, the source is not read. ``workers``: processes that tokenise; a small source,
    or 1, is tokenised in this process, by the tokenizer's own threads. Logs progress. Raises InputError for bad rows (see
    ``sources.py``); then no cache is left.
    """
    cache_dir = Path(cache_dir)
    if key is None or not read_index(cache_folder(cache_dir, key))["complete"]:
        raw = files_digest(source_files(source.path), cache_dir / "raw-files.json")
        identity = {"format": _FORMAT, "field": field, "source": raw, "tokenizer": tokenizer_digest(tokenizer)}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = cache_folder(cache_dir, key)
    if not (index := read_index(folder))["complete"]:
        with _locked(folder):
            if not (index := read_index(folder))["complete"]:
                texts = (check_text(row.fields[field], row, field) for row in read_rows(source.path, [field]))
                try:
                    _make(folder, index, _batches(texts, source_name(source)), tokenizer, workers)
                except InputError:
                    if not is_url(str(source.path)):  # a network may fail, and the parts be good
                        shutil.rmtree(folder)
                    raise
    parts, documents = _open_parts(folder, index)
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(documents[:, 0], dtype=np.int64, out=offsets[1:])
    num_bytes = np.ascontiguousarray(documents[:, 1])
    return TokenizedSource(source_name(source), source.weight, str(source.path), parts, offsets, num_bytes, key)


def cache_folder(cache_dir: Path, key: str) -> Path:
    """Where the cache of a source with this digest lies."""
    return cache_dir / f"{key}-v{_LAYOUT}"


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.bin"


def read_index(folder: Path) -> Index:
    """The index, with None for each part that has not the size of its entry; then it is not complete."""
    try:
        index = json.loads((folder / "index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {"complete": False, "parts": []}
    parts = [entry if _is_whole(part_path(folder, k), entry) else None for k, entry in enumerate(index["parts"])]
    return {"complete": index["complete"] and None not in parts, "parts": parts}


def write_index(folder: Path, index: Index) -> None:
    with replacing(folder / "index.json") as out:
        out.write((json.dumps(index, indent=1) + "\n").encode())


def _is_whole(path: Path, entry: dict | None) -> bool:
    with contextlib.suppress(OSError):
        return entry is not None and path.stat().st_size == 4 * entry["num_tokens"] + 8 * entry["num_docs"]
    return False


def _open_parts(folder: Path, index: Index) -> tuple[list[np.ndarray], np.ndarray]:
    """The tokens of each part, memory-mapped, and the documents of all."""
    # A mapping keeps its file open, and 1,024 is the usual soft limit.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    parts, tables = [], []
    for number, entry in enumerate(index["parts"]):
        path, num_tokens, num_docs = part_path(folder, number), entry["num_tokens"], entry["num_docs"]
        parts.append(np.memmap(path, "<u4", "r", shape=(num_tokens,)))
        tables.append(np.fromfile(path, "<u4", 2 * num_docs, offset=4 * num_tokens).reshape(num_docs, 2))
    return parts, np.concatenate(tables)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and let one process of this machine in at a time.

    The lock only saves work: where it does not reach (another machine), each makes its own parts, and they are the same.
    """
    with user_path(folder.parent, "cannot be written", field="data.cache"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(folder.name + ".lock"), "w")
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in folder.glob("*" + PARTIAL):  # by processes that were killed
                left.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        yield


def _make(folder: Path, index: Index, batches: Iterable[tuple[int, list[str]]], tokenizer, workers: int) -> None:
    """Make the parts that ``index`` lacks and write it after each, at the end as complete."""
    parts = index["parts"]
    there = {number for number, entry in enumerate(parts) if entry is not None}
    made = _tokenized((batch for batch in batches if batch[0] not in there), tokenizer, workers)
    for number, of_part in itertools.groupby(made, key=lambda batch: batch[0]):
        parts[number : number + 1] = [_write_part(part_path(folder, number), of_part)]
        write_index(folder, index)
    index["complete"] = True
    write_index(folder, index)


def _write_part(path: Path, batches: Iterable[Batch]) -> dict:
    """Write a part; it is whole or not there. Returns its entry for the index."""
    num_tokens, tables = 0, []
    with replacing(path) as out:
        for _, tokens, documents in batches:
            out.write(tokens.data)
            num_tokens += len(tokens)
            tables.append(documents)
        table = np.concatenate(tables)
        out.write(table.data)
    return {"num_tokens": num_tokens, "num_docs": len(table)}


def _batches(texts: Iterable[str], name: str) -> Iterator[tuple[int, list[str]]]:
    """The texts of a tokenizer call, and the number of the part that they belong to; logs how far the reading is."""
    number = rows = in_part = in_all = in_batch = 0
    batch: list[str] = []
    began = last = time.monotonic()
    for text in texts:
        batch.append(text)
        in_batch += len(text.encode("utf-8"))
        if in_batch < BATCH_BYTES:
            continue
        yield number, batch
        rows, in_part, in_all, in_batch, batch = rows + len(batch), in_part + in_batch, in_all + in_batch, 0, []
        if in_part >= PART_BYTES:
            number, in_part = number + 1, 0
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last, rate = now, now - began
            log.info(
                f"{name}: {rows:,} documents tokenised, {in_all / 1e9:,.2f} GB of text, "
                f"{rows / rate:,.0f} documents/s, {in_all / 1e6 / rate:,.1f} MB/s"
            )
    if batch:
        yield number, batch


def _tokenized(batches: Iterable[tuple[int, list[str]]], tokenizer, workers: int) -> Iterator[Batch]:
    """The batches, tokenised, in order."""
    batches = iter(batches)
    first = list(itertools.islice(batches, _FEW_BATCHES))
    if workers == 1 or len(first) < _FEW_BATCHES:
        yield from (_tokenize(tokenizer, *batch) for batch in itertools.chain(first, batches))
        return
    context = clean_context(__name__, type(tokenizer).__module__)
    with ProcessPoolExecutor(workers, context, _begin_work, (pickle.dumps(tokenizer),)) as pool:
        ahead: deque[Future] = deque()
        try:
            for batch in itertools.chain(first, batches):
                ahead.append(pool.submit(_work, *batch))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            raise RuntimeError("a worker that tokenised was killed; the same command goes on with the missing parts") from None


def _tokenize(tokenizer, number: int, texts: Sequence[str]) -> Batch:
    ids, eos = tokenize_starts(tokenizer, texts), eos_id(tokenizer)
    for document in ids:
        document.append(eos)
    documents = np.array([(len(row), len(text.encode("utf-8"))) for row, text in zip(ids, texts, strict=True)], "<u4")
    tokens = np.fromiter(itertools.chain.from_iterable(ids), "<u4", int(documents[:, 0].sum()))
    return number, tokens, documents


def _begin_work(pickled: bytes) -> None:
    """Make this process a worker. It ends with its parent, however that ends."""
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    _tokenizer = pickle.loads(pickled)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(number: int, texts: Sequence[str]) -> Batch:
    return _tokenize(_tokenizer, number, texts)
