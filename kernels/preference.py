"""Preference losses on summed log-probabilities: RPO (DPO plus a weighted likelihood of the chosen answer) and kin.

Sequences come in the order chosen_0, rejected_0, chosen_1, rejected_1, ... Denominators are those of one optimizer step
over all ranks and micro-batches: pass them, and the losses of the micro-batches add up to the loss of the step.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medtrain.kernels.logps import chunked_logps

__all__ = ["LOSSES", "NLL_NORMS", "preference_loss", "rpo_loss", "sum_by_sequence"]

LOSSES = ("sigmoid", "robust", "hinge", "ipo", "simpo")
NLL_NORMS = ("sequence", "token")


def rpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    reference_logps: Tensor | None,
    *,
    beta: float,
    alpha: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_norm: str = "sequence",
    num_pairs: int | None = None,
    num_chosen_tokens: int | None = None,
    simpo_gamma: float = 0.5,
    keep_bytes: int | None = None,
    slab_size: int | None = None,
) -> tuple[Tensor, dict[str, Tensor | int]]:
    """Loss of P pairs straight from hidden states: ``chunked_logps``, summed by sequence, then ``preference_loss``.

    Args:
        hidden: [N, H], the positions that predict completion tokens (and nothing else), sequence after sequence.
        weight: [V, H]; gradients flow to hidden and weight.
        targets: [N] int64, the completion tokens.
        cu_seqlens: [2P + 1] integers from 0 to N; sequence i owns rows cu_seqlens[i]:cu_seqlens[i+1]. On the CPU its
            checks cost no synchronisation with a device.
        reference_logps: [2P], the reference model's summed log-probabilities in nats; None only for ``simpo``.
        keep_bytes, slab_size: see ``chunked_logps``. The others: see ``preference_loss``.

    Returns:
        (loss, stats), as ``preference_loss``.

    Raises:
        ValueError: as ``chunked_logps`` and ``preference_loss``; a cu_seqlens that does not cut N rows into 2P
            sequences.
    """
    lengths = _lengths(cu_seqlens, len(targets))
    logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=slab_size)
    return preference_loss(
        sum_by_sequence(logps, cu_seqlens),
        lengths,
        reference_logps,
        beta=beta,
        alpha=alpha,
        loss=loss,
        label_smoothing=label_smoothing,
        nll_norm=nll_norm,
        num_pairs=num_pairs,
        num_chosen_tokens=num_chosen_tokens,
        simpo_gamma=simpo_gamma,
    )


def preference_loss(
    sequence_logps: Tensor,
    lengths: Tensor,
    reference_logps: Tensor | None,
    *,
    beta: float,
    alpha: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_norm: str = "sequence",
    num_pairs: int | None = None,
    num_chosen_tokens: int | None = None,
    simpo_gamma: float = 0.5,
) -> tuple[Tensor, dict[str, Tensor | int]]:
    """Preference loss plus alpha times the chosen answers' negative log-likelihood.

    With w = log pi(y_w|x) - log ref(y_w|x), l the same for y_l, h = w - l, s the logistic function and
    e = label_smoothing, the preference loss of a pair is

        sigmoid  -(1-e) log s(beta h) - e log s(-beta h)
                 DPO (arXiv 2305.18290, eq. 7); with e > 0 conservative DPO (Mitchell 2023, eq. 3)
        robust   (-(1-e) log s(beta h) + e log s(-beta h)) / (1-2e), e < 0.5
                 unbiased under labels flipped with probability e (arXiv 2403.00409)
        hinge    max(0, 1 - beta h)
                 SLiC (arXiv 2305.10425) on DPO's reward
        ipo      (w / |y_w| - l / |y_l| - 1 / (2 beta))^2
                 arXiv 2310.12036, eq. 17, beta being its tau; averaged over tokens as in TRL's DPOTrainer, whose source
                 says that the authors confirmed it. The target is nats a token: beta is typically far above DPO's
        simpo    -(1-e) log s(r) - e log s(-r), r = beta (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|) - simpo_gamma
                 arXiv 2405.14734, eq. 6; no reference; gamma's default is TRL's

    and the whole is ``sum of those / num_pairs + alpha * NLL``, where NLL is ``-log pi(y_w|x) / |y_w|`` summed over
    pairs and divided by num_pairs for nll_norm "sequence" (RPO, arXiv 2404.19733), or ``-log pi(y_w|x)`` summed over
    pairs and divided by num_chosen_tokens for "token". alpha = 0 is DPO.

    Args:
        sequence_logps: [2P] float, summed log-probabilities of the completions in nats.
        lengths: [2P] integers, completion tokens a sequence, each at least 1 (checked when they are on the CPU).
        reference_logps: [2P], the same sums under the reference; gets no gradient. None only for ``simpo``.
        num_pairs, num_chosen_tokens: denominators of the whole optimizer step; by default those of this call.

    Returns:
        (loss, stats): a scalar in sequence_logps' dtype, and detached values over this call's pairs:
        ``dpo_loss``: 0-d, sum over pairs of the preference loss;
        ``nll_loss``: 0-d, the numerator of NLL, before alpha;
        ``pairs``: P, an int; ``chosen_tokens``: 0-d int64;
        ``rewards/chosen``, ``rewards/rejected``: [P], beta w and beta l (simpo: beta times the mean log-probability);
        ``rewards/margin``: [P], their difference; ``rewards/accuracy``: [P], 1.0 where the margin is positive, else 0;
        ``logps/chosen``, ``logps/rejected``: [P], sums in nats.

    Raises:
        ValueError: unknown names, beta <= 0, a negative alpha, label_smoothing outside [0, 1] (robust: [0, 0.5)) or
            given to a loss that has none, shapes that do not fit, an empty completion, no denominator.
    """
    _check_settings(beta, alpha, loss, label_smoothing, nll_norm)
    if sequence_logps.ndim != 1 or len(sequence_logps) % 2:
        raise ValueError(f"sequence_logps must be [2P], chosen and rejected in turn; found shape {tuple(sequence_logps.shape)}")
    if lengths.shape != sequence_logps.shape:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, sequence_logps has {tuple(sequence_logps.shape)}: not equal")
    if reference_logps is None:
        if loss != "simpo":
            raise ValueError(f"loss {loss!r} needs reference_logps; only simpo does without")
    elif reference_logps.shape != sequence_logps.shape:
        raise ValueError(
            f"reference_logps has shape {tuple(reference_logps.shape)}, "
            f"sequence_logps has {tuple(sequence_logps.shape)}: not equal"
        )
    if lengths.device.type == "cpu" and bool((lengths < 1).any()):
        raise ValueError(f"sequence {int((lengths < 1).nonzero()[0])} has no completion tokens")
    pairs = len(sequence_logps) // 2
    if num_pairs is None:
        num_pairs = pairs
        if pairs == 0:
            raise ValueError("no pairs and no num_pairs to divide by")
    elif num_pairs <= 0:
        raise ValueError(f"num_pairs must be positive; found {num_pairs}")
    if num_chosen_tokens is not None and num_chosen_tokens <= 0:
        raise ValueError(f"num_chosen_tokens must be positive; found {num_chosen_tokens}")

    dtype, device = sequence_logps.dtype, sequence_logps.device
    counts = lengths.to(device).view(-1, 2)
    chosen_tokens = counts[:, 0].sum()
    tokens = counts.to(dtype)
    logps = sequence_logps.view(-1, 2)
    average_logps = logps / tokens
    if loss == "simpo":
        rewards = beta * average_logps.detach()
        per_pair = _smoothed_logistic(beta * (average_logps[:, 0] - average_logps[:, 1]) - simpo_gamma, label_smoothing)
    else:
        ratios = logps - reference_logps.detach().to(device, dtype).view(-1, 2)
        rewards = beta * ratios.detach()
        gap = ratios[:, 0] - ratios[:, 1]
        if loss == "sigmoid":
            per_pair = _smoothed_logistic(beta * gap, label_smoothing)
        elif loss == "robust":
            flipped = -label_smoothing * F.logsigmoid(-beta * gap)
            per_pair = (-(1 - label_smoothing) * F.logsigmoid(beta * gap) - flipped) / (1 - 2 * label_smoothing)
        elif loss == "hinge":
            per_pair = torch.relu(1 - beta * gap)
        else:
            average_ratios = ratios / tokens
            per_pair = (average_ratios[:, 0] - average_ratios[:, 1] - 1 / (2 * beta)).square()

    preference = per_pair.sum()
    if nll_norm == "sequence":
        nll = -average_logps[:, 0].sum()
        nll_denominator = num_pairs
    else:
        nll = -logps[:, 0].sum()
        nll_denominator = num_chosen_tokens
        if nll_denominator is None:
            if pairs == 0 and alpha:
                raise ValueError("no pairs and no num_chosen_tokens to divide by")
            nll_denominator = chosen_tokens if pairs else 1
    # alpha = 0 leaves the term out rather than multiply it, so that DPO pays nothing for it.
    total = preference / num_pairs + (alpha * (nll / nll_denominator) if alpha else 0)

    margin = rewards[:, 0] - rewards[:, 1]
    stats = {
        "dpo_loss": preference.detach(),
        "nll_loss": nll.detach(),
        "pairs": pairs,
        "chosen_tokens": chosen_tokens,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margin": margin,
        "rewards/accuracy": (margin > 0).to(dtype),
        "logps/chosen": logps[:, 0].detach(),
        "logps/rejected": logps[:, 1].detach(),
    }
    return total, stats


def sum_by_sequence(logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums [S] over consecutive runs of logps [N], same dtype; cu_seqlens [S + 1] are integers that rise from 0 to N.

    Summed in float64 and rounded once; deterministic; an empty run sums to 0; differentiable.

    Raises:
        ValueError: a cu_seqlens on the CPU that does not rise from 0 to N.
    """
    if logps.ndim != 1:
        raise ValueError(f"logps must be [N]; found shape {tuple(logps.shape)}")
    _check_offsets(cu_seqlens, len(logps))
    lengths = cu_seqlens.diff().to(logps.device, torch.int64)
    # Not index_add: on a GPU its order of additions is not fixed.
    return torch.segment_reduce(logps.double(), "sum", lengths=lengths, unsafe=True, initial=0).to(logps.dtype)


