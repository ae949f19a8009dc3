"""Outputs where several are right: the task's own checker says, as Codeforces' of open-r1 do.

The checker is a Python program that is started with three paths (input, an output that is right, the answer's output) and
prints 1 for a right one. It belongs to the data set and is trusted; it runs in the sandbox all the same, since what it
reads is the answer's. A checker that evaluates what it reads believes the answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

from r1mega.reward.code_problem import StreamCase
from r1mega.sandbox import Backend, Limits, SandboxFailure, Verdict

_PROGRAM = """
import json, sys
*texts, source = json.load(sys.stdin)
sys.argv = ["checker.py", "/tmp/input.txt", "/tmp/correct_output.txt", "/tmp/output.txt"]
for path, text in zip(sys.argv[1:], texts):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
exec(compile(source, "checker.py", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
"""
_SECONDS = 30.0
_POINTS = re.compile(r"[01](?:\.\d*)?|\.\d+")  # what it prints, from 0 to 1


def check_output(backend: Backend, checker: str, case: StreamCase, actual: str, limits: Limits) -> tuple[Verdict, str]:
    """Verdict of the checker and its last words. Raises SandboxFailure for one that fails on the expected output too."""
    ended, said = _run(backend, checker, case, actual, limits)
    if ended is None and _POINTS.fullmatch(said):
        return (Verdict.PASSED, "") if float(said) == 1 else (Verdict.WRONG_ANSWER, f"the checker said {said!r}")
    # An answer can make a good checker fail: whose fault it is, the expected output tells.
    ended_too, said_too = _run(backend, checker, case, case.stdout, limits)
    if ended_too is not None or not _POINTS.fullmatch(said_too):
        raise SandboxFailure(f"the checker fails on the expected output as well: {ended or 'no number'}: {said}")
    return Verdict.WRONG_ANSWER, f"the checker: {ended}: {said}"


def _run(backend: Backend, checker: str, case: StreamCase, actual: str, limits: Limits) -> tuple[Verdict | None, str]:
    """(None, what it printed last) or how it ended, and its last words."""
    given = json.dumps([case.stdin, case.stdout, actual, checker])
    room = limits.tmp_bytes + 2 * len(given)
    limits = replace(
        limits,
        wall_seconds=_SECONDS,
        cpu_seconds=int(_SECONDS),
        memory_bytes=max(limits.memory_bytes, 256 << 20) + 8 * len(given),
        tmp_bytes=room,
        file_bytes=room,
    )
    (done,) = backend.run_cases("python", _PROGRAM, [given], limits)
    ended = done.classify()
    said = (done.stdout if ended is None else done.stderr)[-300:].decode("utf-8", "replace").strip()
    return ended, said
