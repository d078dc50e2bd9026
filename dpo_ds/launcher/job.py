"""What the scheduler calls the job that this process is part of."""

from collections.abc import Mapping
from typing import NamedTuple

# Each scheduler's variables: the job's id, which a restart keeps, and what people know it by.
_SCHEDULERS = {
    "slurm": (("SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID"), ("SLURM_JOB_NAME", "SLURM_JOB_PARTITION")),
    "skypilot": (("SKYPILOT_TASK_ID",), ()),
    "pbs": (("PBS_JOBID",), ("PBS_JOBNAME", "PBS_QUEUE")),
    "lsf": (("LSB_JOBID",), ("LSB_JOBNAME", "LSB_QUEUE")),
}


class Job(NamedTuple):
    """A scheduler's job.

    Attributes:
        name: of the scheduler and the job's id, as in ``slurm-4711``; a job that is requeued keeps it.
        tags: the scheduler, and what people know the job by.
    """

    name: str
    tags: tuple[str, ...]


def job_of(environment: Mapping[str, str]) -> Job | None:
    """Returns the job that an environment belongs to, None where no scheduler has made it."""
    for scheduler, (ids, known_by) in _SCHEDULERS.items():
        for variable in ids:
            if environment.get(variable):
                tags = [environment[name] for name in known_by if environment.get(name)]
                return Job(f"{scheduler}-{environment[variable]}", (scheduler, *tags))
    return None
