"""The policy over the ranks by FSDP2: which weights are gathered together, how long they stay whole, what is gathered ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from medtrain.trainer.config.settings import ParallelConfig
from medtrain.trainer.distributed import World

if TYPE_CHECKING:
    from medtrain.trainer.model.policy import PolicyModel


def shard_model(policy: PolicyModel, config: ParallelConfig, world: World, compute_dtype: torch.dtype) -> None:
    """Shard a policy on meta over ``world.mesh``; on a mesh ("replicate", "shard") each copy shards by itself, and gradients
    are averaged over all ranks.

    Units: each decoder layer; the head (with the embedding where they are tied, else gradients of the two uses would part);
    the root with the rest.
    """
    low = compute_dtype if compute_dtype != torch.float32 else None
    options = {
        "mesh": world.mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None),
    }
    for layer in policy.model.layers:
        fully_shard(layer, reshard_after_forward=config.reshard_after_forward, **options)
    # The head is always given back: its backward follows at once, but a pass without backward would leave it whole.
    if policy.tied:
        fully_shard([policy.model.embed_tokens, policy.lm_head], **options)
    else:
        fully_shard(policy.lm_head, **options)
    fully_shard(policy, **options)
    if config.prefetch:
        _prefetch(policy, config.prefetch)


def _prefetch(policy: PolicyModel, num_ahead: int) -> None:
    """In both directions each unit asks for the next ``num_ahead`` as soon as it is gathered itself.

    FSDP2's own order gathers one ahead: in the forward when the host gets there, which on a GPU may be late, in the backward
    by the order of the forward. The list replaces it.
    """
    order = [*policy.model.layers, policy.lm_head]
    policy.set_modules_to_forward_prefetch(order[:num_ahead])
    for i, unit in enumerate(order):
        if ahead := order[i + 1 : i + 1 + num_ahead]:
            unit.set_modules_to_forward_prefetch(ahead)
        if ahead := order[max(i - num_ahead, 0) : i][::-1]:
            unit.set_modules_to_backward_prefetch(ahead)
