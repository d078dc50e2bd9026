"""What a run says when it goes wrong: by hand, and on real ranks."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_ds.watchdog import Watchdog
from tests.ranks import REPOSITORY, run_ranks
from tests.test_resume import write_run
from tests.test_run import TRAIN

FAULTY = REPOSITORY / "tests/faulty.py"


def step(chosen: float, rejected: float = -1.0, length: float = 10.0) -> dict[str, float]:
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "lengths/chosen": length,
        "learning_rate": 5e-7,
    }


def watchdog(**bounds) -> Watchdog:
    return Watchdog(**{"not_moving_steps": None, "chosen_drop": None, "beta": 0.1, "reduction": "sum", **bounds})


def test_rewards_of_exactly_zero_are_told_of_once_and_not_before_their_time():
    dog = watchdog(not_moving_steps=3)
    said = [dog.look(n, step(0.0, 0.0)) for n in range(1, 9)]
    assert [bool(finding) for finding in said] == [False, False, False, True, False, False, False, False]
    assert "step 4: the policy does not move" in said[3]
    assert "learning rate of 5e-07" in said[3]


def test_a_policy_that_moves_a_little_in_between_is_not_told_of():
    dog = watchdog(not_moving_steps=2)
    assert not any(dog.look(n, step(1e-9 if n % 3 == 0 else 0.0, 0.0)) for n in range(1, 20))


def test_chosen_responses_that_collapse_are_told_of_once():
    # A reward of -1.05 at beta 0.1 is 10.5 nats, over 10 tokens 1.05 a token.
    dog = watchdog(chosen_drop=1.0)
    assert dog.look(1, step(-0.95)) is None
    assert "1.05 nats a token" in dog.look(2, step(-1.05))
    assert dog.look(3, step(-2.0)) is None


def test_rewards_of_averaged_log_probs_are_per_token_already():
    assert watchdog(chosen_drop=1.0, reduction="mean").look(1, step(-0.09)) is None
    assert "1.10 nats a token" in watchdog(chosen_drop=1.0, reduction="mean").look(1, step(-0.11))


def test_nothing_is_told_of_what_is_switched_off():
    dog = watchdog()
    assert not any(dog.look(n, step(reward, reward)) for n, reward in enumerate([0.0] * 50 + [-1000.0]))


def lines_with(start: str, said: list[str]) -> list[str]:
    return [line[line.index(start) :] for part in said for line in part.splitlines() if start in line]


@pytest.mark.ranks
def test_a_policy_that_does_not_move_can_be_the_end(tiny_chat, tmp_path):
    run = write_run(tmp_path / "run", tiny_chat, train={"learning_rate": 1e-30})
    bounds = ["--watchdogs.not_moving_steps", "2", "--watchdogs.action", "stop"]
    finished = run_ranks(1, [TRAIN, "--config", run / "run.yaml", *bounds], folder=run)
    assert finished.codes == [1]
    [error] = lines_with("error: ", finished.errors)
    assert error.startswith("error: step 3: the policy does not move")
    assert error.endswith("; the last checkpoint is " + str(run / "out/checkpoints/step-00000002"))


@pytest.mark.ranks
def test_a_gradient_that_is_not_finite_ends_the_run_before_anything_is_saved(tiny_chat, tmp_path):
    # At step 1 all margins are 0 and the loss is ln 2, but its derivative overflows float32.
    run = write_run(tmp_path / "run", tiny_chat, checkpoint={"every": 1}, data={"shuffle": False})
    finished = run_ranks(2, [TRAIN, "--config", run / "run.yaml", "--loss.beta", "1e38"], folder=run)
    assert finished.codes[0] == 1
    [error] = lines_with("error: ", finished.errors)
    assert "step 1: the gradient's norm is not finite, with a finite loss, for 4 pairs (" in error
    assert all(f"pairs.jsonl row {row}" in error for row in (1, 2, 3, 4))
    assert "there is no checkpoint" in error
    assert not (run / "out/checkpoints").exists()
    assert not (run / "out/export").exists()


@pytest.mark.ranks
def test_an_exception_on_one_rank_ends_all_ranks_within_seconds(tiny_chat, tmp_path):
    run = write_run(tmp_path / "run", tiny_chat)
    front = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2"]
    finished = subprocess.run(
        [*map(str, front), str(FAULTY), "raise", "3", "1", str(TRAIN), "--config", str(run / "run.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    ended = time.monotonic()
    assert finished.returncode != 0
    assert "ValueError: the disk is on fire" in finished.stderr
    [fault] = lines_with("fault at ", [finished.stdout])
    assert ended - float(fault.split()[-1]) < 15
    assert not (run / "out/export").exists()


@pytest.mark.ranks
def test_a_hung_rank_ends_the_run_with_the_phase_and_the_limit_named(tiny_chat, tmp_path):
    run = write_run(tmp_path / "run", tiny_chat, train={"learning_rate": 1e-30})
    arguments = ["--config", run / "run.yaml", "--timeouts.train_s", "4", "--watchdogs.not_moving_steps", "1"]
    finished = run_ranks(2, [FAULTY, "hang", "3", "1", TRAIN, *arguments], folder=run, timeout_s=100)
    assert 1 in finished.codes
    errors = lines_with("error: ", finished.errors)
    assert errors
    for error in errors:
        assert "has made no progress in phase train for 4 s (timeouts.train_s) and stands in policy.py" in error
        assert "(step)" in error
    # A watchdog that is not asked to stop warns, once, on one rank.
    [warning] = lines_with("warning: step", finished.errors)
    assert "step 2: the policy does not move" in warning
