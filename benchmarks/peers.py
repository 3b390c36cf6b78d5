"""The implementations of the kernel benchmark: the op in its modes and its peers, each behind the same small face.

``prepare(inputs)`` imports what it needs and returns a ``Prepared``. It is called with hidden and weight already marked
as needing a gradient or not. What cannot be imported or run raises, and the run turns that into a line with the reason.
No peer's source is kept here: each is called through its public face, or the nearest thing it has to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medtrain.benchmarks.inputs import BETA, Inputs
from medtrain.benchmarks.measure import Calls
from medtrain.kernels.logps import chunked_logps
from medtrain.kernels.logps_launch import forced, supports_fused


class Unavailable(Exception):
    """This implementation cannot run here; the text is the reason."""


@dataclass(frozen=True)
class Prepared:
    """``calls`` to time, and ``margins(output) -> [P] float64`` to read the preference margins from a forward's output."""

    calls: Calls
    margins: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Implementation:
    """``impl`` is the name in the benchmark file; ``variant`` tells rows of one name apart ("" is its default).

    ``keep_bytes`` and ``gemm`` are our op's, where they are not its own choice.
    """

    impl: str
    prepare: Callable[[Inputs], Prepared]
    variant: str = ""
    note: str = ""
    heads: tuple[str | None, ...] = (None, "frozen", "trained")
    keep_bytes: int | None = None
    gemm: str | None = None


def per_token(inputs: Inputs, op: Callable[[], Tensor], *, sign: int = 1, dtype: torch.dtype = torch.float32) -> Prepared:
    """Of an ``op() -> [N]`` that gives log-probabilities (sign 1) or losses (sign -1) of that dtype."""
    upstream = (sign * inputs.upstream).to(dtype)
    trained = inputs.trained()
    return Prepared(
        Calls(op, (lambda output: torch.autograd.grad(output, trained, upstream)) if trained else None),
        lambda output: sign * inputs.margins(output),
    )


def medtrain(inputs: Inputs, keep_bytes: int | None = None, **launch: object) -> Prepared:
    """``launch``: fields of ``medtrain.kernels.logps_launch.Launch`` that replace the table's choice."""
    hidden, weight, targets = inputs.hidden, inputs.weight, inputs.targets
    prepared = per_token(inputs, lambda: chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes))
    calls = prepared.calls
    return replace(
        prepared, calls=Calls(_with_launch(launch, calls.forward), calls.backward and _with_launch(launch, calls.backward))
    )


def _of_gemm(gemm: str, inputs: Inputs) -> Prepared:
    _need_cuda(inputs)
    if gemm == "fused" and not runs_fused(inputs):
        raise Unavailable("the fused GEMM needs Hopper's copy engine and 16-bit rows that begin at 16 bytes")
    return medtrain(inputs, gemm=gemm)


def runs_fused(inputs: Inputs) -> bool:
    """Whether the fused GEMM can be measured on these inputs, or tried in the interpreter where there is no GPU."""
    device = inputs.hidden.device
    return supports_fused(inputs.hidden, inputs.weight) and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    )


def _with_launch(fields: dict[str, object], function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        with forced(**fields):
            return function(*args)

    return call


def plain(inputs: Inputs) -> Prepared:
    def op() -> Tensor:
        logits = inputs.hidden @ inputs.weight.T
        return torch.log_softmax(logits.float(), dim=1).gather(1, inputs.targets.unsqueeze(1)).squeeze(1)

    return per_token(inputs, op)


def trl(inputs: Inputs) -> Prepared:
    from trl.kernels import ChunkedLogProbFunction

    # What its fused head passes: temperature 1, vocabulary slabs of 32768, no soft cap, no scale; of the outputs only
    # the log-probabilities (its DPO trainer asks for three statistics more, which cost extra).
    return per_token(
        inputs,
        lambda: ChunkedLogProbFunction.apply(
            inputs.hidden, inputs.weight, None, inputs.targets, 1.0, min(32768, inputs.shape[2]), None, 1.0, ("log_probs",)
        )[0],
    )


def liger_dpo(inputs: Inputs) -> Prepared:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    compiled = inputs.hidden.is_cuda
    if compiled:
        torch._dynamo.reset()  # else the shapes before this one count against its limit of recompilations
    loss = LigerFusedLinearDPOLoss(beta=BETA, compute_nll_loss=False, compiled=compiled, use_ref_model=False)
    shape = (2 * inputs.num_pairs, -1)
    trained = inputs.trained()
    targets = inputs.targets.view(shape)

    def backward(output: tuple[Tensor, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output[0], trained)

    return Prepared(
        Calls(
            lambda: loss(inputs.weight, inputs.hidden.view(*shape, inputs.hidden.shape[1]), targets),
            backward if trained else None,
        ),
        lambda output: output[1][0].detach().double() - output[1][1].detach().double(),
    )


def liger_cross_entropy(inputs: Inputs) -> Prepared:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    _need_cuda(inputs)
    return per_token(
        inputs, lambda: liger_fused_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, reduction="none"), sign=-1
    )


def cce(inputs: Inputs, filter_eps: str | None) -> Prepared:
    from cut_cross_entropy import linear_cross_entropy

    _need_cuda(inputs)
    return per_token(
        inputs,
        lambda: linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, reduction="none", filter_eps=filter_eps),
        sign=-1,
    )


