"""Weights in and out: safetensors straight into shards, random weights from a seed, and export to a HF folder.

Each rank reads only its own rows of each tensor; export gathers one tensor at a time and writes it at once, so no rank ever
holds more than its share and one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from medtrain.trainer.distributed import World, local_part, whole
from medtrain.trainer.errors import InputError, bad_input
from medtrain.trainer.files import PARTIAL, file_sha256, replace_folder, sync, write_json
from medtrain.trainer.model.lora import Adapters, adapter_pairs, is_adapter, is_packed, weight_name
from medtrain.trainer.model.nf4 import dequantize, quantize
from medtrain.trainer.model.policy import PolicyModel, parameter_shapes
from medtrain.trainer.weights.small_files import write_small_files

MAX_FILE_BYTES = 5_000_000_000  # of an exported safetensors file, as transformers splits them
BLOCK_BYTES = 64 * 2**20  # cast and written at once
CHECKSUMS = "SHA256SUMS"  # beside exported weights, as the program sha256sum writes and checks them
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """A Hugging Face safetensors folder, its headers read and its files known to be whole: those that transformers reads,
    ``model.safetensors`` or what the index names. Without either, all ``*.safetensors`` there.

    Attributes: ``folder``; ``files`` (sorted paths); ``where`` (tensor name -> path), ``shapes``, ``dtypes``.

    Raises:
        InputError: no weights, a damaged file, a tensor in two files, an index that is not of these files.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.files = sorted({self.folder / name for name in index.values()} or self.folder.glob("*.safetensors"))
        if not self.files:
            others = sorted(p.name for kind in ("bin", "pt", "pth", "gguf") for p in self.folder.glob(f"*.{kind}"))
            raise bad_input(
                "no weights here",
                file=self.folder,
                found=", ".join(others) or None,
                expected="*.safetensors, as transformers' save_pretrained writes them",
            )
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in self.files:
            try:
                with safe_open(path, framework="np") as file:  # headers alone; "pt" would map the file writably
                    for name in file.keys():
                        if name in self.where:
                            raise bad_input(
                                "a tensor in two files",
                                file=self.folder,
                                field=name,
                                found=f"{self.where[name].name} and {path.name}",
                                expected="one file that holds it",
                            )
                        self.where[name] = path
                        part = file.get_slice(name)
                        self.shapes[name] = tuple(part.get_shape())
                        self.dtypes[name] = part.get_dtype()
            except FileNotFoundError:
                raise bad_input(
                    "missing", file=path, expected=f"a file, as {INDEX} says" if index else "a file, no dead link"
                ) from None
            except (SafetensorError, OSError) as error:
                size = path.stat().st_size
                raise bad_input(
                    "damaged or truncated safetensors file",
                    file=path,
                    found=f"{size} bytes, {error}",
                    expected="as many bytes as its header says",
                ) from None
        for name, file_name in index.items():
            if self.where.get(name) != self.folder / file_name:
                raise bad_input(
                    "the index is not of these files",
                    file=self.folder / INDEX,
                    field=name,
                    found=file_name,
                    expected=self.where[name].name if name in self.where else "a file that holds it",
                )
        if not index and self.folder / SINGLE in self.files:  # what stands beside it, transformers does not read either
            self.files = [self.folder / SINGLE]
            self.where = {name: path for name, path in self.where.items() if path in self.files}
            self.shapes = {name: self.shapes[name] for name in self.where}
            self.dtypes = {name: self.dtypes[name] for name in self.where}

    def digest(self) -> str:
        """sha256 over the files' contents (in name order).

        Raises:
            InputError: contents other than a ``SHA256SUMS`` beside them says.
        """
        digests = _sha256_of(self.files)
        sums = self.folder / CHECKSUMS
        if sums.is_file():
            expected = {line[66:]: line[:64] for line in sums.read_text(encoding="utf-8").splitlines()}
            for path, digest in zip(self.files, digests, strict=True):
                if expected.get(path.name, digest) != digest:
                    raise bad_input(
                        "damaged or changed",
                        file=path,
                        found=f"sha256 {digest}",
                        expected=f"{expected[path.name]}, as {sums} says; remove that file if it was changed on purpose",
                    )
        return hashlib.sha256("".join(f"{p.name}:{d}\n" for p, d in zip(self.files, digests, strict=True)).encode()).hexdigest()

    def check(self, shapes: dict[str, tuple[int, ...]], *, tied: bool) -> None:
        """Compare with the model's parameter shapes before anything is allocated.

        Raises:
            InputError: a parameter without a tensor, or of another shape; a tied head of which the files hold another.
        """
        for name, shape in shapes.items():
            if name == HEAD and tied:
                continue
            if name not in self.shapes:
                tie = ", or tie_word_embeddings: true in config.json" if name == HEAD else ""
                raise bad_input("missing tensor", file=self.folder, field=name, expected=f"shape {list(shape)}{tie}")
            if self.shapes[name] != shape:
                raise bad_input(
                    "wrong shape", file=self.where[name], field=name, found=list(self.shapes[name]), expected=str(list(shape))
                )
            if self.dtypes[name] not in DTYPES:
                raise bad_input(
                    "quantized weights cannot be trained",
                    file=self.where[name],
                    field=name,
                    found=self.dtypes[name],
                    expected="F32, F16 or BF16",
                )
        if tied and HEAD in self.where and not self._same_bits(HEAD, EMBEDDING):
            raise bad_input(
                "another head than the embedding, which config.json ties it to",
                file=self.where[HEAD],
                field=HEAD,
                expected=f"the bits of {EMBEDDING}, or tie_word_embeddings: false",
            )

    def _same_bits(self, *names: str) -> bool:
        """Whether two tensors of the files are one; read block by block."""
        shape, dtype = self.shapes[names[0]], self.dtypes[names[0]]
        if (self.shapes[names[1]], self.dtypes[names[1]]) != (shape, dtype):
            return False
        per_block = max(1, BLOCK_BYTES // (math.prod(shape[1:]) * DTYPES[dtype].itemsize))
        with ExitStack() as stack:
            parts = [stack.enter_context(safe_open(self.where[n], framework="pt")).get_slice(n) for n in names]
            return all(
                torch.equal(*(part[first : first + per_block].view(torch.uint8) for part in parts))
                for first in range(0, shape[0], per_block)
            )


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the folder's index says; empty without one.

    Raises:
        InputError: no readable index, a name outside the folder, a ``model.safetensors`` that is read instead of it.
    """
    path = folder / INDEX
    if not os.path.lexists(path):
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise bad_input("unreadable index", file=path, found=f"{type(error).__name__}: {error}") from None
    if not index or not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise bad_input("unreadable index", file=path, field="weight_map", found=index, expected="a file name for each tensor")
    for name in index.values():  # the name alone: in a download cache the files themselves are links to elsewhere
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise bad_input("a file outside the folder", file=path, field="weight_map", found=name, expected="a name in it")
    if (folder / SINGLE).is_file() and set(index.values()) != {SINGLE}:
        raise bad_input(
            "two sets of weights",
            file=folder,
            found=f"{SINGLE}, which transformers reads, and {INDEX}, which names others",
            expected="one of them",
        )
    return index


def _sha256_of(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_sha256, paths))


def _fill(local: torch.Tensor, values: torch.Tensor, name: str) -> None:
    """Copy rows of a tensor into this rank's storage, as it is kept there: cast, or quantized."""
    if is_packed(name):
        local.copy_(quantize(values.to(local.device), local.dtype))
    else:
        local.copy_(values)


@torch.no_grad()
def load_weights(policy: PolicyModel, checkpoint: Checkpoint) -> None:
    """Copy this rank's part of every tensor from the files into the (sharded) parameters, cast or quantized as they are
    kept; adapters are left alone."""
    policy.reshard_all()
    in_file: dict[Path, list[tuple[str, torch.Tensor]]] = {}
    for name, param in policy.named_parameters():
        if not is_adapter(name):
            in_file.setdefault(checkpoint.where[weight_name(name)], []).append((name, param))
    for path, named in in_file.items():  # one mapped at a time
        with safe_open(path, framework="pt") as file:
            for name, param in named:
                local, part = local_part(param)
                if local.numel() > 0:
                    _fill(local, file.get_slice(weight_name(name))[part[:1]], name)


@torch.no_grad()
def init_weights(policy: PolicyModel, seed: int) -> None:
    """Random weights as Hugging Face draws them: matrices normal with ``initializer_range``, norms 1, biases 0.

    Each tensor has a generator of its own, seeded by (seed, name), and is drawn whole before it is cut: the weights do
    not depend on the number of ranks. Adapters are left alone.
    """
    policy.reshard_all()
    std, shapes = policy.config.initializer_range, parameter_shapes(policy.config)
    for name, param in policy.named_parameters():
        hf_name = weight_name(name)
        local, part = local_part(param)
        if is_adapter(name):
            continue
        if name.endswith(".bias"):
            local.zero_()
        elif param.ndim == 1:
            local.fill_(1.0)
        else:
            words = hashlib.sha256(f"{seed}/{hf_name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(words[:8], "little") >> 1)
            drawn = torch.empty(shapes[hf_name]).normal_(0.0, std, generator=generator)
            _fill(local, drawn[part[:1]], name)


@torch.no_grad()
def export_model(
    policy: PolicyModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    world: World,
    *,
    dtype: torch.dtype,
    source: str | Path | None = None,
    adapters: Adapters | None = None,
) -> Path:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` and vLLM load; all ranks must call this.

    Adapters are merged into the base weights that they were trained on: NF4 ones are widened, not the original ones taken
    again, so that what is written is the model that was trained. Sums are made in float32 and rounded once.

    The folder appears whole or not at all, with the sha256 of each weights file, which is read back and compared before.
    ``source`` is the checkpoint the run began with, or the run's copy of its small files: its other settings are kept.

    Raises:
        RuntimeError: what was read back is not what was written.
    """
    policy.reshard_all()
    out = Path(out)
    partial = out.with_name(out.name + PARTIAL)
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    named = {weight_name(name): (name, p) for name, p in policy.named_parameters() if not is_adapter(name)}
    pairs = adapter_pairs(policy)

    def gather(hf_name: str) -> torch.Tensor:
        name, param = named[hf_name]
        tensor = whole(param)
        a, b = (whole(p) for p in pairs[hf_name]) if hf_name in pairs else (None, None)
        if world.is_main and is_packed(name):
            tensor = dequantize(tensor, torch.float32)
        if world.is_main and a is not None:
            tensor = tensor.float() + adapters.scaling * (b @ a)
        return tensor

    shapes = parameter_shapes(policy.config)
    files = _files_of({name: shapes[name] for name in named}, dtype)
    digests = {}
    for file, names in files.items():
        if world.is_main:
            digests[file] = _write_file(partial / file, {name: shapes[name] for name in names}, dtype, gather)
        else:
            for name in names:
                gather(name)

    def finish() -> str | None:
        if len(files) > 1:
            total = sum(math.prod(shapes[name]) for name in named) * dtype.itemsize
            weight_map = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)
        if wrong := _wrong_file(partial, digests, {name: shapes[name] for name in named}):
            return wrong
        sums = "".join(f"{digest}  {file}\n" for file, digest in digests.items())
        (partial / CHECKSUMS).write_text(sums, encoding="utf-8")
        write_small_files(partial, policy.config, tokenizer, dtype=dtype, source=source)
        replace_folder(partial, out)
        return None

    if wrong := world.from_main(finish):
        raise RuntimeError(f"{partial / wrong}: what was read back is not what was written; nothing was exported")
    return out


def _files_of(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, list[str]]:
    """File names, and the names of the tensors in each, in order; files of MAX_FILE_BYTES at most where tensors allow."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + num_bytes > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, gather: Callable[[str], torch.Tensor]) -> str:
    """Write what ``gather`` returns for each name of ``shapes``, in that order, as a safetensors file; returns its sha256.

    The safetensors library writes a file from tensors that are all in memory; here one is, and of its cast one block.
    Format: 8 bytes with the header's length, the header (JSON, padded to 8 bytes), the tensors' bytes.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    stored = {kept: name for name, kept in DTYPES.items()}[dtype]
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
            per_block = max(1, BLOCK_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
            tensor = gather(name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)} in place of {shape}")
            for first in range(0, shape[0], per_block):
                put(tensor[first : first + per_block].to("cpu", dtype).contiguous().view(torch.uint8).numpy())
            del tensor  # before the next one is gathered
    sync(path)
    return digest.hexdigest()


def _wrong_file(folder: Path, digests: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The name of a file of ``folder`` that does not have the sha256 given, or not the tensors: by safetensors' own reading."""
    found = _sha256_of([folder / file for file in digests])
    for file, digest in zip(digests, found, strict=True):
        if digests[file] != digest:
            return file
    try:
        return None if Checkpoint(folder).shapes == shapes else "*.safetensors"
    except InputError as error:
        return str(error)


def digest_of_init(init: dict, seed: int) -> str:
    """The weight digest of random weights: they are a function of the sizes and the seed."""
    return hashlib.sha256(json.dumps({"init": init, "seed": seed}, sort_keys=True).encode()).hexdigest()
