"""Reward for programs: they run in the sandbox, their tests and expected values elsewhere.

Not covered: a program is judged by the tests of its task alone; special-casing inputs that are known from the task's
text is a matter of better tests. Arguments are passed by value, so a test that looks at what a call did to its
arguments fails.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from typing import Any, TextIO

from r1mega.errors import DataError
from r1mega.reward.code_checker import check_output
from r1mega.reward.code_fences import code_in
from r1mega.reward.code_problem import AssertBlock, CallCase, CaseLimits, Problem, StreamCase, problem_from
from r1mega.reward.code_values import parse_json, shown
from r1mega.sandbox import Backend, Limits, LocalBackend, SandboxFailure, Verdict
from r1mega.sandbox.inside.wire import encode
from r1mega.sandbox.session import Graded
from r1mega.sandbox.verdict import CaseResult
from r1mega.types import Reward, RewardStatus

_TOLERANCE = 1e-6  # of floating-point results, absolute or relative, as judges have it
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_BRACKETS = re.compile(r"([\[\](){},;:]+)")
_MAX_NUMBER_CHARS = 4000
_NO_LIMITS = CaseLimits()
_ROOM_BYTES = 1 << 16  # beside twice the expected output: for what a wrong answer says, and stderr
_FRACTION_BYTES = 32  # more for each number with a point: an answer may print all its digits
_ROOM_OF_OTHERS = 16  # times that, where a checker may take another output


@dataclass(frozen=True, slots=True)
class CodeResult:
    """verdict: PASSED, or that of the first case that failed; fraction: share of cases (or assertions) passed, in [0,
    1]."""

    verdict: Verdict
    fraction: float
    reason: str
    cases: tuple[CaseResult, ...]


class CodeReward:
    """1 if every test passes, else 0; with partial credit the share of the tests passed.

    backend: None opens this machine's sandbox, which probes itself first. Raises SandboxUnavailable or SandboxBreached
    (both RewardError) where code cannot be run safely: there is no unsafe way to run it.
    """

    def __init__(
        self, backend: Backend | None = None, limits: Limits | None = None, partial_credit: bool = False
    ) -> None:
        self.backend = backend or LocalBackend()
        self.limits = limits or Limits()
        self.partial_credit = partial_credit

    def score(self, response: str, problem: Problem) -> Reward:
        """Reward of one response. A failure of the sandbox is tried once more, then status FAILED, never 0."""
        for last in (False, True):
            try:
                result = self.grade(response, problem)
            except SandboxFailure as failure:
                if last:
                    return Reward(None, {}, RewardStatus.FAILED, f"sandbox: {failure}")
            else:
                value = result.fraction if self.partial_credit else float(result.verdict is Verdict.PASSED)
                return Reward(value, {"accuracy": value}, RewardStatus.OK, f"{result.verdict}: {result.reason}")
        raise AssertionError("unreachable")

    def grade(self, response: str, problem: Problem) -> CodeResult:
        """Verdict and cases of one response. Raises SandboxFailure."""
        code = code_in(response, problem.language)
        if code is None:
            return CodeResult(Verdict.NO_CODE, 0.0, "the response holds no program", ())
        source = problem.program(code)
        if problem.assertions is not None:
            return self._assertions(source, problem, problem.assertions, self._limits(problem))
        cases: list[CaseResult] = []
        runs = self._calls(source, problem) if problem.call_cases else self._streams(source, problem)
        for case in runs:
            cases.append(case)
            if case.verdict is not Verdict.PASSED and not self.partial_credit:
                break
        return _summary(tuple(cases), len(problem.call_cases or problem.stream_cases))

    def _limits(self, problem: Problem, case: CaseLimits = _NO_LIMITS, expected: str = "") -> Limits:
        """Of a case: what it says itself, then its problem, then the reward. What it expects can always be said."""
        room = 2 * len(expected.encode("utf-8", "replace")) + _FRACTION_BYTES * expected.count(".") + _ROOM_BYTES
        room = _ROOM_OF_OTHERS * room if problem.checker else room
        limits = self.limits
        seconds, memory = case.time_limit or problem.time_limit, case.memory_bytes or problem.memory_bytes
        if seconds is not None:
            # The CPU's own limit comes after the case's: it only catches what the clock does not see.
            limits = replace(limits, wall_seconds=seconds, cpu_seconds=math.ceil(seconds) + 1)
        if memory is not None:
            limits = replace(limits, memory_bytes=memory)
        room, message = max(limits.output_bytes, room), max(limits.message_bytes, room)
        return replace(limits, output_bytes=room, message_bytes=message)

    def _streams(self, source: str, problem: Problem) -> Iterator[CaseResult]:
        def limits_of(case: StreamCase) -> Limits:
            return self._limits(problem, case.limits, case.stdout)

        for limits, group in groupby(problem.stream_cases, limits_of):
            cases = list(group)
            runs = self.backend.run_cases(problem.language, source, [case.stdin for case in cases], limits)
            for case, run in zip(cases, runs, strict=False):
                verdict = run.classify()
                reason = run.stderr[-300:].decode("utf-8", "replace").strip()
                if verdict is None:
                    actual = run.stdout.decode("utf-8", "replace")
                    verdict, reason = self._judge(problem, case, actual, limits)
                yield CaseResult(verdict, reason, run.wall_seconds, run.peak_bytes)
                if verdict is Verdict.COMPILE_ERROR:
                    return

    def _judge(self, problem: Problem, case: StreamCase, actual: str, limits: Limits) -> tuple[Verdict, str]:
        if problem.checker is not None:
            return check_output(self.backend, problem.checker, case, actual, limits)
        if same_output(actual, case.stdout):
            return Verdict.PASSED, ""
        return Verdict.WRONG_ANSWER, f"printed {actual[:100]!r}, expected {case.stdout[:100]!r}"

    def _calls(self, source: str, problem: Problem) -> Iterator[CaseResult]:
        """One session for all cases of the same limits; after one that ended the process, a new session for the rest."""
        spec = self._call_spec(problem, problem.call_cases)
        sized = [
            (form, self._limits(problem, case.limits, json.dumps(form["expected"])))
            for form, case in zip(spec["cases"], problem.call_cases, strict=True)
        ]
        for limits, group in groupby(sized, lambda entry: entry[1]):
            remaining = [form for form, _ in group]
            while remaining:
                graded = self.backend.grade(source, {**spec, "cases": remaining}, limits, clock_per_call=True)
                results = _case_results(graded)
                yield from results
                if not results or not graded.call_seconds:
                    return
                remaining = remaining[len(results) :]

    def _call_spec(self, problem: Problem, cases: Sequence[CallCase]) -> dict[str, Any]:
        """Values in the form of the wire, which has integers of any length, and keys that are none."""
        forms = [
            {name: encode(getattr(case, name), None) for name in ("arguments", "keywords", "expected", "wrapped")}
            for case in cases
        ]
        return {
            "cases": forms,
            "entry": problem.entry,
            "nodes": problem.nodes,
            "tolerance": _TOLERANCE,
            "stop_at_failure": not self.partial_credit,
        }

    def _assertions(self, source: str, problem: Problem, block: AssertBlock, limits: Limits) -> CodeResult:
        spec = {
            "context": block.context,
            "tests": block.tests,
            "entry": problem.entry,
            "stop_at_failure": not self.partial_credit,
        }
        graded = self.backend.grade(source, spec, limits, clock_per_call=False)
        outcome = graded.outcome
        passed, failed = outcome.get("num_passed", 0), outcome.get("num_failed", 0)
        verdict, reason = _assertion_verdict(graded)
        # Assertions that were not reached count as failed; one in a loop counts each time it ran.
        total = max(passed + failed, outcome.get("num_assertions", 0) if verdict is not Verdict.PASSED else 0, 1)
        fraction = 1.0 if verdict is Verdict.PASSED else passed / (total + (passed == total))
        case = CaseResult(verdict, reason, sum(graded.call_seconds), graded.peak_bytes)
        return CodeResult(verdict, fraction, reason or f"{passed} assertions", (case,))


def _assertion_verdict(graded: Graded) -> tuple[Verdict, str]:
    outcome = graded.outcome
    if outcome.get("ended") == "tampering":
        return Verdict.TAMPERING, outcome["message"]
    if graded.ended is not None:
        return graded.ended
    if str(outcome.get("message", "")).startswith("exit: "):
        return Verdict.EARLY_EXIT, outcome["message"].removeprefix("exit: ")
    if outcome.get("first") is not None:
        return _failure(outcome["first"])
    if outcome.get("ended") == "whole" and outcome.get("num_passed", 0) > 0:
        return Verdict.PASSED, ""
    return Verdict.WRONG_ANSWER, "no assertion was reached"


def _failure(first: Mapping[str, str]) -> tuple[Verdict, str]:
    """Verdict and reason of the first failure, as the grader noted it. A test that cannot be carried out is no
    verdict."""
    message, where = first["message"], first.get("where", "")
    if first["kind"] == "test":
        raise SandboxFailure(f"the tests cannot be carried out: {message}")
    if first["kind"] == "answer":
        return (Verdict.MEMORY_LIMIT if message.startswith("MemoryError") else Verdict.RUNTIME_ERROR), message
    return Verdict.WRONG_ANSWER, " ".join(filter(None, (message, f"at `{where}`" if where else "")))


def _case_results(graded: Graded) -> list[CaseResult]:
    seconds = iter(graded.call_seconds)
    results = []
    for first in graded.outcome.get("results", ()):
        verdict, reason = (Verdict.PASSED, "") if first is None else _failure(first)
        results.append(CaseResult(verdict, reason, next(seconds, 0.0), graded.peak_bytes))
    if graded.outcome.get("ended") != "whole":
        ended = graded.ended or _assertion_verdict(graded)
        if graded.outcome.get("ended") == "tampering":
            ended = (Verdict.TAMPERING, graded.outcome["message"])
        results.append(CaseResult(*ended, next(seconds, 0.0), graded.peak_bytes))
    elif graded.ended is not None:
        # Killed for memory by a child process after it had answered everything: the last case pays.
        results[-1] = CaseResult(*graded.ended, results[-1].wall_seconds, graded.peak_bytes)
    return results


def _summary(cases: tuple[CaseResult, ...], num_cases: int) -> CodeResult:
    passed = sum(case.verdict is Verdict.PASSED for case in cases)
    for index, case in enumerate(cases):
        if case.verdict is not Verdict.PASSED:
            return CodeResult(
                case.verdict, passed / num_cases, f"case {index + 1} of {num_cases}: {case.reason}", cases
            )
    return CodeResult(Verdict.PASSED, 1.0, f"{passed} of {num_cases} cases", cases)


def same_output(actual: str, expected: str) -> bool:
    """Equal line by line up to white space at their ends and blank lines at both ends of the whole; else token by token,
    numbers with a point or an exponent within 1e-6."""
    actual_lines = [line.split() for line in actual.strip().splitlines()]
    expected_lines = [line.split() for line in expected.strip().splitlines()]
    if len(actual_lines) != len(expected_lines):
        return False
    return all(
        len(a) == len(e) and all(map(_same_token, a, e)) for a, e in zip(actual_lines, expected_lines, strict=True)
    )


def _same_token(actual: str, expected: str) -> bool:
    """Equal, or numbers apart equal (`[0.5,` and `[0.50,`)."""
    if actual == expected:
        return True
    parts, wanted = _BRACKETS.split(actual), _BRACKETS.split(expected)
    return len(parts) == len(wanted) and all(map(_same_number, parts, wanted))


def _same_number(actual: str, expected: str) -> bool:
    """Two integers are the same digits (`011` is a text of its own); a number beside an integer is its value, up to an
    absolute 1e-6 (10**15 + 2 is not 10**15); two with a point or an exponent are near, absolutely or relatively."""
    if actual == expected:
        return True
    if max(len(actual), len(expected)) > _MAX_NUMBER_CHARS or not (
        _NUMBER.fullmatch(actual) and _NUMBER.fullmatch(expected)
    ):
        return False
    integers = [token.removeprefix("+") for token in (actual, expected) if _INTEGER.fullmatch(token)]
    if len(integers) == 2:
        return integers[0] == integers[1] or {*integers} == {"-0", "0"}
    if integers:
        return abs(Fraction(actual) - Fraction(expected)) <= _TOLERANCE
    a, e = float(actual), float(expected)
    return math.isfinite(a) and math.isclose(a, e, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


# --- command line ---------------------------------------------------------------------------------------------------


def read_items(lines: Iterable[str], name: str) -> Iterator[tuple[str, Problem]]:
    """{"prediction": text, tests as in code_problem} lines. Raises DataError naming file:line."""
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix("\ufeff") if number == 1 else line
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            line.encode()  # what was no UTF-8 is half a surrogate pair here
            record = parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{where}: not JSON ({error}); expected one object with 'prediction' and tests a line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with 'prediction' and tests, found {type(record).__name__}")
        if not isinstance(record.get("prediction"), str):
            raise DataError(f"{where}: 'prediction' must be a text, found {shown(record.get('prediction'))}")
        yield record["prediction"], problem_from(record, where)


def score_stream(
    source: Iterable[str],
    sink: TextIO,
    name: str = "<stdin>",
    *,
    reward: CodeReward | None = None,
    num_workers: int = 1,
) -> int:
    """`r1mega reward code`: items in, {"value", "status", "reason"} lines out in order. Returns the number of items.

    The whole input is read and checked first, so that a malformed line ends the command before anything is run.
    """
    items = list(read_items(source, name))
    reward = reward or CodeReward()
    with ThreadPoolExecutor(num_workers) as pool:
        for scored in pool.map(lambda item: reward.score(*item), items):
            line = {"value": scored.value, "status": scored.status.value, "reason": scored.reason}
            text = json.dumps(line, ensure_ascii=False)
            sink.write(text.encode("utf-8", "replace").decode() + "\n")  # an answer can say half a surrogate pair
    return len(items)
