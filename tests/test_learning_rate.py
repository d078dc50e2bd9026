import math

import pytest

from dpo_ds.learning_rate import learning_rate


def rates(schedule, *, steps=10, warmup_ratio=0.2):
    return [
        learning_rate(step, steps=steps, peak=1.0, schedule=schedule, warmup_ratio=warmup_ratio)
        for step in range(1, steps + 1)
    ]


def test_the_warm_up_rises_linearly_to_the_peak():
    assert rates("constant") == pytest.approx([0.5] + [1.0] * 9)
    assert rates("linear", warmup_ratio=0.4)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_part_of_a_step_of_warm_up_is_a_whole_one():
    # 0.25 of 10 steps are 2.5.
    assert rates("constant", warmup_ratio=0.25)[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_linear_falls_evenly_towards_zero_behind_the_last_step():
    assert rates("linear")[2:] == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine_falls_along_half_a_wave():
    assert rates("cosine")[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 1.0])
def test_no_step_has_a_rate_of_zero(schedule, warmup_ratio):
    assert min(rates(schedule, warmup_ratio=warmup_ratio)) > 0
    assert max(rates(schedule, warmup_ratio=warmup_ratio)) == 1
