"""Data sources: reads rows of JSON Lines, parquet and HF ``save_to_disk`` folders, and names the row of a mistake.

A source is one file (``.jsonl`` or ``.parquet``) or one folder: a folder that ``datasets`` saved (``state.json`` beside
``.arrow`` files), or a folder of ``.jsonl`` and ``.parquet`` files, read in the order of their names. Rows stream;
nothing here holds a whole file. Rows count from 1 within their file, and of a JSON Lines file they are its lines.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from medtrain.trainer.config.source import Source
from medtrain.trainer.errors import bad_input, user_path

_ROWS_PER_READ = 1024
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


class Row(NamedTuple):
    """One row: the file that holds it, its number from 1, and its fields."""

    file: Path
    number: int
    fields: dict[str, object]


def name_sources(sources: Sequence[Source]) -> list[Source]:
    """Return the sources with every name filled in and unique.

    A missing name becomes the file's stem, with ``-2``, ``-3``, ... where that is taken. Raises InputError if two
    sources were given the same name.
    """
    taken: set[str] = set()
    for source in sources:
        if source.name is not None and source.name in taken:
            raise bad_input("two sources have this name", file=source.path, field="name", found=source.name)
        taken.add(source.name or "")
    named = []
    for source in sources:
        name = source.name
        if name is None:
            stem = Path(os.path.realpath(source.path)).stem
            name = next(n for k in range(1, len(sources) + 2) if (n := stem if k == 1 else f"{stem}-{k}") not in taken)
            taken.add(name)
        named.append(dataclasses.replace(source, name=name))
    return named


def source_files(path: str | Path) -> list[Path]:
    """Return the data files of a source in reading order. Raises InputError if there are none or of no known kind."""
    with user_path(path):
        files = _files_of(Path(path))
        for file in files:
            with open(file, "rb"):
                pass
    return files


def _files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise bad_input("no such file or folder", file=path)
    if path.is_file():
        if path.suffix not in (".jsonl", ".parquet"):
            raise bad_input("unknown kind of file", file=path, found=path.name, expected=".jsonl or .parquet")
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise bad_input("holds several splits", file=path, found=splits, expected="the path of one of them")
    if (path / "state.json").is_file():
        try:
            names = [entry["filename"] for entry in json.loads((path / "state.json").read_text("utf-8"))["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise bad_input("not a data set saved by datasets", file=path / "state.json", field="_data_files") from None
        files = [path / name for name in names]
        for file in files:
            if not file.is_file():
                raise bad_input("no such file, but state.json lists it", file=file)
    else:
        files = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".parquet") and not p.name.startswith("."))
    if not files:
        raise bad_input("the folder holds no data files", file=path, expected=".jsonl or .parquet files")
    return files


def read_rows(path: str | Path, fields: Sequence[str], if_there: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a source, each with at least ``fields``, and with those of ``if_there`` that it has.

    Raises InputError naming file and row: unreadable files, broken JSON, a row that is no object, invalid UTF-8, a
    missing field, no rows at all.
    """
    empty = True
    for file in source_files(path):
        for row in read_range(file, fields, if_there=if_there):
            empty = False
            yield row
    if empty:
        raise bad_input("no rows", file=path)


def read_range(
    file: Path,
    fields: Sequence[str],
    begin: int = 0,
    end: int | None = None,
    *,
    lines_before: int = 0,
    if_there: Sequence[str] = (),
) -> Iterator[Row]:
    """Yield the rows of a range of one file, as :func:`read_rows` does those of a source.

    JSON Lines: the lines that begin in the bytes [begin, end); ``lines_before`` that range are added to their numbers.
    Parquet: the row groups that begin in the rows [begin, end), counted from 0; Arrow: these rows.
    """
    rows = (
        _read_jsonl(file, begin, end, lines_before)
        if file.suffix == ".jsonl"
        else _read_arrow(file, fields, if_there, begin, end)
    )
    for row in rows:
        for field in fields:
            if field not in row.fields:
                found = ", ".join(sorted(row.fields)) or "no fields"
                raise bad_input("missing", file=file, row=row.number, field=field, found=found)
        yield row


def lines_before(file: Path, begin: int) -> int:
    """How many lines of a JSON Lines file begin before byte ``begin``."""
    if begin == 0:
        return 0
    count, left, last = 0, begin, b""
    with open(file, "rb") as handle:
        while left and (chunk := handle.read(min(left, 2**20))):
            count, left, last = count + chunk.count(b"\n"), left - len(chunk), chunk[-1:]
    return count + (last != b"\n")


