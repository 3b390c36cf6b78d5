"""NF4: frozen weights of linear layers in 4 bits, widened to the compute precision where they are used.

The format of QLoRA (arXiv 2305.14314, section 3 and appendix E): 64 neighbours in a row share one float32 scale, their largest
magnitude, and every weight is the nearest of 16 levels times it. Rows are quantized one by one, so that shards have the same
bits. A layer's one parameter, ``packed`` [out, in * 9/16 bytes], holds a row's codes (two per byte, the first in the high half),
then its scales, declared as the compute dtype: FSDP gathers bit by bit only what it need not cast.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

BLOCK = 64

# Quantiles of a normal distribution scaled to [-1, 1], with an exact zero: QLoRA, appendix E.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def packed_shape(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Shape of ``packed`` for a weight [rows, columns], declared as ``dtype``; columns are a multiple of BLOCK."""
    return rows, columns // BLOCK * (BLOCK // 2 + 4) // dtype.itemsize


def quantize(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pack a weight [rows, columns] (any float dtype, columns a multiple of BLOCK) as :func:`packed_shape` says.

    Raises ValueError: other shapes, or a weight that is not finite.
    """
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"NF4 needs rows of a multiple of {BLOCK} weights; found {columns}")
    blocks = weight.detach().float().reshape(rows, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax(-1)
    if not scales.isfinite().all():
        raise ValueError("a weight that is not finite cannot be quantized")
    levels = torch.tensor(LEVELS, device=weight.device)
    # A block of zeros is divided by 1; its scale stays 0.
    units = blocks / torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    codes = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).view(rows, columns)
    halves = codes[:, 0::2] << 4 | codes[:, 1::2]
    return torch.cat([halves, scales.view(torch.uint8).view(rows, -1)], dim=1).view(dtype)


def dequantize(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [rows, columns] that ``packed`` stands for: level times scale in float32, rounded once to ``dtype``."""
    data = packed.detach().contiguous().view(torch.uint8)
    rows = len(data)
    num_blocks = data.shape[1] // (BLOCK // 2 + 4)
    halves, scales = data.split([num_blocks * BLOCK // 2, num_blocks * 4], dim=1)
    levels = torch.tensor(LEVELS, device=data.device)
    pairs = torch.cartesian_prod(levels, levels)  # [256, 2]: a byte's two levels in one look-up
    values = pairs.index_select(0, halves.reshape(-1).int()).view(rows, num_blocks, BLOCK)
    return (values * scales.contiguous().view(torch.float32).unsqueeze(-1)).view(rows, -1).to(dtype)


class _Linear(torch.autograd.Function):
    """x @ W.T + b, gradient to x alone. Keeps the packed weight for the backward and widens it again there."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(packed)
        return F.linear(x, dequantize(packed, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (packed,) = ctx.saved_tensors
        return gradient @ dequantize(packed, gradient.dtype), None, None


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in NF4: ``forward(x [..., in]) -> [..., out]`` in x's dtype.

    It takes over the bias of ``linear``; the weight, which may be on meta, is not read.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight
        shape = packed_shape(linear.out_features, linear.in_features, weight.dtype)
        self.packed = nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device), requires_grad=False)
        self.register_parameter("bias", linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(x, self.packed, self.bias)
