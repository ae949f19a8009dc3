"""One way to see the job, whoever started it: torchrun's variables, also under srun and mpirun."""

from __future__ import annotations

import os
import subprocess

_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
_OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


def adopt_launcher_environment() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from Slurm's or Open MPI's, unless they are set.

    Under Slurm only inside a job step (srun), where SLURM_PROCID numbers the tasks. The master is the step's first
    host; its port follows from the job id, so that two jobs on one host do not meet.
    """
    if "RANK" in os.environ:
        return
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        os.environ |= {ours: os.environ[theirs] for ours, theirs in _SLURM.items()}
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
    elif "OMPI_COMM_WORLD_RANK" in os.environ:
        os.environ |= {ours: os.environ[theirs] for ours, theirs in _OPEN_MPI.items()}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # several hosts: set it in the job script
        os.environ.setdefault("MASTER_PORT", "29500")


def _first_host(node_list: str) -> str:
    """'node[03-05,9]' -> 'node03', by Slurm's own tool."""
    return subprocess.run(
        ["scontrol", "show", "hostnames", node_list], check=True, capture_output=True, text=True
    ).stdout.split()[0]
