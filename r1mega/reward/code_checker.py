"""Outputs where several are right: the task's own checker says, as Codeforces' of open-r1 do.

The checker is a Python program that is started with three paths (input, an output that is right, the answer's output) and
prints 1 for a right one. It belongs to the data set and is trusted; it runs in the sandbox all the same, since what it
reads is the answer's. A checker that evaluates what it reads believes the answer.
"""

from __future__ import annotations

import json
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


def check_output(backend: Backend, checker: str, case: StreamCase, actual: str, limits: Limits) -> tuple[Verdict, str]:
    """Verdict of the checker and its last words. Raises SandboxFailure for one that does not compile."""
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
    if ended is Verdict.COMPILE_ERROR or (ended is not None and b"SyntaxError" in done.stderr[-300:]):
        raise SandboxFailure(f"the checker does not compile: {said}")
    if ended is None and said in ("1", "1.0"):
        return Verdict.PASSED, ""
    return Verdict.WRONG_ANSWER, f"the checker said {said!r}" if ended is None else f"the checker: {ended}: {said}"
