"""Several ranks of one command on this machine, by torchrun's agent.

What torchrun's own command line does not do: the exit code is that of the rank that failed first, SIGTERM and
SIGUSR2 reach the ranks as a request to save, however long that takes, and what cannot end by itself is killed: at a second
SIGTERM (SECONDS_APART from the first, as the ranks count), and soon after the watchdog of a rank has found that the job stands still.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from r1mega.errors import EXIT_STALLED
from r1mega.platform.signals import SECONDS_APART
from r1mega.platform.watchdog import LAUNCHER_VARIABLE

_TORCH_TELLS = "torch.distributed.elastic.multiprocessing.api"
"""The logger that says of every rank that it ended, and of the others that they are asked to: `run_ranks` does, in one line."""

SECONDS_TO_DIE = 10
"""After the watchdog has ended a rank, until the others are killed: one that stands still, or is stopped, does not hear SIGTERM. (Where
another fault has ended the first rank it is torch's 30 s: multiprocessing/api.py, PContext.close. Ranks that save meet at the save's end.)
"""


def run_ranks(arguments: Sequence[str], ranks: int, asked: threading.Event | None = None) -> int:
    """Run `python ARGUMENTS` so many times, with RANK and the rest set; the exit code (128 + n: ended by signal n). asked: set
    when this process was asked to stop.
    """
    logging.getLogger(_TORCH_TELLS).setLevel(logging.CRITICAL)
    job = uuid.uuid4().hex
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=job, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, signals_to_handle="SIGHUP,SIGQUIT",
    )  # fmt: skip
    with _saving_signals(job, asked or threading.Event()) as terminated:
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if terminated():
                return 128 + signal.SIGTERM
            if any(other.exitcode == EXIT_STALLED for other in error.failures.values()):
                print(
                    f"the watchdog ended the {ranks} ranks; its lines above name the one", file=sys.stderr, flush=True
                )
                return EXIT_STALLED
            code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
            how = f"exit code {code}" if code < 128 else signal.Signals(code - 128).name
            print(f"rank {rank} of {ranks} (pid {failure.pid}) ended first: {how}", file=sys.stderr, flush=True)
            return code
    return 0


@contextlib.contextmanager
def _saving_signals(job: str, asked: threading.Event) -> Iterator[Callable[[], bool]]:
    """What tells whether SIGTERM came twice, and the ranks were killed for it."""
    terminated, last = 0, -SECONDS_APART

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal terminated, last
        asked.set()
        if number == signal.SIGTERM and time.monotonic() - last >= SECONDS_APART:
            terminated, last = terminated + 1, time.monotonic()
        _send(job, signal.SIGUSR2 if terminated < 2 else signal.SIGKILL)

    def stalled(_number: int, _frame: FrameType | None) -> None:
        killer = threading.Timer(SECONDS_TO_DIE, _send, (job, signal.SIGKILL))
        killer.daemon = True
        killer.start()

    handlers = {signal.SIGTERM: pass_on, signal.SIGUSR2: pass_on, signal.SIGUSR1: stalled}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    try:
        yield lambda: terminated > 1
    finally:
        del os.environ[LAUNCHER_VARIABLE]
        for number, former in previous.items():
            signal.signal(number, former)


def _send(job: str, number: signal.Signals) -> None:
    for pid in _workers(job):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


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
