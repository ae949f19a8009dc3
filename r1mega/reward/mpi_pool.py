"""The reward pool over the hosts of an MPI job: mpi4py.futures places the tasks, each of its workers keeps a
crash-tolerant `WorkerPool` of one process. A task that kills its process therefore never kills an MPI process, which
would end the job.

The workers are spawned (MPI_Comm_spawn), so the MPI runtime must allow that and decides on which hosts they run.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from r1mega.errors import RewardError
from r1mega.reward.pool import LATENCIES_KEPT, Outcome, PoolMetrics, Task, WorkerPool, percentile

if TYPE_CHECKING:
    from r1mega.config.rewards import RewardPool

logger = logging.getLogger(__name__)

_START_SECONDS = 120.0
_LOCAL_POOL: dict[tuple[int, int], WorkerPool] = {}
"""Of an MPI worker: its one pool, by memory and retries."""


def spans_hosts(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether mpirun started this process as part of a job on more than one host (Open MPI, or MPICH and its kin)."""
    for everywhere, here in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"), ("PMI_SIZE", "MPI_LOCALNRANKS")):
        if everywhere in environment and here in environment:
            return int(environment[everywhere]) > int(environment[here])
    return False


def run_task(task: Task, memory_bytes: int, max_retries: int) -> tuple[Outcome, dict[str, int]]:
    """Runs in an MPI worker: the outcome, and what it cost (retries, kills, crashes)."""
    pool = _LOCAL_POOL.get((memory_bytes, max_retries))
    if pool is None:
        pool = _LOCAL_POOL[memory_bytes, max_retries] = WorkerPool(1, memory_bytes, max_retries)
    before = pool.metrics()
    outcome = pool.submit(task).result()
    after = pool.metrics()
    return outcome, {name: getattr(after, name) - getattr(before, name) for name in ("retries", "kills", "crashes")}


class MPIPool:
    """What `WorkerPool` offers, on num_workers MPI processes. Raises RewardError without mpi4py or an MPI library,
    or when MPI cannot spawn."""

    def __init__(
        self, num_workers: int = 1, memory_bytes: int = 1 << 30, max_retries: int = 2, max_pending: int = 4096
    ) -> None:
        try:
            from mpi4py.futures import MPIPoolExecutor
        except (ImportError, RuntimeError) as error:
            raise RewardError(
                f"reward.pool.executor = mpi: {error}; install mpi4py and an MPI library, or set it to processes"
            ) from error
        self._limits = (memory_bytes, max_retries)
        self._executor = MPIPoolExecutor(num_workers, path=[p for p in sys.path if p], main=False)
        try:  # a runtime without a free slot, or without MPI_Comm_spawn, is found out now and not by every task
            self._executor.submit(abs, -1).result(_START_SECONDS)
        except Exception as error:  # whatever the runtime raises: it is no pool
            self._executor.shutdown(wait=False, cancel_futures=True)
            raise RewardError(
                f"reward.pool.executor = mpi: no worker could be spawned ({type(error).__name__}: {error}); leave MPI "
                "free slots, or set it to processes"
            ) from error
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(max_pending)
        self._closed = False
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._counts = dict.fromkeys(("submitted", "finished", "failed", "retries", "kills", "crashes"), 0)

    def submit(self, task: Task) -> Future[Outcome]:
        """Queue a task. Waits while max_pending tasks are unfinished (back-pressure)."""
        self._slots.acquire()
        with self._lock:
            closed = self._closed
            self._counts["submitted"] += not closed
        if closed:
            self._slots.release()
            raise RewardError("the reward pool is closed; submit before close()")
        result: Future[Outcome] = Future()
        start = time.monotonic()
        self._executor.submit(run_task, task, *self._limits).add_done_callback(lambda f: self._finish(f, result, start))
        return result

    def map(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Outcomes in the order of the tasks."""
        return [future.result() for future in [self.submit(task) for task in tasks]]

    def metrics(self) -> PoolMetrics:
        with self._lock:
            queued = self._counts["submitted"] - self._counts["finished"] - self._counts["failed"]
            p50, p99 = percentile(self._latencies, 0.5), percentile(self._latencies, 0.99)
            return PoolMetrics(**self._counts, queued=queued, p50_seconds=p50, p99_seconds=p99)

    def close(self) -> None:
        """Fail what has not begun, wait for the rest, end the workers."""
        with self._lock:
            self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> MPIPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self, future: Future[tuple[Outcome, dict[str, int]]], result: Future[Outcome], start: float) -> None:
        cost: dict[str, Any] = {}
        if future.cancelled():
            outcome = Outcome(failure="the reward pool was closed", attempts=0)
        elif (error := future.exception()) is not None:
            outcome = Outcome(failure=f"the MPI worker failed: {type(error).__name__}: {error}")
            logger.warning("reward task excluded: %s", outcome.failure)
        else:
            outcome, cost = future.result()
        with self._lock:
            self._counts["finished" if outcome.failure is None else "failed"] += 1
            for name, count in cost.items():
                self._counts[name] += count
            self._latencies.append(time.monotonic() - start)
        self._slots.release()
        result.set_result(outcome)


def open_pool(config: RewardPool) -> WorkerPool | MPIPool:
    """The pool that the config asks for; under `auto` over MPI where mpirun started a job on several hosts."""
    settings = (config.num_workers, config.memory_bytes, config.max_retries, config.max_pending)
    if config.executor == "mpi":
        return MPIPool(*settings)
    if config.executor == "auto" and spans_hosts():
        try:
            return MPIPool(*settings)
        except RewardError as error:
            logger.warning("rewards are computed by processes of this host: %s", error)
    return WorkerPool(*settings)
