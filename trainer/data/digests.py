"""Digests of the raw input, remembered: a second start does not read 50 GB again to learn that nothing has changed.

What is remembered of a file holds while its size, inode and times of change (content and status) are the same. The
status time is set by the system alone, so a file that was overwritten and given its old date back is read again. Of a
file that changed less than two seconds before it was read nothing is remembered: a later change could bear the same time.
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

from medtrain.trainer.files import file_sha256, replacing

_SETTLED_NS = 2_000_000_000
_THREADS = 8  # hashing gives way to other threads, and one alone does not keep up with a fast disk


def files_digest(files: Sequence[Path], memory: str | Path | None = None, *, trust: bool = True) -> str:
    """Return the sha256 (hex) of the kinds and bytes of the files, in order. Their names and times do not matter.

    ``memory``: the file that remembers, read and written; with ``trust`` off it is only written.
    """
    known = _read(memory) if memory is not None else {}
    now = time.time_ns()
    stamps = {file: _stamp(file) for file in files}

    def digest(file: Path) -> str:
        entry = known.get(str(file.resolve()))
        return entry[1] if trust and entry is not None and entry[0] == stamps[file] else file_sha256(file)

    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(digest, files))
    settled = {
        str(file.resolve()): [stamps[file], found]
        for file, found in zip(files, digests, strict=True)
        if max(stamps[file][2:]) < now - _SETTLED_NS and _stamp(file) == stamps[file]
    }
    if memory is not None and any(known.get(path) != entry for path, entry in settled.items()):
        kept = {path: entry for path, entry in (_read(memory) | settled).items() if os.path.exists(path)}
        with contextlib.suppress(OSError):  # a cache that cannot be written is slow, not wrong
            Path(memory).parent.mkdir(parents=True, exist_ok=True)
            with replacing(Path(memory)) as out:
                out.write(json.dumps(kept, indent=0).encode())
    whole = hashlib.sha256()
    for file, found in zip(files, digests, strict=True):
        whole.update(f"{file.suffix}:{found}\n".encode())
    return whole.hexdigest()


def _stamp(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _read(memory: str | Path) -> dict[str, list]:
    try:
        found = json.loads(Path(memory).read_text("utf-8"))
        return {path: [list(stamp), str(digest)] for path, (stamp, digest) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
