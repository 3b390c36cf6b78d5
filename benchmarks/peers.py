"""The implementations of the kernel benchmark: the op in its modes and its peers, each behind the same small interface.

What cannot be imported or run raises, and the run turns that into a line with the reason. No peer's source is kept here:
each is called through its public interface, or the nearest thing it has to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medtrain.benchmarks.inputs import BETA, Inputs
from medtrain.benchmarks.measure import Calls
from medtrain.kernels.logps import chunked_logps
from medtrain.kernels.logps_launch import forced, supports_fused

KEEP_ALL = 2**62
# Logits of one slab of the floor: enough that one GEMM of a slab fills any device.
_FLOOR_LOGITS = 2**28


class Unavailable(Exception):
    """This implementation cannot run here; the text is the reason."""


@dataclass(frozen=True, eq=False)
class Implementation:
    """``impl`` is the name in the benchmark file; ``variant`` tells rows of one name apart ("" is its default).

    ``prepare(inputs, **options)`` imports what it needs; hidden and weight are marked as needing a gradient or not.
    """

    impl: str
    prepare: Callable[..., Calls]
    variant: str = ""
    note: str = ""
    heads: tuple[str | None, ...] = (None, "frozen", "trained")
    options: dict[str, Any] = field(default_factory=dict)


def per_token(inputs: Inputs, op: Callable[[], Any], *, sign: int = 1, dtype: torch.dtype = torch.float32) -> Calls:
    """Of an ``op() -> [N]`` that gives log-probabilities (sign 1) or losses (sign -1) of that dtype."""
    upstream, trained = (sign * inputs.upstream).to(dtype), inputs.trained()
    backward = (lambda output: torch.autograd.grad(output, trained, upstream)) if trained else None
    return Calls(op, backward, lambda output: sign * inputs.margins(output))


def medtrain(inputs: Inputs, keep_bytes: int | None = None, **launch: object) -> Calls:
    """``launch``: fields of ``medtrain.kernels.logps_launch.Launch`` that replace the table's choice."""
    calls = per_token(inputs, lambda: chunked_logps(inputs.hidden, inputs.weight, inputs.targets, keep_bytes=keep_bytes))
    with_launch = forced(**launch)  # a context manager decorates a function, too
    return Calls(with_launch(calls.forward), calls.backward and with_launch(calls.backward), calls.margins)


def with_gemm(inputs: Inputs, gemm: str) -> Calls:
    _need_cuda(inputs)
    if gemm == "fused" and not runs_fused(inputs):
        raise Unavailable("the fused GEMM needs Hopper's copy engine and 16-bit rows that begin at 16 bytes")
    return medtrain(inputs, gemm=gemm)


def runs_fused(inputs: Inputs) -> bool:
    """Whether the fused GEMM can be measured on these inputs, or tried in the interpreter where there is no GPU."""
    device = inputs.hidden.device
    supported = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    return supported and supports_fused(inputs.hidden, inputs.weight)


def plain(inputs: Inputs) -> Calls:
    def op() -> Tensor:
        logits = inputs.hidden @ inputs.weight.T
        return torch.log_softmax(logits.float(), dim=1).gather(1, inputs.targets.unsqueeze(1)).squeeze(1)

    return per_token(inputs, op)


def trl(inputs: Inputs) -> Calls:
    from trl.kernels import ChunkedLogProbFunction

    # What its fused head passes: temperature 1, vocabulary slabs of 32768, no soft cap, no scale; of the outputs only
    # the log-probabilities (its DPO trainer asks for three statistics more, which cost extra).
    tensors, options = (inputs.hidden, inputs.weight, None, inputs.targets), (1.0, min(32768, inputs.shape[2]), None, 1.0)
    return per_token(inputs, lambda: ChunkedLogProbFunction.apply(*tensors, *options, ("log_probs",))[0])


def liger_dpo(inputs: Inputs) -> Calls:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    compiled = inputs.hidden.is_cuda
    if compiled:
        torch._dynamo.reset()  # else the shapes before this one count against its limit of recompilations
    loss = LigerFusedLinearDPOLoss(beta=BETA, compute_nll_loss=False, compiled=compiled, use_ref_model=False)
    by_sequence, trained = (2 * inputs.num_pairs, -1), inputs.trained()

    def forward() -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden = inputs.hidden.view(*by_sequence, inputs.shape[1])
        return loss(inputs.weight, hidden, inputs.targets.view(by_sequence))

    backward = (lambda output: torch.autograd.grad(output[0], trained)) if trained else None
    return Calls(forward, backward, lambda output: output[1][0].detach().double() - output[1][1].detach().double())


def liger_cross_entropy(inputs: Inputs) -> Calls:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    _need_cuda(inputs)
    tensors = (inputs.hidden, inputs.weight, inputs.targets)
    return per_token(inputs, lambda: liger_fused_linear_cross_entropy(*tensors, reduction="none"), sign=-1)


def cce(inputs: Inputs, filter_eps: str | None) -> Calls:
    from cut_cross_entropy import linear_cross_entropy

    _need_cuda(inputs)
    tensors = (inputs.hidden, inputs.weight, inputs.targets)
    return per_token(inputs, lambda: linear_cross_entropy(*tensors, reduction="none", filter_eps=filter_eps), sign=-1)


def torch_own(inputs: Inputs) -> Calls:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()
    tensors, dtype = (inputs.hidden, inputs.weight, inputs.targets), inputs.hidden.dtype
    return per_token(inputs, lambda: F.linear_cross_entropy(*tensors, reduction="none", options=options), sign=-1, dtype=dtype)


def _need_cuda(inputs: Inputs) -> None:
    if not inputs.hidden.is_cuda:
        raise Unavailable("needs CUDA")


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
        for slab in weight.split(width):
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


_TRAINED = ("trained",)
_LIGER = (
    "computes the DPO loss too, and both gradients in the forward; its margins set its own upstream gradient; one pair at a "
    "time; compiled on CUDA only"
)
_LIGER_CE = "fused linear cross-entropy, reduction none, which recomputes the logits in the backward"

IMPLEMENTATIONS = (
    Implementation("medtrain", medtrain, note="keep_bytes at its default when the head is trained"),
    Implementation("medtrain", medtrain, "keep_bytes=0", "the backward recomputes", _TRAINED, {"keep_bytes": 0}),
    Implementation("medtrain", medtrain, "keep all", "the backward recomputes nothing", _TRAINED, {"keep_bytes": KEEP_ALL}),
    Implementation("medtrain", with_gemm, "cublas", "logits from cuBLAS, the exponential apart", options={"gemm": "cublas"}),
    Implementation("medtrain", with_gemm, "fused", "the exponential in the GEMM's epilogue", options={"gemm": "fused"}),
    Implementation("trl", trl, note="log-probabilities alone; logits rounded to the inputs' dtype"),
    Implementation("liger", liger_dpo, note=_LIGER),
    Implementation("liger", liger_cross_entropy, "cross entropy", _LIGER_CE),
    Implementation("cce", cce, note="skips blocks of small gradients", options={"filter_eps": "high"}),
    Implementation("cce-exact", cce, note="without the gradient filter", options={"filter_eps": None}),
    Implementation("torch", torch_own, note="chunked; its unreduced output has the inputs' dtype"),
    Implementation("plain", plain, note="all N x V logits, log-softmax in float32"),
)
FLOOR = Implementation("floor", floor, note="bare torch.mm calls: 2NVH, 4NVH frozen, 6NVH trained")
