"""Tokens of CPT documents: each source is tokenised once into a memory-mapped cache that is checked before every use.

A document's tokens are ``tokenizer(text, add_special_tokens=False) + [eos]``, after the BOS where the tokenizer puts one
before every text. The cache of a source is a folder named by the sha256 of everything that decides the tokens: the bytes
of its files, the tokenizer, the field, the format. It holds them in parts (``parts.py``), made by several processes
(``workers.py``): one that is missing, since the process was killed, or that was damaged later, is made anew, and the
others stay. Processes of one machine wait for the one that writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.digests import files_digest
from medtrain.trainer.data.encode import eos_id, tokenizer_digest
from medtrain.trainer.data.parts import Part, is_whole, missing_parts, open_parts, write_index
from medtrain.trainer.data.pieces import plan_parts
from medtrain.trainer.data.sources import read_rows, source_files
from medtrain.trainer.data.tokenizer import check_ids, first_texts
from medtrain.trainer.data.workers import Job, Report, default_workers, make_parts
from medtrain.trainer.errors import InputError, bad_input, user_path
from medtrain.trainer.files import PARTIAL

_FORMAT = 1  # of what the tokens are
_LAYOUT = 2  # of how they lie on the disk


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

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document ``i``, uint32 [n], the last one eos."""
        return self.tokens(int(self.offsets[i]), int(self.offsets[i + 1]))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start`` to ``stop``, uint32, which must lie within one document."""
        k = int(np.searchsorted(self._starts, start, side="right")) - 1
        before = int(self._starts[k])
        return self.parts[k][start - before : stop - before]

    def head(self, n: int) -> np.ndarray:
        """Return the first tokens, uint32, at most ``n`` and those of one part: a sample."""
        return next(part[:n] for part in self.parts if len(part))


def tokenize_source(
    source: Source,
    tokenizer,
    cache_dir: str | Path,
    *,
    field: str = "text",
    key: str | None = None,
    workers: int | None = None,
    verify: bool = False,
    progress: Report | None = None,
) -> TokenizedSource:
    """Return the tokenised documents of ``source``, from the cache in ``cache_dir`` where it holds them.

    Any number of processes may call this at once. ``key`` is the ``digest`` that another process has just got for the
    same source: where its cache is here too, the source is not looked at. ``workers``: processes that tokenise, by
    default :func:`default_workers`; they change no bit. ``verify``: read the source and the whole cache, and trust no
    file for its size and times. ``progress`` is called now and then while tokens are made. Raises InputError for bad
    rows (see ``sources.py``), and where the tokenizer's ids are not those of its tokenizer.json; then no cache is left.
    """
    cache_dir = Path(cache_dir)
    if key is not None:
        parts = _open(cache_folder(cache_dir, key))
        if parts is not None:
            return _tokenized(source, parts, key)
    files = source_files(source.path)
    check_ids(tokenizer, first_texts(row.fields[field] for row in read_rows(source.path, [field])))
    digests = {
        "source": files_digest(files, cache_dir / "raw-files.json", trust=not verify),
        "tokenizer": tokenizer_digest(tokenizer),
    }
    settings = {"format": _FORMAT, "field": field, **digests}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_folder(cache_dir, key)
    parts = _open(folder, verify=verify)
    if parts is None:
        with _alone(folder) as alone:
            parts = _open(folder, verify=verify)
            if parts is None:
                plan = plan_parts(files, field)
                places = {file: i for i, file in enumerate(files)}
                made_of = [_name(key, k, [(places[p.file], p.begin, p.end) for p in part]) for k, part in enumerate(plan)]
                missing = missing_parts(folder, made_of, verify=verify)
                if alone:
                    for left in folder.glob("*" + PARTIAL):  # by processes that were killed
                        left.unlink(missing_ok=True)
                try:
                    make_parts(Job(folder, plan, made_of, field, tokenizer), missing, workers or default_workers(), progress)
                    about = {**settings, "layout": _LAYOUT, "eos_id": eos_id(tokenizer)}
                    if write_index(folder, about, len(plan)) == 0:
                        raise bad_input("no rows", file=source.path)
                except InputError:
                    shutil.rmtree(folder)
                    raise
                parts = _open(folder)
    if parts is None:
        raise OSError(f"{folder}: what was just written there cannot be read back")
    return _tokenized(source, parts, key)


def cache_folder(cache_dir: Path, key: str) -> Path:
    """Where the cache of a source with this digest lies."""
    return cache_dir / f"{key}-v{_LAYOUT}"


def _name(key: str, number: int, pieces: list[tuple[int, int, int]]) -> bytes:
    """What a part is made of, in 32 bytes."""
    return hashlib.sha256(json.dumps([key, number, pieces]).encode()).digest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Make the folder and let one process of this machine in at a time; whether that could be had.

    It only spares work: where locks do not reach (another machine), each makes its own parts, and they are the same.
    """
    with user_path(folder.parent, "cannot be written", field="data.cache"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(folder.name + ".lock"), "w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        folder.mkdir(exist_ok=True)
        yield alone


def _open(folder: Path, *, verify: bool = False) -> list[Part] | None:
    return open_parts(folder) if is_whole(folder, verify=verify) else None


def _tokenized(source: Source, parts: list[Part], key: str) -> TokenizedSource:
    documents = [part.documents for part in parts]
    offsets = np.zeros(1 + sum(map(len, documents)), np.int64)
    np.cumsum(np.concatenate([table[:, 0] for table in documents]), dtype=np.int64, out=offsets[1:])
    name = source.name or Path(source.path).resolve().stem
    num_bytes = np.concatenate([table[:, 1] for table in documents])
    return TokenizedSource(name, source.weight, str(source.path), [part.tokens for part in parts], offsets, num_bytes, key)
