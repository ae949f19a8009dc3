"""What `r1mega plan --sbatch` writes: a script that bash and the launch scripts take, with the plan's figures."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1mega.cli import app
from r1mega.errors import ConfigError
from r1mega.plan.calibrate import Calibration
from r1mega.plan.command import Job, plan_job
from r1mega.plan.gpu import Efficiency
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

    def with_step(seconds: float, **more: Calibration) -> str:
        """A save of 2e12 bytes a node: 2,000 s."""
        one = dataclasses.replace(planned.seconds, phases={"update": seconds})
        memory = dataclasses.replace(planned.memory, checkpoint_bytes=4e12)
        return submission(job, dataclasses.replace(planned, seconds=one, memory=memory, **more))

    found = directives(with_step(5000))
    assert found["signal"] == "B:USR1@10500" and seconds(found["time"]) == 24 * 3600
    assert "is wanted" not in with_step(5000)
    run = Calibration(Path("run"), 3, Efficiency(), {}, save_bandwidth=4e9)  # four times what is assumed
    assert directives(with_step(5000, calibration=run))["signal"] == "B:USR1@8250"
    assert "a save at 500 s by what was measured" in with_step(5000, calibration=run)
    found = directives(with_step(50000))  # a day is too short for one step and its warning
    assert found["signal"] == "B:USR1@65535" and 65535 + 50000 < seconds(found["time"]) < 65535 + 2 * 50000
    assert "78,000 s is wanted and Slurm's longest is 65,535 s" in with_step(50000)


def test_what_trains_nothing_has_no_planned_step(job, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    text = submission(job, dataclasses.replace(plan_job(job), seconds=None))
    assert "a step is not planned," in text and seconds(directives(text)["time"]) == 24 * 3600


def test_gpus_that_are_no_whole_number_of_machines_are_refused(job):
    with pytest.raises(ConfigError, match="12 GPUs are no whole number of machines of 8"):
        submission(dataclasses.replace(job, gpus=12), plan_job(job))
    assert "--nodes=1\n" in submission(dataclasses.replace(job, gpus=4), plan_job(job))


def test_it_is_written_only_where_the_stage_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = ["plan", CONFIG, "--gpus", "8", "--sbatch", str(tmp_path / "job.sh")]
    longer = ["microbatch_tokens=100000000", "data.max_tokens=100000000"]
    large = CliRunner().invoke(app, [*words, "--mean", "10000000", *longer])
    assert large.exit_code == 1 and not (tmp_path / "job.sh").exists()
    assert large.stdout.splitlines()[-1].endswith("not written: it does not fit")
    assert CliRunner().invoke(app, words).exit_code == 0 and (tmp_path / "job.sh").exists()
