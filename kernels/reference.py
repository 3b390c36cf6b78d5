"""The same functions written down plainly in float64, for tests and for reading: a full softmax, one pair at a time."""

from math import inf

import torch
from torch import Tensor

__all__ = ["reference_logps", "reference_rpo_loss"]


def reference_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [N] in nats, float64, of targets [N] under softmax(hidden [N, H] @ weight [V, H].T)."""
    logits = hidden.double() @ weight.double().T
    return torch.log_softmax(logits, dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)


def reference_rpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    reference: Tensor | None,
    *,
    beta: float,
    alpha: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_norm: str = "sequence",
    simpo_gamma: float = 0.5,
) -> Tensor:
    """Scalar float64 loss; arguments as ``medtrain.kernels.preference.rpo_loss``, formulas as ``preference_loss``."""
    logps = reference_logps(hidden, weight, targets)
    bounds = cu_seqlens.tolist()
    sequences = [logps[low:high] for low, high in zip(bounds, bounds[1:], strict=False)]
    preference, nll, nll_tokens = [], [], []
    for pair in range(len(sequences) // 2):
        chosen, rejected = sequences[2 * pair], sequences[2 * pair + 1]
        nll.append(-chosen.mean())
        nll_tokens.extend(-chosen)
        if loss == "simpo":
            r = beta * (chosen.mean() - rejected.mean()) - simpo_gamma
            preference.append(-(1 - label_smoothing) * _log_sigmoid(r) - label_smoothing * _log_sigmoid(-r))
            continue
        assert reference is not None, f"{loss} needs a reference"
        w = chosen.sum() - reference[2 * pair].double()
        l = rejected.sum() - reference[2 * pair + 1].double()  # noqa: E741
        h = w - l
        if loss == "sigmoid":
            term = -(1 - label_smoothing) * _log_sigmoid(beta * h) - label_smoothing * _log_sigmoid(-beta * h)
        elif loss == "robust":
            term = -(1 - label_smoothing) * _log_sigmoid(beta * h) + label_smoothing * _log_sigmoid(-beta * h)
            term = term / (1 - 2 * label_smoothing)
        elif loss == "hinge":
            term = (1 - beta * h).clamp(0, inf)
        elif loss == "ipo":
            term = (w / len(chosen) - l / len(rejected) - 1 / (2 * beta)) ** 2
        else:
            raise ValueError(f"unknown loss {loss!r}")
        preference.append(term)
    likelihood = {"sequence": nll, "token": nll_tokens}[nll_norm]
    return torch.stack(preference).mean() + alpha * torch.stack(likelihood).mean()


def _log_sigmoid(x: Tensor) -> Tensor:
    return -torch.logaddexp(torch.zeros_like(x), -x)
