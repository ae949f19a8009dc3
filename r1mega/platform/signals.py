"""SIGTERM and SIGUSR2: finish the step, save, exit 85, to be started again.

Slurm sends the signal to every task, maybe twice; torchrun and a person may send it to one rank only. The handler
sets a flag and nothing else, and ranks agree on it between steps, so that all of them save the same step.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
_logger = logging.getLogger(__name__)


class StopRequest:
    """A context manager that catches the signals while it is open.

    `with StopRequest() as stop:` and once a step, on every rank, `if stop.agreed(): save; exit EXIT_SAVED_FOR_REQUEUE`.
    Must be entered on the main thread (a rule of Python's signal module).
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._agreed = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._received = self._received or signal.Signals(number).name  # again: no change

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
