"""Starting weights: safetensors straight into shards, or random weights from a seed; each rank reads only its own rows."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from medtrain.trainer.distributed import local_part
from medtrain.trainer.errors import bad_input
from medtrain.trainer.files import file_sha256
from medtrain.trainer.model.hf_config import parameter_shapes
from medtrain.trainer.model.names import generator_for, is_adapter, is_packed, weight_name
from medtrain.trainer.model.nf4 import quantize
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.weights.safetensors import DTYPES, StoredTensor, read_header, read_rows

CHECKSUMS = "SHA256SUMS"  # next to exported weights, as the program sha256sum writes and checks them
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """A Hugging Face safetensors folder, its headers read and its files known to be whole: those that transformers reads,
    ``model.safetensors`` or what the index names. Without either, all ``*.safetensors`` there.

    Attributes: ``folder``; ``files`` (sorted paths); ``tensors`` by name.

    Raises InputError: no weights, a damaged file, a tensor in two files, an index that is not of these files.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.files = sorted({self.folder / name for name in index.values()} or self.folder.glob("*.safetensors"))
        if not self.files:
            others = sorted(p.name for kind in ("bin", "pt", "pth", "gguf") for p in self.folder.glob(f"*.{kind}"))
            expected = "*.safetensors, as transformers' save_pretrained writes them"
            raise bad_input("no weights here", file=self.folder, found=", ".join(others) or None, expected=expected)
        self.tensors: dict[str, StoredTensor] = {}
        for path in self.files:
            for name, tensor in _read_whole(path, f"as {INDEX} says" if index else "no dead link").items():
                if name in self.tensors:
                    found, expected = f"{self.tensors[name].file.name} and {path.name}", "one file that holds it"
                    raise bad_input("a tensor in two files", file=self.folder, field=name, found=found, expected=expected)
                self.tensors[name] = tensor
        for name, file_name in index.items():
            holder = self.tensors[name].file if name in self.tensors else None
            if holder != self.folder / file_name:
                expected = holder.name if holder else "a file that holds it"
                problem = "the index is not of these files"
                raise bad_input(problem, file=self.folder / INDEX, field=name, found=file_name, expected=expected)
        single = self.folder / SINGLE
        if not index and single in self.files:  # transformers does not read the others either
            self.files = [single]
            self.tensors = {name: tensor for name, tensor in self.tensors.items() if tensor.file == single}

    def digest(self) -> str:
        """sha256 over the files' contents (in name order).

        Raises InputError: contents other than a ``SHA256SUMS`` next to them says.
        """
        digests = sha256_of(self.files)
        sums = self.folder / CHECKSUMS
        lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
        recorded = {line[66:]: line[:64] for line in lines}
        for path, digest in digests.items():
            if recorded.get(path.name, digest) != digest:
                expected = f"{recorded[path.name]}, as {sums} says; remove that file if it was changed on purpose"
                raise bad_input("damaged or changed", file=path, found=f"sha256 {digest}", expected=expected)
        return hashlib.sha256("".join(f"{path.name}:{digest}\n" for path, digest in digests.items()).encode()).hexdigest()

    def check(self, shapes: dict[str, tuple[int, ...]], *, tied: bool) -> None:
        """Compare with the model's parameter shapes before anything is allocated.

        Raises InputError: a parameter without a tensor, or of another shape; a tied head of which the files hold another.
        """
        for name, shape in shapes.items():
            if name == HEAD and tied:
                continue
            if name not in self.tensors:
                tie = ", or tie_word_embeddings: true in config.json" if name == HEAD else ""
                raise bad_input("missing tensor", file=self.folder, field=name, expected=f"shape {list(shape)}{tie}")
            stored = self.tensors[name]
            where = {"file": stored.file, "field": name}
            if stored.shape != shape:
                raise bad_input("wrong shape", **where, found=list(stored.shape), expected=str(list(shape)))
            if stored.dtype not in DTYPES:
                problem = "quantized weights cannot be trained"
                raise bad_input(problem, **where, found=stored.dtype, expected="F32, F16 or BF16")
        if tied and HEAD in self.tensors and not _same_bits(self.tensors[HEAD], self.tensors[EMBEDDING]):
            problem = "another head than the embedding, which config.json ties it to"
            expected = f"the bits of {EMBEDDING}, or tie_word_embeddings: false"
            raise bad_input(problem, file=self.tensors[HEAD].file, field=HEAD, expected=expected)


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the folder's index says; empty without one.

    Raises InputError: no readable index, a name outside the folder, a ``model.safetensors`` that is read instead of it.
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
        found = f"{SINGLE}, which transformers reads, and {INDEX}, which names others"
        raise bad_input("two sets of weights", file=folder, found=found, expected="one of them")
    return index


def _read_whole(path: Path, why: str) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="np"):  # compares sizes with the header; "pt" would map the file writably
            return read_header(path)
    except FileNotFoundError:
        raise bad_input("missing", file=path, expected=f"a file, {why}") from None
    except (SafetensorError, OSError) as error:
        found, expected = f"{path.stat().st_size} bytes, {error}", "as many bytes as its header says"
        raise bad_input("damaged or truncated safetensors file", file=path, found=found, expected=expected) from None


def _same_bits(a: StoredTensor, b: StoredTensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    pairs = zip(read_rows(a), read_rows(b), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for (_, x), (_, y) in pairs)


def sha256_of(paths: list[Path]) -> dict[Path, str]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(file_sha256, paths), strict=True))


def digest_of_init(init: dict, seed: int) -> str:
    """The weight digest of random weights: they are a function of the sizes and the seed."""
    return hashlib.sha256(json.dumps({"init": init, "seed": seed}, sort_keys=True).encode()).hexdigest()


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
            in_file.setdefault(checkpoint.tensors[weight_name(name)].file, []).append((name, param))
    for path, named in in_file.items():  # one mapped at a time
        with safe_open(path, framework="pt") as file:
            for name, param in named:
                local, part = local_part(param)
                if local.numel() > 0:
                    _fill(local, file.get_slice(weight_name(name))[part[:1]], name)


@torch.no_grad()
def init_weights(policy: PolicyModel, seed: int) -> None:
    """Random weights as Hugging Face draws them: matrices normal with ``initializer_range``, norms 1, biases 0.

    Each tensor is drawn whole from a generator of its own and then cut: the same weights on any number of ranks. Adapters
    are left alone.
    """
    policy.reshard_all()
    std, shapes = policy.config.initializer_range, parameter_shapes(policy.config)
    for name, param in policy.named_parameters():
        local, part = local_part(param)
        if is_adapter(name):
            continue
        if name.endswith(".bias"):
            local.zero_()
        elif param.ndim == 1:
            local.fill_(1.0)
        else:
            hf_name = weight_name(name)
            drawn = torch.empty(shapes[hf_name]).normal_(0.0, std, generator=generator_for(hf_name, seed))
            _fill(local, drawn[part[:1]], name)
