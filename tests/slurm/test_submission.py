"""Slurm takes what `r1mega plan --sbatch` writes."""

from pathlib import Path

import pytest

from r1mega.plan.command import Job, plan_job
from r1mega.plan.submission import submission
from r1mega.plan.workload import Lengths
from tests.processes import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_slurm_would_start_it_on_two_machines(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    job = Job(Path("configs/nano/sft.yaml"), ["seed=3"], 16, "h100-80", Lengths(80), 1.0, per_node=8)
    (tmp_path / "job.sh").write_text(submission(job, plan_job(job)))
    number = cluster.run("sbatch", "--parsable", "--hold", tmp_path / "job.sh", "steps=2", R1MEGA_HOME=str(REPOSITORY))
    found = cluster.job(number)
    cluster.run("scancel", number)
    assert found["NumNodes"].startswith("2") and (found["JobName"], found["Requeue"]) == ("r1mega-sft", "1")
    assert found["JobState"] == "PENDING" and found["Reason"] == "JobHeldUser"
