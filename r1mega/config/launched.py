"""What the launcher's environment says of this process's place in the job: torchrun, mpirun, srun. Light."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_VARIABLES = {  # rank, rank on this machine, ranks, ranks on this machine
    "torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    # before Slurm: mpirun may start its daemons by srun, whose step then is the daemons'
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    # a step's own figures: it may have fewer tasks than its job
    "Slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """rank of `size` in the job, local_rank of `local_size` on this machine (None when the launcher does not tell)."""

    launcher: str
    rank: int
    local_rank: int
    size: int
    local_size: int | None


def launched_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """By the first launcher that set its variables; None without one.

    Slurm counts in a step that srun started only: the shell of a batch job or of an allocation has SLURM_PROCID too,
    and is one process.
    """
    for launcher, names in _VARIABLES.items():
        *given, local_size = (environment.get(name, "0" if name == "LOCAL_RANK" else None) for name in names)
        numbers = [number for number in given if number is not None]
        if len(numbers) < len(given) or (launcher == "Slurm" and not _in_step(environment)):
            continue
        rank, local_rank, size = map(int, numbers)
        here = None if local_size is None else _tasks_here(launcher, local_size, environment)
        return Place(launcher, rank, local_rank, size, here)
    return None


def _tasks_here(launcher: str, text: str, environment: Mapping[str, str]) -> int:
    return tasks_per_node(text)[int(environment.get("SLURM_NODEID", "0"))] if launcher == "Slurm" else int(text)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form: "4(x2),3" -> [4, 4, 3]. ValueError for anything else."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"not a list of tasks per node: {text!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: the shells of batch jobs and allocations are steps with numbers near 2**32."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < 2**31
