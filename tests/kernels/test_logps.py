"""chunked_logps against a full float64 softmax: values, gradients, range, memory, errors."""

import math

import pytest
import torch

from medtrain.kernels import logps as op
from medtrain.kernels import logps_torch
from medtrain.kernels.logps import chunked_logps, clamped_rows, reset_clamped_rows, select_path
from medtrain.kernels.reference import reference_logps


@pytest.fixture(autouse=True)
def one_thread_and_a_fresh_count():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    reset_clamped_rows()
    yield
    torch.set_num_threads(threads)


def problem(num_rows, hidden_size, vocab_size, dtype=torch.float64, scale=1.0):
    hidden = torch.randn(num_rows, hidden_size, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (scale * torch.randn(vocab_size, hidden_size, dtype=torch.float64)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (num_rows,))


def gradients(logps, upstream, *inputs):
    return torch.autograd.grad(logps, inputs, upstream.to(logps.dtype))


def expected(hidden, weight, targets, upstream):
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logps = reference_logps(hidden, weight, targets)
    return logps.detach(), *gradients(logps, upstream, hidden, weight)


def relative(found, wanted, dim=None):
    wanted = wanted.double()
    return ((found.double() - wanted).norm(dim=dim) / wanted.norm(dim=dim)).max().item()


# 37 rows in float64 have 296 bytes of E an entry: 8000 keeps 16 of the 101 entries.
@pytest.mark.parametrize("keep_bytes", [None, 0, 8000])
@pytest.mark.parametrize("slab_size", [None, 1, 7, 64, 500])
@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
@pytest.mark.parametrize("shape", [(37, 19, 101), (1, 1, 2), (5, 3, 1)])
def test_float64_equals_full_softmax_for_any_slab_and_budget(shape, trained, slab_size, keep_bytes):
    hidden, weight, targets = problem(*shape, scale=2.0)
    upstream = torch.randn(shape[0], dtype=torch.float64)
    wanted, wanted_hidden, wanted_weight = expected(hidden, weight, targets, upstream)
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    found = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=slab_size)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-12)
    found.backward(upstream)
    for tensor, gradient in ((hidden, wanted_hidden), (weight, wanted_weight)):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-12)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("keep_bytes", [None, 0, 7 * 17 * 8])
def test_gradcheck(keep_bytes):
    hidden, weight, targets = problem(7, 5, 23)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=6), (hidden, weight)
    )


