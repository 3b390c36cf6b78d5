"""One optimizer step, of either stage.

The training loop and ``medtrain bench train`` call the same functions, so what is timed is what trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from medtrain.trainer.distributed import World
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.train.objectives import Denominators, Objective

if TYPE_CHECKING:  # torchao comes with it, for those who ask for it
    from medtrain.trainer.model.fp8 import Guard


@dataclass(frozen=True)
class StepResult:
    """``metrics``: the objective's, and ``grad_norm``; ``squared_lengths``: sum over documents of the step, all ranks;
    ``asked``: whether any rank was told to stop."""

    metrics: dict[str, Any]
    denominators: Denominators
    squared_lengths: float
    asked: bool


def optimizer_step(
    policy: PolicyModel,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    step: int,
    world: World,
    *,
    lr: float,
    grad_clip: float,
    guard: Guard | None = None,
    asked: Callable[[], bool] = lambda: False,
    advice: str = "",
) -> StepResult:
    """Step number ``step`` (from 0): micro-batches, their gradients, one reduction, clipping, update.

    Args:
        guard: of an FP8 run.
        asked: whether this process was told to stop; looked at once the gradients are there.
        advice: ends the message of the error.

    Raises:
        RuntimeError: a loss or gradient norm that is not finite, or the guard's; nothing has been updated then.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    batches, n = objective.micro_batches(step, world)
    sums = torch.zeros(objective.num_sums, dtype=torch.float64, device=world.device)
    attended = 0.0
    checked = guard.check(step, batches[0]) if guard is not None else {}
    for i, batch in enumerate(batches):
        if world.replicas > 1:  # copies add their gradients up once a step, not once a micro-batch
            policy.set_requires_all_reduce(i == len(batches) - 1)
        loss, stats = objective.loss(policy, batch, n)
        # FSDP averages gradients over ranks; the loss is already divided by the whole step's denominator.
        (loss * world.size).backward()
        sums += stats
        attended += batch.attended
    # One reduction a step carries everything: sums, attention work, and whether any rank was told to stop.
    parts = [sums, torch.tensor([attended, float(asked())], dtype=torch.float64, device=world.device)]
    if guard is not None:
        parts.append(guard.nonfinite_gradients())
    totals, (attended, told, *broken) = world.sum(torch.cat(parts)).tensor_split([len(sums)])
    metrics = objective.metrics(totals, n) | checked
    if broken:
        metrics["fp8/nonfinite_gradients"] = float(broken[0])
    grad_norm = _clip(policy, grad_clip)
    if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
        raise RuntimeError(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {grad_norm}: not finite, stopped before the update"
            + (f"; {advice}" if advice else "")
            + (f"; {broken[0]:.0f} FP8 weights have such gradients" if broken else "")
        )
    optimizer.step()
    if guard is not None:
        guard.rescale()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(metrics | {"grad_norm": grad_norm}, n, float(attended), bool(told > 0))


def _clip(policy: PolicyModel, limit: float) -> float:
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), limit if limit > 0 else math.inf)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
