"""The CUDA path of the log-probability op against float64: on a GPU where there is one, else in Triton's interpreter."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import every_two

triton = pytest.importorskip("triton", reason="Triton exists on Linux alone")

from medtrain.kernels import logps as op  # noqa: E402
from medtrain.kernels import logps_kernels, logps_launch, logps_triton  # noqa: E402
from medtrain.kernels.logps import chunked_logps, clamped_rows, reset_clamped_rows  # noqa: E402
from medtrain.kernels.reference import reference_logps  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Stores to bfloat16 round to nearest on a GPU and cut off in the interpreter: twice the error.
BF16_TOLERANCE = 4e-3 if DEVICE == "cuda" else 8e-3


@pytest.fixture(autouse=True)
def the_triton_path(monkeypatch):
    monkeypatch.setattr(op, "select_path", lambda hidden: "triton")
    torch.manual_seed(0)
    reset_clamped_rows()
    # Small chunks, so that small inputs have several; the fused GEMM's blocks fit the tensor cores on a GPU.
    blocks = logps_launch.ExpGemm() if DEVICE == "cuda" else logps_launch.ExpGemm(16, 32, 16, 2)
    with logps_launch.forced(rows=16, exp_gemm=blocks):
        yield


def problem(num_rows, hidden_size, vocab_size, dtype=torch.float32, scale=0.5):
    hidden = torch.randn(num_rows, hidden_size).to(DEVICE, dtype).requires_grad_()
    weight = (scale * torch.randn(vocab_size, hidden_size)).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(vocab_size, (num_rows,))
    targets[: 2 * num_rows : 5] = vocab_size - 1  # some in the last tile, which is not full
    return hidden, weight, targets.to(DEVICE)


def expected(hidden, weight, targets, upstream):
    hidden, weight = (tensor.detach().cpu().double().requires_grad_() for tensor in (hidden, weight))
    logps = reference_logps(hidden, weight, targets.cpu())
    return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), upstream.cpu().double())


def relative(found, wanted):
    return ((found.cpu().double() - wanted).norm() / wanted.norm()).item()


def check(hidden, weight, targets, tolerance=1e-5, logps_tolerance=1e-5, **options):
    """chunked_logps and its gradients within tolerance of float64's; gradients by norm, logps element by element."""
    upstream = torch.randn(len(targets))
    wanted, *wanted_gradients = expected(hidden, weight, targets, upstream)
    logps = chunked_logps(hidden, weight, targets, **options)
    torch.testing.assert_close(logps.detach().cpu().double(), wanted, rtol=logps_tolerance, atol=logps_tolerance, equal_nan=True)
    inputs = [(t, g) for t, g in zip((hidden, weight), wanted_gradients, strict=True) if t.requires_grad]
    if inputs:
        found = torch.autograd.grad(logps, [tensor for tensor, _ in inputs], upstream.to(DEVICE))
        for gradient, (tensor, wanted_gradient) in zip(found, inputs, strict=True):
            assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape
            assert relative(gradient, wanted_gradient) <= tolerance


GEMMS = pytest.mark.parametrize("gemm", ["cublas", "fused"])


def cases_of(*axes):
    """All combinations on a GPU; in the interpreter as many as it takes for every two values to meet."""
    return list(itertools.product(*axes)) if DEVICE == "cuda" else every_two(*axes)


@pytest.mark.parametrize(
    ("trained", "slab_size", "keep_bytes", "gemm"),
    cases_of(("both", "hidden", "weight", "none"), (None, 40), (0, None, 37 * 48 * 4), ("cublas", "fused")),
)
def test_float32_equals_full_softmax_for_any_slab_and_budget(trained, slab_size, keep_bytes, gemm):
    hidden, weight, targets = problem(37, 24, 101)
    hidden.requires_grad_(trained in ("both", "hidden"))
    weight.requires_grad_(trained in ("both", "weight"))
    with logps_launch.forced(gemm=gemm):
        check(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=slab_size)
    assert clamped_rows() == 0


@GEMMS
@pytest.mark.parametrize("shape", [(1, 8, 2), (1, 1, 1), (17, 19, 33), (34, 100, 70), (16, 16, 32), (3, 8, 257)])
def test_odd_shapes(shape, gemm):
    hidden, weight, targets = problem(*shape)
    if shape[2] == 1:  # one word: certain, without a gradient
        logps = chunked_logps(hidden, weight, targets)
        grads = torch.autograd.grad(logps.sum(), (hidden, weight))
        assert logps.tolist() == [0.0] and not any(g.any() for g in grads)
        return
    with logps_launch.forced(gemm=gemm):
        check(hidden, weight, targets)
        check(hidden, weight, targets, keep_bytes=0, slab_size=7)


