"""Progress of a stage: on a terminal one line with live numbers and their course, elsewhere plain lines."""

from __future__ import annotations

import datetime
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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

QUIET = "R1MEGA_QUIET"
"""The variable that `--quiet` sets for this process and those that it starts."""

_LEVELS = "▁▂▃▄▅▆▇█"
_NUM_DRAWN, _WIDEST = 2, 16
_BAR, _BAR_COLUMNS = 20, 134
"""The bar's width, and from how wide a terminal on there is one."""

_REMAINING = "00:00:00"
"""The most that the time that is left takes of a line."""


def is_quiet() -> bool:
    """Whether only warnings, errors and the last line are wanted."""
    return os.environ.get(QUIET) == "1"


def tell(text: str) -> None:
    """A line for the person at the terminal, unless nothing but warnings and errors is wanted."""
    if not is_quiet():
        print(text, flush=True)


def sparkline(values: Sequence[float], width: int, highest: float | None = None) -> str:
    """The course of `values` in at most `width` characters, each the mean of as many as fall to it.

    From 0 (nothing lower is told apart) to `highest`, by default the largest mean. What is not finite is left out.
    """
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    ends = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in zip(ends, ends[1:], strict=False)]
    top = highest or max(means, default=0.0)
    return "".join(_LEVELS[max(0, min(7, int(8 * value / top)))] if top > 0 else _LEVELS[0] for value in means)


class StageProgress:
    """One line for `total` steps, of which `done` were done before.

    Ranks other than 0, and all where `is_quiet`, show nothing. Without a terminal: a line at the first step, then at
    most one every `interval_seconds`, and one at the last step.
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
        self._enabled, self._interval, self._clock = rank == 0 and not is_quiet(), interval_seconds, clock
        self._stream = sys.stdout if stream is None else stream
        self._first = done
        self._printed: float | None = None
        self._begun = self._last = clock()
        self._step_seconds = 0.0
        self._live: dict[str, list[float]] = {}
        self._bar: Progress | None = None

    def __enter__(self) -> StageProgress:
        self._begun = self._last = self._clock()
        console = Console(file=self._stream)
        # the stream's word, not rich's alone: FORCE_COLOR makes no terminal of a file
        if self._enabled and self._stream.isatty() and console.is_terminal and not console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                *([BarColumn(_BAR)] if console.width >= _BAR_COLUMNS else []),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("[cyan]{task.fields[live]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=console,
                refresh_per_second=2,
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
        for label, value in live.items():
            if value is not None:
                self._live.setdefault(label, []).append(value)
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, live=self._drawn(self._bar.console))
        elif self._printed is None or now - self._printed >= self._interval or step >= self.total:
            self._printed = now
            numbers = "  ".join([*self._numbers(), self._seconds()])
            self._line(f"{self.stage} {step}/{self.total}  {numbers}  {self._remaining(now)}")

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

    def _numbers(self) -> list[str]:
        """Of the last step."""
        last = [(label, values[-1]) for label, values in self._live.items()]
        return [f"{label} {value:.{3 if abs(value) < 10 else 1}f}" for label, value in last]

    def _seconds(self) -> str:
        return f"{self._step_seconds:.2f} s/step"

    def _drawn(self, console: Console) -> str:
        """The numbers, the course of some and the seconds of a step, as far as the line has room: nothing is cut."""
        elapsed = str(datetime.timedelta(seconds=int(self._clock() - self._begun)))
        others = [self.stage, f"{self.total}/{self.total}", elapsed, "left", _REMAINING]
        room = console.width - sum(len(text) + 1 for text in others)
        if console.width >= _BAR_COLUMNS:
            room -= _BAR + 1
        numbers = self._numbers()
        while len("  ".join(numbers)) > room and numbers:
            numbers.pop()
        drawn = min(_NUM_DRAWN, len(numbers)) if console.encoding.startswith("utf") else 0
        if drawn:
            width = max(0, min(_WIDEST, (room - len("  ".join(numbers))) // drawn - 1))
            for place, (label, values) in enumerate(list(self._live.items())[:drawn]):
                course = sparkline(values, width, 1.0 if label == "accuracy" else None)
                numbers[place] = f"{numbers[place]} {course}".rstrip()
        whole = "  ".join([*numbers, self._seconds()])
        return whole if len(whole) <= room else "  ".join(numbers)

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
