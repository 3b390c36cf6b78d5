"""rpo_loss and the losses it is made of, against the plain float64 formulas and against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medtrain.kernels.preference import preference_loss, rpo_loss, sum_by_sequence
from medtrain.kernels.reference import reference_logps, reference_rpo_loss

LOSSES = [("sigmoid", 0.0), ("sigmoid", 0.15), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0), ("simpo", 0.0), ("simpo", 0.2)]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    yield
    torch.set_num_threads(threads)


def pairs(lengths=(4, 7, 1, 3, 9, 2), hidden_size=6, vocab_size=45, dtype=torch.float64):
    """Hidden states, weight, targets, cu_seqlens, and reference sums near the policy's."""
    num_rows = sum(lengths)
    hidden = torch.randn(num_rows, hidden_size, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (num_rows,))
    targets[0] = 0
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    sums = sum_by_sequence(reference_logps(hidden, weight, targets).detach(), cu_seqlens)
    return hidden, weight, targets, cu_seqlens, (sums + 3 * torch.randn(len(lengths), dtype=torch.float64)).to(dtype)


# Every loss by every norm; how the op beneath cuts its work up, which the tests of chunked_logps try in full, is drawn.
@pytest.mark.parametrize("nll_norm", ["sequence", "token"])
@pytest.mark.parametrize(("loss", "label_smoothing"), LOSSES)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(lambda chosen: [*chosen, *reversed(chosen)]),
    beta=st.floats(0.05, 2.0),
    alpha=st.floats(0.0, 2.0),
    trained=st.sampled_from(["both", "hidden", "weight"]),
    slab_size=st.sampled_from([None, 7, 16]),
    keep_share=st.sampled_from([None, 0, 0.25]),
)
def test_float64_equals_the_plain_formulas(loss, label_smoothing, nll_norm, lengths, beta, alpha, trained, slab_size, keep_share):
    torch.manual_seed(1)
    inputs = pairs(lengths)
    numbers = dict(beta=beta, alpha=alpha, loss=loss, label_smoothing=label_smoothing, nll_norm=nll_norm)
    inputs[0].requires_grad_(trained != "weight")
    inputs[1].requires_grad_(trained != "hidden")
    differentiated = [tensor for tensor in inputs[:2] if tensor.requires_grad]
    wanted = reference_rpo_loss(*inputs, **numbers)
    wanted_gradients = torch.autograd.grad(wanted, differentiated)
    keep_bytes = None if keep_share is None else int(keep_share * sum(lengths) * 45 * 8)
    found, _ = rpo_loss(*inputs, **numbers, keep_bytes=keep_bytes, slab_size=slab_size)
    assert found.dtype == torch.float64 and found.shape == ()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for left, right in zip(torch.autograd.grad(found, differentiated), wanted_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo"])
def test_tied_embedding_gets_the_gradient_of_both_uses(loss):
    _, weight, targets, cu_seqlens, sums = pairs()
    tokens = torch.randint(45, targets.shape)

    def gradient(function):
        value = function(torch.tanh(weight[tokens]), weight, targets, cu_seqlens, sums, beta=0.3, alpha=1.0, loss=loss)
        return torch.autograd.grad(value[0] if isinstance(value, tuple) else value, weight)[0]

    torch.testing.assert_close(gradient(rpo_loss), gradient(reference_rpo_loss), rtol=1e-12, atol=1e-12)


def test_gradcheck_of_the_whole_loss():
    hidden, weight, targets, cu_seqlens, sums = pairs((2, 3, 1, 2), hidden_size=3, vocab_size=9)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: rpo_loss(hidden, weight, targets, cu_seqlens, sums, beta=0.5, alpha=1.0, slab_size=4)[0],
        (hidden, weight),
    )


@pytest.mark.parametrize(
    ("loss", "label_smoothing", "wanted"),
    [
        # Two pairs of log-ratios (w, l) = (2, -1) and (-1, 2) over lengths (2, 4), (1, 1); beta 0.5: scores 1.5, -1.5.
        ("sigmoid", 0.0, 0.20141327798275246 + 1.7014132779827524),
        ("sigmoid", 0.25, 0.20141327798275246 + 1.7014132779827524),  # symmetric scores: smoothing changes nothing
        ("robust", 0.25, 0.20141327798275246 + 1.7014132779827524),
        ("hinge", 0.0, 0.0 + 2.5),
        ("ipo", 0.0, (1.0 + 0.25 - 1.0) ** 2 + (-1.0 - 2.0 - 1.0) ** 2),
        # Policy averages (-2, -1) and (-4, -1): scores -0.5 - 0.5 and -1.5 - 0.5.
        ("simpo", 0.0, math.log1p(math.e) + math.log1p(math.e**2)),
    ],
)
def test_losses_equal_numbers_worked_out_by_hand(loss, label_smoothing, wanted):
    logps = torch.tensor([-4.0, -4.0, -4.0, -1.0], dtype=torch.float64)
    reference = torch.tensor([-6.0, -3.0, -3.0, -3.0], dtype=torch.float64)
    lengths = torch.tensor([2, 4, 1, 1])
    found, stats = preference_loss(logps, lengths, reference, beta=0.5, alpha=0.0, loss=loss, label_smoothing=label_smoothing)
    assert found.item() == pytest.approx(wanted / 2, rel=1e-12)
    assert stats["dpo_loss"].item() == pytest.approx(wanted, rel=1e-12)


