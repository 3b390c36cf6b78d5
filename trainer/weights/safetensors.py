"""The safetensors format beyond its library: where tensors are, and tensors read and written block by block.

8 bytes with the header's length, the header (JSON, padded to 8 bytes), the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from medtrain.trainer.files import sync

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK_BYTES = 64 * 2**20  # read, cast and written at once


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: bytes ``start`` to ``end`` of ``file``. ``dtype`` as the format names it: F32, BF16, F8_E4M3."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. That the file is whole, opening it with the library tells.

    Raises OSError: it cannot be opened.
    Raises ValueError: it has no such header.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, file.stat().st_size))
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        return {
            name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no safetensors header: {error}") from error


def _rows_per_block(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // (math.prod(shape[1:]) * dtype.itemsize))


def read_rows(tensor: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first row, rows) of a tensor of one of :data:`DTYPES`, block by block."""
    dtype = DTYPES[tensor.dtype]
    num_rows, per_block = tensor.shape[0], _rows_per_block(tensor.shape, dtype)
    with open(tensor.file, "rb") as file:
        file.seek(tensor.start)
        for first in range(0, num_rows, per_block):
            content = bytearray((tensor.end - tensor.start) // num_rows * min(per_block, num_rows - first))
            file.readinto(content)
            yield first, torch.frombuffer(content, dtype=dtype).view(-1, *tensor.shape[1:])


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, make: Callable[[str], torch.Tensor]) -> str:
    """Write the tensors that ``make`` returns for each name of ``shapes``, in that order, as ``dtype``; returns the sha256.

    One tensor is in memory at a time, and one block of its cast.
    """
    stored = next(name for name, kept in DTYPES.items() if kept == dtype)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def put(content) -> None:
            file.write(content)
            digest.update(content)

        put(len(encoded).to_bytes(8, "little"))
        put(encoded)
        for name, shape in shapes.items():
            per_block, tensor = _rows_per_block(shape, dtype), make(name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)} in place of {shape}")
            for first in range(0, shape[0], per_block):
                put(tensor[first : first + per_block].to("cpu", dtype).contiguous().view(torch.uint8).numpy())
            del tensor  # before the next one is made
    sync(path)
    return digest.hexdigest()
