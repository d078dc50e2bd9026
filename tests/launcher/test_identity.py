"""Who a rank is, from the variables that Slurm, Open MPI, MPICH, torchrun and DeepSpeed were seen to set."""

import pytest

from dpo_ds.errors import UserError
from dpo_ds.launcher.identity import Identity, name_meeting_place, ranks_of_nodes

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2,1,2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Identity(0, 1, 0, 1)),
        (TORCHRUN, Identity(5, 8, 1, 4)),
        (DEEPSPEED, Identity(3, 4, 1, 2)),
        (SRUN, Identity(4, 5, 1, 2)),
        (OPEN_MPI, Identity(1, 2, 0, 1)),
        (MPICH, Identity(2, 4, 0, 2)),
        (SRUN | TORCHRUN, Identity(5, 8, 1, 4)),  # torchrun in a Slurm job
        (OPEN_MPI | DEEPSPEED, Identity(3, 4, 1, 2)),  # deepspeed --launcher openmpi
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Identity(0, 1, 0, 1)),  # a batch script is no task
    ],
)
def test_a_rank_knows_its_place_under_every_launcher(environment, expected):
    assert Identity.from_environment(environment) == expected


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "rank 4 of 4 on its node"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE must be a whole number, got 'many'"),
        ({"RANK": "1", "LOCAL_RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-0"}, r"names this node and no rank of it.*agent"),
        ({"PET_NODE_RANK": "1", "PET_NNODES": "2"}, r"names this node and no rank of it.*agent"),
        (SRUN | {"SLURM_TASKS_PER_NODE": "2-1"}, "SLURM_TASKS_PER_NODE must be such as"),
    ],
)
def test_a_place_that_cannot_be_is_refused(environment, complaint):
    with pytest.raises(UserError, match=complaint):
        Identity.from_environment(environment)


def test_slurms_counts_are_read():
    assert ranks_of_nodes("8") == [8]
    assert ranks_of_nodes("2(x3),1") == [2, 2, 2, 1]


def test_ranks_meet_where_the_launcher_says_and_else_nowhere():
    pair = Identity(0, 2, 0, 1)
    given = {"MASTER_ADDR": "node7", "SLURM_JOB_ID": "45017"}
    name_meeting_place(pair, given)
    assert given == {"MASTER_ADDR": "node7", "SLURM_JOB_ID": "45017", "MASTER_PORT": "25017"}
    alone: dict[str, str] = {}
    name_meeting_place(Identity(0, 1, 0, 1), alone)
    assert alone == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with pytest.raises(UserError, match="MASTER_ADDR is not set, so 2 ranks cannot meet"):
        name_meeting_place(pair, {})
