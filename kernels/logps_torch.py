"""The log-probability op in plain PyTorch, for any device and dtype; ``medtrain.kernels.logps`` states the algebra.

It reads from the device in each call, to check the range of the targets and to find rows out of range.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "OFFSET",
    "SUM_LIMIT",
    "Walk",
    "compute_dtype",
    "default_slab_size",
    "finish",
    "grad_weight",
    "kept_dtype",
    "put_target",
    "slabs",
    "tile_rows",
    "unit_dtype",
    "walk",
]

OFFSET = 40.0
# 2**108 leaves a factor of 2**20 below float32's largest number: room for a vocabulary-wide sum times a weight.
SUM_LIMIT = 2.0**108

# The one temporary that is as wide as a slab: 2**22 float32 are 16 MiB. Beyond 4096 rows wider slabs gain no speed.
_TILE_ELEMENTS = 2**22
_TILE_ROWS = 4096


class Walk(NamedTuple):
    """What one walk over the vocabulary gives, N rows in the compute dtype.

    ``logps``, ``offset`` (m), ``total`` (S), ``inverse`` (v): [N]. ``unit``: [N, H], the gradient of -logp with respect to
    hidden, or [0]. ``kept``: [N, >= num_kept], E of the first num_kept vocabulary entries. ``num_clamped``: [1] int64,
    rows that were out of range and walked a second time.
    """

    logps: Tensor
    offset: Tensor
    total: Tensor
    inverse: Tensor
    unit: Tensor
    kept: Tensor
    num_clamped: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of logits, sums and results for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of E where it is stored. Not float16 for float16: E needs the 8 exponent bits."""
    return dtype if dtype in (torch.float64, torch.float32) else torch.bfloat16


def unit_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the unit gradient. float16 lacks the range for the gradient of a token that is already certain."""
    return torch.float32 if dtype == torch.float16 else dtype


def default_slab_size(num_rows: int, vocab_size: int) -> int:
    """Slab width whose tile stays near 16 MiB: the whole vocabulary if that fits, else equal slabs, multiples of 64."""
    widest = _TILE_ELEMENTS // max(1, min(num_rows, _TILE_ROWS))
    if widest >= vocab_size:
        return vocab_size
    num_slabs = -(-vocab_size // widest)
    return -(-vocab_size // (64 * num_slabs)) * 64


def tile_rows(num_rows: int, slab_size: int) -> int:
    """Rows whose logits of one slab are computed at once."""
    return max(1, min(num_rows, _TILE_ELEMENTS // slab_size))


def slabs(vocab_size: int, num_kept: int, slab_size: int) -> Iterator[tuple[int, int]]:
    """Bounds (low, high) of the slabs; each lies wholly before or wholly behind vocabulary entry ``num_kept``."""
    yield from _ranges(0, num_kept, slab_size)
    yield from _ranges(num_kept, vocab_size, slab_size)


def _ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


def put_target(tile: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write values [n] into tile [n, s] at columns [n], where the column lies in the tile. No synchronisation."""
    inside = (columns >= 0) & (columns < tile.shape[1])
    columns = columns.clamp(0, tile.shape[1] - 1).unsqueeze(1)
    tile.scatter_(1, columns, torch.where(inside.unsqueeze(1), values.to(tile.dtype).unsqueeze(1), tile.gather(1, columns)))


