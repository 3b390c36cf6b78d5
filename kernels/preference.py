"""Preference losses on summed log-probabilities: RPO (DPO plus a weighted likelihood of the chosen answer) and kin.

Sequences come in the order chosen_0, rejected_0, chosen_1, rejected_1, ... Denominators are those of one optimizer step
over all ranks and micro-batches: pass them, and the losses of the micro-batches add up to the loss of the step.
"""

from typing import Any

import torch
from torch import Tensor

from medtrain.kernels.logps import chunked_logps
from medtrain.kernels.losses import LOSSES, LossSettings, Pairs

__all__ = ["preference_loss", "rpo_loss", "sum_by_sequence"]


def rpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    reference_logps: Tensor | None,
    *,
    num_pairs: int | None = None,
    num_chosen_tokens: int | None = None,
    keep_bytes: int | None = None,
    slab_size: int | None = None,
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor | int]]:
    """Loss of P pairs straight from hidden states: ``chunked_logps``, summed by sequence, then ``preference_loss``.

    Args:
        hidden: [N, H], the positions that predict completion tokens (and nothing else), sequence after sequence.
        weight: [V, H]; gradients flow to hidden and weight.
        targets: [N] int64, the completion tokens.
        cu_seqlens: [2P + 1] integers from 0 to N; sequence i owns rows cu_seqlens[i]:cu_seqlens[i+1]. On the CPU its
            checks cost no synchronisation with a device.
        reference_logps: [2P], the reference model's summed log-probabilities in nats; None for losses without one.
        keep_bytes, slab_size: see ``chunked_logps``. The others, ``beta`` and ``alpha`` first: see ``preference_loss``.

    Returns:
        (loss, stats), as ``preference_loss``.

    Raises:
        ValueError: as ``chunked_logps`` and ``preference_loss``; a cu_seqlens that does not cut N rows into 2P
            sequences.
    """
    _check_offsets(cu_seqlens, len(targets))
    if len(cu_seqlens) % 2 == 0:
        raise ValueError(f"cu_seqlens must have 2P + 1 entries for P pairs, an odd number; found {len(cu_seqlens)} entries")
    denominators = {"num_pairs": num_pairs, "num_chosen_tokens": num_chosen_tokens}
    logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=slab_size)
    return preference_loss(sum_by_sequence(logps, cu_seqlens), cu_seqlens.diff(), reference_logps, **denominators, **settings)


