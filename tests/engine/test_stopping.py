"""Two real ranks that are asked to stop: one of them, both, by a deadline; and ranks that cannot answer."""

import json
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY, run_ranks

pytestmark = pytest.mark.ranks

SCENARIOS = REPOSITORY / "tests/engine/stopping_scenarios.py"


def run(folder: Path, *scenarios: str) -> list[str]:
    return run_ranks(2, [SCENARIOS, *scenarios], folder=folder, timeout_s=60).expect_success().outputs


def test_ranks_agree_and_leave_together(tmp_path):
    run(
        tmp_path,
        "all_ranks_stop_at_the_same_question",
        "one_ranks_deadline_stops_both",
        "nothing_is_asked_of_a_run_that_nobody_stops",
        "a_rank_does_not_wait_for_another_that_is_one_question_behind",
        "ranks_leave_together",
    )
    marker = json.loads((tmp_path / "out/RESUME.json").read_text())
    assert (marker["reason"], marker["step"], marker["command_exit_code"]) == ("SIGTERM", 3, 200)


def test_a_rank_that_does_not_answer_is_an_error_not_a_hang(tmp_path):
    run(tmp_path, "a_hung_rank_is_named", "a_dead_rank_is_named")
