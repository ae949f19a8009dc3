"""A crash-tolerant pool of worker processes for what may hang, eat memory or die: symbolic algebra and the like.

A task is the name of a function and JSON arguments. Each worker process has one thread here that feeds it, waits at
most the task's limit, kills it when it overruns and starts a fresh one for the retry, so that no score depends on
what another item did to a worker. After the retries the outcome is a failure with a reason, never a value.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import wait  # unlike select.select, for descriptors above 1023 too
from typing import Any

from r1mega.errors import RewardError

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
"""A fresh interpreter and its first imports, at least; not counted against the first task's limit. See `WorkerPool.start_seconds`."""
LATENCIES_KEPT = 10_000
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Task:
    """function: "module:name". arguments: JSON values. seconds: wall-clock limit of one attempt."""

    function: str
    arguments: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """value is what the function returned; failure says why there is none (infrastructure: the item must be
    excluded).
    """

    value: Any = None
    failure: str | None = None
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class PoolMetrics:
    """Counts since the start; latencies (seconds, waiting included) of the last finished tasks."""

    submitted: int
    finished: int
    failed: int
    retries: int
    kills: int  # workers killed for overrunning
    crashes: int  # workers that died by themselves
    queued: int
    p50_seconds: float
    p99_seconds: float


class WorkerDiedError(RuntimeError):
    """The worker ended or overran; `killed` tells which."""

    def __init__(self, message: str, killed: bool) -> None:
        super().__init__(message)
        self.killed = killed


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which that share of the values lies; 0.0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


@dataclass(slots=True)
class _Job:
    task: Task
    future: Future[Outcome]
    submitted_at: float
    attempts: int = 0


class _Worker:
    """One process and the pipe to it. Used by a single thread, which must outlive it (the kernel ties the two)."""

    def __init__(self, memory_bytes: int) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "r1mega.reward.worker", str(memory_bytes), str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        except OSError as error:
            raise RewardError(f"a reward worker could not be started ({' '.join(command)}): {error}") from error
        assert self.process.stdin is not None and self.process.stdout is not None  # PIPE
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.buffer = b""
        self.warm: set[str] = set()
        self.started_seconds = 0.0  # the longest time that imports took

    def call(self, task: Task, start_seconds: float) -> dict[str, Any]:
        """The reply to one task. Raises WorkerDiedError; the worker is then of no further use."""
        if task.function not in self.warm:  # imports are awaited apart, so that a slow start costs the task nothing
            begin = time.monotonic()
            self._exchange(Task("r1mega.reward.worker:warm_up", (task.function,), start_seconds))
            self.started_seconds = max(self.started_seconds, time.monotonic() - begin)
            self.warm.add(task.function)
        return self._exchange(task)

    def _exchange(self, task: Task) -> dict[str, Any]:
        request = json.dumps({"function": task.function, "arguments": task.arguments}).encode() + b"\n"
        deadline = time.monotonic() + task.seconds
        try:
            self.requests.write(request)
            self.requests.flush()
        except OSError as error:
            raise WorkerDiedError(f"died before the task ({self._status()})", killed=False) from error
        while b"\n" not in self.buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not wait([self.replies.fileno()], remaining):
                raise WorkerDiedError(f"gave no answer within {task.seconds:g} s", killed=True)
            received = os.read(self.replies.fileno(), _READ_BYTES)
            if not received:
                raise WorkerDiedError(f"died ({self._status()})", killed=False)
            self.buffer += received
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def _status(self) -> str:
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "pipe closed"
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # bytes that the dead worker never read
            self.requests.close()
        self.replies.close()


