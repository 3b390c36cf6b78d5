"""Data sources: rows of JSON Lines, JSON, CSV, parquet and HF ``save_to_disk`` folders, with the place of every mistake.

A source is one file or one folder, on this machine or at a URL that fsspec reads. A folder is one that ``datasets`` saved
(``state.json`` next to ``.arrow`` files), or holds files that are read in the order of their names. Rows stream, but those of
``.json``. They count from 1 in their file; in JSON Lines and CSV a row's number is its line.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import functools
import io
import itertools
import json
import logging
import os
import re
import string
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from medtrain.trainer.config.source import Source
from medtrain.trainer.errors import InputError, StopRequested, bad_input

log = logging.getLogger(__name__)

_CODECS = {"": None, ".gz": "gzip", ".zst": "zstd"}
_EXPECTED = ".jsonl, .json, .csv (each also with .gz or .zst) or .parquet"
_SPLIT = re.compile(r"(train|test|dev|val|eval)(?:uation|idation|id)?(?=[-_.])")  # at the beginning of a file's name
_ROWS_PER_READ = 1024
_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


class Row(NamedTuple):
    """One row: the file that holds it (path or URL), its number from 1, and its fields."""

    file: str
    number: int
    fields: dict[str, Any]

    def error(self, problem: str, **details: Any) -> InputError:
        """:func:`bad_input` that names file and row; ``details``: field, found, expected."""
        return bad_input(problem, file=self.file, row=self.number, **details)


def name_sources(sources: Sequence[Source]) -> list[Source]:
    """Return the sources, each with a name of its own. A missing name is the file's stem, with ``-2``, ``-3``, ... where that
    is taken. Raises InputError if two sources were given the same name."""
    taken = {source.name for source in sources}
    named: list[Source] = []
    for k, source in enumerate(sources):
        if source.name is not None and source.name in [other.name for other in sources[:k]]:
            raise bad_input("two sources have this name", file=source.path, field="name", found=source.name)
        stem = source_name(source)
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        name = source.name or next(name for name in names if name not in taken)
        taken.add(name)
        named.append(dataclasses.replace(source, name=name))
    return named


def source_name(source: Source) -> str:
    """The source's name, by default its file's without the endings."""
    path = Path(os.path.realpath(source.path))
    return source.name or Path(path.stem if path.suffix in _CODECS else path.name).stem


def file_kind(file: str) -> tuple[str, str]:
    """How a file is written and how compressed: ``(".jsonl", ".gz")``, ``(".parquet", "")``."""
    path = PurePath(file)
    return (PurePath(path.stem).suffix, path.suffix) if path.suffix in _CODECS else (path.suffix, "")


def is_url(path: str) -> bool:
    return "://" in path


@functools.cache
def _note(line: str) -> None:
    """Logged once, however often a source is listed."""
    log.info(line)


def source_files(path: str | Path) -> list[str]:
    """Return the data files of a source in reading order. Raises InputError if there are none or of no known kind."""
    path = str(path)
    with reading(path):
        files, root = fsspec.core.url_to_fs(path)
        if files.info(root)["type"] == "file":
            if not _is_data(path):
                raise bad_input("unknown kind of file", file=path, found=PurePath(path).name, expected=_EXPECTED)
            return [path]
        folder, there = path.rstrip("/"), [PurePath(entry).name for entry in files.ls(root, detail=False)]
        if "state.json" in there:
            try:
                names = [entry["filename"] for entry in json.loads(files.cat_file(f"{root}/state.json"))["_data_files"]]
            except (ValueError, KeyError, TypeError):
                raise bad_input("not a data set saved by datasets", file=f"{folder}/state.json", field="_data_files") from None
        else:
            # Next to .jsonl and .parquet files, those of other kinds tell about the data.
            data = sorted(name for name in there if _is_data(name) and not name.startswith("."))
            names = [name for name in data if name.endswith((".jsonl", ".parquet"))] or data
            if left_out := [name for name in data if name not in names]:
                _note(f"note: {path}: not read: {', '.join(left_out[:5])}{' and others' if len(left_out) > 5 else ''}")
    splits = {found[1] for name in names if (found := _SPLIT.match(name.lower()))}
    if len(splits) > 1:  # as data sets lie on the Hub; trained on as one, the test rows would be learned
        expected = "the files of one split: a file, or a folder of its own"
        raise bad_input("a folder of several splits", file=path, found=", ".join(sorted(splits)), expected=expected)
    if not names:
        raise bad_input("the folder holds no data files", file=path, expected=f"{_EXPECTED} files")
    return [f"{folder}/{name}" for name in names]


def _is_data(file: str) -> bool:
    return file_kind(file)[0] in _READERS or file_kind(file) == (".parquet", "")


def open_bytes(file: str) -> Any:
    """A local file or a URL, its bytes as they are."""
    files, path = fsspec.core.url_to_fs(file)
    return files.open(path, "rb") if is_url(file) else open(file, "rb")


@contextmanager
def reading(file: str, problem: str = "cannot be read") -> Iterator[None]:
    """Errors of a local file and of its format inside are the user's mistake; at a URL, all that its file system raises."""
    try:
        yield
    except (InputError, StopRequested):
        raise
    except Exception as error:
        if isinstance(error, (OSError, pa.ArrowException)) or is_url(file):
            found = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise bad_input(problem, file=file, found=found) from error
        raise


