"""Several ranks of one command on this machine, by torchrun's agent.

What torchrun's own command line does not do: the exit code is that of the rank that failed first, and SIGTERM and
SIGUSR2 reach the ranks as a request to save, however long that takes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SECONDS_TO_SAVE = 600
"""After the first rank has ended, how long the others may take before they are killed."""


def run_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Run `python ARGUMENTS` so many times, with RANK and the rest set; the exit code (128 + n: ended by signal n)."""
    job = uuid.uuid4().hex
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=job, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, signals_to_handle="SIGHUP,SIGQUIT", shutdown_timeout=SECONDS_TO_SAVE,
    )  # fmt: skip
    with _saving_signals(job):
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
            how = f"exit code {code}" if code < 128 else signal.Signals(code - 128).name
            print(f"rank {rank} of {ranks} (pid {failure.pid}) ended first: {how}", file=sys.stderr, flush=True)
            return code
    return 0


@contextlib.contextmanager
def _saving_signals(job: str) -> Iterator[None]:
    def pass_on(number: int, _frame: Any) -> None:
        for pid in _workers(job):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _workers(job: str) -> list[int]:
    """Children of this process that carry the job's name: other children (resource trackers) do not know the signal."""
    tasks = Path("/proc/self/task").iterdir()
    children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return [pid for pid in children if f"TORCHELASTIC_RUN_ID={job}".encode() in _environment(pid)]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile
        return []
