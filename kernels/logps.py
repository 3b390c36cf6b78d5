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
    weight                             also E of the first vocabulary entries, as many as fit into ``keep_bytes``; the
                                       backward recomputes the others'

Two implementations share this face: ``logps_torch`` (any device and dtype) and ``logps_triton`` (CUDA). Both stand behind
the custom ops ``medtrain::logps`` and ``medtrain::logps_grad_weight``, so torch.compile and fake tensors see one
operation each.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medtrain.kernels import logps_torch
from medtrain.kernels.logps_torch import compute_dtype, kept_dtype, unit_dtype

__all__ = ["DEFAULT_KEEP_BYTES", "chunked_logps", "clamped_rows", "num_kept_entries", "reset_clamped_rows", "select_path"]

DEFAULT_KEEP_BYTES = 2**30
"""Bytes of E kept from forward to backward when the weight is trained and the caller names no budget."""

_SUPPORTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_num_clamped_rows: dict[torch.device, Tensor] = {}


def clamped_rows() -> int:
    """Rows met so far in this process (since ``reset_clamped_rows``) that were out of range and walked a second time.

    Their results are exact, so the count warns of cost and of a strange model (a token less likely than exp(-114)),
    not of wrong numbers. Waits for the devices that counted.
    """
    return sum(int(count) for count in _num_clamped_rows.values())


def reset_clamped_rows() -> None:
    """Set the count of ``clamped_rows`` back to zero."""
    _num_clamped_rows.clear()


def select_path(hidden: Tensor) -> str:
    """Name of the implementation that ``chunked_logps`` takes for such a ``hidden``; this is where it is chosen."""
    # The Triton kernels compute in float32; float64 is there to check against.
    if hidden.is_cuda and hidden.dtype != torch.float64:
        return "triton"
    return "torch"


def _path(hidden: Tensor):
    if select_path(hidden) == "triton":
        # Imported here: Triton exists on Linux alone.
        from medtrain.kernels import logps_triton

        return logps_triton
    return logps_torch


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
        slab_size: vocabulary entries walked at once; by default chosen from the shapes. Changes results by rounding only.

    Returns:
        [N] float32 (float64 for float64 inputs). Logits and sums are float32 (float64) whatever the input dtype. E is
        rounded to bfloat16 for 16-bit inputs: where it is kept, and on CUDA also as a factor of the gradients.
        Gradients have the dtype of their tensor.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a sharded weight, a target outside [0, V). On CUDA such a
            target stops the process with a device-side assertion instead: to raise, the host would have to wait.
    """
    _check(hidden, weight, targets, keep_bytes, slab_size)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        keep_bytes = DEFAULT_KEEP_BYTES if keep_bytes is None else keep_bytes
        return _ChunkedLogps.apply(hidden, weight, targets, keep_bytes, slab_size)
    return _walk(hidden, weight, targets, 0, False, slab_size)[0]


def num_kept_entries(num_rows: int, vocab_size: int, dtype: torch.dtype, keep_bytes: int) -> int:
    """Vocabulary entries whose E of ``num_rows`` rows fits into ``keep_bytes``: all of them, or a multiple of 16."""
    fit = keep_bytes // (max(num_rows, 1) * kept_dtype(dtype).itemsize)
    # What Triton, cuBLAS and Hopper's copy engine need to move 16 bytes at once.
    return vocab_size if fit >= vocab_size else fit // 16 * 16


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
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}: not one device")
    # Gathering a sharded weight here would give every rank a wrong gradient without a word.
    if hasattr(weight, "placements"):
        raise ValueError("weight is a sharded DTensor: call chunked_logps in the forward of the module that owns it")
    if keep_bytes is not None and keep_bytes < 0:
        raise ValueError(f"keep_bytes must be 0 or more; found {keep_bytes}")
    if slab_size is not None and slab_size < 1:
        raise ValueError(f"slab_size must be 1 or more; found {slab_size}")


def _no_autocast(tensor: Tensor) -> torch.autocast:
    # Autocast would round the logits of float32 inputs to 16 bits inside our own GEMMs.
    return torch.autocast(tensor.device.type, enabled=False)


@torch.library.custom_op("medtrain::logps", mutates_args=())
def _walk(
    hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int, needs_unit: bool, slab_size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, offset, total, inverse, unit, kept) as ``logps_torch.Walk``."""
    num_kept = num_kept_entries(len(hidden), len(weight), hidden.dtype, keep_bytes)
    with _no_autocast(hidden):
        results = _path(hidden).walk(hidden, weight, targets, num_kept, needs_unit, slab_size)
    counted = _num_clamped_rows.get(hidden.device)
    # Not in place: what inference mode once made cannot be changed outside of it.
    _num_clamped_rows[hidden.device] = results.num_clamped if counted is None else counted + results.num_clamped
    return results[:6]


