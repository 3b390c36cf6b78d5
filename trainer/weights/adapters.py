"""LoRA adapters in and out: their first values, PEFT folders read and written, and digests of what they start from."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from medtrain.trainer.distributed import World, local_part, whole
from medtrain.trainer.files import PARTIAL, file_sha256, replace_folder
from medtrain.trainer.model.lora import ADAPTER, WEIGHTS_FILE, Adapters
from medtrain.trainer.model.names import generator_for, is_adapter, weight_name
from medtrain.trainer.model.policy import PolicyModel


def adapter_digest(adapters: Adapters | None) -> str | None:
    """sha256 of what ``lora.path`` holds: its tensors and alpha; None where adapters start at zero, or there are none."""
    if adapters is None or adapters.path is None:
        return None
    about = [file_sha256(adapters.path / WEIGHTS_FILE), adapters.rank, adapters.alpha]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def start_digest(weights: str, adapters: Adapters | None, adapter: str | None) -> str:
    """Digest of the policy at its start: that of the checkpoint, ``weights``, unless NF4 or a trained adapter changes it.
    Adapters that start at zero do not."""
    if adapters is None or (adapter is None and adapters.base == "dense"):
        return weights
    return hashlib.sha256(json.dumps([weights, adapters.base, adapter]).encode()).hexdigest()


def adapter_parameters(policy: PolicyModel) -> dict[str, torch.Tensor]:
    """By name, such as ``model.layers.0.mlp.up_proj.lora_A.default.weight``: A [rank, in] and B [out, rank]."""
    return {weight_name(name): param for name, param in policy.named_parameters() if is_adapter(name)}


def adapter_names(weight: str) -> tuple[str, str]:
    """The names of A and B of the weight ``model.layers.0.mlp.up_proj.weight``."""
    layer = weight.removesuffix(".weight")
    return f"{layer}.lora_A.{ADAPTER}.weight", f"{layer}.lora_B.{ADAPTER}.weight"


def _name_in_file(name: str) -> str:
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".")


@torch.no_grad()
def fill_adapters(policy: PolicyModel, adapters: Adapters, seed: int) -> None:
    """The adapters' first values: those of ``lora.path``, or as PEFT draws them: A uniform within 1 / sqrt(in), B zero."""
    policy.reshard_all()
    file = safe_open(adapters.path / WEIGHTS_FILE, framework="pt") if adapters.path else None
    for name, param in adapter_parameters(policy).items():
        local, part = local_part(param)
        if local.numel() == 0:
            continue
        if file is not None:
            local.copy_(file.get_slice(_name_in_file(name))[part])
        elif ".lora_B." in name:
            local.zero_()
        else:  # drawn whole, then cut: the same values on any number of ranks
            bound = 1 / math.sqrt(param.shape[1])
            local.copy_(torch.empty(param.shape).uniform_(-bound, bound, generator=generator_for(name, seed))[part])


@torch.no_grad()
def export_adapters(policy: PolicyModel, adapters: Adapters, out: str | Path, world: World, *, base: str | None) -> Path:
    """Write a PEFT folder of the adapters in float32, whole or not at all; all ranks must call this.

    ``base``: the base model that it names. With NF4 the file fits the same base in any precision.
    """
    policy.reshard_all()
    out = Path(out)
    tensors = {}
    for name, param in adapter_parameters(policy).items():
        tensor = whole(param)
        if world.is_main:
            tensors[_name_in_file(name)] = tensor.float().cpu().contiguous()
    if world.is_main:
        partial = out.with_name(out.name + PARTIAL)
        config = adapters.peft_config(base)
        config.inference_mode = True  # as PEFT itself saves it: loaded, it is not trained by default
        config.save_pretrained(str(partial))
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        replace_folder(partial, out)
    world.barrier()
    return out
