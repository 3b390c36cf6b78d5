"""Peaked inputs of the kernel benchmark, and float64's answer for them.

Uniform random logits would flatter a method that skips small gradients, and hide rounding: nothing is certain there and
nothing is large. Here most targets are nearly certain, some are not, and log-probabilities reach down to about -20, as
under a trained head.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medtrain.kernels.reference import reference_logps
from medtrain.trainer.errors import bad_input

# Small, since there is no reference model to take the margins near 0: the pairs' gradients then weigh about the same.
BETA = 0.02
_SAMPLED_ENTRIES = 16_384
# The float64 pass takes at most so many pairs of a shape, and begins none after so many seconds.
_REFERENCE_PAIRS, _REFERENCE_SECONDS = 8, 3.0
_NOISE = 3.0  # standard deviation of the logits of tokens that have nothing to do with the context
_HARD_SHARE = 0.15


@dataclass(frozen=True)
class Inputs:
    """One batch of ``num_pairs`` pairs, all chosen sequences first, then all rejected ones, each of N / (2 P) rows.

    hidden [N, H] and weight [V, H] share a dtype, targets [N] are int64. ``upstream`` [N] float32 is the gradient of
    the mean DPO loss (``BETA``, reference log-probabilities 0) with respect to the log-probabilities.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    num_pairs: int
    upstream: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, H, V)."""
        return len(self.hidden), self.hidden.shape[1], len(self.weight)

    def require_grad(self, head: str | None) -> Inputs:
        """Choose what is trained: ``head`` "frozen" (hidden alone), "trained" (weight too) or None (nothing)."""
        self.hidden.requires_grad_(head is not None)
        self.weight.requires_grad_(head == "trained")
        return self

    def trained(self) -> tuple[Tensor, ...]:
        """The inputs that need a gradient."""
        return tuple(tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad)

    def margins(self, logps: Tensor) -> Tensor:
        """[P] float64: summed logps [N] of each chosen sequence minus those of its rejected one."""
        chosen, rejected = logps.detach().double().view(2, self.num_pairs, -1).sum(2)
        return chosen - rejected


@dataclass(frozen=True)
class Reference:
    """float64's answer for ``inputs`` (the whole batch, or its first pairs): margins [P], gradients of the mean DPO loss.

    ``grad_weight`` holds the vocabulary entries ``sampled`` alone: every target, and others at even distances.
    """

    inputs: Inputs
    margins: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    sampled: Tensor

    def errors(self, margins: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, float | None]:
        """Largest margin error in nats; relative Frobenius error of the gradients of hidden and, if given, weight."""
        hidden, *weight = gradients or (None,)
        return {
            "margin_error_nats": (margins.double() - self.margins).abs().max().item(),
            "dx_error": None if hidden is None else _relative(hidden, self.grad_hidden),
            "dw_error": _relative(weight[0][self.sampled], self.grad_weight) if weight else None,
        }


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def num_pairs(num_rows: int) -> int:
    """Pairs that N rows are cut into, of sequences of about 512 tokens; InputError for rows that do not make equal ones."""
    pairs = max(1, round(num_rows / (2 * 512)))
    if num_rows < 2 or num_rows % (2 * pairs):
        expected = f"a multiple of {2 * pairs}"
        raise bad_input("rows do not make sequences of one length", field="--shapes", found=f"N = {num_rows}", expected=expected)
    return pairs


def make_inputs(num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A batch with trained-like logits; the same on every run for a kind of device."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_rows, generator=generator, device=device)

    weight = randn(vocab_size, hidden_size).div_(math.sqrt(hidden_size))
    targets = torch.randint(vocab_size, (num_rows,), generator=generator, device=device)
    # hidden = lift * W_target + noise: the target's logit is about lift, the others' are normal with variance
    # noise^2 + lift^2 / H. ``level`` is their log-sum-exp, which follows the largest of them once the spread is wide.
    level, widest = math.log(vocab_size), math.sqrt(2 * math.log(vocab_size))
    for _ in range(8):
        spread = math.sqrt(_NOISE**2 + (level + 5) ** 2 / hidden_size)
        level = math.log(vocab_size) + spread**2 / 2 if spread < widest else spread * widest
    hard = uniform(0.0, 1.0) < _HARD_SHARE
    lift = level + torch.where(hard, uniform(-20.0, 0.0), uniform(3.0, 15.0))
    hidden = randn(num_rows, hidden_size).mul_(_NOISE).addcmul_(weight[targets], lift.unsqueeze(1))
    pairs = num_pairs(num_rows)
    upstream = torch.full((num_rows,), -0.5 * BETA / pairs, device=device)
    upstream[num_rows // 2 :] *= -1
    return Inputs(hidden.to(dtype), weight.to(dtype), targets, pairs, upstream)


def reference(inputs: Inputs) -> Reference:
    """float64's answer for the first pairs, as many as time allows; its ``inputs`` have the upstream gradient it found.

    Works pair by pair, so no tensor is larger than one pair x V.
    """
    vocab_size, device = inputs.shape[2], inputs.hidden.device
    by_pair = (2, inputs.num_pairs, -1)
    hidden, targets = inputs.hidden.detach().unflatten(0, by_pair), inputs.targets.unflatten(0, by_pair)
    most = min(inputs.num_pairs, _REFERENCE_PAIRS)
    step = 1 if vocab_size <= _SAMPLED_ENTRIES else -(-vocab_size // (_SAMPLED_ENTRIES // 2))
    sampled = torch.cat([targets[:, :most].flatten(), torch.arange(0, vocab_size, step, device=device)]).unique()

    weight = inputs.weight.detach().double().requires_grad_()
    grad_weight = weight.new_zeros(len(sampled), weight.shape[1])
    margins, upstream, grad_hidden = [], [], []
    started = time.perf_counter()
    while len(margins) < most and (not margins or time.perf_counter() - started < _REFERENCE_SECONDS):
        x = hidden[:, len(margins)].double().requires_grad_()
        logps = reference_logps(x.flatten(0, 1), weight, targets[:, len(margins)].flatten()).view(2, -1)
        chosen, rejected = logps.sum(1)
        to_logps, to_x, to_weight = torch.autograd.grad(-F.logsigmoid(BETA * (chosen - rejected)), (logps, x, weight))
        grad_weight += to_weight[sampled]
        del to_weight
        margins.append((chosen - rejected).item())
        upstream.append(to_logps)
        grad_hidden.append(to_x)
    count = len(margins)
    part = Inputs(
        hidden[:, :count].flatten(0, 2).contiguous(),
        inputs.weight,
        targets[:, :count].flatten().contiguous(),
        count,
        torch.stack(upstream, 1).div(count).flatten().float(),
    )
    grad_hidden = torch.stack(grad_hidden, 1).flatten(0, 2) / count
    return Reference(part, torch.tensor(margins, dtype=torch.float64, device=device), grad_hidden, grad_weight / count, sampled)
