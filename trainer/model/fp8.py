"""FP8 in the policy: linear layers by torchao, their weights as plain tensors, and the guard that watches them.

torchao scales each tensor (tensorwise) or each row (rowwise) by its largest magnitude just before every product, so that
finite numbers never overflow; what can go wrong is a number that is not finite, one so small beside the largest that it
becomes zero, and a model that drifts from what it would be without FP8. The guard measures all three.

Import this file after :func:`medtrain.trainer.model.precision.load_torchao`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchao.float8 import Float8LinearConfig
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
from torchao.float8.fsdp_utils import precompute_float8_dynamic_scale_for_fsdp

from medtrain.trainer.config.settings import PrecisionConfig
from medtrain.trainer.distributed import World, local_tensor, unwrapped, whole
from medtrain.trainer.model.compile import as_written
from medtrain.trainer.model.precision import Fp8

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from medtrain.trainer.data.batch import MicroBatch
    from medtrain.trainer.model.policy import PolicyModel


class FP8Linear(Float8Linear):
    """torchao's layer, which computes without FP8 while ``plain`` is set, and counts into ``counts`` where there is one.

    ``sharded`` then holds the weight as FSDP keeps it, where what was gathered is rounded to FP8 already.
    """

    plain: bool = False
    sharded: tuple[torch.Tensor, ...] = ()
    counts: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.plain:
            weight = whole(self.sharded[0].to(x.dtype)) if self.sharded else self.weight
            return F.linear(x, weight, self.bias)
        y = super().forward(x)
        if self.counts is not None:
            self.counts += _counts(x, y, self.config)
        return y


def add_fp8(layers: nn.Module, fp8: Fp8, prefix: str) -> None:
    """Put FP8 layers in place of the linear layers of ``layers`` (on meta) that ``fp8`` names; ``prefix`` is its name."""
    config = Float8LinearConfig.from_recipe_name(fp8.recipe)
    # Packs are ragged: the gradient of a weight sums over a number of tokens that is a multiple of nothing.
    config = dataclasses.replace(config, emulate=fp8.emulate, enable_fsdp_float8_all_gather=fp8.all_gather, pad_inner_dim=True)
    for path, module in [*layers.named_modules()]:
        for name, child in [*module.named_children()]:
            full = ".".join(part for part in (prefix, path, name, "weight") if part)
            if full in fp8.names:
                setattr(module, name, FP8Linear.from_float(child, config=config))


def fp8_layers(policy: nn.Module) -> list[FP8Linear]:
    return [module for module in policy.modules() if isinstance(module, FP8Linear)]


class Guard:
    """Watches FP8 during a run: gradients in every step, one micro-batch a rank with and without FP8 now and then."""

    def __init__(self, config: PrecisionConfig, policy: PolicyModel, world: World):
        self.config, self.policy, self.world = config, policy, world

    def check(self, step: int, batch: MicroBatch) -> dict[str, float]:
        """:func:`measure_fp8` before step ``step`` (from 0) where it is due, else nothing; all ranks must call this.

        Raises:
            RuntimeError: something is wrong and ``precision.fp8_guard`` is ``stop``.
        """
        every = self.config.fp8_check_every
        if every == 0 or step % every:
            return {}
        found = measure_fp8(self.policy, batch, self.world)
        if wrong := complaint(found, self.config.fp8_tolerance):
            if self.config.fp8_guard == "stop":
                raise RuntimeError(
                    f"step {step + 1}: FP8: {wrong}; stopped before the step, the last checkpoint stands "
                    "(precision.fp8_guard=warn goes on)"
                )
            log.warning(f"step {step + 1}: FP8: {wrong}")
        return found

    def without_fp8(self):
        """Inside, the policy computes in the compute precision alone; see :func:`without_fp8`."""
        return without_fp8(self.policy)

    def nonfinite_gradients(self) -> torch.Tensor:
        """How many FP8 weights have a gradient that is not finite in this rank's part; float64 [1], without waiting."""
        grads = [layer.weight.grad for layer in fp8_layers(self.policy)]
        local = [unwrapped(local_tensor(grad)) for grad in grads if grad is not None]
        norms = torch._foreach_norm([grad for grad in local if grad.numel()], float("inf")) or [torch.zeros(())]
        # Each copy of the model has the same gradients; the ranks' numbers are added up.
        return (~torch.stack(norms).isfinite()).sum().double().view(1).to(self.world.device) / self.world.replicas

    def rescale(self) -> None:
        """After the weights have changed: the scales of those gathered in FP8, by one reduction for all of them."""
        precompute_float8_dynamic_scale_for_fsdp(self.policy)


