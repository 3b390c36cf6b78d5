"""Activation checkpointing: what a decoder layer keeps from forward to backward, and what it computes again there.

``full`` keeps a layer's input. ``selective`` (torch's selective checkpointing, as torchtitan's "op" mode) also keeps attention
and, of the products after it, every second one, adapters left out: ``o_proj`` and ``up_proj``. Products before attention are not
kept: Liger's rotary kernel overwrites its inputs, so that a kept query or key would be rotated twice.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# By name: a package's own operations are there only once it is imported.
_ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::_scaled_mm"})


def checkpoint_layers(layers: nn.ModuleList, mode: str, rank: int | None = None) -> None:
    """Wrap each layer as ``model.activation_checkpointing`` says; nothing for ``none`` and ``budget``. ``rank``: of adapters."""
    if mode not in ("full", "selective"):
        return
    options: dict[str, Any] = {} if mode == "full" else {"context_fn": functools.partial(_selective_contexts, rank)}
    for i, layer in enumerate(layers):
        # No layer draws random numbers, so their state need not be brought back.
        layers[i] = checkpoint_wrapper(layer, preserve_rng_state=False, **options)


def _selective_contexts(rank: int | None):
    products_seen: dict[bool, int | None] = {False: None, True: None}  # since attention, by whether it is the second forward
    return create_selective_checkpoint_contexts(functools.partial(_choose, products_seen, rank))


def _choose(products_seen: dict[bool, int | None], rank: int | None, ctx, op, *args, **kwargs) -> CheckpointPolicy:
    name, seen = op._schema.name, products_seen[ctx.is_recompute]
    keep = name in _ATTENTION
    if keep:
        products_seen[ctx.is_recompute] = 0
    elif name in _PRODUCTS and seen is not None and rank not in args[-1 if name != "aten::_scaled_mm" else 1].shape:
        products_seen[ctx.is_recompute] = seen + 1
        keep = seen % 2 == 0
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
