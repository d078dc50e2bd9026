import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_ds.data.processes import map_in_order
from dpo_ds.errors import RunError

ITEMS = list(range(20))


def late_if_even(item):
    time.sleep(0.02 * (item % 2 == 0))
    return item, os.getpid()


def kill_itself(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_from_several_processes_and_items_are_taken_as_they_are_needed():
    taken = []
    results = map_in_order(late_if_even, (taken.append(n) or n for n in ITEMS), count=len(ITEMS), processes=2)
    first = next(results)
    # Two for each process wait, and the one that was asked for.
    assert taken == [0, 1, 2, 3, 4]
    found = [first, *results]
    assert [item for item, _ in found] == ITEMS
    assert len({process for _, process in found} - {os.getpid()}) == 2


def test_one_process_does_alone_what_is_quickly_done():
    for processes in (1, None):
        found = list(map_in_order(late_if_even, ITEMS, count=len(ITEMS), processes=processes))
        assert found == [(item, os.getpid()) for item in ITEMS]


def test_other_processes_come_once_the_rest_would_take_long():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core only")
    # After half a second 50 of 10,000 are done, so the rest would take minutes.
    found = [
        result
        for result, _ in zip(
            map_in_order(late_if_even, range(10_000), count=10_000, processes=None), range(100), strict=False
        )
    ]
    assert [item for item, _ in found] == list(range(100))
    assert found[0][1] == os.getpid() != found[-1][1]


def test_a_killed_process_is_named_with_the_remedy():
    with pytest.raises(RunError, match=r"one of 2 processes that tokenize was killed.*lower data.processes"):
        list(map_in_order(kill_itself, ITEMS, count=len(ITEMS), processes=2))


SLEEPER = """
import sys, time
from dpo_ds.data.processes import map_in_order
from tests.data.test_processes import late_if_even
if __name__ == "__main__":
    for _, process in map_in_order(late_if_even, range(10**6), count=10**6, processes=1 + 1):
        print(process, flush=True)
"""


def test_the_processes_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    parent = subprocess.Popen([sys.executable, tmp_path / "sleeper.py"], stdout=subprocess.PIPE, text=True)
    workers = {int(parent.stdout.readline()) for _ in range(10)}
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while alive := [worker for worker in workers if os.path.exists(f"/proc/{worker}")]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
