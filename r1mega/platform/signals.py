"""SIGTERM and SIGUSR2: finish the step, save, exit 85, to be started again. A second SIGTERM ends at once.

Slurm sends the signal to every task, maybe twice; torchrun and a person may send it to one rank only. The handler
sets a flag and nothing else, and ranks agree on it between steps, so that all of them save the same step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
SECONDS_APART = 1.0
"""One request may send SIGTERM twice at once (Slurm: to the step and to its tasks)."""
_logger = logging.getLogger(__name__)
_open_requests = 0


class StopRequest:
    """A context manager that catches the signals while it is open.

    `with StopRequest() as stop:` and once a step, on every rank, `if stop.agreed(): save; exit EXIT_SAVED_FOR_REQUEUE`.
    Must be entered on the main thread (a rule of Python's signal module).

    A second SIGTERM ends the process with exit code 143, without saving, also where the main thread hangs in a collective and runs no
    handler: the kernel's side of the handler writes to a socket that a thread reads. Once the ranks have agreed to save it
    takes one more, for launchers send one themselves to the ranks that are not done when the first is.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._agreed = False
        self._previous: dict[signal.Signals, Any] = {}
        self._outcome: tuple[int, str] | None = None
        self._ends = False

    def __enter__(self) -> StopRequest:
        global _open_requests
        _open_requests += 1
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs, self._previous_wakeup = theirs, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._count, args=(self._ours,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _open_requests
        # the system's own handlers stay
        self._ends = self._outcome is not None and all(map(callable, self._previous.values()))
        for number, handler in self._previous.items():
            signal.signal(number, self._end if self._ends else handler)
        self._previous.clear()
        if self._ends:  # and the thread goes on, for where the main one hangs
            return
        _open_requests -= 1
        signal.set_wakeup_fd(self._previous_wakeup)
        self._theirs.close()  # the thread ends

    def decide(self, code: int, text: str = "") -> None:
        """How the process ends is known: where a handler was set before this request was opened (to say that nothing has begun, and
        that it wants to be started again), these signals end it with that exit code from the request's close on, at once, as what still
        closes then may wait for a peer that is dead, in a library, where no handler runs. text: told then on standard error.
        """
        self._outcome = code, text

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        code, text = self._outcome or (128 + signal.SIGTERM, "")
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(code)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._received = self._received or signal.Signals(number).name  # again: no change

    def _count(self, signals: socket.socket) -> None:
        received, last = 0, -SECONDS_APART
        with signals:
            while number := signals.recv(1):
                if self._ends and number[0] in SIGNALS:
                    time.sleep(SECONDS_APART)  # the handler's, or that of whoever has set another since
                    self._end(number[0], None)
                if number[0] != signal.SIGTERM or time.monotonic() - last < SECONDS_APART:
                    continue
                received, last = received + 1, time.monotonic()
                if received >= (3 if self._agreed else 2):
                    os.write(2, b"SIGTERM again: ending at once, without saving\n")
                    os._exit(128 + signal.SIGTERM)

    @property
    def requested(self) -> bool:
        """This rank has received a signal."""
        return self._received is not None

    def agreed(self) -> bool:
        """Any rank has received a signal. A collective call when there are several ranks; true stays true."""
        if self._agreed:
            return True
        anyone = self.requested
        if dist.is_initialized() and dist.get_world_size() > 1:
            from r1mega import platform

            flag = torch.tensor([float(anyone)], device=platform.current().device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            anyone = bool(flag.item())
        if anyone:
            _logger.warning("stop requested (%s): saving, then exit for requeue", self._received or "by another rank")
            self._agreed = True
        return self._agreed


def _after_fork() -> None:
    """What a fork is sent is none of its parent's business."""
    if _open_requests:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_after_fork)
