"""Weights in and out: safetensors straight into shards, random weights from a seed, and export to a HF folder.

Each rank reads only its own rows of each tensor; export gathers one tensor at a time and writes files of bounded size,
so no rank ever holds a whole large model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase

from medtrain.trainer.distributed import World, local_part, whole
from medtrain.trainer.errors import bad_input
from medtrain.trainer.files import PARTIAL, file_sha256, replace_folder, write_json
from medtrain.trainer.lora import Adapters, adapter_pairs, is_adapter, is_packed, weight_name
from medtrain.trainer.model import PolicyModel, parameter_shapes
from medtrain.trainer.quant import dequantize, quantize

MAX_FILE_BYTES = 5_000_000_000  # of an exported safetensors file, as transformers splits them


class Checkpoint:
    """A Hugging Face safetensors folder, its headers read and its files known to be whole.

    Attributes: ``folder``; ``files`` (sorted paths); ``where`` (tensor name -> path), ``shapes``, ``dtypes``.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise bad_input("unreadable index", file=index, found=str(error)) from None
            self.files = [self.folder / name for name in names]
        else:
            self.files = sorted(self.folder.glob("*.safetensors"))
        if not self.files:
            raise bad_input("no weights here", file=self.folder, expected="*.safetensors")
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        self.where[name] = path
                        part = file.get_slice(name)
                        self.shapes[name] = tuple(part.get_shape())
                        self.dtypes[name] = part.get_dtype()
            except FileNotFoundError:
                raise bad_input("missing", file=path, expected=f"a file, as {index.name} says") from None
            except (SafetensorError, OSError) as error:
                size = path.stat().st_size
                raise bad_input("damaged or truncated safetensors file", file=path, found=f"{size} bytes, {error}",
                                expected="as many bytes as its header says") from None  # fmt: skip

    def digest(self) -> str:
        """sha256 over the files' contents (in name order)."""
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(file_sha256, self.files))
        return hashlib.sha256(
            "".join(f"{p.name}:{d}\n" for p, d in zip(self.files, digests, strict=True)).encode()
        ).hexdigest()

    def check(self, shapes: dict[str, tuple[int, ...]], *, tied: bool) -> None:
        """Compare with the model's parameter shapes before anything is allocated.

        Raises:
            InputError: a parameter without a tensor, or of another shape.
        """
        for name, shape in shapes.items():
            if name == "lm_head.weight" and tied:
                continue
            if name not in self.shapes:
                raise bad_input("missing tensor", file=self.folder, field=name, expected=f"shape {list(shape)}")
            if self.shapes[name] != shape:
                raise bad_input("wrong shape", file=self.where[name], field=name, found=list(self.shapes[name]),
                                expected=str(list(shape)))  # fmt: skip
            if self.dtypes[name] not in ("F64", "F32", "F16", "BF16"):
                raise bad_input("quantized weights cannot be trained", file=self.where[name], field=name,
                                found=self.dtypes[name], expected="F32, F16 or BF16")  # fmt: skip


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
    handles: dict[Path, object] = {}
    for name, param in policy.named_parameters():
        local, part = local_part(param)
        if local.numel() == 0 or is_adapter(name):
            continue
        hf_name = weight_name(name)
        path = checkpoint.where[hf_name]
        if path not in handles:
            handles[path] = safe_open(path, framework="pt")
        _fill(local, handles[path].get_slice(hf_name)[part[:1]], name)


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

    The folder appears whole or not at all. ``source`` is the checkpoint the run began with: its generation settings are
    kept.
    """
    policy.reshard_all()
    out = Path(out)
    partial = out.with_name(out.name + PARTIAL)
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    sizes, written = [0], []

    def flush() -> None:
        if world.is_main:
            path = partial / f"part-{len(written):05d}.safetensors"
            save_file(shards[-1], path, metadata={"format": "pt"})
            written.append((path, list(shards[-1]), sizes[-1]))
        shards[-1] = {}
        sizes[-1] = 0

    pairs = adapter_pairs(policy)
    for name, param in policy.named_parameters():
        if is_adapter(name):
            continue
        hf_name = weight_name(name)
        tensor = whole(param)
        if is_packed(name):
            tensor = dequantize(tensor, torch.float32)
        if hf_name in pairs:
            a, b = pairs[hf_name]
            tensor = tensor.float() + adapters.scaling * (whole(b) @ whole(a))
        tensor = tensor.to(dtype)
        num_bytes = tensor.numel() * tensor.element_size()
        if sizes[-1] and sizes[-1] + num_bytes > MAX_FILE_BYTES:
            flush()
        sizes[-1] += num_bytes
        if world.is_main:
            shards[-1][hf_name] = tensor.cpu().contiguous()
    flush()
    if world.is_main:
        _name_files(partial, written)
        hf_config = type(policy.config).from_dict(policy.config.to_dict())
        hf_config.architectures = [_architecture(policy)]
        hf_config.dtype = dtype
        hf_config.save_pretrained(partial)
        write_json(partial / "generation_config.json", _generation_config(tokenizer, source))
        tokenizer.save_pretrained(partial)
        replace_folder(partial, out)
    world.barrier()
    return out


def _architecture(policy: PolicyModel) -> str:
    return type(policy.model).__name__.removesuffix("Model") + "ForCausalLM"


def _name_files(folder: Path, written: list[tuple[Path, list[str], int]]) -> None:
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (path, names, _) in enumerate(written):
        final = f"model-{i + 1:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": sum(size for _, _, size in written)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _generation_config(tokenizer: PreTrainedTokenizerBase, source: str | Path | None) -> dict:
    if source is not None and (Path(source) / "generation_config.json").is_file():
        # As plain JSON: transformers refuses to save many a published file once it has been changed.
        config = json.loads((Path(source) / "generation_config.json").read_text(encoding="utf-8"))
        ends = config.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if tokenizer.eos_token_id not in ends:  # the end this run taught must end generation
            config["eos_token_id"] = [tokenizer.eos_token_id, *ends]
        return config
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=pad).to_diff_dict()


def digest_of_init(init: dict, seed: int) -> str:
    """The weight digest of random weights: they are a function of the sizes and the seed."""
    return hashlib.sha256(json.dumps({"init": init, "seed": seed}, sort_keys=True).encode()).hexdigest()
