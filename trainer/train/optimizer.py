"""AdamW (arXiv 1711.05101) for every way of keeping weights and moments: torch's own, or one with 8-bit moments or bf16 weights.

Ours rounds only what it keeps: moments of matrices to 8 bits in blocks with a scale each (arXiv 2110.02861, by torchao's
functions), bfloat16 weights stochastically. Blocks lie within rows, and the noise is a function of (seed, weight, step, place):
both are the same on any number of ranks, and nothing but the step must be restored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.distributed.tensor import DTensor

from medtrain.trainer.config.settings import Config
from medtrain.trainer.distributed import local_part, local_tensor, unwrapped
from medtrain.trainer.errors import bad_input
from medtrain.trainer.model.names import weight_name
from medtrain.trainer.model.policy import PolicyModel
from medtrain.trainer.model.precision import MOMENT_BLOCK as BLOCK
from medtrain.trainer.model.precision import load_torchao

_WORD = 0xFFFFFFFF


def check_state(state: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse 8-bit moments where no matrix could have them (``shapes`` of the parameters by name), or without torchao."""
    if state != "8bit":
        return
    load_torchao("optim.state")
    if all(len(shape) < 2 or shape[1] % BLOCK for shape in shapes.values()):
        raise bad_input(
            "no matrix has 8-bit moments",
            field="optim.state",
            found="8bit",
            expected=f"rows of a multiple of {BLOCK} weights, or optim.state=fp32",
        )


def make_optimizer(policy: PolicyModel, config: Config) -> torch.optim.Optimizer:
    """The optimizer that ``optim`` and ``precision`` ask for, over what the policy trains; decays matrices only."""
    policy.reshard_all()
    named = {weight_name(name): p for name, p in policy.named_parameters() if p.requires_grad}
    matrices = [p for p in named.values() if p.ndim >= 2]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = (config.optim.beta1, config.optim.beta2)
    if config.optim.state == "fp32" and config.precision.weights == "fp32":
        return torch.optim.AdamW(groups, lr=config.optim.lr, betas=betas, eps=config.optim.eps, fused=True)
    return SmallAdamW(
        groups,
        {p: name for name, p in named.items()},
        lr=config.optim.lr,
        betas=betas,
        eps=config.optim.eps,
        eight_bit=config.optim.state == "8bit",
        seed=config.run.seed,
    )


