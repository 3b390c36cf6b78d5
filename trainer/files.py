"""Files as wholes: written so that they are the old one or the new one, also after a power cut, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from medtrain.trainer.errors import bad_input, user_path

PARTIAL = ".partial"  # the ending of whatever is not yet, or no longer, what its name says


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` next to ``path``, let it reach the disk, and rename it into place."""
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


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """:func:`write_bytes` of one JSON object per line."""
    write_bytes(path, _json_lines(rows))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object per line. A last line that a kill has cut off is ended first."""
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(_json_lines(rows))


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_jsonl(path: str | Path, *, skip_broken: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, object) for the non-blank lines of a JSON Lines file. ``skip_broken``: lines that are no
    object, such as one that a kill has cut off, are left out.

    Raises:
        InputError: an unreadable file; unless ``skip_broken``, a line that is not UTF-8, not JSON, or not an object.
    """
    with user_path(path):
        content = Path(path).read_bytes()
    # Split on bytes: str.splitlines would also split at U+2028 and the like, which JSON allows inside strings.
    for row, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if skip_broken:
                continue
            problem = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not valid JSON"
            raise bad_input(problem, file=path, row=row, found=str(error)) from error
        if isinstance(value, dict):
            yield row, value
        elif not skip_broken:
            raise bad_input("not a JSON object", file=path, row=row, found=value, expected="one object per line")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of :func:`read_jsonl`."""
    return [row for _, row in read_jsonl(path)]


def check_identity(
    place: Path,
    recorded: Mapping[str, Any] | None,
    identity: Mapping[str, Any],
    *,
    occupied: bool,
    expected: str,
    free: Collection[str] = (),
) -> None:
    """Refuse a ``place`` that holds the results of something else, so that a run started again goes on only in its own.

    Args:
        recorded: what is written there of how its results were made; None where nothing is.
        identity: what is to be made there, plain data; entries that are only in ``recorded`` do not count.
        occupied: whether there are results.
        expected: what to do instead, for the message.
        free: entries that may differ.

    Raises:
        InputError: results without a record, or made otherwise; every entry that differs is named.
    """
    if recorded is None:
        if occupied:
            raise bad_input("holds results, and no record of how they were made", file=place, expected=expected)
        return
    plain = json.loads(json.dumps(identity))
    differing = [name for name in plain if name not in free and recorded.get(name) != plain[name]]
    if differing:
        raise bad_input(f"holds the results of a run with another {', '.join(differing)}", file=place, expected=expected)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, for what several processes may write at once: each next to ``path`` under a name of its own. At
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