@_walk.register_fake
def _(hidden, weight, targets, keep_bytes, needs_unit, slab_size):
    num_kept = num_kept_entries(len(hidden), len(weight), hidden.dtype, keep_bytes)
    rows = [hidden.new_empty(len(hidden), dtype=compute_dtype(hidden.dtype)) for _ in range(4)]
    unit = hidden.new_empty(hidden.shape if needs_unit else (0,), dtype=unit_dtype(hidden.dtype))
    width = num_kept if select_path(hidden) == "torch" else -(-num_kept // 16) * 16
    return *rows, unit, hidden.new_empty(len(hidden), width, dtype=kept_dtype(hidden.dtype))


@torch.library.custom_op("medtrain::logps_grad_weight", mutates_args=())
def _grad_weight(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    offset: Tensor,
    total: Tensor,
    inverse: Tensor,
    kept: Tensor,
    keep_bytes: int,
    vocab_size: int,
    slab_size: int | None,
) -> Tensor:
    """dW [V, H] from grad [N], the upstream gradient of -logp; weight is None where all of E is kept."""
    if len(hidden) == 0:
        return hidden.new_zeros(vocab_size, hidden.shape[1])
    num_kept = num_kept_entries(len(hidden), vocab_size, hidden.dtype, keep_bytes)
    with _no_autocast(hidden):
        return _path(hidden).grad_weight(
            grad, hidden, weight, targets, offset, total, inverse, kept, num_kept, vocab_size, slab_size
        )


@_grad_weight.register_fake
def _(grad, hidden, weight, targets, offset, total, inverse, kept, keep_bytes, vocab_size, slab_size):
    return hidden.new_empty(vocab_size, hidden.shape[1])


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, keep_bytes: int, slab_size: int | None) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        keep_bytes = keep_bytes if needs_weight else 0
        logps, offset, total, inverse, unit, kept = _walk(hidden, weight, targets, keep_bytes, needs_hidden, slab_size)
        if needs_weight:
            # The weight itself is only needed to recompute E; without it FSDP need not gather it again for our sake.
            all_kept = num_kept_entries(len(hidden), len(weight), hidden.dtype, keep_bytes) == len(weight)
            ctx.save_for_backward(unit, hidden, None if all_kept else weight, targets, offset, total, inverse, kept)
        else:
            ctx.save_for_backward(unit)
        ctx.keep_bytes, ctx.slab_size, ctx.vocab_size, ctx.hidden_dtype = (keep_bytes, slab_size, len(weight), hidden.dtype)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor):
        unit, *for_weight = ctx.saved_tensors
        grad = -grad_logps
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            # Multiplied in float32 and rounded once, without a float32 tensor in between.
            grad_hidden = torch.mul(unit, grad.unsqueeze(1), out=torch.empty_like(unit, dtype=ctx.hidden_dtype))
        if ctx.needs_input_grad[1]:
            grad_weight = _grad_weight(grad, *for_weight, ctx.keep_bytes, ctx.vocab_size, ctx.slab_size)
        return grad_hidden, grad_weight, None, None, None