def row_groups(file: Path, field: str) -> list[tuple[int, int]]:
    """(rows, bytes of ``field`` before compression; of all columns where it is none) of each row group of a parquet
    file. Raises InputError if it cannot be read."""
    import pyarrow.parquet as pq

    with _readable(file):
        metadata = pq.ParquetFile(file).metadata
        groups = []
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            columns = [group.column(k) for k in range(group.num_columns)]
            size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
            groups.append((group.num_rows, size or group.total_byte_size))
        return groups


def arrow_rows(file: Path) -> int:
    """The number of rows of an Arrow stream. Raises InputError if it cannot be read."""
    import pyarrow as pa

    with _readable(file):
        return sum(batch.num_rows for batch in pa.ipc.open_stream(pa.memory_map(str(file))))


def check_text(text: object, row: Row, field: str) -> str:
    """Return ``text`` if it is a string with more than blanks in it and valid Unicode; else raise InputError naming row
    and field."""
    where = {"file": row.file, "row": row.number, "field": field}
    if not isinstance(text, str):
        raise bad_input("wrong type", **where, found=kind_of(text), expected="a string")
    if not text.strip():
        raise bad_input("empty text", **where, found=text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair ("\ud800"), which no tokenizer takes.
        found = f"\\u{ord(text[error.start]):04x} at character {error.start + 1}"
        raise bad_input("half a surrogate pair is not text", **where, found=found) from None
    return text


def kind_of(value: object) -> str:
    """Return what a JSON value is, in words, for messages."""
    return _KINDS.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _read_jsonl(file: Path, begin: int, end: int | None, lines_before: int) -> Iterator[Row]:
    with open(file, "rb") as handle:
        place = begin
        if begin > 0:
            # From the byte before: a line that begins just here must not be taken for the rest of one.
            handle.seek(begin - 1)
            place += len(handle.readline()) - 1
        for number, line in enumerate(handle, start=lines_before + 1):
            if end is not None and place >= end:
                return
            if place == 0:
                place, line = len(line), line.removeprefix(codecs.BOM_UTF8)
            else:
                place += len(line)
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
                raise bad_input("invalid UTF-8", file=file, row=number, found=found) from None
            except (ValueError, RecursionError) as error:
                found = line[:60].decode("utf-8", "replace").rstrip("\r\n")
                raise bad_input(f"not valid JSON: {error}", file=file, row=number, found=found) from None
            if not isinstance(fields, dict):
                raise bad_input("wrong row", file=file, row=number, found=kind_of(fields), expected="a JSON object")
            yield Row(file, number, fields)


def _read_arrow(file: Path, fields: Sequence[str], if_there: Sequence[str], begin: int, end: int | None) -> Iterator[Row]:
    """Yield the columns ``fields``, and those of ``if_there`` that exist, of a parquet file, or of an Arrow stream as
    ``datasets`` writes it, row by row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _readable(file):
        parquet = file.suffix == ".parquet"
        reader = pq.ParquetFile(file) if parquet else pa.ipc.open_stream(pa.memory_map(str(file)))
        schema = reader.schema_arrow if parquet else reader.schema
        for field in fields:
            if field not in schema.names:
                raise bad_input("missing", file=file, row=1, field=field, found=", ".join(schema.names))
        fields = [*fields, *(name for name in if_there if name in schema.names)]
        stop = math.inf if end is None else end
        if parquet:
            groups, number = [], 0
            for i in range(reader.num_row_groups):
                if begin <= number < stop:
                    groups.append(i)
                number += reader.metadata.row_group(i).num_rows
            reader, number = reader.iter_batches(_ROWS_PER_READ, row_groups=groups, columns=list(fields)), begin
        else:
            number = 0
        for batch in reader:
            if not parquet:
                if number >= stop:
                    return
                skipped = min(max(begin - number, 0), batch.num_rows)
                number += skipped
                batch = batch.slice(skipped, min(batch.num_rows - skipped, stop - number) if end is not None else None)
            batch = batch.select(list(fields))
            for start in range(0, batch.num_rows, _ROWS_PER_READ):
                piece = batch.slice(start, _ROWS_PER_READ)
                for row_fields in _to_rows(piece, file, number):
                    number += 1
                    yield Row(file, number, row_fields)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise bad_input(f"not a readable {file.suffix[1:]} file: {error}", file=file) from None


def _to_rows(batch, file: Path, before: int) -> list[dict[str, object]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for k in range(batch.num_rows):
            for field in batch.schema.names:
                try:
                    batch.slice(k, 1).column(field).to_pylist()
                except UnicodeDecodeError as error:
                    found = f"byte 0x{error.object[error.start]:02x}"
                    raise bad_input("invalid UTF-8", file=file, row=before + k + 1, field=field, found=found) from None
        raise
