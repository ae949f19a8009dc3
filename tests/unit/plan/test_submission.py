"""What `r1mega plan --sbatch` writes: a script that bash and the launch scripts take, with the plan's figures."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest

from r1mega.plan.command import Job, plan_job
from r1mega.plan.submission import submission
from r1mega.plan.workload import Lengths

REPOSITORY = Path(__file__).parents[3]
CONFIG = "configs/nano/sft.yaml"


@pytest.fixture(scope="module")
def job():
    return Job(Path(CONFIG), ["seed=3", "run_dir=runs/a b"], 16, "h100-80", Lengths(80), 1.0, per_node=8)


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))


def seconds(duration: str) -> int:
    days, hours, minutes, rest = map(int, re.split("[-:]", duration))
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def test_it_runs_the_stage_as_the_launch_scripts_do(job, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    script = tmp_path / "job.sh"
    script.write_text(submission(job, plan_job(job)))
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "R1MEGA_"))}
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    ran = subprocess.run(
        ["bash", script, "steps=2"], cwd=REPOSITORY, env=outside | {"R1MEGA_PYTHON": "echo"}, capture_output=True, text=True
    )  # fmt: skip
    assert ran.stdout == f"-m r1mega train {CONFIG} seed=3 run_dir=runs/a b steps=2\n", ran.stderr
    found, shipped = directives(script.read_text()), directives((REPOSITORY / "launch/stage1.sh").read_text())
    assert set(shipped) <= set(found)
    same = ("ntasks-per-node", "gpus-per-node", "open-mode", "output")
    assert {key: found[key] for key in same} == {key: shipped[key] for key in same}
    assert (found["nodes"], found["mem"]) == ("2", "0") and "#SBATCH --requeue\n" in script.read_text()


def test_the_warning_is_longer_than_a_step_and_a_save(job, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    planned = plan_job(job)
    assert directives(submission(job, planned))["signal"] == "B:USR1@600"  # as the launch scripts ask for

    def with_step(seconds: float) -> dict[str, str]:
        """A save of 2e12 bytes a node: 2,000 s."""
        one = dataclasses.replace(planned.seconds, phases={"update": seconds})
        memory = dataclasses.replace(planned.memory, checkpoint_bytes=4e12)
        return directives(submission(job, dataclasses.replace(planned, seconds=one, memory=memory)))

    found = with_step(5000)
    assert found["signal"] == "B:USR1@10500" and 24 * 3600 <= seconds(found["time"]) <= 36 * 3600
    found = with_step(50000)
    assert found["signal"] == "B:USR1@65535" and seconds(found["time"]) >= 65535 + 50000
