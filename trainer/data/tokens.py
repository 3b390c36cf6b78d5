"""Tokens of CPT documents: each source is tokenised once, into a cache that later starts find again.

A document's tokens are those of its text, after the BOS where the tokenizer puts one before every text, and eos. The cache
of a source is a folder named by the sha256 of what decides the tokens: the bytes of its files, the tokenizer, the format. It
holds parts, and at the end ``complete``, their number. A part (uint32) is the tokens of some documents, then of each document
its tokens and the UTF-8 bytes of its text [n, 2], then n. One process reads the rows in order, deals them to workers and
writes what comes back, so neither the number of workers nor a kill changes a bit.
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
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import fsspec
import numpy as np

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.sources import check_text, file_kind, is_url, open_bytes, read_rows, reading, source_files, source_name
from medtrain.trainer.data.tokenizer import tokenize_starts, tokenizer_digest
from medtrain.trainer.errors import InputError, bad_input, user_path
from medtrain.trainer.files import PARTIAL, replacing
from medtrain.trainer.processes import clean_context

log = logging.getLogger(__name__)

PART_BYTES = 2**28  # of text in a part: what a kill can cost
BATCH_BYTES = 2**21  # of text in a tokenizer call: bounds its memory, keeps its threads busy
PROGRESS_SECONDS = 10.0
_SETTLED_NS = 2_000_000_000
_THREADS = 8  # hashing gives way to other threads, and one alone does not keep up with a fast disk
_TAGS = ("ETag", "etag", "blob_id")  # what S3 and the web, Google and Azure, the Hub call the digest of a file
_FEW_BATCHES = 4  # for these, workers are not worth their start
_FIELD, _FORMAT = "text", 1  # of what the tokens are
_LAYOUT = 4  # of how they lie on the disk; another PART_BYTES is another layout

Part = tuple[np.ndarray, np.ndarray]  # tokens, memory-mapped; documents
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
        return self.parts[k][start - int(self._starts[k]) : stop - int(self._starts[k])]


@dataclass(frozen=True)
class Windows:
    """The windows of one source, the items of the global order: each token after a document's first is a target in exactly one.

    With ``seq_len`` L, a document ``d`` of n tokens has n - 1 predictions. Its window k has the inputs
    ``d[kL : min((k + 1)L, n - 1)]`` and as targets the same shifted by one; no window holds two documents.
    ``first`` int64 [num_docs + 1]: windows before each document; ``lengths`` int32 [num_windows]: inputs, and as many
    targets, of each. Documents of one token (eos alone) have none.
    """

    source: TokenizedSource
    seq_len: int
    first: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def window(self, i: int) -> np.ndarray:
        """Return the tokens of window ``i``, uint32 [length + 1]: ``[:-1]`` the inputs, ``[1:]`` the targets."""
        doc = int(np.searchsorted(self.first, i, side="right")) - 1
        start = int(self.source.offsets[doc]) + (i - int(self.first[doc])) * self.seq_len
        return self.source.tokens(start, start + int(self.lengths[i]) + 1)


def make_windows(source: TokenizedSource, seq_len: int) -> Windows:
    """Cut the documents of ``source`` into windows of at most ``seq_len`` inputs. Raises InputError if none remains."""
    predictions = np.diff(source.offsets) - 1
    first = np.zeros(source.num_docs + 1, dtype=np.int64)
    np.cumsum(-(-predictions // seq_len), out=first[1:])
    if first[-1] == 0:
        raise bad_input("no document has a token to predict", file=source.path)
    lengths = np.full(first[-1], seq_len, dtype=np.int32)
    kept = predictions > 0
    lengths[first[1:][kept] - 1] = (predictions[kept] - 1) % seq_len + 1
    return Windows(source, seq_len, first, lengths)


def default_workers(local_ranks: int = 1) -> int:
    """Workers for this machine: one per CPU that this process may use, less one per other rank, which waits busily."""
    return max(1, len(os.sched_getaffinity(0)) - (local_ranks - 1))


def tokenize_source(
    source: Source, tokenizer, cache_dir: str | Path, *, key: str | None = None, workers: int = 1
) -> TokenizedSource:
    """Return the tokenised documents of ``source``, from the cache in ``cache_dir`` where it holds them.

    Any number of processes may call this at once. ``key`` is the ``digest`` that another process has just got for the
    same source: where its cache is here too, the source is not read. ``workers``: processes that tokenise; a small source,
    or 1, is tokenised in this process, by the tokenizer's own threads. Logs progress. Raises InputError for bad rows (see
    ``sources.py``); then no cache is left.
    """
    cache_dir = Path(cache_dir)
    whole = None if key is None else _whole_cache(cache_folder(cache_dir, key))
    if key is None or whole is None:
        raw = files_digest(source_files(source.path), cache_dir / "raw-files.json")
        identity = {"format": _FORMAT, "field": _FIELD, "source": raw, "tokenizer": tokenizer_digest(tokenizer)}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        folder = cache_folder(cache_dir, key)
        whole = _whole_cache(folder) or _make(folder, source, tokenizer, workers)
    documents = np.concatenate([part[1] for part in whole])
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(documents[:, 0], dtype=np.int64, out=offsets[1:])
    tokens, num_bytes = [part[0] for part in whole], np.ascontiguousarray(documents[:, 1])
    return TokenizedSource(source_name(source), source.weight, str(source.path), tokens, offsets, num_bytes, key)


def cache_folder(cache_dir: Path, key: str) -> Path:
    """Where the cache of a source with this digest lies."""
    return cache_dir / f"{key}-v{_LAYOUT}"


def _whole_cache(folder: Path) -> list[Part] | None:
    """The parts in order; None where they are not all there."""
    with contextlib.suppress(OSError, ValueError):
        number, parts = int((folder / "complete").read_text("utf-8")), _read_parts(folder)
        return [parts[k] for k in range(number)] if len(parts) == number else None
    return None


def _read_parts(folder: Path) -> dict[int, Part]:
    """The parts that are there by number, but those that were cut short."""
    # A mapping keeps its file open, and 1,024 is the usual soft limit.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    parts = {}
    for path in folder.glob("part-*.bin"):
        with contextlib.suppress(OSError, ValueError):
            words = np.memmap(path, "<u4", "r")
            num_tokens = len(words) - 1 - 2 * int(words[-1])
            documents = np.fromfile(path, "<u4", len(words) - 1 - num_tokens, offset=4 * num_tokens).reshape(-1, 2)
            if documents[:, 0].sum(dtype=np.int64) == num_tokens:
                parts[int(path.stem.removeprefix("part-"))] = words[:num_tokens], documents
    return parts


def _make(folder: Path, source: Source, tokenizer, workers: int) -> list[Part]:
    """Make the parts that are missing, one process of this machine at a time.

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
        if (whole := _whole_cache(folder)) is not None:
            return whole
        folder.mkdir(exist_ok=True)
        there = _read_parts(folder)
        texts = (check_text(row.fields[_FIELD], row, _FIELD) for row in read_rows(source.path, [_FIELD]))
        batches = (batch for batch in _batches(texts, source_name(source)) if batch[0] not in there)
        try:
            made = _tokenized(batches, tokenizer, workers)
            for number, of_part in itertools.groupby(made, key=lambda batch: batch[0]):
                _write_part(folder / f"part-{number:05d}.bin", of_part)
        except InputError:
            if not is_url(str(source.path)):  # a network may fail, and the parts be good
                shutil.rmtree(folder)
            raise
        parts = _read_parts(folder)
        with replacing(folder / "complete") as out:  # several machines may write it at once
            out.write(str(len(parts)).encode())
        return [parts[k] for k in range(len(parts))]


