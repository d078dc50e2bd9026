"""What the scheduler calls a job."""

from dpo_ds.launcher.job import Job, job_of


def test_a_job_keeps_its_name_when_it_is_requeued_and_an_array_has_one():
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "align", "SLURM_JOB_PARTITION": "gpus"}
    assert job_of(slurm) == Job("slurm-12", ("slurm", "align", "gpus"))
    assert job_of(slurm | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_RESTART_COUNT": "3"}) == Job(
        "slurm-7", ("slurm", "align", "gpus")
    )
    assert job_of({"PBS_JOBID": "9.server", "PBS_JOBNAME": ""}) == Job("pbs-9.server", ("pbs",))


def test_no_scheduler_is_no_job():
    assert job_of({"HOME": "/home/me", "SLURM_JOB_ID": ""}) is None
