"""Packing: every item once, within capacity, the same number of micro-batches a rank, balanced."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtrain.trainer.data.packing import check_capacity, pack
from medtrain.trainer.errors import InputError


def loads(plan, lengths):
    return np.array([[sum(lengths[i] for i in items) for items in ranks] for ranks in plan])


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(64, 300), st.integers(1, 9))
def test_every_item_once_within_capacity_and_as_many_micro_batches_on_each_rank(lengths, capacity, world_size):
    plan = pack(lengths, capacity, world_size)
    assert sorted(i for ranks in plan for items in ranks for i in items) == list(range(len(lengths)))
    assert {len(ranks) for ranks in plan} == {world_size}
    assert loads(plan, lengths).max() <= capacity
    # Best-fit decreasing never leaves two bins that would fit into one.
    assert (len(plan) - 1) * world_size * capacity < 2 * sum(lengths) + capacity
    by_rank = loads(plan, lengths)
    assert (by_rank.min(axis=1)[:-1] >= by_rank.max(axis=1)[1:]).all(), "a micro-batch mixes full and light ranks"
    assert by_rank[:-1].min(initial=1) > 0, "only the last may leave a rank without work"
    assert plan == pack(np.array(lengths), capacity, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_ranks_are_balanced_and_micro_batches_few(world_size):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1025, 3000)
    plan = pack(lengths, 4096, world_size)
    by_rank = loads(plan, lengths)
    assert len(plan) <= int(np.ceil(lengths.sum() / 4096 / world_size)) + 1
    # A step lasts as long as the fullest rank of each micro-batch: nothing is lost beyond a hundredth.
    assert by_rank.max(axis=1).sum() <= 1.01 * lengths.sum() / world_size


def test_the_last_micro_batch_is_as_full_as_the_others():
    lengths = [30] * 100
    by_rank = loads(pack(lengths, 300, 4), lengths)  # ten bins for best fit alone: 8 full, then 2 full beside 2 empty
    assert by_rank.shape == (3, 4) and by_rank.min() >= 240 and by_rank.max() <= 270


def test_an_overfull_spreading_gives_way_to_best_fit():
    # Spread longest first onto the least loaded, 6+4+4 would go over 12; best fit has 6+6 and 4+4+4.
    assert loads(pack([6, 6, 4, 4, 4], 12, 1), [6, 6, 4, 4, 4]).ravel().tolist() == [12, 12]
    assert loads(pack([6, 6, 4, 4, 4], 12, 2), [6, 6, 4, 4, 4]).tolist() == [[12, 12]]
    # Eleven bins filled to the brim for twelve ranks: even over twelve bins, spreading overfills one.
    lengths = [2] * 2 + [3] * 6 + [4] * 5 + [5] * 6 + [6] * 4 + [7] * 4 + [8]
    assert loads(pack(lengths, 12, 12), lengths).tolist() == [[12] * 11 + [0]]


def test_fewer_items_than_ranks_leave_empty_places_and_no_rank_out():
    assert sorted(map(len, pack([5, 7], 8, 4)[0])) == [0, 0, 1, 1]
    assert len(pack([5, 7], 8, 4)) == 1


def test_an_item_above_capacity_is_an_error_that_names_the_setting():
    check_capacity(8, 8, what="a window")
    with pytest.raises(InputError, match="'optim.micro_batch_tokens': too small for a pair .found 8; expected at least 9"):
        check_capacity(9, 8, what="a pair")


def test_packing_is_fast_enough_to_do_in_every_step():
    lengths = np.random.default_rng(1).integers(1, 2049, 4096)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        pack(lengths, 8192, 8)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1  # about 0.01 on an idle core
