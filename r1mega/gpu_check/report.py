"""The table for a person and the JSON for everyone else. Plain text where rich is not installed."""

from __future__ import annotations

import json
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r1mega.gpu_check.runner import Result, Status

_STYLES: dict[Status, str] = {"passed": "green", "slow": "yellow", "failed": "red", "skipped": "dim", "not run": "dim"}


def summary(results: Sequence[Result]) -> str:
    """'9 passed, 1 slow, 0 failed, 4 skipped, 0 not run': only the first two prove anything."""
    counts = Counter(result.status for result in results)
    return ", ".join(f"{counts[status]} {status}" for status in _STYLES)


def line(result: Result) -> str:
    """One line, as the step ends."""
    return f"{result.status:>8}  {result.name}  {result.seconds:.0f} s  {result.reason[:160]}".rstrip()


def print_table(results: Sequence[Result]) -> None:
    """Step, status, seconds, and what it proved, or why not."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain_table(results))
        return
    table = Table(title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("what it proves, or why not", overflow="fold")
    for result in results:
        style = _STYLES[result.status]
        table.add_row(result.name, Text(result.status, style), f"{result.seconds:.0f}", Text(_told(result)))
    Console(soft_wrap=False).print(table)


def plain_table(results: Sequence[Result], width: int = 100) -> str:
    """The same without rich."""
    indent = " " * 34
    rows = []
    for result in results:
        head = f"{result.name:<16}{result.status:<10}{result.seconds:>5.0f} s  "
        rows.append(textwrap.fill(head + _told(result), width, subsequent_indent=indent))
    return "\n".join(rows)


def _told(result: Result) -> str:
    return "; ".join(filter(None, [result.reason or result.proves, *result.notes]))


@dataclass(slots=True)
class Record:
    """The results so far, in a JSON file that is written after every step: a machine that goes away takes none along.

    about: of the whole run. `steps` has what each step found; figures are in the units of their names.
    """

    path: Path
    about: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    finished: bool = False
    begun: float = field(default_factory=time.monotonic)

    def add(self, result: Result) -> None:
        """A step has ended: say so, and keep it."""
        self.results.append(result)
        print(line(result), flush=True)
        self.write()

    def write(self) -> float:
        """Returns the seconds since the start."""
        seconds = round(time.monotonic() - self.begun, 1)
        counts = Counter(result.status for result in self.results)
        record = self.about | {
            "seconds": seconds, "finished": self.finished, "summary": {status: counts[status] for status in _STYLES},
            "steps": [asdict(result) for result in self.results],
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.tmp")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(self.path)
        return seconds
