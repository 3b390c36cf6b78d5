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
import math
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


def files_digest(files: Sequence[str], memory: Path | None = None, *, trust: bool = True) -> str:
    """Return the sha256 (hex) of the kinds and bytes of the files, in order. Their names and times do not matter.

    ``memory``: the file that remembers, read and written; with ``trust`` off it is only written.
    """
    known = _read(memory)
    names = [file if is_url(file) else os.path.realpath(file) for file in files]
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda name: _digest(name, known.get(name) if trust else None), names))
    settled = {name: entry for name, entry in zip(names, entries, strict=True) if entry[0] is not None}
    if memory is not None and any(known.get(name) != entry for name, entry in settled.items()):
        kept = {name: entry for name, entry in (_read(memory) | settled).items() if is_url(name) or os.path.exists(name)}
        with contextlib.suppress(OSError):  # a cache that cannot be written is slow, not wrong
            memory.parent.mkdir(parents=True, exist_ok=True)
            with replacing(memory) as out:
                out.write(json.dumps(kept, indent=0).encode())
    whole = hashlib.sha256()
    for file, (_, digest) in zip(files, entries, strict=True):
        whole.update(f"{''.join(file_kind(file))}:{digest}\n".encode())
    return whole.hexdigest()


def _digest(file: str, known: list | None) -> list:
    """[what was seen of the file, None where that may stay the same while the file changes; sha256 of its bytes]"""
    stamp, began = _stamp(file), time.time_ns()
    if known is not None and stamp is not None and known[0] == stamp:
        return known
    with reading(file), open_bytes(file) as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(2**20):
            digest.update(chunk)
    return [stamp if _stamp(file, before=began - _SETTLED_NS) == stamp else None, digest.hexdigest()]


def _stamp(file: str, before: float = math.inf) -> list | None:
    """What changes with a local file, if it last changed ``before`` (ns), or with a file at a URL, if it has a tag."""
    if not is_url(file):
        found = os.stat(file)
        settled = max(found.st_mtime_ns, found.st_ctime_ns) < before
        return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns] if settled else None
    with reading(file):
        files, path = fsspec.core.url_to_fs(file)
        found = files.info(path)
    return next(([found["size"], found[tag]] for tag in _TAGS if found.get(tag)), None)


def _read(memory: Path | None) -> dict[str, list]:
    try:
        return json.loads(memory.read_text("utf-8")) if memory is not None else {}
    except (OSError, ValueError):
        return {}
