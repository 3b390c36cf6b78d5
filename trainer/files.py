"""Files as wholes: written so that they are the old one or the new one, also after a power cut, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from medtrain.trainer.errors import bad_input, user_path

PARTIAL = ".partial"  # the ending of whatever is not yet, or no longer, what its name says


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, let it reach the disk, and rename it into place."""
    temporary = path.with_name(path.name + PARTIAL)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """:func:`write_bytes` of indented JSON."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_rows(path: Path) -> list[Any]:
    """The objects of a JSON Lines file that we wrote: its lines end with a line feed alone, as the texts in them may hold
    what ``str.splitlines`` would split at (U+2028)."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, for what several processes may write at once: each beside ``path`` under a name of its own. At
    the end it reaches the disk and takes its place; after an exception it is gone."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def replace_folder(partial: Path, out: Path) -> None:
    """Let ``partial``'s files reach the disk and put it in the place of ``out``, old or new at any moment."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    old = out.with_name(out.name + ".old" + PARTIAL)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_can_make(folder: Path, *, field: str | None = None) -> None:
    """Refuse a folder of results that is not there and cannot be made; nothing is written to find out."""
    with user_path(folder, field=field):
        if folder.exists():
            return
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        if folder.is_symlink() or not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise bad_input("cannot be made", field=field, found=str(folder), expected=f"a writable {parent}")


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Let what was written to a file, or renamed inside a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints under ``root``, oldest first."""
    if not root.is_dir():
        return []
    found = []
    for folder in root.glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdigit() and (folder / "trainer.json").is_file():
            found.append((int(number), folder))
    return sorted(found)
