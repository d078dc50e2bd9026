"""One fault of each phase; ``make faults`` runs the whole matrix."""

from pathlib import Path

import pytest

from tests.faults.matrix import MATRIX, ONE_A_PHASE, PHASES, Fault, Runs, suffer

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def runs(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_chat, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("fault", ONE_A_PHASE, ids=str)
def test_a_run_goes_on_behind_a_fault_and_leaves_nothing(fault: Fault, runs: Runs, tmp_path: Path):
    suffer(fault, runs, tmp_path / "run")


def test_every_phase_has_its_fault_and_the_matrix_holds_a_hundred():
    assert {fault.phase for fault in ONE_A_PHASE} == set(PHASES)
    assert set(ONE_A_PHASE) <= set(MATRIX)
    assert len(set(MATRIX)) >= 100
