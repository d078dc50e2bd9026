"""Two real ranks that stand still, that disagree about what comes next, or whose gradients are not finite."""

from pathlib import Path

import pytest

from tests.ranks import REPOSITORY, Finished, run_ranks

pytestmark = pytest.mark.ranks

SCENARIOS = REPOSITORY / "tests/engine/patience_scenarios.py"


def start(folder: Path, *scenarios: str, model: Path, **env: str) -> Finished:
    return run_ranks(2, [SCENARIOS, *scenarios, model], folder=folder, env=env or None, timeout_s=100)


def test_a_rank_that_stands_still_ends_by_the_clock_and_before_its_collectives(tmp_path, tiny_models):
    finished = start(
        tmp_path,
        "every_group_is_patient_for_longer_than_the_clock",
        "a_rank_that_progresses_lives_on_and_one_that_waits_ends",
        model=tiny_models["llama"],
    )
    assert all(said.endswith("alive\n") for said in finished.outputs)
    assert 1 in finished.codes
    errors = [line for said in finished.errors for line in said.splitlines()]
    assert errors
    assert all("made no progress in phase train for 3 s (timeouts.train_s)" in error for error in errors)


def test_gradients_that_are_not_finite_move_nothing_and_another_order_of_collectives_is_named(tmp_path, tiny_models):
    start(
        tmp_path,
        "a_gradient_that_is_not_finite_leaves_the_weights_alone",
        "another_order_of_collectives_is_named",
        model=tiny_models["llama"],
        TORCH_DISTRIBUTED_DEBUG="DETAIL",
    ).expect_success()
