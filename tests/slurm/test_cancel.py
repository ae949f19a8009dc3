"""Who ended a job decides whether it comes back: ranks that save and exit 85 do so for a warning and for scancel alike. A machine
that is taken, or lost, brings it back as well.
"""

from __future__ import annotations

import sys
import time

import pytest

from tests.processes import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

JOB = """#!/bin/bash
. launch/slurm.sh
run_in_job srun bash -c 'trap "exit 85" USR2 TERM; touch "$0"; for i in {1..900}; do [ -e "${0%.*}.end" ] && exit; sleep 0.2; done' "$1.${SLURM_RESTART_COUNT:-}"
"""

SPARE = JOB.replace("run_in_job", "R1MEGA_SPARE_NODES=1 SECONDS_BETWEEN_LOOKS=1; run_in_job"), "--no-kill"
LONG_STEP = """#!/bin/bash
. launch/slurm.sh
run_in_job srun bash -c 'trap "" USR2; echo "${0%.*}" > "$R1MEGA_SAY_RUN_DIR"; touch "$0"; exec sleep 300' "$1.${SLURM_RESTART_COUNT:-}"
"""


@pytest.fixture
def job(cluster, tmp_path, request):
    """A running job of two machines whose ranks save at once; its number. Parameter: another script, options of sbatch."""
    script, (text, *options) = tmp_path / "job.sh", getattr(request, "param", [JOB])
    script.write_text(text)
    (tmp_path / "runs/checkpoints/step_000002").mkdir(parents=True)
    (tmp_path / "runs/checkpoints/step_000002/manifest.json").write_text("{}")
    number = cluster.run(
        "sbatch", "--parsable", "--requeue", "--nodes=2", "--ntasks-per-node=1", *options, f"--output={tmp_path}/job.out", str(script), str(tmp_path / "runs"),
        R1MEGA_HOME=str(REPOSITORY), R1MEGA_LOGS=str(tmp_path / "logs"), R1MEGA_PYTHON=sys.executable, R1MEGA_LAST_SECONDS="45",
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


@pytest.mark.parametrize("job", [[JOB], SPARE], ids=["", "also with a spare machine"], indirect=True)
def test_a_cancelled_job_stays_down(cluster, job, tmp_path):
    cluster.run("scancel", job)
    found = cluster.wait(job)
    text = (tmp_path / "job.out").read_text()
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), text
    assert not (tmp_path / "runs.1").exists()


def test_a_job_that_was_warned_comes_back_and_what_waits_for_it_goes_on(cluster, job, tmp_path):
    """The next stage's job, as launch/pipeline.sh submits it."""
    command = [
        f"--dependency=afterok:{job}",
        "--kill-on-invalid-dep=yes",
        f"--output={tmp_path}/next.out",
        "--wrap=true",
    ]
    following = cluster.run("sbatch", "--parsable", *command)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_for(tmp_path / "runs.1")
    assert cluster.job(job)["Restarts"] == "1"
    assert cluster.job(following)["JobState"] == "PENDING"
    (tmp_path / "runs.end").touch()
    assert cluster.wait(following)["JobState"] == "COMPLETED"


def test_a_job_whose_machines_are_taken_comes_back(cluster, job, tmp_path):
    """A preemption: SIGTERM without the warning before it, as scancel's."""
    command = ["--partition=urgent", "--nodes=3", "--exclusive", f"--output={tmp_path}/urgent.out", "--wrap=sleep 1"]
    urgent = cluster.run("sbatch", "--parsable", *command)
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    wait_for(tmp_path / "runs.1")
    assert cluster.job(job)["Restarts"] == "1", (tmp_path / "job.out").read_text()


@pytest.mark.parametrize(
    ("job", "lost"), [([JOB], 0), ([JOB], 1), ([*SPARE, "--gpus-per-node=1"], 0)],
    ids=["that of the script", "another", "that of the script of a job with a spare one"], indirect=["job"],
)  # fmt: skip
def test_a_job_whose_machine_is_lost_comes_back_on_others(cluster, job, lost, tmp_path, request):
    """kill -9 of the machine's slurmd and of all that it had started: of the first one the script too, so that nobody is left to ask
    for a requeue but Slurm; nor does Slurm with --no-kill.
    """
    before = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    assert before[0] == cluster.job(job)["BatchHost"]
    if "--no-kill" in request.node.callspec.params["job"]:  # the one that looks after it starts beside the ranks
        wait_for(tmp_path / f"logs/job.sh-{job}/guard-0.log")
    with cluster.without_slurmd(before[lost]):
        wait_for(tmp_path / "runs.1")
        after = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
        assert before[lost] not in after and len(after) == 2
        assert cluster.job(job)["Restarts"] == "1", (tmp_path / "job.out").read_text()


@pytest.mark.parametrize("job", [[LONG_STEP, "--time=1", "--signal=B:USR1@30", "--open-mode=append"]], indirect=True)
def test_a_job_whose_step_is_longer_than_the_warning_comes_back(cluster, job, tmp_path):
    wait_for(tmp_path / "runs.1")
    said = (tmp_path / "job.out").read_text()
    assert cluster.job(job)["Restarts"] == "1", said
    assert "longer than the warning, back to the queue" in said
