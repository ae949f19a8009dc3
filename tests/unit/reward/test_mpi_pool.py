"""The pool over MPI: the same outcomes as the process pool's, killers included, in processes that mpiexec started."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.config.rewards import RewardPool
from r1mega.reward.mpi_pool import open_pool, spans_hosts
from r1mega.reward.pool import Task, WorkerPool

pytestmark = pytest.mark.heavy

FAULTS = Path(__file__).parents[2] / "faults"
KILLERS = {5: "segfault", 11: "endless_loop", 17: "memory_bomb"}
COUNT, MEMORY_BYTES = 24, 512 << 20
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


def tasks() -> list[Task]:
    return [
        Task(
            f"reward_killers:{KILLERS.get(index, 'square')}",
            () if index in KILLERS else (index,),
            3.0 if index in KILLERS else 30.0,
        )
        for index in range(COUNT)
    ]


def main() -> None:
    from r1mega.reward.mpi_pool import MPIPool

    config = RewardPool(executor="mpi", num_workers=2, max_retries=1, memory_bytes=MEMORY_BYTES)
    with open_pool(config) as pool:
        assert isinstance(pool, MPIPool)
        outcomes, metrics = pool.map(tasks()), pool.metrics()
    print(json.dumps([[dataclasses.asdict(o) for o in outcomes], dataclasses.asdict(metrics)]))


def mpi_is_here() -> bool:
    probe = subprocess.run([sys.executable, "-c", "import mpi4py.futures, mpi4py.MPI"], capture_output=True)
    return probe.returncode == 0 and MPIEXEC is not None


def test_outcomes_are_those_of_the_process_pool(monkeypatch):
    if not mpi_is_here():
        pytest.skip("mpi4py or an MPI library is missing: pip install mpi4py mpich")
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [MPIEXEC, "-n", "1", sys.executable, str(Path(__file__))],
        capture_output=True, text=True, timeout=200, cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(FAULTS), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes, metrics = json.loads(done.stdout.splitlines()[-1])
    monkeypatch.syspath_prepend(str(FAULTS))
    with WorkerPool(1, MEMORY_BYTES, max_retries=1) as pool:
        expected, expected_metrics = pool.map(tasks()), pool.metrics()
    for index, (over_mpi, here) in enumerate(zip(outcomes, expected, strict=True)):
        assert (over_mpi["value"], over_mpi["attempts"]) == (here.value, here.attempts)
        assert (over_mpi["failure"] is None) == (here.failure is None) == (index not in KILLERS)
    for name in ("submitted", "finished", "failed", "retries"):
        assert metrics[name] == getattr(expected_metrics, name), name
    # on a busy machine even a crash may take longer than its limit
    assert metrics["kills"] + metrics["crashes"] == 6 and metrics["kills"] >= 2
    assert metrics["retries"] == 3 and metrics["queued"] == 0


def test_among_a_thousand_open_files(many_descriptors):
    with WorkerPool(1) as pool:
        assert [outcome.value for outcome in pool.map([Task("math:sqrt", (4.0,), 60.0)])] == [2.0]


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
        ({"PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}, True),
        ({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, False),
        ({"SLURM_NNODES": "4", "WORLD_SIZE": "32"}, False),
    ],
)
def test_where_mpi_is_chosen(environment, several):
    assert spans_hosts(environment) is several


def test_one_host_keeps_the_process_pool():
    with open_pool(RewardPool()) as pool:
        assert isinstance(pool, WorkerPool)


if __name__ == "__main__":
    main()
