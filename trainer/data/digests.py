"""Digests of the raw input, remembered: a second start does not read 50 GB again to learn that nothing has changed.

What is remembered of a file holds while its size, inode and times of change (content and status) are the same. The status
time is set by the system alone, so a file that was overwritten and given its old date back is read again. Of a file that
changed less than two seconds before it was read nothing is remembered: a later change could bear the same time. At a URL,
size and entity tag must be the same; without a tag nothing is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec

from medtrain.trainer.data.sources import file_kind, is_url, open_bytes, reading
from medtrain.trainer.files import replacing

_SETTLED_NS = 2_000_000_000
_THREADS = 8  # hashing gives way to other threads, and one alone does not keep up with a fast disk
_TAGS = ("ETag", "etag", "blob_id")  # what S3 and the web, Google and Azure, the Hub call the digest of a file


def files_digest(files: Sequence[str], memory: Path | None = None) -> str:
    """Return the sha256 (hex) of the kinds and bytes of the files, in order. Their names and times do not matter.

    ``memory``: the file that remembers, read and written.
    """
    known: dict[str, list] = {}
    if memory is not None:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(memory.read_text("utf-8"))
    names = [file if is_url(file) else os.path.realpath(file) for file in files]
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda name: _digest(name, known.get(name)), names))
    learned = known | {name: entry for name, entry in zip(names, entries, strict=True) if entry[0] is not None}
    if memory is not None and learned != known:
        with contextlib.suppress(OSError):  # a cache that cannot be written is slow, not wrong
            memory.parent.mkdir(parents=True, exist_ok=True)
            with replacing(memory) as out:
                out.write(json.dumps(learned, indent=0).encode())
    lines = [f"{''.join(file_kind(file))}:{digest}\n" for file, (_, digest) in zip(files, entries, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(file: str, known: list | None) -> list:
    """[what was seen of the file, None where that may stay the same while the file changes; sha256 of its bytes]"""
    stamp, began = _stamp(file), time.time_ns()
    if known is not None and stamp is not None and known[0] == stamp:
        return known
    with reading(file), open_bytes(file) as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    settled = stamp is not None and stamp == _stamp(file) and (is_url(file) or max(stamp[2:]) < began - _SETTLED_NS)
    return [stamp if settled else None, digest]


def _stamp(file: str) -> list | None:
    """What changes with a local file, or with a file at a URL, if it has a tag."""
    if not is_url(file):
        found = os.stat(file)
        return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
    with reading(file):
        files, path = fsspec.core.url_to_fs(file)
        found = files.info(path)
    return next(([found["size"], found[tag]] for tag in _TAGS if found.get(tag)), None)
