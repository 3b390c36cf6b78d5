"""Launch choices of the CUDA path by shape: one table, set by measurement (``medtrain bench tune``), not at import.

Every figure here changes speed and memory only, and results by rounding at most.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

__all__ = ["FLOAT16_ROWS", "ExpGemm", "Launch", "choose_launch", "forced", "slab_size", "supports_fused"]


@dataclass(frozen=True)
class ExpGemm:
    """Block sizes of the fused GEMM: tile BLOCK_M x BLOCK_N, BLOCK_K of hidden a step, tiles grouped by GROUP_M rows;
    ``flatten`` joins the loops over tiles and steps, so that loads of the next tile begin before the epilogue."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    group_m: int = 8
    num_stages: int = 3
    num_warps: int = 8
    flatten: bool = True


@dataclass(frozen=True)
class Launch:
    """How one call is cut up.

    Attributes:
        gemm: what makes E of a slab: ``cublas`` (torch.mm into float32 logits, then the exponential in a pass of its own)
            or ``fused`` (one Triton kernel, no logits in memory; needs the copy engine of Hopper or later).
        rows: rows of hidden walked at once. A multiple of 128; the GEMM E @ W has rows x H outputs, and this number
            makes its tiles of 128 x 256 fill the 132 multiprocessors of an H100 in nearly whole waves.
        slab_bytes: upper bound of what logits and E of rows x slab take in the forward.
        grad_slab_bytes: upper bound of what the recomputed E of all rows x slab takes in the backward.
        exp_gemm: block sizes where ``gemm`` is ``fused``.
    """

    gemm: str = "cublas"
    rows: int = 2304
    slab_bytes: int = 256 * 2**20
    grad_slab_bytes: int = 256 * 2**20
    exp_gemm: ExpGemm = ExpGemm()


# By hidden size; a size between two entries takes the next larger one's rows, so that memory stays within its bound.
# rows: 4096 x 896 is 448 tiles of 128 x 256 (3.4 waves), 2816 x 1536 132 (1.0), 3584 x 3584 392 (3.0), 2048 x 8192 512 (3.9).
# No entry has been timed on a device yet: gemm stays "cublas" until one has.
LAUNCHES = {896: Launch(rows=4096), 1536: Launch(rows=2816), 3584: Launch(rows=3584), 8192: Launch(rows=2048)}

# Vocabulary entries of a float16 gradient of the weight that are float32 at one time.
FLOAT16_ROWS = 8192

_forced: dict[str, object] = {}


@contextlib.contextmanager
def forced(**fields: object) -> Iterator[None]:
    """Override fields of every ``Launch`` chosen inside the block: for tests and for measuring the alternatives."""
    global _forced
    before, _forced = _forced, _forced | fields
    try:
        yield
    finally:
        _forced = before


def choose_launch(hidden_size: int) -> Launch:
    """The ``Launch`` for hidden states of this size."""
    size = next((size for size in sorted(LAUNCHES) if size >= hidden_size), max(LAUNCHES))
    return replace(LAUNCHES[size], **_forced)


def slab_size(vocab_size: int, num_rows: int, bytes_a_logit: int, budget: int) -> int:
    """Slab width so that num_rows x slab logits take at most ``budget`` bytes; slabs are equal and multiples of 256."""
    if bytes_a_logit == 0:
        return vocab_size
    widest = max(256, budget // (max(num_rows, 1) * bytes_a_logit) // 256 * 256)
    if widest >= vocab_size:
        return vocab_size
    num_slabs = -(-vocab_size // widest)
    return -(-vocab_size // (256 * num_slabs)) * 256


def supports_fused(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the fused GEMM can take these contiguous tensors: tensor descriptors ask for rows that begin at 16 bytes, and
    float32 operands would miss the tensor cores (the interpreter has none to miss)."""
    if hidden.is_cuda and hidden.element_size() != 2:
        return False
    row_bytes = hidden.shape[1] * hidden.element_size()
    return row_bytes % 16 == 0 and hidden.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
