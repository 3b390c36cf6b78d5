"""Memory of the log-probability op by every allocation that torch makes: what is kept, the most, what it does not grow with."""

import pytest
import torch

from medtrain.benchmarks.measure import Calls, measure_memory
from medtrain.kernels import logps as op
from medtrain.kernels import logps_launch
from medtrain.kernels.logps import chunked_logps, num_kept_entries
from medtrain.kernels.logps_torch import kept_dtype, unit_dtype

CUDA = torch.cuda.is_available()
PATHS = ["torch", "triton"]


class NoKernel:
    """Stands in for a Triton kernel: the host's allocations are the same whether it runs or not."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def on_path(monkeypatch, request):
    """Sends the op down ``path``; its device. Interpreted kernels would leave garbage of their own in the count."""
    path = request.getfixturevalue("path")
    monkeypatch.setattr(op, "select_path", lambda hidden: path)
    if path == "triton" and not CUDA:
        from medtrain.kernels import logps_kernels

        for name in logps_kernels.__all__:
            monkeypatch.setattr(logps_kernels, name, NoKernel())
    # A slab of the CUDA path's default size would swallow inputs as small as these whole.
    with logps_launch.forced(rows=128, slab_bytes=2**19, grad_slab_bytes=2**19):
        yield torch.device("cuda" if path == "triton" and CUDA else "cpu")


def measured(device, num_rows, hidden_size, vocab_size, dtype, trains_hidden=True, trains_weight=True, keep_bytes=None):
    """(kept, most at any moment) of a forward and backward, the gradient of the weight included."""
    hidden = torch.randn(num_rows, hidden_size).to(device, dtype).requires_grad_(trains_hidden)
    weight = (torch.randn(vocab_size, hidden_size) / 8).to(device, dtype).requires_grad_(trains_weight)
    targets = torch.randint(vocab_size, (num_rows,), device=device)
    upstream, inputs = torch.ones(num_rows, device=device), [t for t in (hidden, weight) if t.requires_grad]
    calls = Calls(
        lambda: chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes),
        (lambda logps: torch.autograd.grad(logps, inputs, upstream)) if inputs else None,
    )
    if device.type == "cuda":
        measure_memory(calls, device)  # the first call brings what stays: counters, cuBLAS's workspace
    found = measure_memory(calls, device)
    return found.kept, found.peak


TRAINED = {"both": (True, True), "frozen head": (True, False), "head alone": (False, True), "nothing": (False, False)}
WIDE, DEEP = (2000, 64, 9001), (700, 512, 6000)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float32, WIDE), (torch.float32, DEEP), (torch.bfloat16, WIDE), (torch.float16, DEEP)]
)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("keep", [None, 0.0, 0.3])
def test_memory_is_unit_gradients_kept_exponentials_and_slabs(on_path, path, dtype, trained, shape, keep):
    if dtype.itemsize == 2 and path == "triton" and not CUDA:
        pytest.skip("16-bit GEMMs with float32 results are imitated on a CPU, with copies of their own")
    (num_rows, hidden_size, vocab_size), (trains_hidden, trains_weight) = shape, TRAINED[trained]
    keep_bytes = None if keep is None else int(keep * num_rows * vocab_size * dtype.itemsize)
    kept, peak = measured(on_path, *shape, dtype, trains_hidden, trains_weight, keep_bytes)

    num_kept = num_kept_entries(num_rows, vocab_size, dtype, 2**30 if keep is None else keep_bytes) if trains_weight else 0
    unit = num_rows * hidden_size * unit_dtype(dtype).itemsize if trains_hidden else 0
    per_row = 4 * num_rows * (4 if trains_weight else 1)  # logps, m, S and v
    assert kept == pytest.approx(unit + num_rows * num_kept * kept_dtype(dtype).itemsize + per_row, rel=0.02, abs=2**14)
    # As `medtrain plan` counts it (trainer/plan/memory.py) but for the slabs: these are small, and never narrower than 256.
    slabs = 2**19 + 8 * 256 * num_rows if path == "triton" else 24 * 2**20
    grad_weight = hidden_size * vocab_size * dtype.itemsize if trains_weight else 0
    float16 = 6 * hidden_size * vocab_size if dtype == torch.float16 else 0  # which a run does not compute in
    most = kept + 12 * num_rows * hidden_size + min(6 * num_rows * vocab_size, slabs) + 24 * num_rows + grad_weight + float16
    assert peak <= most


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("trained", ["frozen head", "both"])
def test_memory_does_not_grow_with_rows_times_vocabulary(on_path, path, trained):
    trains_hidden, trains_weight = TRAINED[trained]
    keep_bytes = 0 if trains_weight else None  # a frozen head needs no budget: the default must not be spent on it
    hidden_size = 4

    def extra(num_rows, vocab_size):
        _, peak = measured(on_path, num_rows, hidden_size, vocab_size, torch.float32, trains_hidden, trains_weight, keep_bytes)
        return peak - (4 * hidden_size * vocab_size if trains_weight else 0)

    # 16 times as many logits: 192 MB of them. What may grow is a few numbers a row and, on the CUDA path, the slab of
    # all rows that the backward works on, which is never narrower than 256 entries.
    small, large = extra(750, 4001), extra(3000, 16_001)
    assert large <= 4.2 * small + 2**14
    assert large <= 20 * 2**20
