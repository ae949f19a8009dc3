"""The table for a person and the JSON for everyone else. Plain text where rich is not installed."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1mega.gpu_check.runner import Result

_STYLES = {"passed": "green", "slow": "yellow", "failed": "red", "skipped": "dim", "not run": "dim"}


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


def write_json(path: Path, results: Sequence[Result], about: dict[str, Any]) -> None:
    """about: of the whole run. `steps` has what each step found; figures are in the units of their names."""
    counts = Counter(result.status for result in results)
    record = about | {
        "summary": {status: counts[status] for status in _STYLES}, "steps": [asdict(result) for result in results]
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
