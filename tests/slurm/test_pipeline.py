"""`launch/pipeline.sh`: a job for each stage, in the order of what they read, with the same lineage as without Slurm."""

import json
import subprocess
import sys

import pytest

from tests.e2e.runs import PIPELINE, SMALL, metrics
from tests.processes import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_a_job_for_each_stage_that_is_not_finished(cluster, tmp_path):
    file = tmp_path / "r1.yaml"
    file.write_text(PIPELINE.replace("zero.yaml}", "zero.yaml, ranks: 2}") + "ranks_per_machine: 1\n")

    def submit():
        environment = cluster.environment | {
            "R1MEGA_HOME": str(REPOSITORY), "R1MEGA_PYTHON": sys.executable, "R1MEGA_LOGS": str(tmp_path / "logs"),
            "R1MEGA_INTERFACE": "lo", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/kernels", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "launch/pipeline.sh", file, f"dir={tmp_path}/runs", *SMALL, "zero.evaluate.data=null"],
            env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [line.split(": job ") for line in done.stdout.splitlines()]

    (first, base), (second, rest) = submit()
    zero, after = rest.split(", after ")
    assert (first, second, after) == ("base", "zero", base)
    job = cluster.job(zero)
    assert job["NumNodes"] in ("2", "2-2") and base in job["Dependency"]
    ends = {number: cluster.wait(number)["JobState"] for number in (base, zero)}
    logs = "\n".join(log.read_text()[-2000:] for log in tmp_path.glob("logs/**/*.*") if log.is_file())
    assert ends == {base: "COMPLETED", zero: "COMPLETED"}, logs
    assert [line["step"] for line in metrics(tmp_path / "runs" / "zero")] == [1, 2, 3]
    lineage = json.loads((tmp_path / "runs" / "zero" / "lineage.json").read_text())
    assert lineage["state"] == "finished" and lineage["inputs"]["model.path"]["owner"] == "base"
    assert lineage["environment"]["world_size"] == 2 and (tmp_path / "runs" / "report.html").exists()
    assert submit() == [], "nothing is left to do"
