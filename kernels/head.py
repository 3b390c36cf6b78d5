"""The head as a module whose forward is the log-probability op: stands in for ``lm_head``, and is its own FSDP unit."""

from torch import Tensor, nn
from torch.nn import functional

from medtrain.kernels.logps import chunked_logps

__all__ = ["LogpsHead"]


class LogpsHead(nn.Module):
    """``forward(hidden [N, H], targets [N]) -> logps [N]``; see ``chunked_logps`` for dtypes and errors. With ``targets``
    None it gives logits [N, V] as they are: for generation, where N is a few rows' last position.

    Shard it by itself (``fully_shard(head)``): inside its forward the weight is whole, and the backward hands FSDP a
    plain gradient. A head whose weight is the embedding's belongs in one unit with the embedding. Keep it out of
    activation checkpointing, which would run it twice.

    Args:
        weight: [V, H]; the parameter of the ``lm_head`` replaced (the same object, so that a tied one stays tied).
        keep_bytes: see ``chunked_logps``; None means its default. May be changed between steps.
    """

    def __init__(self, weight: nn.Parameter, *, keep_bytes: int | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.keep_bytes = keep_bytes

    def forward(self, hidden: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None:
            return functional.linear(hidden, self.weight)
        return chunked_logps(hidden, self.weight, targets, keep_bytes=self.keep_bytes)

    def extra_repr(self) -> str:
        return f"vocab_size={self.weight.shape[0]}, hidden_size={self.weight.shape[1]}, keep_bytes={self.keep_bytes}"
