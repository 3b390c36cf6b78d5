"""Makes the missing parts of a token cache, in this process or, for several parts, in worker processes.

A part depends on its pieces alone, so who makes it, and when, changes no bit. Workers are given one part at a time, in
order. They hold one end of a pipe each: when this process dies, killed or not, theirs ends, and so do they.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from medtrain.trainer.data.encode import eos_id, tokenize_starts
from medtrain.trainer.data.parts import part_path, write_part
from medtrain.trainer.data.pieces import Piece
from medtrain.trainer.data.sources import check_text, lines_before, read_range
from medtrain.trainer.errors import InputError
from medtrain.trainer.processes import clean_context

_CHARS_PER_CALL = 1_000_000  # bounds the memory of one tokenizer call; long enough to keep its threads busy


@dataclass(frozen=True)
class Job:
    """What makes a part: ``parts``: the pieces of each, ``made_of``: 32 bytes that name each."""

    folder: Path
    parts: Sequence[Sequence[Piece]]
    made_of: Sequence[bytes]
    field: str
    tokenizer: object


@dataclass(frozen=True)
class Progress:
    """``rows`` and ``tokens`` made in ``seconds``; ``bytes_done`` of ``bytes_total``, parts found whole included. Within
    a part, bytes of text stand for bytes of the file."""

    rows: int
    tokens: int
    bytes_done: int
    bytes_total: int
    seconds: float

    def __str__(self) -> str:
        share, rate = self.bytes_done / max(self.bytes_total, 1), max(self.seconds, 1e-9)
        return (
            f"{self.rows:,} documents tokenised, {share:.0%} of {self.bytes_total / 1e9:,.2f} GB, "
            f"{self.rows / rate:,.0f} documents/s, {self.tokens / rate:,.0f} tokens/s"
        )


Report = Callable[[Progress], None]


def default_workers(local_ranks: int = 1) -> int:
    """Workers for this machine: one a CPU that this process may use, less one for each other rank, which waits busily."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus - (local_ranks - 1))


def make_parts(job: Job, missing: Sequence[int], workers: int, report: Report | None) -> None:
    """Make the parts ``missing`` (ascending) in ``job.folder``, with up to ``workers`` processes; with one part, or one
    worker, in this process, where the tokenizer's own threads are at work.

    Raises InputError for the first bad row in the order of the source; later parts may then have been made.
    """
    tally = _Tally(job, missing, report)
    workers = min(workers, len(missing))
    if workers > 1:
        _make_by_workers(job, missing, workers, tally)
        return
    for number in missing:
        _make(job, number, lambda *made, number=number: tally.add(number, *made))
        tally.finish(number)


class _Tally:
    """Adds up what was made, and tells."""

    def __init__(self, job: Job, missing: Sequence[int], report: Report | None):
        self.sizes = [sum(piece.size for piece in pieces) for pieces in job.parts]
        self.done = sum(self.sizes) - sum(self.sizes[number] for number in missing)
        self.rows = self.tokens = 0
        self.in_work: dict[int, int] = {}  # bytes of text by part
        self.report, self.began = report, time.monotonic()

    def add(self, number: int, rows: int, tokens: int, num_bytes: int) -> None:
        self.rows += rows
        self.tokens += tokens
        self.in_work[number] = min(self.in_work.get(number, 0) + num_bytes, self.sizes[number])
        self._tell()

    def finish(self, number: int) -> None:
        self.in_work.pop(number, None)
        self.done += self.sizes[number]
        self._tell()

    def _tell(self) -> None:
        if self.report is not None:
            done, seconds = self.done + sum(self.in_work.values()), time.monotonic() - self.began
            self.report(Progress(self.rows, self.tokens, done, sum(self.sizes), seconds))


def _make(job: Job, number: int, add: Callable[[int, int, int], None]) -> None:
    eos = eos_id(job.tokenizer)

    def batches() -> Iterator[tuple[list[list[int]], list[int]]]:
        for texts in _text_batches(_texts(job.parts[number], job.field)):
            ids = tokenize_starts(job.tokenizer, texts)
            for document in ids:
                document.append(eos)
            num_bytes = [len(text.encode("utf-8")) for text in texts]
            yield ids, num_bytes
            add(len(ids), sum(map(len, ids)), sum(num_bytes))

    write_part(part_path(job.folder, number), job.made_of[number], batches())


def _texts(pieces: Sequence[Piece], field: str) -> Iterator[str]:
    for piece in pieces:
        try:
            yield from _piece_texts(piece, field, 0)
        except InputError:
            if piece.file.suffix != ".jsonl" or piece.begin == 0:
                raise
            # The lines before are counted only now that a message needs their number.
            for _ in _piece_texts(piece, field, lines_before(piece.file, piece.begin)):
                pass
            raise


def _piece_texts(piece: Piece, field: str, before: int) -> Iterator[str]:
    for row in read_range(piece.file, [field], piece.begin, piece.end, lines_before=before):
        yield check_text(row.fields[field], row, field)


def _text_batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= _CHARS_PER_CALL:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _make_by_workers(job: Job, missing: Sequence[int], workers: int, tally: _Tally) -> None:
    context = clean_context(__name__, type(job.tokenizer).__module__)
    pickled = pickle.dumps(job)  # once for all: a tokenizer has megabytes
    processes, at_work = {}, {}  # by connection: the process; the part it makes
    waiting = iter(missing)
    failed: dict[int, str] = {}

    def give(connection: Connection) -> None:
        at_work.pop(connection, None)
        number = None if failed else next(waiting, None)
        if number is not None:
            at_work[connection] = number
            connection.send(number)

    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, pickled), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            give(ours)
        # Parts are given out in order: once one has failed, only those before it can hold an earlier mistake.
        while any(number < min(failed, default=sys.maxsize) for number in at_work.values()):
            for connection in wait(list(at_work)):
                number = at_work[connection]
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError):
                    process = processes[connection]
                    process.join()
                    raise RuntimeError(
                        f"a worker ended with status {process.exitcode} while it tokenised part {number} of {job.folder}; "
                        "the same command goes on with the missing parts"
                    ) from None
                if kind == "made":
                    tally.add(number, *content)
                elif kind == "done":
                    tally.finish(number)
                    give(connection)
                else:
                    failed[number] = content
                    give(connection)
    finally:
        for connection, process in processes.items():
            connection.close()
            process.terminate()
        for process in processes.values():
            process.join()
    if failed:
        raise InputError(failed[min(failed)])


def _work(connection: Connection, pickled: bytes) -> None:
    """A worker: makes the parts it is told until the pipe ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that a half-written part is removed
    job = pickle.loads(pickled)
    try:
        while True:
            number = connection.recv()
            try:
                _make(job, number, lambda *made: connection.send(("made", made)))
                connection.send(("done", None))
            except InputError as error:
                connection.send(("failed", str(error)))
    except (EOFError, ConnectionError):
        pass  # the parent is gone
