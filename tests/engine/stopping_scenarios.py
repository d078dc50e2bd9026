"""What two real ranks do in the tests of stopping: ``python stopping_scenarios.py SCENARIO ...`` runs these on both."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from dpo_ds.engine import World
from dpo_ds.engine.meeting import Meeting
from dpo_ds.engine.stopping import Agreement, stoppable
from dpo_ds.errors import RunError, Stopped
from dpo_ds.launcher.identity import Identity
from dpo_ds.launcher.marker import mark_stopped
from dpo_ds.launcher.signals import Reason, StopRequest

# Asked at (rank, question): the signals that the rank sends itself before it.
WAYS_TO_BE_ASKED = {
    "one rank": ({(1, 5): [signal.SIGTERM]}, Reason.SIGTERM, 6),
    "both at different times": ({(0, 4): [signal.SIGUSR1], (1, 7): [signal.SIGUSR1]}, Reason.SIGUSR1, 5),
    "both at once, with two signals": ({(0, 3): [signal.SIGINT], (1, 3): [signal.SIGTERM]}, Reason.SIGTERM, 4),
    "one rank, twice": ({(0, 2): [signal.SIGUSR2, signal.SIGUSR2], (0, 3): [signal.SIGUSR2]}, Reason.SIGUSR2, 3),
    "before the first question": ({(1, 1): [signal.SIGTERM]}, Reason.SIGTERM, 2),
}


def send(number: signal.Signals, request: StopRequest) -> None:
    os.kill(os.getpid(), number)
    while request.reason is None:
        time.sleep(0.001)


def all_ranks_stop_at_the_same_question(world: World) -> None:
    for name, (sent, reason, last) in WAYS_TO_BE_ASKED.items():
        with StopRequest() as request:
            agreement = Agreement(request)
            for question in range(1, 20):
                for number in sent.get((world.rank, question), ()):
                    send(number, request)
                time.sleep(0.003 * (question % 3) * (world.rank + 1))  # neither rank is always the first
                if agreement.ask():
                    break
            assert agreement.ask() is agreement.settle() is reason, name
            assert world.gather(question) == [last, last], name


def one_ranks_deadline_stops_both(world: World) -> None:
    agreement = Agreement(StopRequest(stop_after_s=0.2 if world.rank == 1 else None))
    questions = 1
    while not (reason := agreement.ask()):
        questions += 1
        time.sleep(0.01)
    assert reason is Reason.STOP_AFTER
    assert len(set(world.gather(questions))) == 1


def nothing_is_asked_of_a_run_that_nobody_stops(world: World) -> None:
    agreement = Agreement(StopRequest(stop_after_s=3600))
    assert not any(agreement.ask() for _ in range(200))
    assert agreement.settle() is None


def a_rank_does_not_wait_for_another_that_is_one_question_behind(world: World) -> None:
    agreement = Agreement(StopRequest())
    agreement.ask()
    world.barrier()
    if world.rank == 1:
        time.sleep(1)
    started = time.perf_counter()
    agreement.ask()
    assert time.perf_counter() - started < 0.5
    agreement.settle()


def a_hung_rank_is_named(world: World) -> None:
    agreement = Agreement(StopRequest(), timeout=timedelta(seconds=1))
    agreement.ask()
    agreement.ask()
    if world.rank == 1:
        time.sleep(3)
        return
    agreement.ask()
    started = time.monotonic()
    with pytest.raises(RunError, match="whether to stop cannot be agreed: another rank is gone, or is more than 1 s"):
        agreement.ask()
    assert time.monotonic() - started < 2.5


def a_dead_rank_is_named(world: World) -> None:
    agreement = Agreement(StopRequest())
    agreement.ask()
    world.barrier()
    if world.rank == 1:
        os._exit(0)
    started = time.monotonic()
    with pytest.raises(RunError, match="another rank is gone"):
        any(agreement.ask() for _ in range(3))
    assert time.monotonic() - started < 5
    os._exit(0)  # not through a group that lacks a rank


def work_until_stopped(world: World, folder: Path) -> None:
    with stoppable(StopRequest(), world=world, folder=folder) as agreement:
        world.barrier()
        assert not (folder / "RESUME.json").exists()
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        while not (reason := agreement.ask()):
            time.sleep(0.01)
        if world.rank == 0:
            time.sleep(0.5)  # what rank 0 alone has to finish
        raise Stopped(reason.name, step=3, checkpoint="checkpoints/step-00000003")


def ranks_leave_together(world: World) -> None:
    folder = Path("out")
    if world.rank == 0:
        mark_stopped(folder, Stopped("an earlier run", step=1, checkpoint=None))
    with pytest.raises(Stopped, match="SIGTERM"):
        work_until_stopped(world, folder)
    assert (folder / "RESUME.json").exists()


if __name__ == "__main__":
    identity = Identity.from_environment()
    with Meeting(identity) as meeting:
        if identity.speaks_for_node:
            meeting.vouch({})
        meeting.wait()
    ranks = World.join(identity, meeting)
    for scenario in sys.argv[1:]:
        globals()[scenario](ranks)
    sys.exit()
