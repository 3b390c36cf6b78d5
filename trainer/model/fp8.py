"""FP8 in the policy: linear layers by torchao, their weights as plain tensors, and the guard that watches them.

torchao scales each tensor (tensorwise) or row (rowwise) by its largest magnitude just before every product, so finite numbers
never overflow. The guard measures what can go wrong: a number that is not finite, one so small compared with the largest
that it becomes zero, and a model that drifts from what it would be without FP8.

Import this file after :func:`medtrain.trainer.model.precision.load_torchao`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from medtrain.trainer.data.batch import MicroBatch
    from medtrain.trainer.model.policy import PolicyModel

log = logging.getLogger(__name__)


class FP8Linear(Float8Linear):
    """torchao's layer, which computes without FP8 while ``plain`` is set, and adds to ``counts`` where there is one.

    ``sharded`` then holds the weight as FSDP keeps it, where what was gathered is already rounded to FP8.
    """

    plain: bool = False
    sharded: tuple[torch.Tensor, ...] = ()
    counts: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.plain:
            weight = whole(self.sharded[0].to(input.dtype)) if self.sharded else self.weight
            return F.linear(input, weight, self.bias)
        output = super().forward(input)
        if self.counts is not None:
            self.counts += _counts(input, output, self.config)
        return output


def add_fp8(layers: nn.Module, fp8: Fp8, prefix: str) -> None:
    """Put FP8 layers in place of the linear layers of ``layers`` (on meta) that ``fp8`` names; ``prefix`` is its name."""
    config = Float8LinearConfig.from_recipe_name(fp8.recipe)
    # Packs are ragged: the gradient of a weight sums over a number of tokens that is a multiple of nothing.
    config = dataclasses.replace(config, emulate=fp8.emulate, enable_fsdp_float8_all_gather=fp8.all_gather, pad_inner_dim=True)
    for path, module in [*layers.named_modules()]:
        for name, child in [*module.named_children()]:
            if ".".join(part for part in (prefix, path, name, "weight") if part) in fp8.names:
                setattr(module, name, FP8Linear.from_float(child, config=config))


class Guard:
    """Watches FP8 during a run: gradients in every step, and now and then one micro-batch per rank with and without FP8."""

    def __init__(self, config: PrecisionConfig, policy: PolicyModel, world: World):
        self.config, self.policy, self.world = config, policy, world
        self.layers = [module for module in policy.modules() if isinstance(module, FP8Linear)]

    def check(self, step: int, batch: MicroBatch) -> dict[str, float]:
        """Where a check is due before step ``step`` (from 0), compute ``batch``, one micro-batch per rank, with and without FP8;
        all ranks must call this.

        Returns ``fp8/shadow_loss_difference`` (nats per counted token, the loss with FP8 less the one without) and shares:
        ``fp8/nonfinite_share`` of the FP8 layers' inputs and outputs; of the inputs, ``fp8/saturated_share`` at FP8's largest
        number after scaling and ``fp8/underflow_share`` that become zero.

        Raises RuntimeError: something is wrong and ``precision.fp8_guard`` is ``stop``.
        """
        every, tolerance = self.config.fp8_check_every, self.config.fp8_tolerance
        if every == 0 or step % every:
            return {}
        metrics = self._measure(batch)
        share, difference = metrics["fp8/nonfinite_share"], metrics["fp8/shadow_loss_difference"]
        problems = []
        if share > 0:
            problems.append(f"{share:.1e} of what goes into and out of FP8 layers is not finite")
        if not abs(difference) <= tolerance:  # so that NaN is wrong too
            limit = f"more than precision.fp8_tolerance={tolerance:g}"
            problems.append(f"the loss is {difference:+.4f} nats per token from the one without FP8, {limit}")
        message = f"step {step + 1}: FP8: {'; '.join(problems)}"
        if problems and self.config.fp8_guard == "stop":
            ending = "stopped before the step, the last checkpoint stands (precision.fp8_guard=warn goes on)"
            raise RuntimeError(f"{message}; {ending}")
        if problems:
            log.warning(message)
        return metrics

    def _measure(self, batch: MicroBatch) -> dict[str, float]:
        counts = torch.zeros(5, dtype=torch.float64, device=self.world.device)
        with torch.no_grad(), as_written():
            for layer in self.layers:
                layer.counts = counts
            moved = batch.to(self.policy.device)
            with_fp8 = self.policy(moved).double().sum()
            for layer in self.layers:
                layer.counts = None
            with self.without_fp8():
                without = self.policy(moved).double().sum()
        self.policy.reshard_all()
        tokens = torch.tensor(len(batch.targets), dtype=torch.float64, device=self.world.device)
        sums = self.world.sum(torch.cat([torch.stack([without - with_fp8, tokens]), counts]))
        difference, tokens, numbers, inputs, nonfinite, saturated, underflow = sums.tolist()
        return {
            "fp8/shadow_loss_difference": difference / max(tokens, 1),
            "fp8/nonfinite_share": nonfinite / numbers,
            "fp8/saturated_share": saturated / inputs,
            "fp8/underflow_share": underflow / inputs,
        }

    @contextmanager
    def without_fp8(self) -> Iterator[None]:
        """Inside, the policy computes in the compute precision alone; for forwards without gradient."""
        self.policy.reshard_all()
        for layer in self.layers:
            layer.plain = True
            if isinstance(layer.weight, DTensor) and layer.config.enable_fsdp_float8_all_gather:
                layer.sharded = (layer.weight,)  # in a tuple, or torch would take it for a parameter of its own
        try:
            with as_written():  # a graph for this alone is not worth its compilation
                yield
        finally:
            for layer in self.layers:
                layer.plain, layer.sharded = False, ()

    def nonfinite_gradients(self) -> torch.Tensor:
        """How many FP8 weights have a gradient that is not finite in this rank's part; float64 [1], without waiting."""
        grads = [unwrapped(local_tensor(layer.weight.grad)) for layer in self.layers if layer.weight.grad is not None]
        # torch exports no other way to take many norms in one kernel.
        norms = torch._foreach_norm([grad for grad in grads if grad.numel()], float("inf"))  # pyright: ignore[reportPrivateImportUsage]
        norms = norms or [torch.zeros(())]
        # Each copy of the model has the same gradients; the ranks' numbers are added up.
        return (~torch.stack(norms).isfinite()).sum().double().view(1).to(self.world.device) / self.world.replicas

    def rescale(self) -> None:
        """After the weights have changed: the scales of those gathered in FP8, by one reduction for all of them."""
        precompute_float8_dynamic_scale_for_fsdp(self.policy)


def _counts(x: torch.Tensor, y: torch.Tensor, config: Float8LinearConfig) -> torch.Tensor:
    """float64 [5]: how many numbers are in x and y, in x, not finite in both; of x at FP8's largest, and rounded to zero."""
    granularity, dtype = config.cast_config_input.scaling_granularity, config.cast_config_input.target_dtype
    assert dtype is not None  # every recipe names one
    known = torch.where(x.isfinite(), x, 0.0)  # one number that is not finite would hide the rest
    dim = -1 if granularity is ScalingGranularity.AXISWISE else None
    powers_of_2 = config.round_scales_to_power_of_2
    scale = tensor_to_scale(
        known, dtype, scaling_granularity=granularity, axiswise_dim=dim, round_scales_to_power_of_2=powers_of_2
    )
    rounded = to_fp8_saturated(known.float() * scale, dtype).float()
    counts = [
        x.numel() + y.numel(),
        x.numel(),
        (~x.isfinite()).sum() + (~y.isfinite()).sum(),
        (rounded.abs() == torch.finfo(dtype).max).sum(),
        ((known != 0) & (rounded == 0)).sum(),
    ]
    return torch.stack([torch.as_tensor(count, device=x.device) for count in counts]).double()
