"""The policy as a Hugging Face folder: one tensor is gathered at a time and written at once, so that no rank ever holds more
than its share and one tensor."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from medtrain.trainer.distributed import World, whole
from medtrain.trainer.errors import InputError
from medtrain.trainer.files import PARTIAL, replace_folder, write_json
from medtrain.trainer.model.hf_config import parameter_shapes
from medtrain.trainer.model.lora import Adapters
from medtrain.trainer.model.names import is_adapter, is_packed, weight_name
from medtrain.trainer.model.nf4 import dequantize
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.weights.adapters import adapter_names, adapter_parameters
from medtrain.trainer.weights.load import CHECKSUMS, INDEX, SINGLE, Checkpoint, sha256_of
from medtrain.trainer.weights.safetensors import write_file
from medtrain.trainer.weights.small_files import write_small_files

MAX_FILE_BYTES = 5_000_000_000  # of an exported safetensors file, as transformers splits them


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

    Adapters are merged into the base weights that they were trained on (NF4 ones widened, not the original ones), so that
    what is written is the model that was trained. Sums are made in float32 and rounded once.

    The folder appears whole or not at all, with the sha256 of each weights file, which is read back and compared before.
    ``source``: the checkpoint the run began with, or the run's copy of its small files, whose other settings are kept.

    Raises RuntimeError: what was read back is not what was written.
    """
    policy.reshard_all()
    out = Path(out)
    partial = out.with_name(out.name + PARTIAL)
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    named = {weight_name(name): (name, p) for name, p in policy.named_parameters() if not is_adapter(name)}
    factors = adapter_parameters(policy)

    def gather(hf_name: str) -> torch.Tensor:
        name, param = named[hf_name]
        tensor = whole(param)
        pair = [whole(factors[factor]) for factor in adapter_names(hf_name) if factor in factors]
        if world.is_main and is_packed(name):
            tensor = dequantize(tensor, torch.float32)
        if world.is_main and pair:
            assert adapters is not None, "a policy with adapters is exported with them"
            a, b = pair
            tensor = tensor.float() + adapters.scaling * (b @ a)
        return tensor

    all_shapes = parameter_shapes(policy.config)
    shapes = {name: all_shapes[name] for name in named}
    files = _split(shapes, dtype)
    digests: dict[str, str] = {}
    for file, names in files.items():
        if world.is_main:
            digests[file] = write_file(partial / file, {name: shapes[name] for name in names}, dtype, gather)
        else:
            for name in names:
                gather(name)

    def finish() -> str | None:
        if len(files) > 1:
            total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            weight_map = {name: file for file, names in files.items() for name in names}
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        if wrong := _wrong_file(partial, digests, shapes):
            return wrong
        sums = "".join(f"{digest}  {file}\n" for file, digest in digests.items())
        (partial / CHECKSUMS).write_text(sums, encoding="utf-8")
        write_small_files(partial, policy.config, tokenizer, dtype=dtype, source=source)
        replace_folder(partial, out)
        return None

    if wrong := world.from_main(finish):
        raise RuntimeError(f"{partial / wrong}: what was read back is not what was written; nothing was exported")
    return out


def _split(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, list[str]]:
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
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _wrong_file(folder: Path, digests: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The name of a file of ``folder`` that does not have the sha256 given, or not the tensors."""
    for path, digest in sha256_of([folder / file for file in digests]).items():
        if digests[path.name] != digest:
            return path.name
    try:
        tensors = Checkpoint(folder).tensors
    except InputError as error:
        return str(error)
    return None if {name: tensor.shape for name, tensor in tensors.items()} == shapes else "*.safetensors"
