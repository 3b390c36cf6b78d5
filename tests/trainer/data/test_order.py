"""The global order: purity, coverage, shares, seeking, the refusal of empty steps."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtrain.trainer.data.order import GlobalOrder, sorting_permutation, source_shares
from medtrain.trainer.errors import InputError

item_lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(np.array)
sources = st.lists(st.tuples(item_lengths, st.integers(1, 20)), min_size=1, max_size=3)


def make(drawn, extra, seed):
    lengths = [ls for ls, _ in drawn]
    shares = source_shares([weight for _, weight in drawn], [ls.sum() for ls in lengths])
    least = min(math.ceil(int(ls.max()) / share) for ls, share in zip(lengths, shares, strict=True))
    return GlobalOrder(lengths, shares, least + extra, seed)


def stream(order, source, steps):
    parts = [order.step(s) for s in range(steps)]
    return np.concatenate([step.item_ids[step.source_ids == source] for step in parts])


@settings(deadline=None)
@given(sources, st.integers(0, 40), st.integers(0, 2**40))
def test_every_epoch_of_a_source_holds_each_item_exactly_once(drawn, extra, seed):
    order = make(drawn, extra, seed)
    for i, (lengths, _) in enumerate(drawn):
        items = stream(order, i, 12)
        for epoch in range(len(items) // len(lengths)):
            part = items[epoch * len(lengths) : (epoch + 1) * len(lengths)]
            assert sorted(part) == list(range(len(lengths)))


@settings(deadline=None)
@given(sources, st.integers(0, 40), st.integers(0, 2**40))
def test_the_stream_does_not_depend_on_the_step_size(drawn, extra, seed):
    small, large = make(drawn, 0, seed), make(drawn, extra, seed)
    for i in range(len(drawn)):
        a, b = stream(small, i, 10), stream(large, i, 10)
        n = min(len(a), len(b))
        assert np.array_equal(a[:n], b[:n])


@settings(deadline=None)
@given(sources, st.integers(0, 40), st.integers(0, 9))
def test_a_step_takes_its_share_by_tokens_to_within_an_item_and_is_never_empty(drawn, extra, seed):
    order = make(drawn, extra, seed)
    taken = np.zeros(len(drawn))
    for s in range(10):
        step = order.step(s)
        assert len(step.item_ids) > 0
        for i, (lengths, _) in enumerate(drawn):
            of_source = step.source_ids == i
            assert np.array_equal(step.lengths[of_source], lengths[step.item_ids[of_source]])
            taken[i] += step.lengths[of_source].sum()
            # Taken is all that starts before the boundary: its last item may reach past it, but not by a whole item.
            boundary = math.floor((s + 1) * order.step_size * order.shares[i])
            assert boundary <= taken[i] < boundary + lengths.max()


@settings(deadline=None)
@given(sources, st.integers(0, 40), st.integers(0, 9), st.integers(0, 10**6))
def test_seeking_a_step_equals_walking_to_it(drawn, extra, seed, start):
    walker, seeker = make(drawn, extra, seed), make(drawn, extra, seed)
    for s in range(start, start + 5):
        walked = walker.step(s)
    sought = seeker.step(start + 4)
    assert np.array_equal(walked.source_ids, sought.source_ids)
    assert np.array_equal(walked.item_ids, sought.item_ids)


def test_seed_source_and_epoch_each_give_another_permutation():
    lengths = [np.ones(50, np.int64)] * 2
    one, other = (GlobalOrder(lengths, [Fraction(1, 2)] * 2, 100, seed) for seed in (0, 1))
    permutations = [one.step(0).item_ids[:50], one.step(0).item_ids[50:], one.step(1).item_ids[:50]]
    permutations.append(other.step(0).item_ids[:50])
    assert len({tuple(p) for p in permutations}) == 4


def test_the_order_is_the_same_in_every_version():
    """A resumed run must find its order again; these numbers may never change."""
    step = GlobalOrder([np.ones(8, np.int64)], [Fraction(1)], 8, 17).step(3)
    assert step.item_ids.tolist() == [4, 1, 7, 3, 5, 2, 0, 6]


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 99), st.sampled_from([64, 12, 5]), st.booleans())
def test_keys_sort_as_a_stable_argsort_says_also_where_their_high_bits_or_all_are_equal(n, seed, bits, high):
    keys = np.random.default_rng(seed).integers(0, 2**bits - 1, n, dtype=np.uint64)
    keys <<= np.uint64(64 - bits if high else 0)
    assert np.array_equal(sorting_permutation(keys), np.argsort(keys, kind="stable"))


def test_equal_draws_keep_the_order_of_their_items(monkeypatch):
    draws = np.array([2, 1, 2, 1, 0, 2], dtype=np.uint64).repeat(50)
    monkeypatch.setattr(np.random, "PCG64", lambda _: SimpleNamespace(random_raw=lambda n: draws))
    order = GlobalOrder([np.ones(300, np.int64)], [Fraction(1)], 300, 0)
    assert np.array_equal(order.step(0).item_ids, np.argsort(draws, kind="stable"))


def test_a_long_stream_starts_where_the_lengths_before_it_end():
    """Several blocks of kept starts, against all starts at once."""
    lengths = np.random.default_rng(0).integers(1, 50, 5000).astype(np.int32)
    order = GlobalOrder([lengths], [Fraction(1)], 777, 5)
    keys = np.random.PCG64(np.random.SeedSequence([5, 0, 0])).random_raw(5000)
    permutation = np.argsort(keys, kind="stable")
    starts = np.cumsum(lengths[permutation]) - lengths[permutation]
    for step in range(int(lengths.sum()) // 777):
        expected = permutation[(starts >= step * 777) & (starts < (step + 1) * 777)]
        assert order.step(step).item_ids.tolist() == expected.tolist()


def test_pairs_and_natural_shares_use_all_sources_up_together():
    lengths = [np.ones(n, np.int64) for n in (30, 60, 10)]
    order = GlobalOrder(lengths, source_shares([None] * 3, [30, 60, 10]), 10, 0, setting="optim.batch_pairs")
    counts = np.array([np.bincount(order.step(s).source_ids, minlength=3) for s in range(10)])
    assert (counts == [3, 6, 1]).all()


def test_weights_are_shares_and_exact():
    assert source_shares([0.1, 0.2], [5, 5]) == [Fraction(1, 3), Fraction(2, 3)]
    assert source_shares([None, None], [1, 3]) == [Fraction(1, 4), Fraction(3, 4)]
    with pytest.raises(InputError, match="field 'weight'.*a weight for 1 of 2 sources"):
        source_shares([0.5, None], [1, 1])


def test_a_step_that_could_be_empty_is_refused_with_the_least_size_that_works():
    lengths, shares = [np.array([3, 70]), np.array([9])], [Fraction(9, 10), Fraction(1, 10)]
    with pytest.raises(InputError, match=r"field 'optim.batch_tokens'.*found 77; expected at least 78"):
        GlobalOrder(lengths, shares, 77, 0)
    assert all(len(GlobalOrder(lengths, shares, 78, 0).step(s).item_ids) for s in range(50))
    with pytest.raises(InputError, match="optim.batch_pairs"):
        GlobalOrder([np.ones(5)] * 3, [Fraction(1, 3)] * 3, 2, 0, setting="optim.batch_pairs")


def test_a_tiny_source_passed_many_times_in_a_step_is_taken_whole_each_time():
    order = GlobalOrder([np.array([1, 2]), np.full(100, 5)], [Fraction(1, 2)] * 2, 600, 0)
    step = order.step(1)
    assert np.bincount(step.item_ids[step.source_ids == 0]).tolist() == [100, 100]
