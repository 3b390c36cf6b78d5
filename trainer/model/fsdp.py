"""The policy over the ranks by FSDP2: which weights are gathered together, how long they stay whole, what is gathered ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from medtrain.trainer.config.settings import ParallelConfig
from medtrain.trainer.distributed import World

if TYPE_CHECKING:
    from medtrain.trainer.model.policy import PolicyModel


def shard_model(policy: PolicyModel, config: ParallelConfig, world: World, compute_dtype: torch.dtype) -> None:
    """Shard a policy on meta over ``world.mesh``; on a mesh ("replicate", "shard") each copy shards by itself, and gradients
    are averaged over all ranks.

    Units: each decoder layer; the head (with the embedding where they are tied, so that both uses add to one gradient); the
    root with the rest.
    """
    low = compute_dtype if compute_dtype != torch.float32 else None
    precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    options: dict[str, Any] = {"mesh": world.mesh, "mp_policy": precision}
    layers = policy.model.layers
    for layer in layers:
        fully_shard(layer, reshard_after_forward=config.reshard_after_forward, **options)
    # The head is always given back: its backward follows at once, but a pass without backward would leave it whole.
    fully_shard([policy.model.embed_tokens, policy.lm_head] if policy.tied else policy.lm_head, **options)
    fully_shard(policy, **options)
    if config.prefetch:
        _prefetch(policy, [*layers, policy.lm_head], config.prefetch)


def _prefetch(root: Any, units: list[Any], num_ahead: int) -> None:
    """Let each unit, in both directions, ask for the next ``num_ahead`` as soon as it is gathered itself.

    The lists replace FSDP2's own order, which gathers one ahead: in the forward when the host gets there, which on a GPU may
    be late; in the backward by the order of the forward.
    """
    root.set_modules_to_forward_prefetch(units[:num_ahead])
    for i, unit in enumerate(units):
        if ahead := units[i + 1 : i + 1 + num_ahead]:
            unit.set_modules_to_forward_prefetch(ahead)
        if ahead := units[max(i - num_ahead, 0) : i][::-1]:
            unit.set_modules_to_backward_prefetch(ahead)
