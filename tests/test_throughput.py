import torch

from dpo_ds.throughput import StepCost, Stopwatch, matmul_flops


def test_the_head_is_counted_on_scored_tokens_only():
    assert StepCost(backbone=100, head=10, passes=8).flops(tokens=7, scored=3) == 8 * (700 + 30)


def test_laps_add_up_to_the_time_that_passed():
    waits = []
    clock = Stopwatch(lambda: waits.append(1))
    clock.lap("first")
    clock.lap("second")
    assert len(waits) == 2
    assert 0 <= sum(clock.laps.values()) <= clock.total()


def test_the_matmul_rate_is_that_of_a_real_device():
    assert 1e8 < matmul_flops(torch.device("cpu"), torch.float32) < 1e16
