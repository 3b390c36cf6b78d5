"""Peaked inputs of the kernel benchmark, and what float64 makes of them.

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

SEQUENCE_TOKENS = 512  # about a completion of reasoning; sequences share N out evenly
# Small, since there is no reference model to take the margins near 0: the pairs' gradients then weigh about the same.
BETA = 0.02
SAMPLED_VOCABULARY = 16_384
# The float64 pass over a shape: at most so many seconds and pairs, whatever the device.
_REFERENCE_SECONDS = 3.0
_REFERENCE_PAIRS = 8

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
        return (*self.hidden.shape, len(self.weight))

    def require_grad(self, head: str | None) -> Inputs:
        """Say who is trained: ``head`` "frozen" (hidden alone), "trained" (weight too) or None (nobody)."""
        self.hidden.requires_grad_(head is not None)
        self.weight.requires_grad_(head == "trained")
        return self

    def trained(self) -> tuple[Tensor, ...]:
        """The inputs that need a gradient."""
        return tuple(tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad)

    def margins(self, logps: Tensor) -> Tensor:
        """[P] float64: summed logps [N] of each chosen sequence minus those of its rejected one."""
        sums = logps.detach().double().view(2, self.num_pairs, -1).sum(2)
        return sums[0] - sums[1]


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
    """Pairs that N rows are cut into: sequences of about ``SEQUENCE_TOKENS`` tokens.

    Raises:
        InputError: rows that do not make equally long sequences.
    """
    pairs = max(1, round(num_rows / (2 * SEQUENCE_TOKENS)))
    if num_rows < 2 or num_rows % (2 * pairs):
        raise bad_input(
            "rows do not make sequences of one length",
            field="--shapes",
            found=f"N = {num_rows}",
            expected=f"a multiple of {2 * pairs}",
        )
    return pairs


def make_inputs(
    num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Inputs:
    """A batch with trained-like logits; the same on every run for a seed and a kind of device."""
    generator = torch.Generator(device).manual_seed(seed)

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
    hard = torch.rand(num_rows, generator=generator, device=device) < _HARD_SHARE
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
    num_rows, hidden_size, vocab_size = inputs.shape
    pairs = inputs.num_pairs
    rows = num_rows // pairs
    flops = 8 * rows * hidden_size * vocab_size
    checked = max(1, min(pairs, _REFERENCE_PAIRS, int(_REFERENCE_SECONDS * _float64_rate(inputs.hidden.device) / flops)))
    if checked < pairs:
        halves = [tensor.unflatten(0, (2, pairs, -1)) for tensor in (inputs.hidden, inputs.targets)]
        hidden, targets = (half[:, :checked].flatten(0, 2).contiguous() for half in halves)
        subset = Inputs(hidden, inputs.weight, targets, checked, torch.empty(len(hidden), device=hidden.device))
    else:
        subset = inputs
    spread = torch.arange(0, vocab_size, max(1, -(-vocab_size // (SAMPLED_VOCABULARY // 2))), device=inputs.hidden.device)
    if vocab_size <= SAMPLED_VOCABULARY:
        spread = torch.arange(vocab_size, device=inputs.hidden.device)
    sampled = torch.cat([subset.targets, spread]).unique()

    weight = subset.weight.detach().double().requires_grad_()
    hidden = subset.hidden.detach().double().view(2, checked, rows // 2, hidden_size)
    targets = subset.targets.view(2, checked, rows // 2)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = weight.new_zeros(len(sampled), hidden_size)
    upstream = hidden.new_empty(2, checked, rows // 2)
    margins = hidden.new_empty(checked)
    for pair in range(checked):
        x = hidden[:, pair].reshape(rows, hidden_size).requires_grad_()
        logps = reference_logps(x, weight, targets[:, pair].reshape(rows))
        sums = logps.view(2, -1).sum(1)
        loss = -F.logsigmoid(BETA * (sums[0] - sums[1])) / checked
        to_logps, to_hidden, to_weight = torch.autograd.grad(loss, (logps, x, weight))
        margins[pair] = (sums[0] - sums[1]).detach()
        upstream[:, pair] = to_logps.view(2, -1)
        grad_hidden[:, pair] = to_hidden.view(2, -1, hidden_size)
        grad_weight += to_weight[sampled]
        del logps, sums, loss, to_weight
    subset = Inputs(subset.hidden, subset.weight, subset.targets, checked, upstream.flatten().float())
    return Reference(subset, margins, grad_hidden.view(-1, hidden_size), grad_weight, sampled)


def _float64_rate(device: torch.device) -> float:
    """Floating-point operations a second of a float64 product on this device."""
    size = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, dtype=torch.float64, device=device)
    seconds = math.inf
    for _ in range(3):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds = min(seconds, time.perf_counter() - started)
    return 2 * size**3 / seconds