def finish(target_logits: Tensor, offset: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(logps, v), each [N], from the target's logits, m and S."""
    # Not the constant 40: m was rounded, and its difference to z_y is the offset that the walk really used.
    rise = offset - target_logits
    # -softplus(t); torch's softplus drops the last 2e-9 nats beyond t = 20.
    logps = torch.nn.functional.logsigmoid(-(total.log() + rise))
    return logps, (total + torch.exp(-rise)).reciprocal()


def walk(hidden: Tensor, weight: Tensor, targets: Tensor, num_kept: int, needs_unit: bool, slab_size: int | None) -> Walk:
    """The forward: one walk over the vocabulary, and a second one for the rows that turn out to be out of range.

    Args:
        hidden, weight, targets: as ``chunked_logps``.
        num_kept: vocabulary entries whose E is kept for ``grad_weight``, the first ones.
        needs_unit: whether to compute the unit gradient.
        slab_size: vocabulary entries walked at once; None chooses.

    Raises:
        ValueError: a target outside [0, V).
    """
    _check_targets(targets, len(weight))
    slab_size = slab_size or default_slab_size(len(hidden), len(weight))
    dtype = compute_dtype(hidden.dtype)
    x = hidden.to(dtype)
    target_weight = weight.index_select(0, targets).to(dtype)
    target_logits = (x * target_weight).sum(1)
    offset = target_logits + OFFSET
    kept = torch.empty(len(hidden), num_kept, dtype=kept_dtype(hidden.dtype), device=hidden.device)
    total, unit = _sums(x, weight, targets, offset, kept, needs_unit, slab_size)

    # Written so that NaN counts as out of range too.
    outside = (~(total < SUM_LIMIT)).nonzero().squeeze(1)
    if len(outside):
        x_outside, targets_outside, kept_outside = x[outside], targets[outside], kept.new_empty(len(outside), num_kept)
        offset[outside] = maximum = _row_maximum(x_outside, weight, targets_outside, slab_size)
        total[outside], unit_outside = _sums(x_outside, weight, targets_outside, maximum, kept_outside, needs_unit, slab_size)
        kept[outside] = kept_outside
        if needs_unit:
            unit[outside] = unit_outside

    logps, inverse = finish(target_logits, offset, total)
    if needs_unit:
        unit.addcmul_(total.unsqueeze(1), target_weight, value=-1).mul_(inverse.unsqueeze(1))
    unit = unit.to(unit_dtype(hidden.dtype))
    if num_kept and kept.dtype == dtype:
        put_target(kept, targets, -total)
    return Walk(logps, offset, total, inverse, unit, kept, torch.tensor([len(outside)]))


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.numel():
        low, high = (bound.item() for bound in targets.aminmax())
        if low < 0 or high >= vocab_size:
            row = int(((targets < 0) | (targets >= vocab_size)).nonzero()[0])
            raise ValueError(f"targets[{row}] is {int(targets[row])}, outside [0, {vocab_size}): pass only positions that count")


def _exp_tile(x: Tensor, slab: Tensor, offset: Tensor, out: Tensor) -> Tensor:
    """``exp(x @ slab.T - offset)``: x [n, H], slab [s, H], offset [n], written into out [n, s]."""
    # No clamp at 2**108: an overflowing row sums to inf, which the test for SUM_LIMIT catches just as well.
    return torch.addmm(offset.neg().unsqueeze(1).expand_as(out), x, slab.T, out=out).exp_()


def _sums(
    x: Tensor, weight: Tensor, targets: Tensor, offset: Tensor, kept: Tensor, needs_unit: bool, slab_size: int
) -> tuple[Tensor, Tensor]:
    """S [n] and, if asked for, E @ W [n, H] of rows x [n, H]; E of the first entries goes to kept [n, num_kept]."""
    num_rows, num_kept = kept.shape
    total = x.new_zeros(num_rows)
    unit = torch.empty_like(x) if needs_unit else x.new_empty(0)
    num_tile_rows = tile_rows(num_rows, slab_size)
    buffer = x.new_empty(num_tile_rows * slab_size)
    for low, high in slabs(len(weight), num_kept, slab_size):
        slab = None  # a widened copy goes before the next one comes
        slab = weight[low:high].to(x.dtype)
        for start, stop in _ranges(0, num_rows, num_tile_rows):
            # Kept E that needs no rounding is computed in its place.
            if high <= num_kept and kept.dtype == x.dtype:
                tile = kept[start:stop, low:high]
            else:
                tile = buffer[: (stop - start) * (high - low)].view(stop - start, high - low)
            _exp_tile(x[start:stop], slab, offset[start:stop], out=tile)
            put_target(tile, targets[start:stop] - low, x.new_zeros(stop - start))
            total[start:stop] += tile.sum(1)
            if needs_unit:
                rows = unit[start:stop]
                torch.addmm(rows, tile, slab, beta=0 if low == 0 else 1, out=rows)
            if high <= num_kept and kept.dtype != x.dtype:
                kept[start:stop, low:high] = tile
    return total, unit


def _row_maximum(x: Tensor, weight: Tensor, targets: Tensor, slab_size: int) -> Tensor:
    """Largest logit [n] of each row, the target's own left out."""
    maximum = x.new_full((len(x),), -torch.inf)
    num_tile_rows = tile_rows(len(x), slab_size)
    for low, high in _ranges(0, len(weight), slab_size):
        slab = weight[low:high].to(x.dtype)
        for start, stop in _ranges(0, len(x), num_tile_rows):
            logits = x[start:stop] @ slab.T
            put_target(logits, targets[start:stop] - low, x.new_full((stop - start,), -torch.inf))
            maximum[start:stop] = torch.maximum(maximum[start:stop], logits.amax(1))
    return maximum


def grad_weight(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    offset: Tensor,
    total: Tensor,
    inverse: Tensor,
    kept: Tensor,
    num_kept: int,
    vocab_size: int,
    slab_size: int | None,
) -> Tensor:
    """``E'^T (v g X)`` [V, H] in hidden's dtype, slab by slab: each slab is summed over all rows, then written once.

    grad [N] is g, the upstream gradient of -logp, N > 0; the others as in ``Walk``. ``weight`` is only read where E is
    recomputed: it may be None when num_kept == vocab_size.
    """
    slab_size = slab_size or default_slab_size(len(hidden), vocab_size)
    dtype, num_rows = compute_dtype(hidden.dtype), len(hidden)
    result = torch.empty(vocab_size, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    x = hidden.to(dtype)
    scaled = x * (inverse * grad).unsqueeze(1)
    sums = None if dtype == hidden.dtype else x.new_empty(min(slab_size, vocab_size), hidden.shape[1])
    exact = kept.dtype == dtype
    num_tile_rows = tile_rows(num_rows, slab_size)
    buffer = x.new_empty(num_tile_rows * slab_size)
    for low, high in slabs(vocab_size, num_kept, slab_size):
        out = result[low:high] if sums is None else sums[: high - low]
        is_kept = high <= num_kept
        slab = None  # a widened copy goes before the next one comes
        slab = None if is_kept or weight is None else weight[low:high].to(dtype)
        # Rounded E is widened tile by tile; exact E already holds -S in the target's place.
        for start, stop in _ranges(0, num_rows, num_rows if is_kept and exact else num_tile_rows):
            if is_kept and exact:
                tile = kept[start:stop, low:high]
            else:
                tile = buffer[: (stop - start) * (high - low)].view(stop - start, high - low)
                if slab is None:
                    tile.copy_(kept[start:stop, low:high])
                else:
                    _exp_tile(x[start:stop], slab, offset[start:stop], out=tile)
            if not (is_kept and exact):
                put_target(tile, targets[start:stop] - low, -total[start:stop])
            torch.addmm(out, tile.T, scaled[start:stop], beta=0 if start == 0 else 1, out=out)
        if sums is not None:
            result[low:high] = out
    return result
