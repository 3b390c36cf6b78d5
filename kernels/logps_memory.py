"""Memory of the log-probability op by formula: what ``chunked_logps`` takes beyond its inputs and the gradient of the weight.

With N counted rows, hidden size H, vocabulary V and slab width s, bytes by size of the item:

    kept from forward to backward     unit gradient N x H, where hidden is trained
                                      E of K vocabulary entries, N x K <= keep_bytes, and S, v, m, where the weight is
    only during a pass                tiles of one slab, rows x s; float32 sums, rows x H

Nothing grows with N x V beyond ``keep_bytes``. Used to plan a run's memory, and held against measurements by the tests.
"""

from dataclasses import dataclass

import torch

from medtrain.kernels import logps_launch, logps_torch
from medtrain.kernels.logps import DEFAULT_KEEP_BYTES, num_kept_entries
from medtrain.kernels.logps_torch import compute_dtype, kept_dtype, unit_dtype

__all__ = ["LogpsMemory", "logps_memory"]


@dataclass(frozen=True)
class LogpsMemory:
    """Bytes beyond inputs and dW. ``kept``: alive between forward and backward; ``forward``, ``backward``: the most at any
    moment of each, with what is kept, the logps and the gradient of hidden."""

    kept: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def logps_memory(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    trains_hidden: bool = True,
    trains_weight: bool = True,
    keep_bytes: int | None = None,
    slab_size: int | None = None,
    path: str = "triton",
) -> LogpsMemory:
    """What one call of ``chunked_logps`` on [num_rows, hidden_size] and [vocab_size, hidden_size] of ``dtype`` takes.

    ``path`` is that of ``select_path``: ``triton`` (CUDA) or ``torch``; the others as in ``chunked_logps``.
    """
    keep_bytes = DEFAULT_KEEP_BYTES if keep_bytes is None else keep_bytes
    num_kept = num_kept_entries(num_rows, vocab_size, dtype, keep_bytes) if trains_weight else 0
    rows = num_rows * compute_dtype(dtype).itemsize
    unit = num_rows * hidden_size * unit_dtype(dtype).itemsize if trains_hidden else 0
    kept = unit + num_rows * num_kept * kept_dtype(dtype).itemsize
    passes = _triton if path == "triton" else _torch
    forward, for_weight = passes(num_rows, hidden_size, vocab_size, dtype, num_kept, trains_hidden, slab_size)
    kept += rows * (4 if trains_weight else 1)  # logps, and m, S, v
    backward = num_rows * hidden_size * dtype.itemsize if trains_hidden else 0
    backward += for_weight if trains_weight else 0
    return LogpsMemory(
        kept=kept, forward=kept + forward + 2 * rows, backward=kept + backward + 2 * rows if trains_hidden or trains_weight else 0
    )


def _triton(num_rows, hidden_size, vocab_size, dtype, num_kept, trains_hidden, slab_size) -> tuple[int, int]:
    """(bytes during the forward, bytes while dW is made), beside what is kept."""
    launch = logps_launch.choose_launch(hidden_size)
    fused, item = launch.gemm == "fused", kept_dtype(dtype).itemsize
    chunk = min(launch.rows, max(num_rows, 1))
    stores = trains_hidden and (fused or item < 4)
    a_logit = (0 if fused else 4) + (item if stores else 0)
    slab = slab_size or logps_launch.slab_size(vocab_size, chunk, a_logit, launch.slab_bytes)
    widest = min(slab, max(num_kept, vocab_size - num_kept))
    forward = chunk * widest * ((0 if fused else 4) + (item if stores and num_kept < vocab_size else 0))
    forward += 4 * chunk * hidden_size if trains_hidden else 0
    backward = num_rows * hidden_size * item
    rest = vocab_size - num_kept
    if rest:
        slab = min(slab_size or logps_launch.slab_size(rest, num_rows, item, launch.grad_slab_bytes), rest)
        backward += num_rows * slab * item + (0 if fused else 4 * chunk * slab)
    if dtype == torch.float16:  # a slab of the weight as bfloat16; float32 parts of dW
        forward += 2 * widest * hidden_size if trains_hidden else 0
        backward += 4 * hidden_size * min(logps_launch.FLOAT16_ROWS, vocab_size)
    return forward, backward


def _torch(num_rows, hidden_size, vocab_size, dtype, num_kept, trains_hidden, slab_size) -> tuple[int, int]:
    item, rounded = compute_dtype(dtype).itemsize, compute_dtype(dtype) != dtype
    slab = slab_size or logps_torch.default_slab_size(num_rows, vocab_size)
    tile = item * slab * logps_torch.tile_rows(num_rows, slab)
    by_hidden = item * num_rows * hidden_size
    slab_copy = item * min(slab, max(num_kept, vocab_size - num_kept)) * hidden_size if rounded else 0
    copies = by_hidden * (2 if rounded else 1)  # rows of the weight, and hidden itself where it is widened
    unit = by_hidden if trains_hidden else 0
    # The unit gradient is counted as kept already, in its final dtype; while it is summed it is as wide as the sums.
    forward = copies + tile + slab_copy + (unit if rounded else 0)
    backward = copies + tile + slab_copy * (1 if num_kept == vocab_size else 2)
    return forward, backward
