"""Learning-rate schedules reach their marks."""

import pytest

from medtrain.trainer.config.settings import OptimConfig
from medtrain.trainer.train.schedule import lr_factor


def factors(steps, **settings):
    return [lr_factor(OptimConfig(**settings), step, steps) for step in range(steps)]


def test_warm_up_rises_linearly_and_reaches_the_peak_at_its_last_step():
    assert factors(10, warmup_steps=4, schedule="constant") == [0.25, 0.5, 0.75, 1.0, *[1.0] * 6]


def test_cosine_falls_from_the_peak_to_the_floor_at_the_last_step():
    found = factors(11, schedule="cosine", min_lr_ratio=0.2)
    assert found[0] == 1.0 and found[5] == pytest.approx(0.6) and found[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(found, found[1:], strict=False))


def test_wsd_is_stable_until_its_decay_and_ends_at_the_floor():
    found = factors(20, schedule="wsd", decay_steps=4, min_lr_ratio=0.0, warmup_steps=2)
    assert found[:2] == [0.5, 1.0]
    assert found[2:16] == [1.0] * 14
    assert found[16:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_one_step_is_a_schedule_too(schedule):
    assert 0 < factors(1, schedule=schedule)[0] <= 1