def _lengths(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    _check_offsets(cu_seqlens, num_rows)
    if len(cu_seqlens) % 2 == 0:
        raise ValueError(f"cu_seqlens must have 2P + 1 entries for P pairs, an odd number; found {len(cu_seqlens)} entries")
    return cu_seqlens.diff()


def _check_offsets(cu_seqlens: Tensor, num_rows: int) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be a list of integers; found shape {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}")
    if cu_seqlens.device.type == "cpu":
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != num_rows or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {num_rows}; found {first} to {last}")


def _check_settings(beta: float, alpha: float, loss: str, label_smoothing: float, nll_norm: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}")
    if nll_norm not in NLL_NORMS:
        raise ValueError(f"unknown nll_norm {nll_norm!r}: choose one of {', '.join(NLL_NORMS)}")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive; found {beta}")
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be 0 or more; found {alpha}")
    if loss in ("hinge", "ipo") and label_smoothing != 0:
        raise ValueError(f"loss {loss!r} has no label_smoothing; found {label_smoothing}")
    if loss == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing of loss 'robust' must be at least 0 and below 0.5; found {label_smoothing}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1; found {label_smoothing}")


def _smoothed_logistic(score: Tensor, label_smoothing: float) -> Tensor:
    loss = -F.logsigmoid(score)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-score)
    return loss
