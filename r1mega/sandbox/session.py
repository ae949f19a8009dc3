"""One answer graded by calls: two sandboxes, and this process carrying lines between them.

    grader --C request--> here --request--> answer
    grader <--reply------ here <--reply---- answer
    grader --V outcome (with our nonce)--> here

Lines between the two are carried unread. The grader never sees the source, the answer never sees a test or an expected
value.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from r1mega.sandbox.launcher import Child, Launcher, enforce, exchange
from r1mega.sandbox.policy import Limits
from r1mega.sandbox.process_tree import cpu_pressure_seconds
from r1mega.sandbox.verdict import Completed, SandboxFailure, Verdict

_INSIDE = Path(__file__).parent / "inside"
_POLL_SECONDS = 0.05
_START_SECONDS = 30.0  # for an interpreter to come up; more is the host's fault
_WRAP_UP_SECONDS = 5.0  # for the grader to report after the answer is gone


@dataclass(frozen=True, slots=True)
class Graded:
    """What the grader found. outcome: its report ({} when it could not give one).

    ended: verdict and message for an answer that did not last to the end of the tests, None if it did.
    call_seconds: wall time of each call, in order; peak_bytes: of the answer's sandbox.
    """

    outcome: Mapping[str, Any]
    ended: tuple[Verdict, str] | None
    call_seconds: tuple[float, ...]
    peak_bytes: int | None


@dataclass
class _State:
    """Where a session stands. turn: 'start', 'loading' (the answer's module), then 'grader' or 'answer'.

    nonce: of the grader's report and its requests' numbers, never shown to the answer, which repeats load_number once
    it has loaded. waiting: a question that the grader asked before the answer had loaded.
    """

    nonce: str
    load_number: str
    turn: str = "start"
    waiting: bytes | None = None
    lines: dict[int, bytearray] = field(default_factory=dict)
    ended: tuple[Verdict, str] | None = None
    outcome: dict[str, Any] | None = None
    call_seconds: list[float] = field(default_factory=list)
    printed_bytes: int = 0


def source_files(role: str) -> dict[str, bytes]:
    """The files of one side as they lie inside. role: 'answer' | 'grader'."""
    return {"/box/wire.py": (_INSIDE / "wire.py").read_bytes(), "/box/agent.py": (_INSIDE / f"{role}.py").read_bytes()}


def grade(launcher: Launcher, source: str, spec: Mapping[str, Any], limits: Limits, *, clock_per_call: bool) -> Graded:
    """Load `source` in one sandbox, run the tests of `spec` (see inside/grader.py) in another.

    clock_per_call: limits.wall_seconds is for each call; otherwise for loading and all calls together. Only the
    answer's own turns count; the tests have as much again, plus their start-up. Raises SandboxFailure when either
    sandbox fails for a reason that is not the answer's.
    """
    calls = len(spec.get("cases", ())) if clock_per_call else 1
    answer_limits = replace(limits, cpu_seconds=limits.cpu_seconds * max(1, calls))
    grader_limits = replace(answer_limits, memory_bytes=max(limits.memory_bytes, 512 << 20))
    python = [launcher.tools.python, "-s", "-S", "-B", "/box/agent.py"]
    state = _State(nonce=secrets.token_hex(16), load_number=secrets.token_hex(16))
    with (
        launcher.start(python, answer_limits, source_files("answer")) as answer,
        launcher.start(python, grader_limits, source_files("grader")) as grader,
    ):
        session = _Session(answer, grader, state, limits, clock_per_call)
        grader.feed(json.dumps({**spec, "nonce": state.nonce}).encode() + b"\n")
        libraries = launcher.policy.library_paths
        load = {"number": state.load_number, "do": "load", "source": source, "libraries": libraries}
        answer.feed(json.dumps(load).encode() + b"\n")
        session.run()
        answer.close()
    if answer.host_out_of_memory or grader.host_out_of_memory:
        raise SandboxFailure("the host ran out of memory and the kernel killed a program")
    if state.ended is None and answer.stopped is Verdict.MEMORY_LIMIT:
        state.ended = (Verdict.MEMORY_LIMIT, "a process of the answer was killed for its memory")
    return Graded(state.outcome or {}, state.ended, tuple(state.call_seconds), answer.peak_bytes)


class _Session:
    """The relay between two running sandboxes."""

    def __init__(self, answer: Child, grader: Child, state: _State, limits: Limits, clock_per_call: bool) -> None:
        self.answer, self.grader, self.state = answer, grader, state
        self.limits, self.clock_per_call = limits, clock_per_call
        self.turn_started, self.pressure = time.monotonic(), cpu_pressure_seconds()
        self.budget = {"start": _START_SECONDS, "answer": limits.wall_seconds}
        self.budget["grader"] = _START_SECONDS + limits.wall_seconds

    def run(self) -> None:
        """Until the grader has reported, or cannot any more."""
        state = self.state
        while state.outcome is None:
            for child, name, data in exchange([self.answer, self.grader], _POLL_SECONDS):
                if name == "stderr":
                    self._printed(child, data)
                elif data:
                    self._received(child, data)
                elif child is self.answer:
                    self._answer_gone()
                else:
                    return self._grader_gone()
                if state.outcome is not None:
                    return
            self._keep_time()

    def _keep_time(self) -> None:
        # The launcher's own clock starts with the namespaces; a session's starts with the answer, so it is kept here.
        now = time.monotonic()
        for child in (self.answer, self.grader):
            if child.wall_start is not None:
                child.wall_start = now
            enforce(child)
        if self.answer.stopped is not None and self.state.ended is None:
            self._end(self.answer.stopped, self.answer.stopped.value.replace("_", " "))
        of_answer, spent = self.state.turn in ("loading", "answer"), now - self.turn_started
        budget = self.budget["answer" if of_answer else self.state.turn]
        if spent < budget:
            return
        owner = self.grader if self.state.turn == "grader" else self.answer
        if spent - owner.starved_seconds(budget, self.pressure) < budget:
            return
        if self.state.turn == "start":
            raise SandboxFailure(
                f"the answer's interpreter did not come up within {_START_SECONDS:.0f} s with a CPU to be had"
            )
        if self.state.turn != "grader":
            return self._end(Verdict.TIME_LIMIT, f"over {self.limits.wall_seconds:g} s of wall time")
        if self.state.ended is None and not self.state.call_seconds:
            raise SandboxFailure("the tests ran out of time before they asked anything of the answer")
        if self.state.ended is None:
            self.state.ended = (Verdict.TIME_LIMIT, "the tests took too long with the values returned")
        self.state.outcome = {}

    def _give_turn(self, turn: str) -> None:
        """Stop the clock of whose turn it was, start that of the next."""
        now, state = time.monotonic(), self.state
        spent, self.turn_started, self.pressure = now - self.turn_started, now, cpu_pressure_seconds()
        if state.turn == "answer":
            state.call_seconds.append(spent)
        owner = "answer" if state.turn == "loading" else state.turn
        self.budget[owner] = self.limits.wall_seconds if self.clock_per_call else self.budget[owner] - spent
        state.turn = turn

    def _printed(self, child: Child, data: bytes) -> None:
        if child is self.answer:
            self.state.printed_bytes += len(data)
            if self.state.printed_bytes > self.limits.output_bytes:
                self._end(Verdict.OUTPUT_LIMIT, f"printed more than {self.limits.output_bytes} bytes")

    def _received(self, child: Child, data: bytes) -> None:
        buffer = self.state.lines.setdefault(id(child), bytearray())
        buffer += data
        if child is self.answer and self.state.ended is not None:
            return buffer.clear()
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            if child is self.answer:
                self._from_answer(line)
            else:
                self._from_grader(line)
        if child is self.answer and len(buffer) > self.limits.message_bytes:
            self._end(Verdict.OUTPUT_LIMIT, f"returned a value of more than {self.limits.message_bytes} bytes")

    def _from_answer(self, line: bytes) -> None:
        state = self.state
        if state.ended is not None:
            return
        if state.turn == "start":
            if line != b"hello":
                raise SandboxFailure(f"unexpected first line of the agent: {line[:100]!r}")
            self._give_turn("loading")
        elif state.turn == "loading":
            self._loaded(line)
        elif state.turn == "answer":
            self._give_turn("grader")
            self.grader.feed(line + b"\n")
        else:
            self._end(Verdict.TAMPERING, "sent a reply that nobody had asked for")

    def _loaded(self, line: bytes) -> None:
        try:
            if len(line) >= 1 << 16:
                raise ValueError("too long for ours")
            reply = json.loads(line)
            if reply["number"] != self.state.load_number:
                raise ValueError("not our number")
            result, message = str(reply["load"]), str(reply.get("message", ""))
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._end(Verdict.TAMPERING, "forged the message that it had loaded")
        if result == "ok":
            self._give_turn("grader")
            if (waiting := self.state.waiting) is not None:
                self._from_grader(waiting)
        else:
            known = result in (Verdict.COMPILE_ERROR, Verdict.EARLY_EXIT, Verdict.MEMORY_LIMIT)
            self._end(Verdict(result) if known else Verdict.RUNTIME_ERROR, message)

    def _from_grader(self, line: bytes) -> None:
        state = self.state
        if line[:1] == b"V":
            report = json.loads(line[1:])
            if report.pop("nonce", None) != state.nonce:
                raise SandboxFailure("the grader's report does not carry its nonce: a test wrote to its channel")
            state.outcome = report
        elif state.ended is not None:
            self.grader.feed(b"\n")
        elif state.turn in ("start", "loading"):
            state.waiting = line
        else:
            self._give_turn("answer")
            self.answer.feed(line[1:] + b"\n")

    def _end(self, verdict: Verdict, message: str) -> None:
        """The answer is done for; the grader learns it at its next question and reports what it has."""
        state = self.state
        if state.ended is not None:
            return
        state.ended = (verdict, message)
        self.answer.stop(verdict)
        if state.turn in ("start", "loading"):
            state.outcome = {}
        elif state.turn == "answer":
            self.grader.feed(b"\n")
        self._give_turn("grader")
        self.budget["grader"] = _WRAP_UP_SECONDS

    def _answer_gone(self) -> None:
        """The reply channel closed: the process ended, or closed it and goes on in silence."""
        if self.state.ended is not None:
            return
        self._await_end(self.answer)
        if not self.answer.finished:
            return self._end(Verdict.TAMPERING, "closed its reply channel and went on")
        self.answer.check_started()
        end = Completed(self.answer.exit_code, b"", bytes(self.answer.stderr_tail), 0.0, None, self.answer.stopped)
        verdict = end.classify() or Verdict.EARLY_EXIT
        if verdict in (Verdict.RUNTIME_ERROR, Verdict.COMPILE_ERROR):
            verdict = Verdict.EARLY_EXIT
        self._end(verdict, f"the process ended with status {self.answer.exit_code} before it had answered")

    def _grader_gone(self) -> None:
        """The grader broke: on what it had been given, or the machine is at fault."""
        self._await_end(self.grader)
        self.grader.stop(Verdict.TAMPERING)
        if not self.state.call_seconds and self.state.ended is None:
            tail = bytes(self.grader.stderr_tail[-300:]).decode("utf-8", "replace")
            raise SandboxFailure(f"the grader ended before its first question: {tail or 'no message'}")
        if self.state.ended is None:
            self.state.ended = (Verdict.MEMORY_LIMIT, "the tests broke on the values returned")
        self.state.outcome = {}

    def _await_end(self, child: Child) -> None:
        """A closed channel and the end of its process arrive in either order; a second is plenty between them."""
        patience = time.monotonic() + 1.0
        while not child.finished and time.monotonic() < patience:
            for sender, name, data in exchange([child], _POLL_SECONDS):
                if name == "stderr":
                    self._printed(sender, data)
