"""Who ended a job decides whether it comes back: ranks that save and exit 85 do so for a warning and for scancel alike."""

from __future__ import annotations

import time

import pytest

from tests.processes import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

JOB = """#!/bin/bash
. launch/slurm.sh
run_in_job srun bash -c 'trap "exit 85" USR2 TERM; touch "$0"; for i in {1..900}; do sleep 0.2; done' "$1.${SLURM_RESTART_COUNT:-}"
"""


@pytest.fixture
def job(cluster, tmp_path):
    """A running job whose ranks save at once; its number."""
    script = tmp_path / "job.sh"
    script.write_text(JOB)
    number = cluster.run(
        "sbatch", "--parsable", "--requeue", f"--output={tmp_path}/job.out", str(script), str(tmp_path / "runs"),
        R1MEGA_HOME=str(REPOSITORY), R1MEGA_LOGS=str(tmp_path / "logs"),
    )  # fmt: skip
    wait_for(tmp_path / "runs.")
    yield number
    cluster.run("scancel", number)
    cluster.wait(number)


def wait_for(path, seconds=120):
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit, f"no {path}"
        time.sleep(0.1)


def test_a_cancelled_job_stays_down(cluster, job, tmp_path):
    cluster.run("scancel", job)
    found = cluster.wait(job)
    text = (tmp_path / "job.out").read_text()
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), text
    assert not (tmp_path / "runs.1").exists()


def test_a_job_that_was_warned_comes_back(cluster, job, tmp_path):
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_for(tmp_path / "runs.1")
    assert cluster.job(job)["Restarts"] == "1"
