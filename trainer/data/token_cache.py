"""The token cache on disk: a folder of parts and ``index.json``, which tells the parts that are made and whether it is all.

A part is the tokens (uint32) of some documents, one after the other, then of each document its tokens and the UTF-8 bytes of
its text (uint32 [n, 2]). Parts are memory-mapped; nothing is copied together. A part of the size and time of change that the
index has for it is trusted, so that 40 GB open without being read; any other is compared with its sha256.
"""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from medtrain.trainer.files import file_sha256, replacing

Index = dict  # "complete": bool, "parts": a list of entries (dicts), and what the cache was made of


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.bin"


def write_part(path: Path, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict:
    """Write a part of (tokens, documents) arrays; it is whole or not there. Returns its entry for the index."""
    num_tokens, tables = 0, []
    with replacing(path) as out:
        for tokens, documents in batches:
            out.write(tokens.data)
            num_tokens += len(tokens)
            tables.append(documents)
        table = np.concatenate(tables)
        out.write(table.data)
    return {"num_tokens": num_tokens, "num_docs": len(table), "mtime_ns": path.stat().st_mtime_ns, "sha256": file_sha256(path)}


def read_index(folder: Path, *, verify: bool = False) -> Index:
    """The index, with None for each part that is not what its entry says; then it is not complete.

    ``verify``: read every part, else only those whose time of change is another. If these prove good, the index learns it.
    """
    try:
        index = json.loads((folder / "index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {"complete": False, "parts": []}
    times = [entry and entry["mtime_ns"] for entry in index["parts"]]
    index["parts"] = [_checked(part_path(folder, k), entry, verify) for k, entry in enumerate(index["parts"])]
    if None in index["parts"]:
        index["complete"] = False
    elif times != [entry["mtime_ns"] for entry in index["parts"]]:
        with contextlib.suppress(OSError):  # a cache that cannot be written is read whole each time
            write_index(folder, index)
    return index


def write_index(folder: Path, index: Index) -> None:
    with replacing(folder / "index.json") as out:
        out.write((json.dumps(index, indent=1) + "\n").encode())


def open_parts(folder: Path, index: Index) -> tuple[list[np.ndarray], np.ndarray]:
    """The tokens of each part, memory-mapped, and the documents of all."""
    # A mapping keeps its file open, and 1,024 is the usual soft limit.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    parts, tables = [], []
    for number, entry in enumerate(index["parts"]):
        path, num_tokens, num_docs = part_path(folder, number), entry["num_tokens"], entry["num_docs"]
        parts.append(np.memmap(path, "<u4", "r", shape=(num_tokens,)))
        tables.append(np.fromfile(path, "<u4", 2 * num_docs, offset=4 * num_tokens).reshape(num_docs, 2))
    return parts, np.concatenate(tables)


def _checked(path: Path, entry: dict | None, verify: bool) -> dict | None:
    try:
        found = path.stat()
        if entry is None or found.st_size != 4 * entry["num_tokens"] + 8 * entry["num_docs"]:
            return None
        if (verify or found.st_mtime_ns != entry["mtime_ns"]) and file_sha256(path) != entry["sha256"]:
            return None
    except OSError:
        return None
    return entry | {"mtime_ns": found.st_mtime_ns}
