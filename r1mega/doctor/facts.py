"""One row of what `r1mega doctor` prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fact:
    """One row. state: True is there, False is missing or would not work, None is neither (a number, a choice)."""

    name: str
    state: bool | None
    text: str
