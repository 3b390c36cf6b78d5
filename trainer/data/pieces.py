"""Pieces: a source cut into ranges of its files, and these grouped into parts of about equal size, by sizes alone.

The cut is a function of the files, never of how many processes work on it. A part is what one process tokenises at a
time, and one file of the token cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medtrain.trainer.data.sources import arrow_rows, row_groups

PART_BYTES = (8 * 2**20, 2**30)  # a part stands for at least and at most so many bytes of raw text, ...
NUM_PARTS = 256  # ... and between them a source has so many parts


@dataclass(frozen=True)
class Piece:
    """A range of one file. JSON Lines: the lines that begin in the bytes [begin, end). Parquet and Arrow: the rows
    [begin, end), counted from 0. ``size``: the bytes of text that it stands for."""

    file: Path
    begin: int
    end: int
    size: int


def plan_parts(files: Sequence[Path], field: str) -> list[list[Piece]]:
    """Return the pieces of each part, in the order of the rows. Raises InputError for a file that cannot be read.

    A row group of a parquet file is never divided, so it may make a part larger than the others.
    """
    # (file, begin, end, size) in the finest grain that can be read by itself
    grains = [grain for file in files for grain in _grains(file, field)]
    total = sum(grain.size for grain in grains)
    least, most = PART_BYTES
    wanted = -(-total // max(least, min(most, -(-total // NUM_PARTS)))) or 1
    target = max(1, -(-total // wanted))
    parts: list[list[Piece]] = [[]]
    room = target
    for grain in grains:
        for piece in _divided(grain, room, target):
            if parts[-1] and piece.size > room:
                parts.append([])
                room = target
            parts[-1].append(piece)
            room -= piece.size
    return parts


def _grains(file: Path, field: str) -> list[Piece]:
    if file.suffix == ".parquet":
        grains, begin = [], 0
        for rows, size in row_groups(file, field):
            grains.append(Piece(file, begin, begin + rows, size))
            begin += rows
        return grains
    size = file.stat().st_size
    return [Piece(file, 0, size if file.suffix == ".jsonl" else arrow_rows(file), size)]


def _divided(grain: Piece, room: int, target: int) -> list[Piece]:
    """Cut what is divisible into a first piece that fills ``room`` and further ones of ``target``."""
    if grain.file.suffix == ".parquet" or grain.size <= room:
        return [grain]
    ends = [*range(room, grain.size, target), grain.size] if room > 0 else [*range(target, grain.size, target), grain.size]
    pieces, begin, before = [], grain.begin, 0
    for end_bytes in ends:
        end = grain.begin + (grain.end - grain.begin) * end_bytes // grain.size
        pieces.append(Piece(grain.file, begin, end, end_bytes - before))
        begin, before = end, end_bytes
    return pieces
