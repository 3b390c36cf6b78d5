"""Memory of the log-probability op: the formula against every allocation that torch made, and what it does not grow with."""

import pytest
import torch

from medtrain.benchmarks.measure import Calls, measure_memory
from medtrain.kernels import logps as op
from medtrain.kernels import logps_launch
from medtrain.kernels.logps import chunked_logps
from medtrain.kernels.logps_memory import logps_memory

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
def test_memory_is_what_the_formula_says(on_path, path, dtype, trained, shape, keep):
    if dtype.itemsize == 2 and path == "triton" and not CUDA:
        pytest.skip("16-bit GEMMs with float32 results are imitated on a CPU, with copies of their own")
    num_rows, _, vocab_size = shape
    trains_hidden, trains_weight = TRAINED[trained]
    keep_bytes = None if keep is None else int(keep * num_rows * vocab_size * dtype.itemsize)
    options = {"trains_hidden": trains_hidden, "trains_weight": trains_weight, "keep_bytes": keep_bytes}
    kept, peak = measured(on_path, *shape, dtype, **options)
    wanted = logps_memory(*shape, dtype, path=path, **options)
    grad_weight = shape[1] * vocab_size * dtype.itemsize if trains_weight else 0
    assert kept == pytest.approx(wanted.kept, rel=0.02, abs=2**14)
    assert peak == pytest.approx(max(wanted.forward, wanted.backward + grad_weight), rel=0.15)


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


def test_formula_at_the_size_of_a_7b_head():
    shape = (8192, 3584, 152_064, torch.bfloat16)
    assert logps_memory(*shape, trains_weight=False).peak <= 0.4e9
    assert logps_memory(*shape, keep_bytes=0).peak <= 0.7e9
    # Keeping all of E costs what E takes, 2 bytes a logit.
    everything = logps_memory(*shape, keep_bytes=2**40).kept - logps_memory(*shape, keep_bytes=0).kept
    assert everything == 2 * 8192 * 152_064
