"""Log-probabilities of target tokens straight from hidden states, without a tensor of tokens x vocabulary.

``chunked_logps`` gives ``log softmax(hidden @ weight.T)[targets]``. The method rests on a row offset that is known
before the first GEMM, so the vocabulary is walked once, slab by slab, with no running maximum and no rescaling. For a
row x with logits ``z_j = x . W_j``, target y and offset ``m = z_y + 40``:

    e_j  = exp(z_j - m)  for j != y,   e_y = 0     S = sum_j e_j      t = ln S + 40
    logp = -softplus(t)                            v = 1 / (S + exp(-40))
    p_j  = v e_j  for j != y                       p_y - 1 = -S v     (no cancellation of 1 - p)
    d(-logp)/dx = v (sum_j e_j W_j - S W_y)
    d(-logp)/dW = E'^T (v g X)                     E' is E with -S in the target's place, g the upstream gradient

Any rough offset can stand in for the row maximum, because float32 and bfloat16 share an exponent of 8 bits: the
target's own logit plus 40 nats serves every log-probability from -4e-18 down to -114 nats. A row whose sum reaches
2**108 lies outside; it is counted (``clamped_rows``) and walked again with its true maximum as m, to which the same
algebra applies.

The gradient with respect to ``hidden`` is finished in the forward for a unit upstream gradient and only scaled per row
in the backward. What the forward keeps depends on who needs a gradient:

    nobody (reference, evaluation)     nothing; one GEMM
    hidden only (frozen head, LoRA)    the unit gradient [N, H]; two GEMMs, and none in the backward
    weight                             also E of the first rows, as many as fit into ``keep_bytes``; the backward
                                       recomputes the others'

This is the plain PyTorch path, for any device. It reads from the device in each call, to check the range of the targets
and to find rows out of range.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["DEFAULT_KEEP_BYTES", "chunked_logps", "clamped_rows", "reset_clamped_rows", "select_path"]

DEFAULT_KEEP_BYTES = 2**30
"""Bytes of E kept from forward to backward when the weight is trained and the caller names no budget."""

OFFSET = 40.0
# 2**108 leaves a factor of 2**20 below float32's largest number: room for a vocabulary-wide sum times a weight.
SUM_LIMIT = 2.0**108

# The one temporary that is as wide as a slab: 2**22 float32 are 16 MiB. Beyond 4096 rows wider slabs gain no speed.
_TILE_ELEMENTS = 2**22
_TILE_ROWS = 4096

_SUPPORTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_num_clamped_rows = 0


def clamped_rows() -> int:
    """Rows met so far in this process (since ``reset_clamped_rows``) that were out of range and walked a second time.

    Their results are exact, so the count warns of cost and of a strange model (a token less likely than exp(-114)),
    not of wrong numbers.
    """
    return _num_clamped_rows


def reset_clamped_rows() -> None:
    """Set the count of ``clamped_rows`` back to zero."""
    global _num_clamped_rows
    _num_clamped_rows = 0


def select_path(hidden: Tensor) -> str:
    """Name of the implementation that ``chunked_logps`` takes for such a ``hidden``; this is where it is chosen."""
    return "torch"


def chunked_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, keep_bytes: int | None = None, slab_size: int | None = None
) -> Tensor:
    """Log-probability of each row's target under ``softmax(hidden @ weight.T)``, in nats, differentiable once.

    Gather the rows that count first: every row costs a full vocabulary, whatever its gradient.

    Args:
        hidden: [N, H], float64, float32, bfloat16 or float16. N may be 0.
        weight: [V, H], same dtype and device. Inside FSDP2 call this from the forward of the module that owns the
            weight (``LogpsHead``), where it is unsharded.
        targets: [N] int64, each in [0, V).
        keep_bytes: bytes of E that may stay alive between forward and backward when ``weight`` needs a gradient; saves
            the backward a GEMM. 0 always works. Default ``DEFAULT_KEEP_BYTES``.
        slab_size: vocabulary entries walked at once; by default chosen from N and V. Changes results by rounding only.

    Returns:
        [N] float32 (float64 for float64 inputs). Logits and sums are float32 (float64) whatever the input dtype; E is
        rounded to bfloat16 only where it is kept for 16-bit inputs. Gradients have the dtype of their tensor.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a sharded weight, a target outside [0, V).
    """
    _check(hidden, weight, targets, keep_bytes, slab_size)
    keep_bytes = DEFAULT_KEEP_BYTES if keep_bytes is None else keep_bytes
    slab_size = default_slab_size(len(hidden), len(weight)) if slab_size is None else min(slab_size, len(weight))
    return _PATHS[select_path(hidden)](hidden, weight, targets, keep_bytes, slab_size)


def default_slab_size(num_rows: int, vocab_size: int) -> int:
    """Slab width whose tile stays near 16 MiB: the whole vocabulary if that fits, else equal slabs, multiples of 64."""
    widest = _TILE_ELEMENTS // max(1, min(num_rows, _TILE_ROWS))
    if widest >= vocab_size:
        return vocab_size
    num_slabs = -(-vocab_size // widest)
    return -(-vocab_size // (64 * num_slabs)) * 64


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int | None, slab_size: int | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or targets.ndim != 1:
        raise ValueError(
            "expected hidden [N, H], weight [V, H], targets [N]; found shapes "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    if hidden.shape[1] != weight.shape[1] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(
            f"sizes do not fit: hidden [N, H] is {tuple(hidden.shape)}, weight [V, H] is {tuple(weight.shape)}, "
            f"targets [N] is {tuple(targets.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: the vocabulary is empty")
    if hidden.dtype not in _SUPPORTED:
        raise ValueError(f"hidden must be float64, float32, bfloat16 or float16; found {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}: cast one of them")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64; found {targets.dtype}")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}: not one device"
        )
    # Gathering a sharded weight here would give every rank a wrong gradient without a word.
    if hasattr(weight, "placements"):
        raise ValueError("weight is a sharded DTensor: call chunked_logps in the forward of the module that owns it")
    if keep_bytes is not None and keep_bytes < 0:
        raise ValueError(f"keep_bytes must be 0 or more; found {keep_bytes}")
    if slab_size is not None and slab_size < 1:
        raise ValueError(f"slab_size must be 1 or more; found {slab_size}")
    if targets.numel():
        low, high = (bound.item() for bound in targets.aminmax())
        if low < 0 or high >= weight.shape[0]:
            row = int(((targets < 0) | (targets >= weight.shape[0])).nonzero()[0])
            raise ValueError(
                f"targets[{row}] is {int(targets[row])}, outside [0, {weight.shape[0]}): pass only positions that count"
            )


def _torch_logps(hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int, slab_size: int) -> Tensor:
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedLogps.apply(hidden, weight, targets, keep_bytes, slab_size)
    with _no_autocast(hidden):
        return _Walk(hidden, weight, targets, slab_size, num_kept=0, unit_gradient=False).logps


_PATHS = {"torch": _torch_logps}


def _no_autocast(tensor: Tensor) -> torch.autocast:
    # Autocast would round the logits of float32 inputs to 16 bits inside our own GEMMs.
    return torch.autocast(tensor.device.type, enabled=False)


def _ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


def _exp_tile(x: Tensor, slab: Tensor, offset: Tensor, out: Tensor) -> Tensor:
    """``exp(x @ slab.T - offset)``: x [n, H], slab [s, H], offset [n], written into out [n, s]."""
    # No clamp at 2**108: an overflowing row sums to inf, which the test for SUM_LIMIT catches just as well.
    return torch.addmm(offset.neg().unsqueeze(1).expand_as(out), x, slab.T, out=out).exp_()


def _put_target(tile: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write values [n] into tile [n, s] at columns [n], where the column lies in the tile. No synchronisation."""
    inside = (columns >= 0) & (columns < tile.shape[1])
    columns = columns.clamp(0, tile.shape[1] - 1).unsqueeze(1)
    tile.scatter_(1, columns, torch.where(inside.unsqueeze(1), values.unsqueeze(1), tile.gather(1, columns)))


