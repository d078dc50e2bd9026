"""The arithmetic of a rank's memory, beside DeepSpeed's own estimate and by hand."""

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

from dpo_ds.memory import (
    Parameters,
    Peaks,
    Share,
    gathered,
    keeps_for_backward,
    peak,
    shares_of_policy,
    shares_of_reference,
)

LARGE = Parameters(total=8_000_000_000, trained=8_000_000_000, whole=0, largest=500_000_000)
PEAKS = Peaks(training=3_000, scoring=1_000)


def shares(offload: dict[str, str], ranks: int = 16) -> list[Share]:
    zero = {section: {"device": device} for section, device in offload.items()}
    return shares_of_policy(LARGE, {"zero_optimization": zero}, itemsize=2, ranks=ranks, activations=PEAKS)


@pytest.mark.parametrize(
    ("offload", "cpu_offload", "cpu_offload_params"),
    [({}, False, False), ({"offload_optimizer": "cpu"}, True, False)],
)
def test_model_states_are_those_of_deepspeeds_estimate(offload, cpu_offload, cpu_offload_params):
    _, device, of_a_layer = estimate_zero3_model_states_mem_needs(
        total_params=LARGE.total,
        largest_layer_params=LARGE.largest,
        num_gpus_per_node=8,
        num_nodes=2,
        cpu_offload=cpu_offload,
        cpu_offload_params=cpu_offload_params,
    )
    lasting = [share for share in shares(offload) if share.phase == "all" and "bucket" not in share.purpose]
    assert sum(share.device for share in lasting) == pytest.approx(device - of_a_layer)


def test_what_is_offloaded_is_elsewhere():
    on_gpu, on_host, in_files = (
        shares(offload)
        for offload in (
            {},
            {"offload_optimizer": "cpu", "offload_param": "cpu"},
            {"offload_optimizer": "nvme"},
        )
    )

    def sums(some: list[Share], purpose: str) -> tuple[float, float, float]:
        (found,) = (share for share in some if share.purpose == purpose)
        return found.device, found.host, found.files

    states, weights = 12 * 5e8, 2 * 5e8
    assert [sums(some, "masters and optimizer states") for some in (on_gpu, on_host, in_files)] == [
        (states, 0, 0),
        (0, states, 0),
        (0, 0, states),
    ]
    assert [sums(some, "policy's weights") for some in (on_gpu, on_host)] == [(weights, 0, 0), (0, weights, 0)]


def test_the_most_is_all_that_stays_and_the_phase_that_needs_most():
    some = [
        Share("a", device=10, host=1),
        Share("b", device=5, phase="scoring"),
        Share("c", device=6, host=7, phase="training"),
        Share("d", device=3, phase="training"),
        Share("e", device=8, phase="update"),
    ]
    assert peak(some)[1:4] == (19, 8, 0)
    assert peak([]).device == 0


def test_a_reference_holds_weights_and_little_else():
    config = {"zero_optimization": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 10_000_000}}
    found = peak(shares_of_reference(LARGE, config, itemsize=2, ranks=16, activations=PEAKS))
    assert found.device == 2 * 5e8 + 2 * 510_000_000 + PEAKS.scoring


@pytest.mark.parametrize(
    ("zero", "whole", "stays"),
    [
        ({}, 1_000_000_000, False),
        ({"stage3_max_reuse_distance": 0}, 550_000_000, False),
        ({"stage3_max_live_parameters": 2e10, "stage3_max_reuse_distance": 2e10}, 8_000_000_000, True),
    ],
)
def test_what_is_whole_at_one_time_follows_the_ds_config(zero, whole, stays):
    assert gathered(LARGE, zero) == whole
    assert keeps_for_backward(LARGE, zero) is stays