class SmallAdamW(torch.optim.Optimizer):
    """AdamW with ``eight_bit`` moments, bfloat16 weights, or both; weights in float32 and moments in float32 otherwise.

    Args:
        groups: as of any torch optimizer; ``names`` gives each parameter's name, of which the noise is made.
    """

    def __init__(self, groups, names: dict[torch.Tensor, str], *, lr, betas, eps, eight_bit: bool, seed: int):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.eight_bit = eight_bit
        self.keys = {p: _key(f"{seed}/{name}") for p, name in names.items()}

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride] (torch overloads it)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        # torch has cast what it loaded to the dtype of each weight; codes are whole numbers and moments are float32.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                if index in state_dict["state"]:
                    self.state[p] = dict(state_dict["state"][index])

    def _update(self, p: torch.Tensor, grad: torch.Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                state |= self._zeros(p, name, signed)
        state["step"] += 1
        step = int(state["step"])
        beta1, beta2 = group["betas"]
        weight, part = local_part(p)
        if weight.numel() == 0:
            return
        first = part[0].start * math.prod(p.shape[1:]) if p.ndim else 0
        moments = [
            local_tensor(state[name]) for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale") if name in state
        ]
        function: Callable[..., None] = _plain_step
        if len(moments) == 4:
            function = _eight_bit_step
            moments += [_levels(True, weight.device), _levels(False, weight.device)]
        if weight.device.type == "cuda":
            function = _compiled(function)
        # Numbers that change from step to step go in as tensors: the compiler would make code for each value.
        numbers = torch.tensor(
            [group["lr"], group["lr"] * group["weight_decay"], 1 - beta1**step, math.sqrt(1 - beta2**step)],
            dtype=torch.float32,
            device=weight.device,
        )
        noise_key = torch.tensor(_mixed(self.keys[p] + step), dtype=torch.int64, device=weight.device)
        function(
            unwrapped(weight), unwrapped(local_tensor(grad)), *moments, numbers, noise_key, first, beta1, beta2, group["eps"]
        )

    def _zeros(self, p: torch.Tensor, name: str, signed: bool) -> dict[str, torch.Tensor]:
        """A moment of p: float32, or codes [as p] and scales [rows, columns / BLOCK], sharded as p is."""
        if not (self.eight_bit and p.ndim == 2 and p.shape[1] % BLOCK == 0):
            return {name: _like(p, p.shape, torch.float32, 0)}
        zero = _code_of_zero(signed)
        return {
            name: _like(p, p.shape, torch.uint8, zero),
            f"{name}_scale": _like(p, (p.shape[0], p.shape[1] // BLOCK), torch.float32, 0),
        }


def _like(p: torch.Tensor, shape, dtype: torch.dtype, value: int) -> torch.Tensor:
    """A tensor of a whole shape, sharded as p is."""
    local, _ = local_part(p)
    mine = torch.full((*local.shape[:1], *shape[1:]), value, dtype=dtype, device=local.device)
    if not isinstance(p, DTensor):
        return mine
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(mine, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _plain_step(weight, grad, m, v, numbers, key, first: int, beta1: float, beta2: float, eps: float) -> None:
    grad = grad.float()
    m.lerp_(grad, 1 - beta1)
    v.lerp_(grad.square(), 1 - beta2)
    _move(weight, m, v, numbers, key, first, eps)


def _eight_bit_step(
    weight, grad, m8, m_scale, v8, v_scale, m_levels, v_levels, numbers, key, first: int, beta1: float, beta2: float, eps: float
) -> None:
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

    grad = grad.float()
    m = dequant_with_qmap(m8, m_levels, m_scale.view(-1)).lerp(grad, 1 - beta1)
    v = dequant_with_qmap(v8, v_levels, v_scale.view(-1)).lerp(grad.square(), 1 - beta2)
    for codes, scales, levels, moment in ((m8, m_scale, m_levels, m), (v8, v_scale, v_levels, v)):
        scaled, new_scales = scale_tensor(moment, BLOCK)
        codes.copy_(quantize_8bit_with_qmap(scaled, levels))
        scales.copy_(new_scales.view_as(scales))
    _move(weight, m, v, numbers, key, first, eps)


def _move(weight, m, v, numbers, key, first: int, eps: float) -> None:
    """AdamW's update of a weight from its moments in float32: ``numbers`` are lr, lr * decay, 1 - beta1^t, sqrt(1 - beta2^t)."""
    lr, decay, correction1, root_correction2 = numbers.unbind()
    old = weight.float()
    new = old - decay * old - lr * (m / correction1) / (v.sqrt() / root_correction2 + eps)
    weight.copy_(stochastically_rounded(new, key, first) if weight.dtype == torch.bfloat16 else new)


def stochastically_rounded(values: torch.Tensor, key: torch.Tensor, first: int) -> torch.Tensor:
    """float32 to bfloat16: to one of the two neighbours, with the probability that makes the mean right.

    ``key`` (int64 scalar) and each value's place in the whole weight, counted from ``first``, decide; numbers that bfloat16
    has, infinities and NaN stay.
    """
    bits = values.contiguous().view(torch.int32)
    places = torch.arange(values.numel(), dtype=torch.int64, device=values.device).view(values.shape) + first
    noise = _mixed(_mixed(places & _WORD) + (places >> 32) * 0x9E3779B1 + key) & 0xFFFF
    up = (bits & 0xFFFF) > noise.to(torch.int32)
    towards_zero = bits & -0x10000
    rounded = torch.where(up, towards_zero + 0x10000, towards_zero).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _mixed(x):
    """A 32-bit integer hash (Wellons' lowbias32), of an int or of an int64 tensor."""
    x = x & _WORD
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@lru_cache
def _levels(signed: bool, device: torch.device) -> torch.Tensor:
    """The 256 numbers that a code stands for (torchao's dynamic map), float32, ascending."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed=signed), device=device)


@lru_cache
def _code_of_zero(signed: bool) -> int:
    return int((_levels(signed, torch.device("cpu")) == 0).nonzero())


@lru_cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """As one kernel or few: step by step, widened moments and codes would need many times the weight's memory."""
    return torch.compile(function, dynamic=False)