def torch_own(inputs: Inputs) -> Prepared:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()
    return per_token(
        inputs,
        lambda: F.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, reduction="none", options=options),
        sign=-1,
        dtype=inputs.hidden.dtype,
    )


def _need_cuda(inputs: Inputs) -> None:
    if not inputs.hidden.is_cuda:
        raise Unavailable("needs CUDA")


KEEP_ALL = 2**62

IMPLEMENTATIONS = (
    Implementation("medtrain", medtrain, note="keep_bytes at its default when the head is trained"),
    Implementation(
        "medtrain", partial(medtrain, keep_bytes=0), "keep_bytes=0", "the backward recomputes", heads=("trained",), keep_bytes=0
    ),
    Implementation(
        "medtrain",
        partial(medtrain, keep_bytes=KEEP_ALL),
        "keep all",
        "the backward recomputes nothing",
        heads=("trained",),
        keep_bytes=KEEP_ALL,
    ),
    Implementation("medtrain", partial(_of_gemm, "cublas"), "cublas", "logits from cuBLAS, the exponential apart", gemm="cublas"),
    Implementation("medtrain", partial(_of_gemm, "fused"), "fused", "the exponential in the GEMM's epilogue", gemm="fused"),
    Implementation("trl", trl, note="log-probabilities alone; logits rounded to the inputs' dtype"),
    Implementation(
        "liger",
        liger_dpo,
        note="computes the DPO loss too, and both gradients in the forward; "
        "its margins set its own upstream gradient; one pair at a time; compiled on CUDA only",
    ),
    Implementation(
        "liger",
        liger_cross_entropy,
        "cross entropy",
        "fused linear cross-entropy, reduction none, which recomputes the logits in the backward",
    ),
    Implementation("cce", partial(cce, filter_eps="high"), note="skips blocks of small gradients"),
    Implementation("cce-exact", partial(cce, filter_eps=None), note="without the gradient filter"),
    Implementation("torch", torch_own, note="chunked; its unreduced output has the inputs' dtype"),
    Implementation("plain", plain, note="all N x V logits, log-softmax in float32"),
)


# Logits of one slab of the floor: enough that one GEMM of a slab fills any device.
_FLOOR_LOGITS = 2**28


def floor(inputs: Inputs) -> Calls:
    """The bare GEMMs a mode cannot do without, as ``torch.mm`` over vocabulary slabs; see ``floor_flops``.

    Nothing is added up or stored beyond one slab, and there is no backward: all is in the forward.
    """
    hidden, weight, num_trained = inputs.hidden.detach(), inputs.weight.detach(), len(inputs.trained())
    num_rows, hidden_size, vocab_size = inputs.shape
    width = min(vocab_size, max(256, _FLOOR_LOGITS // num_rows // 256 * 256))
    tile = hidden.new_empty(num_rows * width)
    to_hidden = torch.empty_like(hidden)
    to_weight = weight.new_empty(width, hidden_size)

    def forward() -> None:
        for low in range(0, vocab_size, width):
            slab = weight[low : low + width]
            logits = tile[: num_rows * len(slab)].view(num_rows, len(slab))
            torch.mm(hidden, slab.T, out=logits)
            if num_trained:
                torch.mm(logits, slab, out=to_hidden)
            if num_trained == 2:
                torch.mm(logits.T, hidden, out=to_weight[: len(slab)])

    return Calls(forward)


def floor_flops(inputs: Inputs) -> int:
    """Operations of ``floor``: logits (2NVH), with the gradient of hidden (4NVH), with that of the weight too (6NVH)."""
    num_rows, hidden_size, vocab_size = inputs.shape
    return (2, 4, 6)[len(inputs.trained())] * num_rows * vocab_size * hidden_size
