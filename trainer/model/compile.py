"""Decoder layers compiled one by one by torch.compile: one graph for all of them, whatever the length of a pack.

A layer's ``forward`` is replaced, not the layer: parameters keep their names, and FSDP's hooks, which stand around
``forward``, stay outside of the graph. The checkpointing that wraps a layer is compiled with it. ``fullgraph``: what would
break the graph is an error in the first step, not a slower run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch.nn as nn

from medtrain.trainer.model.attention import PackedLayout

BACKEND = "inductor"  # the tests have faster ones
# Variants of one layer: with and without gradients, adapters, a shared prompt, one token; lengths known and unknown.
RECOMPILE_LIMIT = 32


def compile_layers(layers: nn.ModuleList, *, budget: float | None = None) -> None:
    """Compile each layer of a policy on meta, before it is sharded; ``budget``: share of a layer's activations to keep, by
    the compiler's own choice of what is cheapest to compute again."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._functorch.config.activation_memory_budget = 1.0 if budget is None else budget
    for layer in layers:
        compiled = torch.compile(layer.forward, backend=BACKEND, fullgraph=True)
        layer.forward = functools.partial(_forward, layer.forward, compiled)


def _forward(
    eager: Callable, compiled: Callable, hidden_states: torch.Tensor, *, layout: PackedLayout | None = None, **kwargs: Any
) -> torch.Tensor:
    if layout is None:  # generation, with a KV cache that grows by one token per call
        return eager(hidden_states, **kwargs)
    # Marked in advance, so that no graph is compiled for the first lengths alone.
    for tensor in (hidden_states, kwargs["position_ids"], *kwargs["position_embeddings"]):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
    for tensor in (layout.cu_seqlens, layout.key_cu_seqlens, layout.key_index):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compiled(hidden_states, layout=layout, **kwargs)


def as_written():
    """Inside, compiled layers run uncompiled."""
    return torch.compiler.set_stance("force_eager")
