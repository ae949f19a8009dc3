"""Where a process stands in its job, by the variables that launchers set."""

import pytest

from r1mega.config.launched import Place, launched_place, tasks_per_node

STEP = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
MPICH = {"PMI_RANK": "3", "MPI_LOCALRANKID": "0", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (TORCHRUN, Place("torchrun", 2, 0, 4, 2)),
        (STEP, Place("Slurm", 5, 1, 7, 3)),  # of the step, not of the job
        (OPEN_MPI, Place("Open MPI", 1, 1, 2, 2)),
        (MPICH, Place("MPICH", 3, 0, 4, 2)),
        ({**STEP, **OPEN_MPI}, Place("Open MPI", 1, 1, 2, 2)),  # mpirun that starts its daemons by srun
        ({**STEP, **TORCHRUN}, Place("torchrun", 2, 0, 4, 2)),  # torchrun in a step of one task a machine
        ({**STEP, "PMI_RANK": "5", "PMI_SIZE": "7"}, Place("Slurm", 5, 1, 7, 3)),  # srun --mpi=pmi2
        ({**STEP, "SLURM_STEP_ID": "4294967291"}, None),  # a batch script
        ({name: value for name, value in STEP.items() if "STEP" not in name}, None),  # and one of an older Slurm
    ],
)
def test_place(environment, place):
    assert launched_place(environment) == place


def test_tasks_per_node():
    assert tasks_per_node("4(x2),3,1(x3)") == [4, 4, 3, 1, 1, 1]
    with pytest.raises(ValueError, match="not a list of tasks"):
        tasks_per_node("4x2")
