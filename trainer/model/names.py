"""What a parameter's name says: its Hugging Face name, what kind of weight it is, and the seed of its first values."""

from __future__ import annotations

import hashlib

import torch


def weight_name(name: str) -> str:
    """A parameter's Hugging Face name, without what activation checkpointing, PEFT and NF4 put in."""
    name = name.replace("_checkpoint_wrapped_module.", "").replace(".base_layer.", ".")
    return name.removesuffix("packed") + "weight" if is_packed(name) else name


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def is_packed(name: str) -> bool:
    """Whether a parameter is an NF4 weight."""
    return name.endswith(".packed")


def layer_kind(name: str) -> str:
    """``up_proj`` of ``model.layers.0.mlp.up_proj.weight``."""
    return name.split(".")[-2]


def linear_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of parameter shapes, those of the linear layers of attention and MLP: the matrices within ``model.layers``."""
    return {n: s for n, s in shapes.items() if n.startswith("model.layers.") and n.endswith(".weight") and len(s) == 2}


def generator_for(name: str, seed: int) -> torch.Generator:
    """A parameter's own generator: what is drawn depends neither on the other parameters nor on the number of ranks."""
    words = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(words[:8], "little") >> 1)
