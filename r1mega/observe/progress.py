"""Progress of a stage on the terminal: a bar with live numbers, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LIVE = {
    "accuracy": "reward/accuracy",
    "length": "response/length_mean",
    "loss": "train/loss",
    "probe": "probe/skills",
}
"""Live numbers by label, and the metrics they come from."""


class StageProgress:
    """One bar for `total` steps, of which `done` were done before.

    Ranks other than 0 show nothing. Without a terminal: a line at the first step, then at most one every
    `interval_seconds`, and one at the last step.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        done: int = 0,
        *,
        rank: int = 0,
        interval_seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stage, self.total, self.done = stage, total, done
        self._enabled, self._interval, self._clock = rank == 0, interval_seconds, clock
        self._stream = sys.stdout if stream is None else stream
        self._first = done
        self._printed: float | None = None
        self._begun = self._last = clock()
        self._step_seconds = 0.0
        self._live: dict[str, float] = {}
        self._bar: Progress | None = None

    def __enter__(self) -> StageProgress:
        self._begun = self._last = self._clock()
        if self._enabled and self._stream.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("[cyan]{task.fields[live]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                redirect_stdout=False,  # the generator logs from other file descriptors; rich must not swallow them
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self.done, live="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int, **live: float | None) -> None:
        """`step` steps are done. live: numbers to show by label (accuracy, length, loss ...); what is not given stays
        as it was shown.
        """
        now = self._clock()
        if step > self.done:
            self._step_seconds = (now - self._last) / (step - self.done)
        self.done, self._last = step, now
        self._live.update({label: value for label, value in live.items() if value is not None})
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, live=self._numbers())
        elif self._printed is None or now - self._printed >= self._interval or step >= self.total:
            self._printed = now
            self._line(f"{self.stage} {step}/{self.total}  {self._numbers()}  {self._remaining(now)}")

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`advance` with the live numbers found in a step's metrics."""
        self.advance(step, **{label: metrics.get(name) for label, name in LIVE.items()})

    def note(self, text: str) -> None:
        """A line of its own (above the bar)."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._line(text)

    def _numbers(self) -> str:
        digits = {label: 3 if abs(value) < 10 else 1 for label, value in self._live.items()}
        numbers = [f"{label} {value:.{digits[label]}f}" for label, value in self._live.items()]
        return "  ".join([*numbers, f"{self._step_seconds:.2f} s/step"])

    def _remaining(self, now: float) -> str:
        steps, elapsed = self.done - self._first, now - self._begun
        if steps < 1 or self.done >= self.total:
            return f"elapsed {_duration(elapsed)}"
        return f"elapsed {_duration(elapsed)}, left {_duration(elapsed / steps * (self.total - self.done))}"

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
