"""What a step hands back: figures, and comparisons with a limit (must hold) or a goal (should be reached)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Context:
    """device: 'cuda' or 'cpu'; work: a directory for files that later steps read; earlier: figures of the steps before,
    by the step's name; needs: abilities that the steps of this run need."""

    device: Literal["cuda", "cpu"]
    work: Path
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(slots=True)
class Findings:
    """Collected while a step runs, so that what was measured before a failure is kept; printed too, so that the log has
    it of a step that crashes or hangs.

    figures: plain values; failures: comparisons that do not hold (the step has failed); short: goals that were not
    reached (the step is slow); notes: for a person.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def figure(self, name: str, value: Any) -> None:
        self.figures[name] = rounded(value)
        print(f"{name}: {self.figures[name]}", flush=True)

    def at_most(self, name: str, value: float, limit: float) -> None:
        """NaN does not hold."""
        self.figure(name, value)
        if not value <= limit:
            self.failures.append(f"{name} is {rounded(value)}, more than {limit:g}")

    def holds(self, name: str, condition: bool, otherwise: str = "") -> None:
        self.figure(name, bool(condition))
        if not condition:
            self.failures.append(f"{name}: no{f' ({otherwise})' if otherwise else ''}")

    def goal(self, name: str, value: float, goal: float) -> None:
        self.figure(name, value)
        if not value >= goal:
            self.short.append(f"{name} is {rounded(value)}, the goal is {goal:g}")


def rounded(value: Any) -> Any:
    """Floats to four digits, so that a JSON file can be read; what JSON has no word for becomes a text."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)
