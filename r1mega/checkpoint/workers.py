"""The processes that work on one checkpoint together: of MPI, of torch.distributed, or one alone."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from r1mega.errors import CheckpointError, PlatformError, R1MegaError


class Workers(Protocol):
    """rank 0 .. size - 1. gather: every rank's value, on every rank, in rank order; a collective call."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]: ...


class Alone:
    """One process."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


class TorchWorkers:
    """The ranks of torch.distributed, over a gloo group of their own: a background thread may use it beside training.

    Making one is a collective call.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        from r1mega.platform.groups import timeout

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timeout("checkpoint"))

    def gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone


class MPIWorkers:
    """The ranks of an MPI communicator (mpi4py)."""

    def __init__(self, communicator: Any):
        self._communicator = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def gather(self, value: Any) -> list[Any]:
        return self._communicator.allgather(value)

    def abort(self) -> None:
        """End all ranks after an error that only this one knows of."""
        traceback.print_exc()
        sys.stderr.flush()
        self._communicator.Abort(1)


@contextlib.contextmanager
def workers_of_launcher() -> Iterator[Workers]:
    """The processes that torchrun, mpirun or srun started, found by their variables; this one alone without them.

    Raises PlatformError where mpi4py is needed and not there.
    """
    sizes = {name: int(os.environ.get(name, "1")) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        try:
            yield TorchWorkers()
        finally:
            dist.destroy_process_group()
    elif max(sizes.values()) > 1:
        try:
            from mpi4py import MPI
        except ImportError as error:
            launched = max(sizes, key=sizes.__getitem__)
            raise PlatformError(
                f"{launched} = {sizes[launched]} processes, but mpi4py cannot be loaded ({error}): install it for this "
                "MPI, or start the processes with torchrun"
            ) from error
        workers = MPIWorkers(MPI.COMM_WORLD)
        try:
            yield workers
        except R1MegaError:
            raise  # on every rank
        except Exception:  # of one rank: told with its traceback, and the others, who wait for it, are ended
            workers.abort()
    else:
        yield Alone()


def agree(workers: Workers, problems: Sequence[str], advice: str) -> None:
    """CheckpointError on every rank when any rank has problems: all of them, each once. A collective call."""
    everyone = workers.gather(list(problems))
    where: dict[str, list[int]] = {}
    for rank, theirs in enumerate(everyone):
        for problem in theirs:
            where.setdefault(problem, []).append(rank)
    if where:
        lines = [
            problem if len(ranks) == workers.size else f"{problem} (rank {', '.join(map(str, ranks))})"
            for problem, ranks in where.items()
        ]
        raise CheckpointError(
            "\n  ".join([f"{advice}: {len(lines)} problems", *lines] if len(lines) > 1 else [f"{lines[0]}; {advice}"])
        )


def together(workers: Workers, function: Callable[[], Any]) -> Any:
    """function() of each rank. Its R1MegaError on one becomes an error on all. A collective call."""
    result, error = None, None
    try:
        result = function()
    except R1MegaError as caught:
        error = caught
    everyone = workers.gather(error and str(error))
    if error is not None:
        raise error
    for rank, theirs in enumerate(everyone):
        if theirs is not None:
            raise CheckpointError(f"rank {rank}: {theirs}")
    return result


def on_first_rank(workers: Workers, function: Callable[[], Any], advice: str) -> Any:
    """function() of rank 0, on every rank. Its OSError, RuntimeError (which torch.save makes of a stream's OSError) or
    CheckpointError becomes a CheckpointError on every rank.
    """
    result, problems = None, []
    if workers.rank == 0:
        try:
            result = function()
        except (OSError, RuntimeError, CheckpointError) as error:
            problems = [str(error)]
    agree(workers, problems, advice)
    return workers.gather(result)[0]
