"""One optimizer step, of any stage.

The training loop and ``medtrain bench train`` call the same function, so what is timed is what trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from medtrain.trainer.distributed import World
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.train.stage import Denominators, StageData, StageLoss

if TYPE_CHECKING:  # torchao comes with it, for those who ask for it
    from medtrain.trainer.model.fp8 import Guard


@dataclass(frozen=True)
class StepResult:
    """``metrics``: the loss's, and ``grad_norm``; ``attention_pairs``: query-key pairs that attention computes, of all ranks;
    ``stop_requested``: whether a stop was requested on any rank."""

    metrics: dict[str, Any]
    denominators: Denominators
    attention_pairs: float
    stop_requested: bool


def optimizer_step(
    policy: PolicyModel,
    data: StageData,
    loss: StageLoss,
    optimizer: torch.optim.Optimizer,
    step: int,
    world: World,
    *,
    lr: float,
    grad_clip: float,
    guard: Guard | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    error_hint: str = "",
) -> StepResult:
    """Step number ``step`` (from 0): micro-batches, their gradients, one reduction, clipping, update.

    Args:
        guard: of an FP8 run.
        stop_requested: whether a stop of this process was requested; called once the gradients are there.
        error_hint: ends the message of the error.

    Raises:
        RuntimeError: a loss or gradient norm that is not finite, or the guard's; nothing has been updated then.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    batches, n = data.micro_batches(step, world)
    sums = torch.zeros(loss.num_sums, dtype=torch.float64, device=world.device)
    attention_pairs = 0.0
    fp8_metrics = guard.check(step, batches[0]) if guard is not None else {}
    for i, batch in enumerate(batches):
        # Copies add their gradients up once per step, not once per micro-batch.
        if world.replicas > 1 and isinstance(policy, FSDPModule):
            policy.set_requires_all_reduce(i == len(batches) - 1)
        value, stats = loss(policy, batch, n)
        # FSDP averages gradients over ranks; the loss is already divided by the whole step's denominator.
        (value * world.size).backward()
        sums += stats
        attention_pairs += batch.attended
    # One reduction per step carries everything: sums, attention work, and whether a stop was requested.
    parts = [sums, torch.tensor([attention_pairs, float(stop_requested())], dtype=torch.float64, device=world.device)]
    if guard is not None:
        parts.append(guard.nonfinite_gradients())
    totals, (all_pairs, stop_votes, *nonfinite_fp8_grads) = world.sum(torch.cat(parts)).tensor_split([len(sums)])
    metrics = loss.metrics(totals, n) | fp8_metrics
    if nonfinite_fp8_grads:
        metrics["fp8/nonfinite_gradients"] = float(nonfinite_fp8_grads[0])
    grad_norm = _clip(policy, grad_clip)
    if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
        raise RuntimeError(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {grad_norm}: not finite, stopped before the update"
            + (f"; {error_hint}" if error_hint else "")
            + (f"; {nonfinite_fp8_grads[0]:.0f} FP8 weights have such gradients" if nonfinite_fp8_grads else "")
        )
    optimizer.step()
    if guard is not None:
        guard.rescale()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(metrics | {"grad_norm": grad_norm}, n, float(all_pairs), bool(stop_votes > 0))


def _clip(policy: PolicyModel, limit: float) -> float:
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), limit if limit > 0 else math.inf)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