def _write_part(path: Path, batches: Iterable[Batch]) -> None:
    """Write a part; it is whole or not there."""
    with replacing(path) as out:
        tables = []
        for _, tokens, documents in batches:
            out.write(tokens.data)
            tables.append(documents)
        table = np.concatenate(tables)
        out.write(table.data)
        out.write(np.array([len(table)], "<u4").data)


def _batches(texts: Iterable[str], name: str) -> Iterator[tuple[int, list[str]]]:
    """The texts of a tokenizer call, and the number of the part that they belong to; logs how far the reading is."""
    number = rows = size = in_batch = part_began = 0
    batch: list[str] = []
    began = last = time.monotonic()
    for text in texts:
        batch.append(text)
        in_batch += len(text.encode("utf-8"))
        if in_batch < BATCH_BYTES:
            continue
        yield number, batch
        rows, size, in_batch, batch = rows + len(batch), size + in_batch, 0, []
        if size - part_began >= PART_BYTES:
            number, part_began = number + 1, size
        if (now := time.monotonic()) - last >= PROGRESS_SECONDS:
            last, rate = now, f"{rows / (now - began):,.0f} documents/s, {size / 1e6 / (now - began):,.1f} MB/s"
            log.info(f"{name}: {rows:,} documents tokenised, {size / 1e9:,.2f} GB of text, {rate}")
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
    ids, eos = tokenize_starts(tokenizer, texts), tokenizer.eos_token_id
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
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _work(number: int, texts: Sequence[str]) -> Batch:
    return _tokenize(_tokenizer, number, texts)


def files_digest(files: Sequence[str], memory: Path | None = None) -> str:
    """Return the sha256 (hex) of the kinds and bytes of the files, in order. Their names and times do not matter.

    ``memory`` (a file) keeps digests, so that a second start does not read 50 GB again: they hold while of every file size,
    inode and times of change (of content, and of status, which the system alone sets) are the same, at a URL size and entity
    tag. Nothing is kept where a file changed less than two seconds before it was read, since a later change could bear the
    same time, or has no tag.
    """
    known, began = {}, time.time_ns()
    if memory is not None:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(memory.read_text("utf-8"))
    stamps = [_stamp(file) for file in files]
    seen = hashlib.sha256(repr([*zip(files, stamps, strict=True)]).encode()).hexdigest()
    if seen in known:
        return known[seen]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_file_digest, files))
    lines = [f"{''.join(file_kind(file))}:{digest}\n" for file, digest in zip(files, digests, strict=True)]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    settled = all(stamp is not None and max(stamp[2:]) < began - _SETTLED_NS for stamp in stamps)
    if memory is not None and settled and stamps == [_stamp(file) for file in files]:
        with contextlib.suppress(OSError):  # a cache that cannot be written is slow, not wrong
            memory.parent.mkdir(parents=True, exist_ok=True)
            with replacing(memory) as out:
                out.write(json.dumps(known | {seen: digest}, indent=0).encode())
    return digest


def _file_digest(file: str) -> str:
    with reading(file), open_bytes(file) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _stamp(file: str) -> tuple | None:
    """What changes with a file: size, inode or tag, times of change (ns; 0 at a URL); None at a URL without a tag."""
    with reading(file):
        if not is_url(file):
            found = os.stat(file)
            return found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns
        files, path = fsspec.core.url_to_fs(file)
        info = files.info(path)
        return next(((info["size"], info[tag], 0) for tag in _TAGS if info.get(tag)), None)
