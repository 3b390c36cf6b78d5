"""The token cache on disk: a folder of part files and ``index.json``, which is written last and makes it whole.

A part is one file: its tokens (uint32), then of each document its tokens and the UTF-8 bytes of its text (uint32 [2]), then
a tail: what it was made of, its counts, and the sha256 of all before. The index says of each part its size, time of
change, counts and sha256. A part that still has that size and time is trusted, so that 40 GB open without being read;
any other is read whole and compared with its digest. Parts are memory-mapped; nothing is copied together.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import resource
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medtrain.trainer.files import replacing

_TAIL = struct.Struct("<8sqq32s32s")  # magic, tokens, documents, what it was made of, sha256 of all before this one
_MAGIC = b"medtrain"
_INDEX = "index.json"


@dataclass(frozen=True)
class Part:
    """One part: ``tokens`` uint32 [n], memory-mapped; ``documents`` uint32 [num_docs, 2]: tokens and bytes of each."""

    tokens: np.ndarray
    documents: np.ndarray


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.bin"


def write_part(path: Path, made_of: bytes, batches: Iterable[tuple[Sequence[Sequence[int]], Sequence[int]]]) -> None:
    """Write a part of ``batches`` of (tokens of each document, bytes of each document's text). It is whole or not there.

    ``made_of``: 32 bytes that no other part shares.
    """
    digest, documents = hashlib.sha256(), [np.empty((0, 2), "<u4")]
    with replacing(path) as out:

        def write(content: bytes) -> None:
            digest.update(content)
            out.write(content)

        for ids, num_bytes in batches:
            lengths = [len(document) for document in ids]
            documents.append(np.array([lengths, num_bytes], dtype="<u4").T)
            write(np.fromiter(itertools.chain.from_iterable(ids), "<u4", sum(lengths)).tobytes())
        table = np.concatenate(documents)
        write(table.tobytes())
        tail = _TAIL.pack(_MAGIC, int(table[:, 0].sum(dtype=np.int64)), len(table), made_of, bytes(32))[:-32]
        write(tail)
        out.write(digest.digest())


def write_index(folder: Path, about: dict, num_parts: int) -> int:
    """Write ``index.json`` over the parts that are there; ``about`` goes into it, for people. Returns the documents."""
    entries = []
    for number in range(num_parts):
        path = part_path(folder, number)
        num_tokens, num_docs, _, digest = _read_tail(path)
        size, mtime_ns = _stamp(path)
        entries.append(
            {"size": size, "mtime_ns": mtime_ns, "num_tokens": num_tokens, "num_docs": num_docs, "sha256": digest.hex()}
        )
    totals = {name: sum(entry[name] for entry in entries) for name in ("num_docs", "num_tokens")}
    _replace_index(folder, {**about, **totals, "parts": entries})
    return totals["num_docs"]


def is_whole(folder: Path, *, verify: bool = False) -> bool:
    """Whether there is an index and every part is what it says.

    ``verify``: read every part. Else only those whose size or time of change is another; where these prove good, the
    index learns their times.
    """
    try:
        index = json.loads((folder / _INDEX).read_text("utf-8"))
        changed = False
        for number, entry in enumerate(index["parts"]):
            path = part_path(folder, number)
            size, mtime_ns = _stamp(path)
            if size != entry["size"]:
                return False
            if verify or mtime_ns != entry["mtime_ns"]:
                if _body_digest(path).hex() != entry["sha256"] or _read_tail(path)[3].hex() != entry["sha256"]:
                    return False
                changed |= mtime_ns != entry["mtime_ns"]
                entry["mtime_ns"] = mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if changed:
        with contextlib.suppress(OSError):  # a cache that cannot be written is read whole each time
            _replace_index(folder, index)
    return True


def missing_parts(folder: Path, made_of: Sequence[bytes], *, verify: bool = False) -> list[int]:
    """Return the numbers of the parts that are not there, whole and made of this. Reads those that no index vouches for,
    with ``verify`` all."""
    try:
        entries = json.loads((folder / _INDEX).read_text("utf-8"))["parts"]
        known = {k: (entry["size"], entry["mtime_ns"]) for k, entry in enumerate(entries)}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    missing = []
    for number, wanted in enumerate(made_of):
        path = part_path(folder, number)
        try:
            _, _, found, digest = _read_tail(path)
            trusted = not verify and known.get(number) == _stamp(path)
            if found != wanted or not (trusted or digest == _body_digest(path)):
                missing.append(number)
        except (OSError, ValueError):
            missing.append(number)
    return missing


def open_parts(folder: Path) -> list[Part] | None:
    """Memory-map the parts that the index names, None if they do not fit together."""
    try:
        entries = json.loads((folder / _INDEX).read_text("utf-8"))["parts"]
        _allow_open_files()
        return [_open_part(part_path(folder, k), e["num_tokens"], e["num_docs"]) for k, e in enumerate(entries)]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open_part(path: Path, num_tokens: int, num_docs: int) -> Part:
    if path.stat().st_size != 4 * num_tokens + 8 * num_docs + _TAIL.size:
        raise ValueError(f"{path}: wrong size")
    documents = np.fromfile(path, "<u4", 2 * num_docs, offset=4 * num_tokens).reshape(num_docs, 2)
    if int(documents[:, 0].sum(dtype=np.int64)) != num_tokens:
        raise ValueError(f"{path}: its documents do not add up")
    # Nothing at all cannot be mapped.
    tokens = np.memmap(path, "<u4", "r", shape=(num_tokens,)) if num_tokens else np.empty(0, "<u4")
    return Part(tokens, documents)


def _allow_open_files() -> None:
    """Let this process open as many files as it may: a mapping keeps its file open, and 1,024 is the usual soft limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _replace_index(folder: Path, index: dict) -> None:
    with replacing(folder / _INDEX) as out:
        out.write((json.dumps(index, indent=1) + "\n").encode())


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _read_tail(path: Path) -> tuple[int, int, bytes, bytes]:
    """(tokens, documents, what it was made of, sha256); raises ValueError if this is no part."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        file.seek(max(0, size - _TAIL.size))
        content = file.read()
    if len(content) != _TAIL.size or content[:8] != _MAGIC:
        raise ValueError(f"{path}: no part of a token cache")
    return _TAIL.unpack(content)[1:]


def _body_digest(path: Path) -> bytes:
    """sha256 of a part but for its last 32 bytes, which hold it."""
    digest, left = hashlib.sha256(), path.stat().st_size - 32
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 2**20))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()
