"""What a run came to, by name. A verdict about the answer is a score; a failure of the sandbox never is one."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from r1mega.errors import RewardError


class SandboxUnavailable(RewardError):
    """This machine cannot isolate an answer: a tool or kernel feature is missing (the message says which and what to
    do)."""


class SandboxBreached(RewardError):
    """The start-up probe got through to the host, or a limit did not hold: no answer is run on this machine."""


class SandboxFailure(Exception):
    """One run failed for a reason that is not the answer's (spawn failed, host out of memory). Worth a retry; never
    scored."""


class Verdict(enum.StrEnum):
    """Named by cause. Only PASSED scores; all others are the answer's own failure and score 0 (or the passed share)."""

    PASSED = "passed"
    NO_CODE = "no_code"  # the response holds no program
    COMPILE_ERROR = "compile_error"
    WRONG_ANSWER = "wrong_answer"
    RUNTIME_ERROR = "runtime_error"  # an exception, or an exit status other than 0
    CRASHED = "crashed"  # ended by a signal: segmentation fault, abort
    EARLY_EXIT = "early_exit"  # the process ended before it had answered
    TIME_LIMIT = "time_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    TAMPERING = "tampering"  # messages that the answer had no business to send


@dataclass(frozen=True, slots=True)
class Completed:
    """One program run to its end inside the sandbox.

    exit_code: of the program (128 + n: signal n); stdout, stderr: capped bytes; wall_seconds: from a standing sandbox
    to its end; peak_bytes: of the memory cgroup (None where there is none). stopped: the limit for which it was killed,
    None if it ended by itself.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    wall_seconds: float
    peak_bytes: int | None
    stopped: Verdict | None

    def classify(self) -> Verdict | None:
        """Verdict for a run that did not end well; None if it ended with status 0 within its limits."""
        if self.stopped is not None:
            return self.stopped
        if self.exit_code == 0:
            return None
        tail = self.stderr[-2000:]
        if b"MemoryError" in tail or b"std::bad_alloc" in tail:
            return Verdict.MEMORY_LIMIT
        if self.exit_code == EXIT_NOT_COMPILED:
            return Verdict.COMPILE_ERROR
        if self.exit_code in _CPU_LIMIT_EXITS:
            return Verdict.TIME_LIMIT
        return Verdict.CRASHED if self.exit_code > 128 else Verdict.RUNTIME_ERROR


EXIT_NOT_COMPILED = 117
"""Exit status of the runner inside the sandbox when the source does not compile."""

_CPU_LIMIT_EXITS = (128 + 24,)  # SIGXCPU; the hard limit's SIGKILL comes a second later if it is ignored


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One test case (or one whole assert block): its verdict, what a person should read, and what it cost."""

    verdict: Verdict
    reason: str
    wall_seconds: float = 0.0
    peak_bytes: int | None = None