def test_label_smoothing_and_robust_loss_weigh_the_flipped_pair_as_published():
    logps, reference = torch.tensor([-4.0, -9.0], dtype=torch.float64), torch.tensor([-6.0, -5.0], dtype=torch.float64)
    good, flipped = math.log1p(math.exp(-3.0)), math.log1p(math.exp(3.0))  # beta h = 0.5 (2 + 4)

    def value(loss):
        ones = torch.tensor([1, 1])
        return preference_loss(logps, ones, reference, beta=0.5, alpha=0.0, loss=loss, label_smoothing=0.1)[0].item()

    assert value("sigmoid") == pytest.approx(0.9 * good + 0.1 * flipped, rel=1e-12)
    assert value("robust") == pytest.approx((0.9 * good - 0.1 * flipped) / 0.8, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nll_norm", ["sequence", "token"])
def test_a_policy_equal_to_its_reference_has_no_margin_and_loss_ln_2(dtype, nll_norm):
    hidden, weight, targets, cu_seqlens, _ = pairs((260, 201, 90, 333), vocab_size=1001, dtype=dtype)
    from medtrain.kernels.logps import chunked_logps

    with torch.no_grad():
        sums = sum_by_sequence(chunked_logps(hidden, weight, targets), cu_seqlens)
    # Another slab size, as another budget or packing might choose, must not open a margin.
    found, stats = rpo_loss(hidden, weight, targets, cu_seqlens, sums, beta=1.0, alpha=1.5, nll_norm=nll_norm, slab_size=100)
    assert stats["rewards/margin"].abs().max() <= 1e-3
    chosen = [reference_logps(hidden, weight, targets)[start:stop] for start, stop in ((0, 260), (461, 551))]
    likelihood = torch.cat(chosen).mean() if nll_norm == "token" else (chosen[0].mean() + chosen[1].mean()) / 2
    assert found.item() == pytest.approx(math.log(2) - 1.5 * likelihood.item(), abs=1e-3)


@pytest.mark.parametrize("nll_norm", ["sequence", "token"])
def test_micro_batches_with_the_denominators_of_the_step_add_up_to_the_step(nll_norm):
    hidden, weight, targets, cu_seqlens, sums = pairs()
    settings = dict(beta=0.2, alpha=1.0, nll_norm=nll_norm)
    whole, _ = rpo_loss(hidden, weight, targets, cu_seqlens, sums, **settings)
    wanted = torch.autograd.grad(whole, (hidden, weight))
    total = torch.zeros((), dtype=torch.float64)
    for first, last in ((0, 2), (2, 2), (2, 3)):  # two pairs, none, one
        rows = slice(cu_seqlens[2 * first], cu_seqlens[2 * last])
        part, stats = rpo_loss(
            hidden[rows],
            weight,
            targets[rows],
            cu_seqlens[2 * first : 2 * last + 1] - cu_seqlens[2 * first],
            sums[2 * first : 2 * last],
            **settings,
            num_pairs=3,
            num_chosen_tokens=4 + 1 + 9,
        )
        assert stats["pairs"] == last - first
        total = total + part
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    for left, right in zip(torch.autograd.grad(total, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_alpha_zero_is_dpo():
    inputs = pairs()
    found, stats = rpo_loss(*inputs, beta=0.4, alpha=0.0)
    logps, sums = sum_by_sequence(reference_logps(*inputs[:3]), inputs[3]), inputs[4]
    ratios = logps - sums
    wanted = -torch.nn.functional.logsigmoid(0.4 * (ratios[0::2] - ratios[1::2])).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert stats["nll_loss"] > 0


def test_stats_hold_detached_sums_and_values_by_pair():
    logps = torch.tensor([-4.0, -9.0, -3.0, -1.0], requires_grad=True)
    reference = torch.tensor([-6.0, -5.0, -3.0, -3.0])
    _, stats = preference_loss(logps, torch.tensor([2, 3, 4, 5]), reference, beta=0.5, alpha=1.0)
    assert set(stats) == {
        "dpo_loss",
        "nll_loss",
        "pairs",
        "chosen_tokens",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margin",
        "rewards/accuracy",
        "logps/chosen",
        "logps/rejected",
    }
    assert stats["rewards/chosen"].tolist() == [1.0, 0.0]
    assert stats["rewards/rejected"].tolist() == [-2.0, 1.0]
    assert stats["rewards/margin"].tolist() == [3.0, -1.0]
    assert stats["rewards/accuracy"].tolist() == [1.0, 0.0]
    assert stats["logps/chosen"].tolist() == [-4.0, -3.0]
    assert stats["logps/rejected"].tolist() == [-9.0, -1.0]
    assert stats["pairs"] == 2 and stats["chosen_tokens"] == 6
    assert stats["nll_loss"].item() == pytest.approx(4 / 2 + 3 / 4)
    _, by_token = preference_loss(logps, torch.tensor([2, 3, 4, 5]), reference, beta=0.5, alpha=1.0, nll_norm="token")
    assert by_token["nll_loss"].item() == pytest.approx(7.0)
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in stats.values())


def test_extreme_margins_stay_finite_and_keep_their_gradient():
    logps = torch.tensor([-5000.0, 0.0, 0.0, -5000.0], requires_grad=True)
    found, _ = preference_loss(logps, torch.ones(4, dtype=torch.int64), torch.zeros(4), beta=1.0, alpha=0.0)
    found.backward()
    assert found.item() == 2500.0
    assert logps.grad.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_reference_gets_no_gradient():
    logps, reference = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    preference_loss(logps, torch.ones(4, dtype=torch.int64), reference, beta=1.0, alpha=1.0)[0].backward()
    assert reference.grad is None and logps.grad is not None


def test_sums_by_sequence_round_once_and_leave_empty_runs_zero():
    logps = torch.full((4096,), -0.1, requires_grad=True)
    cu_seqlens = torch.tensor([0, 0, 1000, 4096, 4096], dtype=torch.int32)
    sums = sum_by_sequence(logps, cu_seqlens)
    exact = logps.detach().double()
    assert sums.tolist() == [0.0, exact[:1000].sum().float().item(), exact[1000:].sum().float().item(), 0.0]
    sums.backward(torch.tensor([5.0, 2.0, -1.0, 7.0]))
    assert torch.equal(logps.grad, torch.cat([torch.full((1000,), 2.0), torch.full((3096,), -1.0)]))
    assert sum_by_sequence(torch.zeros(0), torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": -0.1}, "beta must be positive"),
        ({"beta": math.nan}, "beta must be positive"),
        ({"alpha": -1.0}, "alpha must be 0 or more"),
        ({"loss": "dpo"}, "unknown loss 'dpo': choose one of sigmoid, robust"),
        ({"nll_norm": "batch"}, "unknown nll_norm 'batch'"),
        ({"label_smoothing": 1.5}, "between 0 and 1"),
        ({"label_smoothing": -0.1}, "between 0 and 1"),
        ({"loss": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "'hinge' has no label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "'ipo' has no label_smoothing"),
        ({"num_pairs": 0}, "num_pairs must be positive"),
        ({"num_chosen_tokens": 0}, "num_chosen_tokens must be positive"),
        ({"cu_seqlens": torch.tensor([0, 4, 6, 9])}, "odd number; found 4"),
        ({"cu_seqlens": torch.tensor([0, 4, 8])}, "rise from 0 to the number of rows, 9"),
        ({"cu_seqlens": torch.tensor([1, 4, 9])}, "rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 6, 5, 7, 9])}, "rise from 0"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0, 9.0])}, "list of integers"),
        ({"cu_seqlens": torch.tensor([0, 9, 9])}, "sequence 1 has no completion tokens"),
        ({"reference_logps": torch.zeros(4)}, "reference_logps has shape"),
        ({"reference_logps": None}, "'sigmoid' needs reference_logps"),
    ],
)
def test_misuse_is_a_value_error_that_names_it(change, message):
    hidden, weight, targets, cu_seqlens, sums = pairs((4, 5))
    arguments = dict(
        hidden=hidden, weight=weight, targets=targets, cu_seqlens=cu_seqlens, reference_logps=sums, beta=0.1, alpha=1.0
    )
    rpo_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        rpo_loss(**arguments | change)


def test_no_pairs_need_a_denominator():
    empty = torch.zeros(0, requires_grad=True)
    with pytest.raises(ValueError, match="no pairs and no num_pairs"):
        preference_loss(empty, torch.zeros(0, dtype=torch.int64), empty, beta=0.1, alpha=1.0)
    found, _ = preference_loss(empty, torch.zeros(0, dtype=torch.int64), empty, beta=0.1, alpha=1.0, num_pairs=4)
    assert found.item() == 0.0 and found.requires_grad
