"""Tokens of CPT documents: each source is tokenised once, into a cache that later starts find again.

A document's tokens are those of its text, after the BOS where the tokenizer puts one before every text, and eos. The cache
of a source is a folder (``token_cache.py``) named by the sha256 of everything that decides the tokens: the bytes of its
files, the tokenizer, the field, the format. One process reads the rows in order, deals them to workers and writes what comes
back, so neither the number of workers nor a kill changes a bit. Rows of parts that are there are passed over.
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
from medtrain.trainer.data.token_cache import Index, open_parts, part_path, read_index, write_index, write_part
from medtrain.trainer.data.tokenizer import check_ids, first_texts
from medtrain.trainer.errors import InputError, user_path
from medtrain.trainer.files import PARTIAL
from medtrain.trainer.processes import clean_context

log = logging.getLogger(__name__)

PART_BYTES = 2**28  # of text in a part: what a kill can cost
BATCH_BYTES = 2**21  # of text in a tokenizer call: bounds its memory, keeps its threads busy
PROGRESS_SECONDS = 10.0
_FEW_BATCHES = 4  # for these, workers are not worth their start
_FORMAT = 1  # of what the tokens are
_LAYOUT = 3  # of how they lie on the disk


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
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus - (local_ranks - 1))


def tokenize_source(
    source: Source,
    tokenizer,
    cache_dir: str | Path,
    *,
    field: str = "text",
    key: str | None = None,
    workers: int = 1,
    verify: bool = False,
) -> TokenizedSource:
    """Return the tokenised documents of ``source``, from the cache in ``cache_dir`` where it holds them.

    Any number of processes may call this at once. ``key`` is the ``digest`` that another process has just got for the
    same source: where its cache is here too, the source is not read. ``workers``: processes that tokenise; a small source,
    or 1, is tokenised in this process, by the tokenizer's own threads. ``verify``: read the source and the whole cache, and
    trust no file for its size and times. Logs progress. Raises InputError for bad rows (see ``sources.py``), and where the
    tokenizer's ids are not those of its tokenizer.json; then no cache is left.
    """
    cache_dir = Path(cache_dir)
    if key is not None:
        folder = cache_folder(cache_dir, key)
        index = read_index(folder)
        if index["complete"]:
            return _open(folder, index, source, key)
    files = source_files(source.path)
    check_ids(tokenizer, first_texts(row.fields[field] for row in read_rows(source.path, [field])))
    digests = {
        "source": files_digest(files, cache_dir / "raw-files.json", trust=not verify),
        "tokenizer": tokenizer_digest(tokenizer),
    }
    settings = {"format": _FORMAT, "field": field, **digests}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_folder(cache_dir, key)
    index = read_index(folder, verify=verify)
    if not index["complete"]:
        with _locked(folder) as exclusive:
            index = read_index(folder, verify=verify)
            if exclusive:
                for left in folder.glob("*" + PARTIAL):  # by processes that were killed
                    left.unlink(missing_ok=True)
            if not index["complete"]:
                parts = index["parts"] if index.get("part_bytes") == PART_BYTES else []
                index = {**settings, "eos_id": eos_id(tokenizer), "part_bytes": PART_BYTES, "complete": False, "parts": parts}
                try:
                    _make(folder, index, source, tokenizer, workers)
                except InputError:
                    if not is_url(str(source.path)):  # a network may fail, and the parts be good
                        shutil.rmtree(folder)
                    raise
    return _open(folder, index, source, key)


def cache_folder(cache_dir: Path, key: str) -> Path:
    """Where the cache of a source with this digest lies."""
    return cache_dir / f"{key}-v{_LAYOUT}"


def _open(folder: Path, index: Index, source: Source, key: str) -> TokenizedSource:
    parts, documents = open_parts(folder, index)
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(documents[:, 0], dtype=np.int64, out=offsets[1:])
    num_bytes = np.ascontiguousarray(documents[:, 1])
    return TokenizedSource(source_name(source), source.weight, str(source.path), parts, offsets, num_bytes, key)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Make the folder and let one process of this machine in at a time; yields whether the file system has locks.

    The lock only saves work: where it does not reach (another machine), each makes its own parts, and they are the same.
    """
    with user_path(folder.parent, "cannot be written", field="data.cache"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(folder.name + ".lock"), "w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            exclusive = True
        except OSError:
            exclusive = False
        folder.mkdir(exist_ok=True)
        yield exclusive


def _make(folder: Path, index: Index, source: Source, tokenizer, workers: int) -> None:
    """Make the parts that ``index`` lacks and write it after each, at the end as complete."""
    parts, field = index["parts"], index["field"]
    there = {number for number, entry in enumerate(parts) if entry is not None}
    texts = (check_text(row.fields[field], row, field) for row in read_rows(source.path, [field]))
    batches = (batch for batch in _batches(texts, source_name(source)) if batch[0] not in there)
    for number, made in itertools.groupby(_tokenized(batches, tokenizer, workers), key=lambda batch: batch[0]):
        entry = write_part(part_path(folder, number), ((tokens, documents) for _, tokens, documents in made))
        parts[number : number + 1] = [entry]
        write_index(folder, index)
    index["complete"] = True
    write_index(folder, index)


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


def _tokenized(batches: Iterable[tuple[int, list[str]]], tokenizer, workers: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, tokens and documents (see ``token_cache.py``) of each batch, in order."""
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


def _tokenize(tokenizer, number: int, texts: Sequence[str]) -> tuple[int, np.ndarray, np.ndarray]:
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


def _work(number: int, texts: Sequence[str]) -> tuple[int, np.ndarray, np.ndarray]:
    return _tokenize(_tokenizer, number, texts)