def preference_loss(
    sequence_logps: Tensor,
    lengths: Tensor,
    reference_logps: Tensor | None,
    *,
    num_pairs: int | None = None,
    num_chosen_tokens: int | None = None,
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor | int]]:
    """``sum of the preference losses / num_pairs + alpha * NLL``; the losses are those of :mod:`medtrain.kernels.losses`.

    NLL is ``-log pi(y_w|x) / |y_w|`` summed over pairs and divided by num_pairs for nll_norm "sequence" (RPO, arXiv
    2404.19733), or ``-log pi(y_w|x)`` summed over pairs and divided by num_chosen_tokens for "token". alpha = 0 is DPO; of
    ``sft`` the NLL is all.

    Args:
        sequence_logps: [2P] float, summed log-probabilities of the completions in nats.
        lengths: [2P] integers, completion tokens per sequence, each at least 1 (checked when they are on the CPU).
        reference_logps: [2P], the same sums under the reference; gets no gradient. None only for losses without one.
        num_pairs, num_chosen_tokens: denominators of the whole optimizer step; by default those of this call.
        settings: fields of :class:`medtrain.kernels.losses.LossSettings`; ``beta`` and ``alpha`` have no default.

    Returns:
        (loss, stats): a scalar in sequence_logps' dtype, and detached values over this call's pairs:
        ``dpo_loss``: 0-d, sum over pairs of the preference loss;
        ``nll_loss``: 0-d, the numerator of NLL, before alpha;
        ``pairs``: P, an int; ``chosen_tokens``: 0-d int64;
        ``rewards/chosen``, ``rewards/rejected``: [P], beta times the log-ratios (without a reference: times the mean
        log-probability);
        ``rewards/margin``: [P], their difference; ``rewards/accuracy``: [P], 1 where the margin is positive, 0.5 where it is 0;
        ``logps/chosen``, ``logps/rejected``: [P], sums in nats.

    Raises:
        ValueError: unknown names, beta <= 0, a negative alpha, a label_smoothing that the loss does not take, shapes that do
            not fit, an empty completion, no denominator.
    """
    chosen = LossSettings(**settings)
    chosen.check()
    beta, alpha, nll_norm, row = chosen.beta, chosen.alpha, chosen.nll_norm, LOSSES[chosen.loss]
    if sequence_logps.ndim != 1 or len(sequence_logps) % 2:
        raise ValueError(f"sequence_logps must be [2P], chosen and rejected in turn; found shape {tuple(sequence_logps.shape)}")
    for name, tensor in (("lengths", lengths), ("reference_logps", reference_logps)):
        if tensor is None and row.needs_reference:
            raise ValueError(f"loss {chosen.loss!r} needs reference_logps")
        if tensor is not None and tensor.shape != sequence_logps.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, sequence_logps has {tuple(sequence_logps.shape)}: not equal"
            )
    if lengths.device.type == "cpu" and bool((lengths < 1).any()):
        raise ValueError(f"sequence {int((lengths < 1).nonzero()[0])} has no completion tokens")
    pairs = len(sequence_logps) // 2
    if num_pairs is None and pairs == 0:
        raise ValueError("no pairs and no num_pairs to divide by")
    num_pairs = pairs if num_pairs is None else num_pairs
    for name, number in (("num_pairs", num_pairs), ("num_chosen_tokens", num_chosen_tokens)):
        if number is not None and number <= 0:
            raise ValueError(f"{name} must be positive; found {number}")

    dtype, device = sequence_logps.dtype, sequence_logps.device
    counts = lengths.to(device).view(-1, 2)
    chosen_tokens = counts[:, 0].sum()
    tokens = counts.to(dtype)
    logps = sequence_logps.view(-1, 2)
    ratios = logps
    if row.needs_reference and reference_logps is not None:
        ratios = logps - reference_logps.detach().to(device, dtype).view(-1, 2)
    preference = row.per_pair(Pairs(ratios, tokens), chosen).sum()
    if nll_norm == "sequence":
        nll, nll_denominator = -(logps / tokens)[:, 0].sum(), num_pairs
    else:
        nll, nll_denominator = -logps[:, 0].sum(), num_chosen_tokens
        if nll_denominator is None:
            if pairs == 0 and alpha:
                raise ValueError("no pairs and no num_chosen_tokens to divide by")
            nll_denominator = chosen_tokens if pairs else 1
    if row.likelihood_only:
        # Summed over contiguous values, unlike the statistic: the last bit of published curves depends on it.
        terms = logps[:, 0] / tokens[:, 0] if nll_norm == "sequence" else logps[:, 0]
        total = -terms.sum() / nll_denominator
    else:
        # alpha = 0 leaves the term out rather than multiply it, so that DPO pays nothing for it.
        total = preference / num_pairs + (alpha * (nll / nll_denominator) if alpha else 0)

    rewards = beta * (ratios if row.needs_reference else ratios / tokens).detach()
    margin = rewards[:, 0] - rewards[:, 1]
    return total, {
        "dpo_loss": preference.detach(),
        "nll_loss": nll.detach(),
        "pairs": pairs,
        "chosen_tokens": chosen_tokens,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margin": margin,
        "rewards/accuracy": (margin > 0).to(dtype) + (margin == 0).to(dtype) / 2,
        "logps/chosen": logps[:, 0].detach(),
        "logps/rejected": logps[:, 1].detach(),
    }


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


def _check_offsets(cu_seqlens: Tensor, num_rows: int) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be a list of integers; found shape {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}")
    if cu_seqlens.device.type == "cpu":
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != num_rows or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {num_rows}; found {first} to {last}")
