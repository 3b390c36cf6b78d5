"""How many FLOPs a step stands for, and how many a device has."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from medtrain.trainer.model.lora import Adapters

# Dense bf16 peaks, FLOP/s, from the makers' data sheets. Elsewhere mfu is null.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def num_parameters(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """(all parameters, those that multiply a matrix a token: all but an embedding that is only looked up)."""
    total = sum(math.prod(shape) for shape in shapes.values())
    untied = "lm_head.weight" in shapes
    return total, total - (math.prod(shapes["model.embed_tokens.weight"]) if untied else 0)


class FlopsPerToken:
    """Model FLOPs of forward and backward: 6 a parameter that multiplies (4 where it is frozen), and attention's 6 *
    layers * heads * dim * the sum of squared document lengths (causal, so half of 12)."""

    def __init__(self, hf_config, multiplied: int, adapters: Adapters | None):
        heads = hf_config.num_attention_heads
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        self.dense = 6 * multiplied if adapters is None else 4 * multiplied + 6 * adapters.num_parameters
        self.attention = 6 * hf_config.num_hidden_layers * heads * head_dim

    def __call__(self, tokens: int, squared_lengths: float) -> float:
        return self.dense * tokens + self.attention * squared_lengths


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this device, where known."""
    if device.type != "cuda":
        return None
    import torch  # here, for ``medtrain plan`` does without

    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
