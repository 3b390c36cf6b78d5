"""Data sources: reads rows of JSON Lines, parquet and HF ``save_to_disk`` folders, and names the row of a mistake.

A source is one file (``.jsonl`` or ``.parquet``) or one folder: a folder that ``datasets`` saved (``state.json`` beside
``.arrow`` files), or a folder of ``.jsonl`` and ``.parquet`` files, read in the order of their names. Rows stream;
nothing here holds a whole file. Rows count from 1 within their file, and of a JSON Lines file they are its lines.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from medtrain.trainer.errors import bad_input
from medtrain.trainer.files import file_sha256

_ROWS_PER_READ = 1024
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


@dataclass(frozen=True)
class Source:
    """One entry of ``data.sources``, ``data.pairs`` or ``data.heldout``.

    ``path``: file or folder. ``weight``: share of every step relative to the other sources (all have one or none has).
    ``name``: what metrics and the ledger call it; the file's stem where not given (see :func:`name_sources`).
    """

    path: str
    weight: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        weight = self.weight
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is not None and not (is_number and math.isfinite(weight) and weight > 0):
            raise bad_input("wrong weight", file=self.path, field="weight", found=weight, expected="a number above 0")


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
            stem = Path(source.path).resolve().stem
            name = next(n for k in range(1, len(sources) + 2) if (n := stem if k == 1 else f"{stem}-{k}") not in taken)
            taken.add(name)
        named.append(dataclasses.replace(source, name=name))
    return named


def source_files(path: str | Path) -> list[Path]:
    """Return the data files of a source in reading order. Raises InputError if there are none or of no known kind."""
    path = Path(path)
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


def files_digest(files: Sequence[Path]) -> str:
    """Return the sha256 (hex) of the kinds and bytes of the files, in order. Their names and times do not matter."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.suffix}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def read_rows(path: str | Path, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a source, each with at least ``fields``.

    Raises InputError naming file and row: unreadable files, broken JSON, a row that is no object, invalid UTF-8, a
    missing field, no rows at all.
    """
    empty = True
    for file in source_files(path):
        for row in _read_jsonl(file) if file.suffix == ".jsonl" else _read_arrow(file, fields):
            empty = False
            for field in fields:
                if field not in row.fields:
                    found = ", ".join(sorted(row.fields)) or "no fields"
                    raise bad_input("missing", file=file, row=row.number, field=field, found=found)
            yield row
    if empty:
        raise bad_input("no rows", file=path)


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


def _read_jsonl(file: Path) -> Iterator[Row]:
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
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


def _read_arrow(file: Path, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the columns ``fields`` of a parquet file, or of an Arrow stream as ``datasets`` writes it, row by row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        reader = pq.ParquetFile(file) if file.suffix == ".parquet" else pa.ipc.open_stream(pa.memory_map(str(file)))
        schema = reader.schema_arrow if file.suffix == ".parquet" else reader.schema
        for field in fields:
            if field not in schema.names:
                raise bad_input("missing", file=file, row=1, field=field, found=", ".join(schema.names))
        batches = reader.iter_batches(_ROWS_PER_READ, columns=list(fields)) if file.suffix == ".parquet" else reader
        number = 0
        for batch in batches:
            batch = batch.select(list(fields))
            for start in range(0, batch.num_rows, _ROWS_PER_READ):
                piece = batch.slice(start, _ROWS_PER_READ)
                for row_fields in _to_rows(piece, file, number):
                    number += 1
                    yield Row(file, number, row_fields)
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
