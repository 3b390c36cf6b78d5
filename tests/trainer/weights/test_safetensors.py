"""The safetensors format by our own code and by its library: each reads what the other writes."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from medtrain.trainer.weights import safetensors
from medtrain.trainer.weights.safetensors import read_header, read_rows, write_file

TENSORS = {"b": torch.randn(7, 5), "a": torch.randn(3), "c": torch.randn(2, 3, 4)}


@pytest.mark.parametrize("dtype", safetensors.DTYPES.values(), ids=str)
def test_the_library_reads_what_is_written_in_blocks(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(safetensors, "BLOCK_BYTES", 3 * 5 * dtype.itemsize)
    path = tmp_path / "x.safetensors"
    digest = write_file(path, {name: tuple(t.shape) for name, t in TENSORS.items()}, dtype, TENSORS.__getitem__)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], t.to(dtype)) for name, t in TENSORS.items())


def test_rows_are_read_from_the_places_that_the_header_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "BLOCK_BYTES", 3 * 5 * 4)
    save_file(TENSORS | {"d": torch.zeros(3, dtype=torch.float8_e4m3fn)}, tmp_path / "x.safetensors", {"format": "pt"})
    stored = read_header(tmp_path / "x.safetensors")
    assert stored.keys() == {*TENSORS, "d"} and stored["d"].dtype == "F8_E4M3"
    assert {name: stored[name].shape for name in TENSORS} == {name: tuple(t.shape) for name, t in TENSORS.items()}
    assert [first for first, _ in read_rows(stored["b"])] == [0, 3, 6]
    for name, tensor in TENSORS.items():
        assert torch.equal(torch.cat([rows for _, rows in read_rows(stored[name])]), tensor)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]", b'\x08\0\0\0\0\0\0\0{"a": 1}'])
def test_a_file_without_a_header_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors header"):
        read_header(tmp_path / "x.safetensors")