def test_rows_and_vocabulary_cut_into_many_tiles_change_nothing(monkeypatch):
    hidden, weight, targets = problem(101, 6, 53)
    upstream = torch.randn(101, dtype=torch.float64)
    wanted = expected(hidden, weight, targets, upstream)
    monkeypatch.setattr(logps_torch, "_TILE_ELEMENTS", 130)  # rows of 13 and 10, slabs of 10
    for keep_bytes in (None, 0, 31 * 53 * 8):
        found = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=10)
        for left, right in zip((found, *gradients(found, upstream, hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_default_slabs_cover_the_vocabulary_in_tiles_of_16_mib():
    for num_rows in (0, 1, 999, 4096, 50_000):
        for vocab_size in (1, 500, 151_936, 152_064):
            slab = logps_torch.default_slab_size(num_rows, vocab_size)
            assert 1 <= slab <= vocab_size
            assert slab * min(num_rows, 4096) <= 1.1 * 2**22
    assert logps_torch.default_slab_size(1000, 500) == 500


def test_embedding_tied_to_the_head_gets_both_gradients():
    weight = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.randint(31, (2, 40))

    def gradient(function):
        return torch.autograd.grad(function(torch.tanh(weight[tokens]), weight, targets).sum(), weight)[0]

    torch.testing.assert_close(gradient(chunked_logps), gradient(reference_logps), rtol=1e-12, atol=1e-12)


def test_token_zero_counts_like_any_other():
    hidden, weight, _ = problem(9, 4, 11)
    targets = torch.zeros(9, dtype=torch.int64)
    wanted = expected(hidden, weight, targets, torch.ones(9))
    found = chunked_logps(hidden, weight, targets, slab_size=4)
    for left, right in zip((found, *gradients(found, torch.ones(9), hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep_bytes", [None, 0])
def test_strided_inputs_equal_contiguous_ones(keep_bytes):
    hidden, weight, targets = problem(24, 6, 33)
    upstream = torch.randn(24, dtype=torch.float64)
    wanted = expected(hidden, weight, targets, upstream)
    strided_hidden = torch.stack([hidden, hidden], dim=2).detach()[..., 1].requires_grad_()
    strided_weight = weight.detach().T.contiguous().T.requires_grad_()
    strided_targets = torch.stack([targets, targets], dim=1)[:, 0]
    assert not any(tensor.is_contiguous() for tensor in (strided_hidden, strided_weight, strided_targets))
    found = chunked_logps(strided_hidden, strided_weight, strided_targets, keep_bytes=keep_bytes, slab_size=8)
    for left, right in zip((found, *gradients(found, upstream, strided_hidden, strided_weight)), wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    # A row shown to every target, without a copy of it.
    row = hidden.detach()[:1]
    torch.testing.assert_close(
        chunked_logps(row.expand(24, 6), weight, targets), reference_logps(row.repeat(24, 1), weight, targets)
    )


@pytest.mark.parametrize("keep_bytes", [None, 0])
def test_no_rows_give_no_logps_and_zero_gradients(keep_bytes):
    hidden, weight, targets = problem(0, 5, 7, torch.float32)
    logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=3)
    assert logps.shape == (0,) and logps.dtype == torch.float32
    logps.sum().backward()
    assert hidden.grad.shape == (0, 5)
    assert torch.equal(weight.grad, torch.zeros(7, 5))


def test_without_gradients_the_result_is_bitwise_the_same():
    hidden, weight, targets = problem(50, 16, 99, torch.float32)
    trained = chunked_logps(hidden, weight, targets, slab_size=40)
    with torch.no_grad():
        assert torch.equal(chunked_logps(hidden, weight, targets, slab_size=40), trained)
    with torch.inference_mode():
        inferred = chunked_logps(hidden, weight, targets, slab_size=40)
    assert torch.equal(inferred, trained) and not inferred.requires_grad and trained.requires_grad


def test_rows_out_of_range_are_counted_across_inference_mode_and_training():
    hidden, weight, targets = planted([-1.0, -200.0, -300.0])
    with torch.inference_mode():
        chunked_logps(hidden, weight, targets)
    assert clamped_rows() == 2
    chunked_logps(hidden, weight, targets).sum().backward()
    with torch.inference_mode():
        chunked_logps(hidden, weight, targets)
    assert clamped_rows() == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_bytes", [None, 0, 40_000])
def test_reruns_are_bitwise_equal(dtype, keep_bytes):
    hidden, weight, targets = problem(123, 32, 507, dtype, scale=0.5)
    upstream = torch.randn(123)

    def run():
        logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=100)
        return logps, *gradients(logps, upstream, hidden, weight)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_backward_may_run_twice_over_a_retained_graph():
    hidden, weight, targets = problem(20, 6, 40, torch.float32)
    logps = chunked_logps(hidden, weight, targets, keep_bytes=20 * 17 * 4, slab_size=16).sum()
    first = torch.autograd.grad(logps, (hidden, weight), retain_graph=True)
    for left, right in zip(first, torch.autograd.grad(logps, (hidden, weight)), strict=True):
        assert torch.equal(left, right)


# --- range ------------------------------------------------------------------------------------------------------------


def planted(logps, vocab_size=70, dtype=torch.float32):
    """Rows whose target has about the given log-probability: an identity for a weight, so hidden states are logits."""
    targets = (torch.arange(len(logps)) * 13 + 5) % vocab_size
    hidden = torch.full((len(logps), vocab_size), -500.0, dtype=torch.float64)
    for row, logp in enumerate(logps):
        # One rival, in another slab than the target: ln(exp(-logp) - 1) above it.
        rival = -logp if logp < -30 else (math.log(math.expm1(-logp)) if logp else -300.0)
        base = 3.0 * row
        hidden[row, (targets[row] + vocab_size // 2) % vocab_size] = base + rival
        hidden[row, targets[row]] = base
    weight = torch.eye(vocab_size, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("slab_size", [None, 16])
@pytest.mark.parametrize("keep_bytes", [None, 0])
def test_planted_logps_from_zero_to_minus_114_are_right_to_1e_5(keep_bytes, slab_size):
    wanted_logps = [0.0, -1e-8, -1e-3, -20.0, -100.0, -114.0]
    hidden, weight, targets = planted(wanted_logps)
    upstream = torch.ones(len(targets))
    wanted, wanted_hidden, _ = expected(hidden, weight, targets, upstream)
    torch.testing.assert_close(wanted, torch.tensor(wanted_logps, dtype=torch.float64), rtol=1e-4, atol=1e-40)
    logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=slab_size)
    assert clamped_rows() == 0
    torch.testing.assert_close(logps.double(), wanted, rtol=1e-5, atol=1e-30)
    # Also the gradient of a row that is all but certain: 1 - p would have nothing left of it.
    grad_hidden, grad_weight = gradients(logps, upstream, hidden, weight)
    assert relative(grad_hidden[1:], wanted_hidden[1:], dim=1) <= 1e-5
    # Row by row, since the gradient of an uncertain row would drown that of a certain one.
    for row in range(1, len(targets)):
        one, single = hidden.detach()[row : row + 1], targets[row : row + 1]
        found = chunked_logps(one, weight, single, keep_bytes=keep_bytes, slab_size=slab_size)
        (found_weight,) = gradients(found, torch.ones(1), weight)
        assert relative(found_weight, expected(one, weight, single, torch.ones(1))[2]) <= 1e-5
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("slab_size", [None, 16])
@pytest.mark.parametrize("keep_rows", [7, 3, 0])
def test_rows_beyond_the_range_are_counted_and_exact(keep_rows, slab_size, dtype):
    hidden, weight, targets = planted([-1.0, -140.0, -3.0, -400.0, -0.5, -60.0, -116.0], dtype=dtype)
    upstream = torch.tensor([1.0, -0.5, 2.0, 0.25, 1.0, 1.0, 3.0])
    wanted, wanted_hidden, wanted_weight = expected(hidden, weight, targets, upstream)
    itemsize = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2}[dtype]
    logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_rows * 70 * itemsize, slab_size=slab_size)
    assert clamped_rows() == 3
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(logps.double(), wanted, rtol=min(tolerance, 1e-6), atol=0)
    grad_hidden, grad_weight = gradients(logps, upstream, hidden, weight)
    assert relative(grad_hidden, wanted_hidden, dim=1) <= tolerance
    assert relative(grad_weight, wanted_weight) <= tolerance


def test_a_model_far_out_of_range_everywhere_is_still_exact():
    # Logits of hundreds in a dense problem: nearly every row overflows float32 in the first walk.
    hidden, weight, targets = problem(60, 40, 130, torch.float32, scale=60.0)
    upstream = torch.randn(60)
    wanted, wanted_hidden, wanted_weight = expected(hidden, weight, targets, upstream)
    assert wanted.min() < -800
    for keep_bytes in (None, 0, 30 * 130 * 4):
        reset_clamped_rows()
        logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=48)
        assert clamped_rows() == int((wanted < -114.86).sum())
        grad_hidden, grad_weight = gradients(logps, upstream, hidden, weight)
        # A logit of 1000 is known to 6e-5 in float32, and so is a probability.
        torch.testing.assert_close(logps.double(), wanted, rtol=1e-5, atol=1e-3)
        assert relative(grad_hidden, wanted_hidden) <= 1e-4
        assert relative(grad_weight, wanted_weight) <= 1e-4


def test_nan_in_a_row_stays_in_that_row():
    hidden, weight, targets = problem(5, 4, 9, torch.float32)
    wanted = chunked_logps(hidden, weight, targets).detach()
    poisoned = hidden.detach().clone()
    poisoned[2, 1] = math.nan
    logps = chunked_logps(poisoned.requires_grad_(), weight, targets)
    (gradient,) = gradients(logps, torch.ones(5), poisoned)
    others = torch.tensor([0, 1, 3, 4])
    assert logps[2].isnan() and gradient[2].isnan().all()
    assert torch.equal(logps[others], wanted[others]) and gradient[others].isfinite().all()


# --- precision --------------------------------------------------------------------------------------------------------


def peaked(dtype, num_rows=520, hidden_size=96, vocab_size=4001):
    """A trained-like head: logits spread over tens, the target usually on top."""
    weight = torch.randn(vocab_size, hidden_size, dtype=torch.float64) / math.sqrt(hidden_size)
    targets = torch.randint(vocab_size, (num_rows,))
    hidden = 20 * weight[targets] + 3 * torch.randn(num_rows, hidden_size, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def test_rounding_of_the_offset_does_not_reach_the_logps():
    # Logits on float32's grid of 2**-9 just below 2**15; plus 40 they lie beyond it, where the grid is 2**-8.
    targets = torch.tensor([1, 2, 0])
    logits = 32_760 + torch.tensor([[1.0, 3.0, -700.0], [101.0, 501.0, 1.0], [5.0, 7.0, 0.0]]) * 2**-9
    logps = chunked_logps(logits, torch.eye(3), targets)
    wanted = reference_logps(logits, torch.eye(3), targets)
    torch.testing.assert_close(logps.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep_bytes", [None, 0])
def test_bf16_inputs_keep_the_margin_to_a_thousandth_of_a_nat(keep_bytes):
    hidden, weight, targets = peaked(torch.bfloat16)
    sign = torch.ones(520, dtype=torch.float64)
    sign[260:] = -1  # chosen, then rejected: the sum is the margin
    wanted, wanted_hidden, wanted_weight = expected(hidden, weight, targets, sign)
    logps = chunked_logps(hidden, weight, targets, keep_bytes=keep_bytes, slab_size=1000)
    assert logps.dtype == torch.float32
    margin = (wanted * sign).sum()
    assert abs((logps.detach().double() * sign).sum() - margin) <= 1e-3
    grad_hidden, grad_weight = gradients(logps, sign, hidden, weight)
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    assert relative(grad_hidden, wanted_hidden) <= 4e-3
    assert relative(grad_weight, wanted_weight) <= 4e-3
    # The yardstick is sharp: logits rounded to bfloat16 on the way would fail by a factor of ten or more.
    rounded = torch.log_softmax((hidden @ weight.T).float(), dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert abs((rounded.detach().double() * sign).sum() - margin) > 1e-2


def test_float16_keeps_the_range_that_its_own_exponent_lacks():
    hidden, weight, targets = peaked(torch.float16, num_rows=64, vocab_size=503)
    upstream = torch.ones(64)
    wanted, wanted_hidden, wanted_weight = expected(hidden, weight, targets, upstream)
    logps = chunked_logps(hidden, weight, targets)
    torch.testing.assert_close(logps.double(), wanted, rtol=1e-5, atol=1e-6)
    grad_hidden, grad_weight = gradients(logps, upstream, hidden, weight)
    assert relative(grad_hidden, wanted_hidden) <= 4e-3
    assert relative(grad_weight, wanted_weight) <= 4e-3


def test_float16_gradient_of_a_certain_token_survives_until_the_loss_scale_lifts_it():
    hidden, weight, targets = planted([-1e-8, -1e-6], dtype=torch.float16)
    upstream = torch.tensor([2.0**24, 2.0**16])
    _, wanted, _ = expected(hidden, weight, targets, upstream)
    (found,) = gradients(chunked_logps(hidden, weight, targets), upstream, hidden)
    assert relative(found, wanted, dim=1) <= 1e-3


def test_autocast_does_not_round_the_logits():
    hidden, weight, targets = problem(40, 32, 200, torch.float32)
    plain = chunked_logps(hidden, weight, targets)
    wanted = gradients(plain, torch.ones(40), hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = chunked_logps(hidden, weight, targets)
        found = gradients(logps, torch.ones(40), hidden, weight)
        with torch.no_grad():
            assert torch.equal(chunked_logps(hidden, weight, targets), plain)
    assert torch.equal(logps, plain)
    for left, right in zip(found, wanted, strict=True):
        assert torch.equal(left, right)


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(function):
    """(result, bytes of distinct storages that autograd keeps for it)."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(saved.values())


def test_what_is_kept_for_backward_is_the_formula():
    num_rows, hidden_size, vocab_size = 64, 8, 1000
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        hidden, weight, targets = problem(num_rows, hidden_size, vocab_size, dtype)
        unit, column = num_rows * hidden_size * itemsize, num_rows * itemsize

        def kept(keep_bytes, trained, inputs=(hidden, weight, targets)):
            inputs[1].requires_grad_(trained)
            return saved_bytes(lambda: chunked_logps(*inputs, keep_bytes=keep_bytes, slab_size=300))[1]

        assert kept(None, trained=False) == unit
        # Beside E: the unit gradient, hidden, targets, and S, v, m; and the weight only where E must be recomputed.
        rest = 2 * unit + num_rows * (8 + 3 * 4)
        assert kept(0, trained=True) == rest + vocab_size * hidden_size * itemsize
        # The budget is filled in sixteens of vocabulary entries.
        assert kept(165 * column, trained=True) == rest + vocab_size * hidden_size * itemsize + 160 * column
        assert kept(None, trained=True) == rest + vocab_size * column


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, "expected hidden"),
        ({"targets": torch.zeros(3, 1, dtype=torch.int64)}, "expected hidden"),
        ({"weight": torch.zeros(9, 5)}, "sizes do not fit"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "sizes do not fit"),
        ({"weight": torch.zeros(0, 4)}, "vocabulary is empty"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden must be float64"),
        ({"weight": torch.zeros(9, 4, dtype=torch.bfloat16)}, "hidden is torch.float32 but weight is torch.bfloat16"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets must be int64"),
        ({"targets": torch.tensor([0, 8, 9])}, r"targets\[2\] is 9, outside \[0, 9\)"),
        ({"targets": torch.tensor([0, -100, 1])}, r"targets\[1\] is -100"),
        ({"weight": torch.zeros(9, 4, device="meta")}, "weight on meta"),
        ({"keep_bytes": -1}, "keep_bytes must be 0 or more"),
        ({"slab_size": 0}, "slab_size must be 1 or more"),
    ],
)
def test_misuse_is_a_value_error_that_names_it(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(9, 4), "targets": torch.tensor([0, 1, 8])}
    assert chunked_logps(**arguments).shape == (3,)
    with pytest.raises(ValueError, match=message):
        chunked_logps(**arguments | change)


def test_the_path_is_named_and_the_public_face_is_the_op():
    import medtrain

    assert select_path(torch.zeros(1, 1)) == "torch"
    assert medtrain.chunked_logps is chunked_logps


# --- compilers and fake tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["both", "hidden", "weight", "none"])
def test_torch_compile_sees_one_operation_and_the_same_numbers(trained):
    hidden, weight, targets = problem(21, 8, 50, torch.float32)
    hidden.requires_grad_(trained in ("both", "hidden"))
    weight.requires_grad_(trained in ("both", "weight"))
    inputs = [tensor for tensor in (hidden, weight) if tensor.requires_grad]

    def loss(hidden, weight, targets):
        return (chunked_logps(hidden, weight, targets, keep_bytes=1000, slab_size=16) * 0.5).sum()

    # fullgraph: a graph break would raise.
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden, weight, targets)
    eager = loss(hidden, weight, targets)
    assert torch.equal(compiled, eager)
    if inputs:
        for left, right in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("keep_bytes", [0, 1000, 2**30])
def test_custom_ops_keep_their_promises(dtype, keep_bytes):
    hidden, weight, targets = (tensor.detach() for tensor in problem(21, 8, 50, dtype))
    checks = ("test_schema", "test_faketensor")
    for needs_unit in (False, True):
        torch.library.opcheck(op._walk, (hidden, weight, targets, keep_bytes, needs_unit, 16), test_utils=checks)
    _, offset, total, inverse, _, kept = op._walk(hidden, weight, targets, keep_bytes, True, 16)
    grad = torch.randn_like(total)
    arguments = (grad, hidden, weight, targets, offset, total, inverse, kept, keep_bytes, 50, 16)
    torch.library.opcheck(op._grad_weight, arguments, test_utils=checks)


def test_fake_tensors_pass_through_forward_and_backward():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        # A size that no machine here could hold: nothing of it is computed.
        hidden = torch.empty(2**20, 8192, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(152_064, 8192, dtype=torch.bfloat16, requires_grad=True)
        logps = chunked_logps(hidden, weight, torch.empty(2**20, dtype=torch.int64))
        assert logps.shape == (2**20,) and logps.dtype == torch.float32
        logps.sum().backward()
        assert hidden.grad.shape == hidden.shape and weight.grad.dtype == torch.bfloat16