def measure_fp8(policy: PolicyModel, batch: MicroBatch, world: World) -> dict[str, float]:
    """Compute one micro-batch a rank with and without FP8 and compare; all ranks must call this, between two steps.

    Returns ``fp8/shadow_loss_difference`` (nats a counted token: the loss with FP8 less the loss without), the share of the
    FP8 layers' inputs and outputs that are not finite (``fp8/nonfinite_share``), and of the inputs those that lie at FP8's
    largest number after scaling (``fp8/saturated_share``) and those that are not zero but become it
    (``fp8/underflow_share``).
    """
    layers = fp8_layers(policy)
    counts = torch.zeros(5, dtype=torch.float64, device=world.device)
    with torch.no_grad(), as_written():
        for layer in layers:
            layer.counts = counts
        moved = batch.to(policy.device)
        ours = policy(moved).double().sum()
        for layer in layers:
            layer.counts = None
        with without_fp8(policy):
            shadow = policy(moved).double().sum()
    policy.reshard_all()
    tokens = torch.tensor(len(batch.targets), dtype=torch.float64, device=world.device)
    sums = world.sum(torch.cat([torch.stack([shadow - ours, tokens]), counts]))
    difference, tokens, numbers, inputs, nonfinite, saturated, underflow = sums.tolist()
    return {
        "fp8/shadow_loss_difference": difference / max(tokens, 1),
        "fp8/nonfinite_share": nonfinite / numbers,
        "fp8/saturated_share": saturated / inputs,
        "fp8/underflow_share": underflow / inputs,
    }


def complaint(found: dict[str, Any], tolerance: float) -> str | None:
    """What is wrong with the numbers of :func:`measure_fp8`, or None."""
    wrong = []
    if found["fp8/nonfinite_share"] > 0:
        wrong.append(f"{found['fp8/nonfinite_share']:.1e} of what goes into and out of FP8 layers is not finite")
    if not abs(found["fp8/shadow_loss_difference"]) <= tolerance:  # so that NaN is wrong too
        wrong.append(
            f"the loss is {found['fp8/shadow_loss_difference']:+.4f} nats a token from the one without FP8, more than "
            f"precision.fp8_tolerance={tolerance:g}"
        )
    return "; ".join(wrong) or None


@contextmanager
def without_fp8(policy: PolicyModel) -> Iterator[None]:
    """The policy in the compute precision alone, for forwards without gradient, as long as this lasts."""
    policy.reshard_all()
    layers = fp8_layers(policy)
    for layer in layers:
        layer.plain = True
        if isinstance(layer.weight, DTensor) and layer.config.enable_fsdp_float8_all_gather:
            layer.sharded = (layer.weight,)  # in a tuple, or torch would take it for a parameter of its own
    try:
        with as_written():  # a graph for this alone is not worth its compilation
            yield
    finally:
        for layer in layers:
            layer.plain, layer.sharded = False, ()


def _counts(x: torch.Tensor, y: torch.Tensor, config: Float8LinearConfig) -> torch.Tensor:
    """Numbers of x and y; those of x; of x and y not finite; of x at FP8's largest, and those that become zero. float64 [5].

    Scales are made of the finite numbers, lest one that is not hide the rest.
    """
    cast = config.cast_config_input
    finite = x.isfinite()
    known = torch.where(finite, x, 0.0)
    scale = tensor_to_scale(
        known,
        cast.target_dtype,
        scaling_granularity=cast.scaling_granularity,
        axiswise_dim=-1 if cast.scaling_granularity is ScalingGranularity.AXISWISE else None,
        round_scales_to_power_of_2=config.round_scales_to_power_of_2,
    )
    cast_x = to_fp8_saturated(known.float() * scale, cast.target_dtype).float()
    counts = [
        x.numel() + y.numel(),
        x.numel(),
        (~finite).sum() + (~y.isfinite()).sum(),
        (cast_x.abs() == torch.finfo(cast.target_dtype).max).sum(),
        ((known != 0) & (cast_x == 0)).sum(),
    ]
    return torch.stack([torch.as_tensor(count, device=x.device) for count in counts]).double()