def read_rows(path: str | Path, fields: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a source, each with at least ``fields``, and with those of ``optional`` that it has.

    Raises InputError naming file and row: unreadable files, broken JSON, a row that is no object, invalid UTF-8, a
    missing field, no rows at all.
    """
    empty = True
    for file in source_files(path):
        for number, values in _read_file(file, fields, optional):
            empty, row = False, Row(file, number, values)
            if not isinstance(values, dict):
                raise row.error("wrong row", found=kind_of(values), expected="a JSON object")
            for field in fields:
                if field not in values:
                    raise row.error("missing", field=field, found=", ".join(sorted(values)) or "no fields")
            yield row
    if empty:
        raise bad_input("no rows", file=path)


def check_text(text: object, row: Row, field: str) -> str:
    """Return ``text`` if it is a string with more than blanks in it and valid Unicode; else raise InputError naming row
    and field."""
    if not isinstance(text, str):
        raise row.error("wrong type", field=field, found=kind_of(text), expected="a string")
    if not text.strip():
        raise row.error("empty text", field=field, found=text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair ("\ud800"), which no tokenizer takes.
        found = f"\\u{ord(text[error.start]):04x} at character {error.start + 1}"
        raise row.error("half a surrogate pair is not text", field=field, found=found) from None
    return text


def kind_of(value: object) -> str:
    """Return what a JSON value is, in words, for messages."""
    return _NAMES.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _read_file(file: str, fields: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Yield numbers and values of the rows of a file; of a table only the columns ``fields`` and ``optional``."""
    kind, compression = file_kind(file)
    with reading(file, f"not a readable {PurePath(file).suffix[1:]} file"), open_bytes(file) as handle:
        if codec := _CODECS[compression]:
            handle = io.BufferedReader(pa.CompressedInputStream(handle, codec), 2**20)
        yield from _READERS[kind](handle, file) if kind in _READERS else _read_table(handle, file, fields, optional)


def _lines(handle: BinaryIO, file: str) -> Iterator[tuple[int, str]]:
    """Yield numbers from 1 and text of the lines, without a byte order mark."""
    for number, line in enumerate(handle, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
            raise bad_input("invalid UTF-8", file=file, row=number, found=found) from None


def _parse(text: str, file: str, row: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_input(f"not valid JSON: {error}", file=file, row=row, found=text[:60].rstrip("\r\n")) from None


def _read_jsonl(handle: BinaryIO, file: str) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(handle, file):
        if line.strip(string.whitespace):
            yield number, _parse(line, file, number)


def _read_json(handle: BinaryIO, file: str) -> Iterator[tuple[int, Any]]:
    rows = _parse("".join(line for _, line in _lines(handle, file)), file)
    if not isinstance(rows, list):
        raise bad_input("wrong file", file=file, found=kind_of(rows), expected="a list of rows; .jsonl has a row per line")
    yield from enumerate(rows, start=1)


def _read_csv(handle: BinaryIO, file: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)  # 128 KiB is less than a long document
    reader = csv.reader((line for _, line in _lines(handle, file)), strict=True)
    header: list[str] = []
    number = 1  # of the line where the row begins
    try:
        for values in reader:
            if not header:
                header = values
            elif values and len(values) != len(header):
                expected = f"{len(header)}, as in the first line"
                raise bad_input("wrong number of columns", file=file, row=number, found=len(values), expected=expected)
            elif values:
                yield number, dict(zip(header, values, strict=True))
            number = reader.line_num + 1
    except csv.Error as error:
        raise bad_input(f"not valid CSV: {error}", file=file, row=number) from None


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}


def _read_table(handle: BinaryIO, file: str, fields: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a parquet file, or of an Arrow stream as ``datasets`` writes it."""
    reader = pq.ParquetFile(handle) if file.endswith(".parquet") else pa.ipc.open_stream(handle)
    names = (reader.schema_arrow if isinstance(reader, pq.ParquetFile) else reader.schema).names
    for field in fields:
        if field not in names:
            raise bad_input("missing", file=file, row=1, field=field, found=", ".join(names))
    columns = [*fields, *(name for name in optional if name in names)]
    number = 0
    for batch in reader.iter_batches(_ROWS_PER_READ, columns=columns) if isinstance(reader, pq.ParquetFile) else reader:
        for start in range(0, batch.num_rows, _ROWS_PER_READ):
            part = batch.select(columns).slice(start, _ROWS_PER_READ)
            try:
                rows = part.to_pylist()
            except UnicodeDecodeError as error:
                found = f"byte 0x{error.object[error.start]:02x} in rows {number + 1} to {number + part.num_rows}"
                raise bad_input("invalid UTF-8", file=file, found=found) from None
            yield from enumerate(rows, start=number + 1)
            number += len(rows)
