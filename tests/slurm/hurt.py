"""`python -m tests.slurm.hurt FILE ARGUMENTS...`: r1mega with these arguments, on a rank to which the faults in FILE happen.

FILE has a line for each fault: `KIND PHASE RANK`, KIND is KILL, STOP or FULL (its run directory's disk). They come one after the
other, of all starts together: each when that rank is somewhere inside of that phase, in the second step of a start or later, so that
a newer checkpoint is there. FILE.N is written before fault N: step, and seconds since 1970.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1mega.stages.runtime import Runtime

SECONDS_BETWEEN_LOOKS, CHANCE = 0.0005, 0.3
"""At each look inside of the phase the fault comes with that chance: in its midst, and yet in one of a millisecond."""


class Looking(threading.Thread):
    """Looks where the rank is, as its watchdog does, and hurts it there."""

    def __init__(self, file: Path):
        super().__init__(daemon=True)
        self._file, self._faults = file, [line.split() for line in file.read_text().splitlines()]
        self._first = 0

    def watch(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.start()

    def run(self) -> None:
        for number, (kind, phase, rank) in enumerate(self._faults):
            while not self._record(number).exists():
                time.sleep(SECONDS_BETWEEN_LOOKS)
                if int(rank) == self._runtime.rank and self._is_in(phase) and random.random() < CHANCE:
                    self._record(number).write_text(f"{self._runtime._place().step} {time.time()}")
                    self._hurt(kind)
                    if kind == "STOP":
                        return  # Slurm sends SIGCONT before its SIGTERM: the next is not for a process that is ending

    def _record(self, number: int) -> Path:
        return self._file.with_name(f"{self._file.name}.{number}")

    def _is_in(self, phase: str) -> bool:
        place = self._runtime._place()
        self._first = self._first or place.step * (place.phase == "rollout")  # the first step's own
        return 0 < self._first < place.step and place.phase == phase

    def _hurt(self, kind: str) -> None:
        if kind != "FULL":
            os.kill(os.getpid(), getattr(signal, f"SIG{kind}"))
            return
        with open(self._runtime.run_dir / "filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))


def hurt(file: Path) -> None:
    """From now on, the run of this process."""
    from r1mega import platform

    platform.prepare()  # before megatron is imported
    from r1mega.stages.runtime import Runtime

    looking, init = Looking(file), Runtime.__init__

    def started(runtime: Runtime, *arguments: object) -> None:
        init(runtime, *arguments)  # type: ignore[arg-type]
        looking.watch(runtime)

    Runtime.__init__ = started  # type: ignore[method-assign]


if __name__ == "__main__":  # a checkpoint's writer processes import this module again
    from r1mega.cli import main

    hurt(Path(sys.argv.pop(1)))
    main()