class _Walk:
    """The forward: one walk over the vocabulary, and a second one for the rows that turn out to be out of range.

    Holds the result and what the backward needs: ``logps``, ``offset`` (m), ``total`` (S), ``inverse`` (v), all [N];
    ``unit`` [N, H], the gradient of -logp with respect to hidden, or None; ``kept``, a [num_kept, slab] tensor a slab.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, slab_size: int, num_kept: int, unit_gradient: bool
    ) -> None:
        global _num_clamped_rows
        dtype = compute_dtype(hidden)
        self.weight, self.targets, self.slab_size = weight, targets, slab_size
        x = hidden.to(dtype)
        target_weight = weight.index_select(0, targets).to(dtype)
        target_logits = (x * target_weight).sum(1)
        kept_dtype = _kept_dtype(hidden)
        self.kept = [
            torch.empty(num_kept, high - low, dtype=kept_dtype, device=x.device)
            for low, high in _ranges(0, len(weight) if num_kept else 0, slab_size)
        ]
        self.offset = target_logits + OFFSET
        self.total, unit = self._sums(x, targets, self.offset, unit_gradient, torch.arange(num_kept, device=x.device))

        # Written so that NaN counts as out of range too.
        outside = (~(self.total < SUM_LIMIT)).nonzero().squeeze(1)
        if len(outside):
            _num_clamped_rows += len(outside)
            x_outside, targets_outside = x[outside], targets[outside]
            self.offset[outside] = maximum = self._row_maximum(x_outside, targets_outside)
            self.total[outside], unit_outside = self._sums(
                x_outside, targets_outside, maximum, unit_gradient, outside[outside < num_kept]
            )
            if unit_gradient:
                unit[outside] = unit_outside

        # Not the constant 40: m was rounded, and its difference to z_y is the offset that the walk really used.
        rise = self.offset - target_logits
        # -softplus(t); torch's softplus drops the last 2e-9 nats beyond t = 20.
        self.logps = torch.nn.functional.logsigmoid(-(self.total.log() + rise))
        self.inverse = (self.total + torch.exp(-rise)).reciprocal()
        self.unit = None
        if unit_gradient:
            unit.addcmul_(self.total.unsqueeze(1), target_weight, value=-1).mul_(self.inverse.unsqueeze(1))
            # float16 lacks the range for the gradient of a token that is already certain.
            self.unit = unit if hidden.dtype == torch.float16 else unit.to(hidden.dtype)
        if num_kept and kept_dtype == dtype:
            for (low, _), tile in zip(_ranges(0, len(weight), slab_size), self.kept, strict=True):
                _put_target(tile, targets[:num_kept] - low, -self.total[:num_kept])

    def _sums(
        self, x: Tensor, targets: Tensor, offset: Tensor, unit_gradient: bool, kept_rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """S [n] and, if asked for, E @ W [n, H] of rows x [n, H]; E of the first ones goes to kept[slab][kept_rows]."""
        num_rows, num_kept = len(x), len(kept_rows)
        total = x.new_zeros(num_rows)
        unit = torch.empty_like(x) if unit_gradient else None
        tile_rows = max(1, _TILE_ELEMENTS // self.slab_size)
        buffer = x.new_empty(min(num_rows, tile_rows) * self.slab_size)
        # Kept E that needs no rounding is computed in its place.
        in_place = bool(self.kept) and self.kept[0].dtype == x.dtype and num_kept == len(self.kept[0])
        for index, (low, high) in enumerate(_ranges(0, len(self.weight), self.slab_size)):
            slab = self.weight[low:high].to(x.dtype)
            for start, stop in (*_ranges(0, num_kept, tile_rows), *_ranges(num_kept, num_rows, tile_rows)):
                if in_place and stop <= num_kept:
                    tile = self.kept[index][start:stop]
                else:
                    tile = buffer[: (stop - start) * (high - low)].view(stop - start, high - low)
                _exp_tile(x[start:stop], slab, offset[start:stop], out=tile)
                _put_target(tile, targets[start:stop] - low, x.new_zeros(stop - start))
                total[start:stop] += tile.sum(1)
                if unit_gradient:
                    rows = unit[start:stop]
                    torch.addmm(rows, tile, slab, beta=0 if index == 0 else 1, out=rows)
                if stop <= num_kept and not in_place:
                    self.kept[index][kept_rows[start:stop]] = tile.to(self.kept[index].dtype)
        return total, unit

    def _row_maximum(self, x: Tensor, targets: Tensor) -> Tensor:
        """Largest logit [n] of each row, the target's own left out."""
        maximum = x.new_full((len(x),), -torch.inf)
        tile_rows = max(1, _TILE_ELEMENTS // self.slab_size)
        for low, high in _ranges(0, len(self.weight), self.slab_size):
            slab = self.weight[low:high].to(x.dtype)
            for start, stop in _ranges(0, len(x), tile_rows):
                logits = x[start:stop] @ slab.T
                _put_target(logits, targets[start:stop] - low, x.new_full((stop - start,), -torch.inf))
                maximum[start:stop] = torch.maximum(maximum[start:stop], logits.amax(1))
        return maximum


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """dtype of logits, sums and results for such a ``hidden``."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _kept_dtype(hidden: Tensor) -> torch.dtype:
    # Not float16 for float16: E needs the 8 exponent bits.
    return hidden.dtype if hidden.dtype in (torch.float64, torch.float32) else torch.bfloat16


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int, slab_size: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        num_kept = min(len(hidden), keep_bytes // (len(weight) * _kept_dtype(hidden).itemsize)) if needs_weight else 0
        with _no_autocast(hidden):
            walk = _Walk(hidden, weight, targets, slab_size, num_kept, unit_gradient=needs_hidden)
        if needs_weight:
            # The weight itself is only needed to recompute E; without it FSDP need not gather it again for our sake.
            recomputed = weight if num_kept < len(hidden) else None
            ctx.save_for_backward(
                walk.unit, hidden, recomputed, targets, walk.offset, walk.total, walk.inverse, *walk.kept
            )
        else:
            ctx.save_for_backward(walk.unit)
        ctx.slab_size, ctx.num_kept = slab_size, num_kept
        ctx.hidden_dtype, ctx.weight_shape = hidden.dtype, weight.shape
        return walk.logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor):
        unit, *for_weight = ctx.saved_tensors
        grad = -grad_logps
        grad_hidden = grad_weight = None
        with _no_autocast(grad_logps):
            if ctx.needs_input_grad[0]:
                grad_hidden = (unit * grad.unsqueeze(1)).to(ctx.hidden_dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = _grad_weight(grad, ctx.weight_shape, ctx.slab_size, ctx.num_kept, *for_weight)
        return grad_hidden, grad_weight, None, None, None


def _grad_weight(
    grad: Tensor,
    weight_shape: torch.Size,
    slab_size: int,
    num_kept: int,
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    offset: Tensor,
    total: Tensor,
    inverse: Tensor,
    *kept: Tensor,
) -> Tensor:
    """``E'^T (v g X)`` [V, H] in hidden's dtype, slab by slab: each slab is summed over all rows, then written once."""
    dtype, num_rows = compute_dtype(hidden), len(hidden)
    if num_rows == 0:
        return hidden.new_zeros(weight_shape)
    x = hidden.to(dtype)
    scaled = x * (inverse * grad).unsqueeze(1)
    grad_weight = torch.empty(weight_shape, dtype=hidden.dtype, device=hidden.device)
    sums = None if dtype == hidden.dtype else x.new_empty(slab_size, weight_shape[1])
    exact = bool(kept) and kept[0].dtype == dtype
    tile_rows = max(1, _TILE_ELEMENTS // slab_size)
    buffer = x.new_empty(min(num_rows - num_kept, tile_rows) * slab_size)
    for index, (low, high) in enumerate(_ranges(0, weight_shape[0], slab_size)):
        slab = None if weight is None else weight[low:high].to(dtype)
        out = grad_weight[low:high] if sums is None else sums[: high - low]
        # Rounded E is widened tile by tile; exact E already holds -S in the target's place.
        for start, stop in (
            *_ranges(0, num_kept, num_kept if exact else tile_rows),
            *_ranges(num_kept, num_rows, tile_rows),
        ):
            if start < num_kept:
                tile = kept[index][start:stop].to(dtype)
            else:
                tile = buffer[: (stop - start) * (high - low)].view(stop - start, high - low)
                _exp_tile(x[start:stop], slab, offset[start:stop], out=tile)
            if start >= num_kept or not exact:
                _put_target(tile, targets[start:stop] - low, -total[start:stop])
            torch.addmm(out, tile.T, scaled[start:stop], beta=0 if start == 0 else 1, out=out)
        if sums is not None:
            grad_weight[low:high] = out
    return grad_weight
