"""Where a step's time and memory go: exclusive seconds and peak bytes by phase, and torch's profiler on demand."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from r1mega.observe.registry import PHASES

PROFILE_VARIABLE = "R1MEGA_PROFILE_STEP"
"""Environment variable: the number of the step to record with torch's profiler."""

OTHER, BETWEEN = "other", "between"
"""Memory has an owner at all times: a phase, the rest of a step, or what comes between steps."""


class PhaseTimer:
    """Seconds by phase within a step. Nested phases are exclusive: time counts for the innermost one only.

        timer.start_step()
        with timer.phase("rollout"): ...
        metrics = timer.finish_step()

    synchronize: called where a step or an outermost phase begins or ends (torch.cuda.synchronize on a GPU), so that work is
    counted where it was begun. Not at the bounds of nested phases: a device must not wait each time a response is scored.
    memory: by kind, what tells the peak bytes since it was last asked; asked at the same bounds.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] | None = None,
        memory: Mapping[str, Callable[[], int]] | None = None,
    ):
        self._clock, self._synchronize, self._memory = clock, synchronize, memory or {}
        self._stack: list[str] = []
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._begun: float | None = None
        self.part = self.turns = 0
        """Outermost phases entered in this step; phases entered and left since the beginning."""
        self._mark = 0.0

    def start_step(self) -> None:
        """Forget the last step and begin a new one."""
        if self._stack:
            raise RuntimeError(f"a step began inside phase {self._stack[-1]!r}")
        self._seconds = {}
        self.part = 0
        self._begun = self._mark = self._boundary(BETWEEN)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for `name` (again, when the step had it before)."""
        nested = bool(self._stack)
        self._settle(self._clock() if nested else self._boundary(BETWEEN if self._begun is None else OTHER))
        self._stack.append(name)
        self.part += not nested
        self.turns += 1
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._settle(self._clock() if nested else self._boundary(name))
            self._stack.pop()
            self.turns += 1

    @property
    def innermost(self) -> str | None:
        """The phase that is open; of the thread that times and of others."""
        stack = self._stack[-1:]
        return stack[0] if stack else None

    def seconds(self, name: str) -> float:
        """Seconds that `name` has so far in this step."""
        return self._seconds.get(name, 0.0)

    def finish_step(self) -> dict[str, float]:
        """`time/<phase>_seconds` of this step (the phases of an RL step always, others that occurred) and
        `time/step_seconds`, the wall time since `start_step`. Their difference is what no phase claims.
        """
        if self._begun is None or self._stack:
            raise RuntimeError("finish_step without start_step, or inside a phase")
        step = self._boundary(OTHER) - self._begun
        self._begun = None
        seconds = dict.fromkeys(PHASES, 0.0) | self._seconds
        return {f"time/{name}_seconds": value for name, value in seconds.items()} | {"time/step_seconds": step}

    def take_peaks(self) -> dict[str, int]:
        """`memory/<phase>_<kind>_peak_bytes` since this was last called, each with what is nested in it. Phase `other`: in
        steps, outside of phases; `between`: outside of steps (set-up, evaluations, checkpoints).
        """
        peaks, self._peaks = self._peaks, {}
        return peaks

    def _settle(self, now: float) -> None:
        """Give the time since the last boundary to the phase that is open."""
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now

    def _boundary(self, before: str) -> float:
        """The time now, when the device is done. before: the outermost phase that ends here."""
        if self._synchronize is not None:
            self._synchronize()
        for kind, peak in self._memory.items():
            name = f"memory/{before}_{kind}_peak_bytes"
            self._peaks[name] = max(self._peaks.get(name, 0), peak())
        return self._clock()


def rss_bytes() -> int:
    """Resident memory of this process, bytes (Linux: /proc/self/statm)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def profile_step(run_dir: Path, step: int, rank: int = 0) -> Iterator[None]:
    """Record the block with torch's profiler when R1MEGA_PROFILE_STEP names this step; else do nothing.

    Writes RUN_DIR/trace_step_<step>_rank_<rank>.json.gz, for chrome://tracing or Perfetto.
    """
    if os.environ.get(PROFILE_VARIABLE) != str(step):
        yield
        return
    from torch.profiler import profile

    with profile(record_shapes=True) as profiler:
        yield
    profiler.export_chrome_trace(str(Path(run_dir) / f"trace_step_{step}_rank_{rank}.json.gz"))