def test_a_slab_wider_than_one_block_of_columns():
    hidden, weight, targets = problem(5, 16, 9001)
    for keep_bytes in (0, None):
        check(hidden, weight, targets, keep_bytes=keep_bytes)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: hundreds of tiles would take the interpreter hours")
@GEMMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize(("num_rows", "rows"), [(700, 2304), (2305, 2304), (1152, 1152)])
def test_many_tiles_a_program(num_rows, rows, flatten, dtype, gemm):
    # 157 tiles of vocabulary, the last one not full; 4 steps of hidden size, the last one not full; 9 tiles of rows are
    # one group of 8 and a rest of 1.
    hidden, weight, targets = problem(num_rows, 200, 40_001, dtype, scale=0.7)
    with logps_launch.forced(gemm=gemm, rows=rows, exp_gemm=logps_launch.ExpGemm(flatten=flatten)):
        for slab_size, keep_bytes in ((None, 0), (10_000, None), (None, num_rows * 9008 * 2)):
            check(hidden, weight, targets, tolerance=BF16_TOLERANCE, slab_size=slab_size, keep_bytes=keep_bytes)
            weight.requires_grad_(not weight.requires_grad)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device with 12 GiB free: tensors of more than 2**31 entries")
@GEMMS
def test_offsets_beyond_32_bits(gemm):
    num_rows, vocab_size = 16_384, 152_064
    hidden, weight, targets = problem(num_rows, 64, vocab_size, torch.bfloat16)
    with torch.no_grad():
        hidden[-3] *= 60  # out of range, near the end of what is kept
    with logps_launch.forced(gemm=gemm, rows=2304):
        logps = chunked_logps(hidden, weight, targets, keep_bytes=2**33)
        (grad,) = torch.autograd.grad(logps[-64:].sum(), weight)
    assert clamped_rows() >= 1
    tail = hidden.detach()[-64:].clone()
    found = chunked_logps(tail, weight, targets[-64:], keep_bytes=0)
    torch.testing.assert_close(logps[-64:], found, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(found.sum(), weight)
    assert relative(grad, wanted.cpu().double()) <= 2 * BF16_TOLERANCE


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: TF32 exists there alone")
def test_tf32_and_autocast_stay_out():
    hidden, weight, targets = problem(64, 512, 1000, scale=0.2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            check(hidden, weight, targets, keep_bytes=0)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: streams exist there alone")
def test_a_stream_of_its_own():
    hidden, weight, targets = problem(64, 64, 1000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check(hidden, weight, targets, keep_bytes=0)
    torch.cuda.current_stream().wait_stream(stream)


@GEMMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_bytes", [0, None, 37 * 48 * 2])
def test_16_bit_inputs_have_float32_logits(keep_bytes, dtype, gemm):
    hidden, weight, targets = problem(37, 24, 101, dtype, scale=3.0)
    with logps_launch.forced(gemm=gemm):
        # 1e-5 on logps of tens of nats: logits rounded to 16 bits would be off by 1e-2 and more.
        check(hidden, weight, targets, tolerance=BF16_TOLERANCE, keep_bytes=keep_bytes, slab_size=40)


@GEMMS
def test_bf16_margin_is_right_to_a_thousandth_of_a_nat(gemm):
    weight = torch.randn(1001, 64) / 8
    targets = torch.randint(1001, (260,))
    hidden = (18 * weight[targets] + 3 * torch.randn(260, 64)).to(DEVICE, torch.bfloat16)
    weight = weight.to(DEVICE, torch.bfloat16)
    sign = torch.ones(260, dtype=torch.float64)
    sign[130:] = -1
    # Blocks as on a GPU: small ones would take the interpreter thousands of tiles.
    with logps_launch.forced(gemm=gemm, rows=128, exp_gemm=logps_launch.ExpGemm()), torch.no_grad():
        logps = chunked_logps(hidden, weight, targets.to(DEVICE))
    wanted = reference_logps(hidden.cpu(), weight.cpu(), targets)
    assert abs(((logps.cpu().double() - wanted) * sign).sum()) <= 1e-3
    rounded = torch.log_softmax((hidden @ weight.T).float().cpu(), 1).gather(1, targets[:, None]).squeeze(1)
    assert abs(((rounded.double() - wanted) * sign).sum()) > 1e-2  # the yardstick is sharp


# --- range ------------------------------------------------------------------------------------------------------------


def planted(logps, vocab_size=70, hidden_size=72):
    """Rows whose target has about the given log-probability; the weight is an identity, so hidden states are logits."""
    targets = (torch.arange(len(logps)) * 13 + 5) % vocab_size
    hidden = torch.zeros(len(logps), hidden_size)
    hidden[:, :vocab_size] = -500.0
    for row, logp in enumerate(logps):
        rival = -logp if logp < -30 else (torch.tensor(-logp).expm1().log().item() if logp else -300.0)
        hidden[row, (targets[row] + vocab_size // 2) % vocab_size] = 3.0 * row + rival
        hidden[row, targets[row]] = 3.0 * row
    weight = torch.eye(vocab_size, hidden_size)
    return hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(), targets.to(DEVICE)


@GEMMS
def test_planted_logps_from_zero_to_minus_114_are_right_to_1e_5(gemm):
    hidden, weight, targets = planted([0.0, -1e-8, -1e-3, -20.0, -100.0, -114.0])
    wanted = expected(hidden, weight, targets, torch.ones(6))[0]
    with logps_launch.forced(gemm=gemm):
        found = chunked_logps(hidden, weight, targets)
    torch.testing.assert_close(found.detach().cpu().double(), wanted, rtol=1e-5, atol=1e-12)
    assert clamped_rows() == 0


OUTSIDE = [[4], [0, 5, 17, 38], list(range(40))]


@pytest.mark.parametrize(
    ("trained", "outside", "keep_bytes", "gemm"),
    cases_of(("both", "hidden", "weight", "none"), OUTSIDE, (0, None, 40 * 24 * 4), ("cublas", "fused")),
)
def test_rows_out_of_range_are_counted_and_exact_in_every_mode(trained, outside, keep_bytes, gemm):
    logps = [-140.0 - 20 * row if row in outside else -1.0 - row for row in range(40)]
    hidden, weight, targets = planted(logps)
    hidden.requires_grad_(trained in ("both", "hidden"))
    weight.requires_grad_(trained in ("both", "weight"))
    with logps_launch.forced(gemm=gemm):
        check(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=32)
    assert clamped_rows() == len(outside)


def test_rows_out_of_range_over_many_tiles_of_vocabulary_and_hidden_size():
    # More tiles than the interpreter has programs, the last ones not full. Logits of several hundred: float32 itself is
    # not better than 1e-4 there.
    size = 600 if DEVICE == "cuda" else 220
    hidden, weight, targets = problem(21, size, size + 20, scale=75 / size**0.5)
    for keep_bytes in (0, None, 21 * 112 * 4):
        reset_clamped_rows()
        check(hidden, weight, targets, tolerance=2e-4, logps_tolerance=2e-4, keep_bytes=keep_bytes)
        assert clamped_rows() > 10


def test_16_bit_rows_out_of_range_keep_their_gradients():
    hidden, weight, targets = problem(37, 24, 101, torch.bfloat16, scale=12.0)
    check(hidden, weight, targets, tolerance=BF16_TOLERANCE, keep_bytes=37 * 48 * 2, slab_size=40)
    assert 0 < clamped_rows() < 37


def test_a_nan_stays_in_its_row():
    hidden, weight, targets = problem(20, 8, 50)
    with torch.no_grad():
        hidden[7, 3] = float("nan")
        logps = chunked_logps(hidden, weight, targets).cpu()
    assert logps.isnan().nonzero().tolist() == [[7]]
    keep = torch.arange(20) != 7
    wanted = reference_logps(hidden.detach().cpu(), weight.detach().cpu(), targets.cpu())
    torch.testing.assert_close(logps[keep].double(), wanted[keep], rtol=1e-5, atol=1e-5)


def test_rows_out_of_range_are_listed_in_order_over_many_blocks():
    total = torch.rand(10_000, device=DEVICE)
    wanted = [0, 1, 4095, 4096, 7777, 9999]
    total[wanted] = torch.tensor([2.0**108, torch.inf, torch.nan, 2.0**120, 2.0**108, 2.0**109], device=DEVICE)
    rows = torch.full((10_000,), -1, dtype=torch.int32, device=DEVICE)
    count = torch.empty(1, dtype=torch.int32, device=DEVICE)
    target_logits = torch.zeros(10_000, device=DEVICE)
    target_logits[4095] = float("nan")  # whose results are NaN as they are
    logps_kernels.list_rows_kernel[(1,)](total, target_logits, rows, count, 10_000, BLOCK=4096, num_warps=8)
    wanted.remove(4095)
    assert int(count) == 5 and rows[:5].tolist() == wanted and bool((rows[5:] == -1).all())


# --- inputs, determinism, synchronisation -----------------------------------------------------------------------------


@GEMMS
def test_strided_inputs(gemm):
    hidden, weight, targets = problem(24, 16, 33)
    strided_hidden = torch.stack([hidden, hidden], 2).detach()[..., 1].requires_grad_()
    strided_weight = weight.detach().T.contiguous().T.requires_grad_()
    strided_targets = torch.stack([targets, targets], 1)[:, 0]
    with logps_launch.forced(gemm=gemm):
        check(strided_hidden, strided_weight, strided_targets, keep_bytes=0, slab_size=8)
        check(strided_hidden, strided_weight, strided_targets)


@pytest.mark.parametrize("keep_bytes", [0, None])
def test_no_rows(keep_bytes):
    hidden, weight, targets = problem(0, 8, 7)
    logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes)
    logps.sum().backward()
    assert logps.shape == (0,) and hidden.grad.shape == (0, 8) and not weight.grad.any()


@GEMMS
@pytest.mark.parametrize("keep_bytes", [0, 37 * 48 * 2])
def test_reruns_are_bitwise_equal(keep_bytes, gemm):
    hidden, weight, targets = problem(37, 24, 101, torch.bfloat16, scale=6.0)  # some rows out of range too
    upstream = torch.randn(37, device=DEVICE)

    def run():
        logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=40)
        return logps, *torch.autograd.grad(logps, (hidden, weight), upstream)

    with logps_launch.forced(gemm=gemm):
        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)


def test_custom_op_shapes_are_those_the_fake_implementation_tells():
    hidden, weight, targets = (tensor.detach() for tensor in problem(21, 8, 50, torch.bfloat16))
    for keep_bytes in (0, 1000, 2**30):
        arguments = (hidden, weight, targets, keep_bytes, True, 16)
        torch.library.opcheck(op._walk, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_target_outside_the_vocabulary_stops_the_process():
    if DEVICE == "cpu":
        hidden, weight, _ = problem(3, 8, 5)
        with pytest.raises(RuntimeError, match="outside"):
            chunked_logps(hidden, weight, torch.tensor([0, 5, 1]))
        return
    # In a process of its own: a failed assertion on the device ends every later call.
    script = """
import torch
from medtrain import chunked_logps
chunked_logps(torch.zeros(3, 8, device="cuda"), torch.zeros(5, 8, device="cuda"), torch.tensor([0, 5, 1], device="cuda"))
torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode != 0 and "assert" in run.stderr.lower()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matmul_settings_of_the_process_are_given_back(dtype):
    matmul = torch.backends.cuda.matmul
    reduced = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    names = ("fp32_precision", "allow_fp16_accumulation", *reduced)
    before = [getattr(matmul, name) for name in names]
    with contextlib.suppress(ZeroDivisionError), logps_triton._exact_matmul(dtype):
        if dtype == torch.float32:
            assert matmul.fp32_precision == "ieee"
        else:
            assert not matmul.allow_bf16_reduced_precision_reduction
            assert dtype == torch.bfloat16 or not (matmul.allow_fp16_accumulation or getattr(matmul, reduced[0]))
        raise ZeroDivisionError
    assert [getattr(matmul, name) for name in names] == before


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: a CPU has nothing to wait for")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("trained", ["both", "hidden", "none"])
@pytest.mark.parametrize("keep_bytes", [0, None])
@GEMMS
def test_forward_and_backward_never_wait_for_the_device(gemm, keep_bytes, trained, dtype):
    hidden, weight, targets = problem(300, 64, 1000, dtype, scale=6.0)  # some rows out of range
    hidden.requires_grad_(trained != "none")
    weight.requires_grad_(trained == "both")
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    upstream = torch.randn(300, device=DEVICE)

    def run():
        with logps_launch.forced(gemm=gemm):
            logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes)
            if inputs:
                torch.autograd.grad(logps, inputs, upstream)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- compilation for Hopper -------------------------------------------------------------------------------------------


def test_every_kernel_compiles_for_sm_90_without_spills():
    # In a process of its own: what was imported for the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.hopper"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines() if '"kernel"' in line]
    assert {row["kernel"].split("/")[0] for row in rows} == {name.removesuffix("_kernel") for name in logps_kernels.__all__}
    for row in rows:
        assert row["local"] == 0, row
        assert row["shared"] <= 227 * 1024, row
        if row["kernel"].startswith("exp_gemm"):
            assert row["wgmma"] > 0, row


def test_launches_keep_to_their_bounds():
    for hidden_size in (64, 896, 1536, 2048, 3584, 5120, 8192, 16_384):
        launch = logps_launch.choose_launch(hidden_size)
        assert launch.rows >= 1
    for vocab_size in (5, 151_936, 152_064):
        for num_rows in (1, 100, 2304, 32_768):
            slab = logps_launch.slab_size(vocab_size, num_rows, 6, 256 * 2**20)
            assert 1 <= slab <= vocab_size
            assert slab == min(vocab_size, 256) or slab * num_rows * 6 <= 256 * 2**20 + 256 * num_rows * 6
    assert logps_launch.slab_size(152_064, 2304, 0, 1) == 152_064
