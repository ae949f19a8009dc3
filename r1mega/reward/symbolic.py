"""Symbolic comparison by math-verify and sympy: runs in worker processes only (`python -m r1mega.reward.worker`).

The limit is CPU time of this process, so that a busy machine changes no score: an answer that needs more is "not
shown equal" and scores 0. A worker that does not come back at all is killed by the pool and says nothing about the
answer.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

FLOAT_DIGITS = 12
_REPEAT_SECONDS = 0.25  # the signal comes again when a library swallowed the first one


class OverLimit(BaseException):
    """CPU limit reached. Not an Exception, so that the broad handlers of the libraries let it pass."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise OverLimit after so many CPU seconds of this process (ITIMER_PROF)."""

    def over(_signal: int, _frame: FrameType | None) -> None:
        raise OverLimit

    previous = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds, _REPEAT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def same_by_algebra(golds: Sequence[str], answer: str, cpu_seconds: float) -> dict[str, object]:
    """{"equal", "reason"} of an answer against every gold."""
    try:
        with cpu_limit(cpu_seconds):
            equal = any(_same(gold, answer) for gold in golds)
        return {
            "equal": equal,
            "reason": "equal by symbolic algebra" if equal else "not shown equal by symbolic algebra",
        }
    except OverLimit:
        return {"equal": False, "reason": f"not shown equal within {cpu_seconds:g} s of CPU time"}
    except (MemoryError, RecursionError) as error:
        return {"equal": False, "reason": f"not shown equal: {type(error).__name__}"}


def _same(gold: str, answer: str) -> bool:
    """Only the LaTeX grammar is used: math-verify's plain one evaluates text as Python."""
    from math_verify import LatexExtractionConfig, parse, verify

    readings = []
    for text in (gold, answer):
        text = text.strip().strip("$")
        readings.append(
            parse(
                f"\\boxed{{{text}}}",
                [LatexExtractionConfig(boxed_match_priority=0)],
                "no_fallback",
                parsing_timeout=None,
            )
        )
    if not all(readings):
        return False
    return bool(verify(readings[0], readings[1], float_rounding=FLOAT_DIGITS, strict=True, timeout_seconds=None))


def prepare() -> None:
    """Import and warm up the libraries (about a second) before the first limit runs."""
    _same("1", "2")