class WorkerPool:
    """`submit` returns a future of an Outcome; results come back in whatever order the caller asks for them."""

    def __init__(
        self, num_workers: int = 1, memory_bytes: int = 1 << 30, max_retries: int = 2, max_pending: int = 4096
    ) -> None:
        self._memory_bytes, self._max_retries, self._num_workers = memory_bytes, max_retries, num_workers
        self._jobs: deque[_Job] = deque()
        self._condition = threading.Condition()
        self._slots = threading.BoundedSemaphore(max_pending)
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._longest_start = 0.0
        self._closed = False
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._counts = dict.fromkeys(("submitted", "finished", "failed", "retries", "kills", "crashes"), 0)

    def start_seconds(self, attempt: int) -> float:
        """That a worker may take to come up for this attempt (1: the first) at a task: three times the longest start so far, at
        least `START_SECONDS`, and twice as long at each attempt. A machine that is slow is not one that hangs.
        """
        return max(START_SECONDS, 3 * self._longest_start) * 2 ** (attempt - 1)

    def submit(self, task: Task) -> Future[Outcome]:
        """Queue a task. Waits while max_pending tasks are unfinished (back-pressure). Workers start on demand."""
        self._slots.acquire()
        future: Future[Outcome] = Future()
        with self._condition:
            if self._closed:
                self._slots.release()
                raise RewardError("the reward pool is closed; submit before close()")
            self._counts["submitted"] += 1
            self._jobs.append(_Job(task, future, time.monotonic()))
            if self._idle < len(self._jobs) and len(self._threads) < self._num_workers:
                thread = threading.Thread(target=self._feed, name=f"reward-worker-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._condition.notify()
        return future

    def map(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Outcomes in the order of the tasks."""
        return [future.result() for future in [self.submit(task) for task in tasks]]

    def metrics(self) -> PoolMetrics:
        with self._condition:
            p50, p99 = percentile(self._latencies, 0.5), percentile(self._latencies, 0.99)
            return PoolMetrics(**self._counts, queued=len(self._jobs), p50_seconds=p50, p99_seconds=p99)

    def close(self) -> None:
        """Fail what is still queued, kill the workers, join the threads."""
        with self._condition:
            self._closed = True
            abandoned, self._jobs = list(self._jobs), deque()
            self._condition.notify_all()
        for job in abandoned:
            self._finish(job, Outcome(failure="the reward pool was closed", attempts=job.attempts))
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> _Job | None:
        with self._condition:
            self._idle += 1
            while not self._jobs and not self._closed:
                self._condition.wait()
            self._idle -= 1
            return self._jobs.popleft() if self._jobs else None

    def _feed(self) -> None:
        """Life of one worker's thread."""
        worker: _Worker | None = None
        try:
            while (job := self._next()) is not None:
                try:
                    worker = self._attempt(job, worker)
                except Exception as error:  # a fault of this pool itself must reach the one who waits, not hang it
                    worker = None
                    self._slots.release()
                    job.future.set_exception(error)
        finally:
            if worker is not None:
                worker.close()

    def _attempt(self, job: _Job, worker: _Worker | None) -> _Worker | None:
        """Try a job once; returns the worker if it can be used again."""
        job.attempts += 1
        try:
            worker = worker or _Worker(self._memory_bytes)
            reply = worker.call(job.task, self.start_seconds(job.attempts))
            reason, killed = reply.get("fatal"), False
        except WorkerDiedError as error:
            reason, killed = f"the worker {error}", error.killed
        except RewardError as error:
            reason, killed = str(error), False
        if worker is not None:
            self._longest_start = max(self._longest_start, worker.started_seconds)
        if reason is None:
            self._finish(job, Outcome(reply.get("value"), reply.get("error"), job.attempts))
            return worker
        if worker is not None:
            worker.close()
        self._again(job, reason, killed)
        return None

    def _again(self, job: _Job, reason: str, killed: bool) -> None:
        """Put a task back whose worker was lost, or give it up."""
        with self._condition:
            self._counts["kills" if killed else "crashes"] += 1
            if job.attempts <= self._max_retries and not self._closed:
                self._counts["retries"] += 1
                self._jobs.appendleft(job)
                self._condition.notify()
                return
        logger.warning("reward task %s excluded after %d attempts: %s", job.task.function, job.attempts, reason)
        self._finish(job, Outcome(failure=f"{reason} ({job.attempts} attempts)", attempts=job.attempts))

    def _finish(self, job: _Job, outcome: Outcome) -> None:
        with self._condition:
            self._counts["finished" if outcome.failure is None else "failed"] += 1
            self._latencies.append(time.monotonic() - job.submitted_at)
        self._slots.release()
        job.future.set_result(outcome)
