import numpy as np
import torch

from dpo_ds.throughput import StepCost, Stopwatch, matmul_flops


def test_the_head_is_counted_on_scored_tokens_only():
    cost = StepCost(backbone=100, head=10, attention=2, passes=8)
    flops = cost.flops(tokens=np.array([7, 1]), scored=np.array([3, 1]), attended=np.array([20.0, 0.5]))
    assert flops.tolist() == [8 * (700 + 30 + 40), 8 * (100 + 10 + 1)]


def test_laps_add_up_to_the_time_that_passed():
    waits = []
    clock = Stopwatch(lambda: waits.append(1))
    clock.lap("first")
    clock.lap("second")
    assert len(waits) == 2
    assert 0 <= sum(clock.laps.values()) <= clock.total()


def test_the_matmul_rate_is_that_of_a_real_device():
    assert 1e8 < matmul_flops(torch.device("cpu"), torch.float32) < 1e16
