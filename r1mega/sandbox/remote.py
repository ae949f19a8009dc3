"""Answers run by a SandboxFusion service (https://github.com/bytedance/SandboxFusion, POST /run_code) instead of here.

The isolation is the service's; what is kept is the separation of answer and tests. The service runs one program per
request, so a session of n calls is repeated: the tests run until their first unanswered question, the answer's agent is
run on all questions so far, and so on (2n + 1 requests). Both sides are deterministic in what they ask (fixed hash
seed, ids that count).

Not covered: the service's own time-outs include its queue; memory of a case is not reported; a program whose value
changes from run to run is judged by the first value of each call.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx

from r1mega.errors import RewardError
from r1mega.sandbox.policy import COMPILER_LIMITS, Language, Limits
from r1mega.sandbox.session import Graded, source_files
from r1mega.sandbox.verdict import Completed, SandboxFailure, Verdict

_FIXED_HASH_SEED = """\
import os, sys
if os.environ.get("PYTHONHASHSEED") != "0":
    os.execve(sys.executable, [sys.executable] + sys.argv, dict(os.environ, PYTHONHASHSEED="0"))
"""
_MAX_CALLS = 200
_SLACK_SECONDS = 60.0  # of HTTP beyond what the service may take for the run


class RemoteBackend:
    """url: of the service, without the path. Raises RewardError if it does not answer when opened."""

    def __init__(self, url: str, client: httpx.Client | None = None) -> None:
        self.url = url.rstrip("/")
        self._client = client or httpx.Client(trust_env=False)
        try:
            run = self._run("python", "print(6 * 7)", "", Limits())
        except SandboxFailure as failure:
            raise RewardError(
                f"sandbox: no usable service at {self.url} ({failure}); start it or correct the URL"
            ) from failure
        if run.stdout.strip() != b"42":
            raise RewardError(f"sandbox: the service at {self.url} printed {run.stdout!r} for 6 * 7")

    def run_cases(self, language: Language, source: str, inputs: Sequence[str], limits: Limits) -> Iterator[Completed]:
        """See backend.Backend. The service compiles C++ anew for each case."""
        for stdin in inputs:
            run = self._run(language, source, stdin, limits)
            yield run
            if run.stopped is Verdict.COMPILE_ERROR:
                return

    def grade(self, source: str, spec: Mapping[str, Any], limits: Limits, *, clock_per_call: bool) -> Graded:
        """See session.grade. limits.wall_seconds is for the whole answer either way (all calls are one program)."""
        nonce = secrets.token_hex(16)
        calls = max(1, len(spec.get("cases", ()))) if clock_per_call else 1
        replay = _Replay(self, source, {**spec, "nonce": nonce}, limits, calls)
        for _ in range(_MAX_CALLS + 1):
            report = replay.ask()
            if report is None:
                replay.answer()
                continue
            if report.pop("nonce", None) != nonce:
                raise SandboxFailure("the grader's report does not carry its nonce: a test wrote to its output")
            return Graded(report, replay.ended, tuple(replay.seconds), None)
        raise SandboxFailure(f"more than {_MAX_CALLS} calls in one session: too many to repeat over the network")

    def _run(
        self,
        language: Language,
        source: str,
        stdin: str,
        limits: Limits,
        files: Mapping[str, bytes] | None = None,
        wall_seconds: float | None = None,
    ) -> Completed:
        wall_seconds = wall_seconds or limits.wall_seconds
        request = {
            "code": source,
            "language": language,
            "stdin": stdin,
            "run_timeout": wall_seconds,
            "compile_timeout": COMPILER_LIMITS.wall_seconds,
            "memory_limit_MB": limits.memory_bytes >> 20,
            "files": {name: base64.b64encode(contents).decode() for name, contents in (files or {}).items()},
        }
        timeout = wall_seconds + COMPILER_LIMITS.wall_seconds + _SLACK_SECONDS
        try:
            content = json.dumps(request).encode("ascii")
            response = self._client.post(
                f"{self.url}/run_code", content=content, headers={"Content-Type": "application/json"}, timeout=timeout
            )
            response.raise_for_status()
            return _completed(response.json(), limits)
        except (httpx.HTTPError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise SandboxFailure(f"{self.url}/run_code: {error!r}") from error


def _completed(reply: Mapping[str, Any], limits: Limits) -> Completed:
    """A RunCodeResponse as a Completed. Raises SandboxFailure for the service's own errors."""
    if reply["status"] == "SandboxError":
        raise SandboxFailure(f"the service failed: {str(reply.get('message'))[:300]}")
    compiled, run = reply.get("compile_result"), reply.get("run_result")
    if compiled is not None and (compiled["status"] != "Finished" or compiled["return_code"] != 0):
        return Completed(1, b"", _bytes(compiled["stderr"]), 0.0, None, Verdict.COMPILE_ERROR)
    if run is None:
        raise SandboxFailure("the service tells of no run")
    stdout, stderr = _bytes(run["stdout"]), _bytes(run["stderr"])
    stopped = None
    if run["status"] == "TimeLimitExceeded":
        stopped = Verdict.TIME_LIMIT
    elif run["status"] == "Error":
        raise SandboxFailure(f"the service could not run the program: {stderr[-300:]!r}")
    elif len(stdout) + len(stderr) > limits.output_bytes:
        stopped = Verdict.OUTPUT_LIMIT
    elif run["return_code"] != 0 and b"SyntaxError" in stderr[-500:] and b'File "answer.py"' not in stderr:
        stopped = Verdict.COMPILE_ERROR
    code = run["return_code"] if run["return_code"] is not None else -1
    code = 128 - code if code < 0 else code  # subprocess counts signals downwards, shells from 128 up
    return Completed(code, stdout, stderr, float(run["execution_time"] or 0.0), None, stopped)


def _bytes(text: str | None) -> bytes:
    return (text or "").encode("utf-8", "replace")


class _Replay:
    """One session, repeated from its start for each call. replies: what the tests have been told so far, in order."""

    def __init__(self, backend: RemoteBackend, source: str, spec: dict[str, Any], limits: Limits, calls: int) -> None:
        self.backend, self.spec, self.calls = backend, spec, calls
        self.limits = replace(limits, output_bytes=limits.message_bytes)
        self.load_number = secrets.token_hex(16)  # not the grader's nonce: the answer sees it
        load = {"number": self.load_number, "do": "load", "source": source, "libraries": []}
        self.load_line = json.dumps(load)
        self.requests: list[str] = []
        self.replies: list[str] = []
        self.seconds: list[float] = []
        self.ended: tuple[Verdict, str] | None = None

    def _program(self, role: str, lines: list[str], wall_seconds: float) -> Completed:
        files = {path.rsplit("/", 1)[1]: contents for path, contents in source_files(role).items()}
        code = _FIXED_HASH_SEED + files.pop("agent.py").decode("utf-8")
        stdin = "".join(line + "\n" for line in lines)
        return self.backend._run("python", code, stdin, self.limits, files, wall_seconds)

    def ask(self) -> dict[str, Any] | None:
        """Run the tests with the replies so far: their report, or None with one more request noted."""
        done = self._program("grader", [json.dumps(self.spec), *self.replies], self.limits.wall_seconds + 30.0)
        lines = done.stdout.decode("utf-8").splitlines()
        asked = [line[1:] for line in lines if line.startswith("C")]
        if asked[: len(self.requests)] != self.requests[: len(asked)]:
            raise SandboxFailure("the tests did not ask the same questions when they were repeated")
        if lines and lines[-1].startswith("V"):
            return json.loads(lines[-1][1:])
        if len(asked) != len(self.replies) + 1:
            if self.replies and (verdict := done.classify()) is not None:
                self.ended = self.ended or (verdict, "the tests broke on the values returned")
                return {"nonce": self.spec["nonce"]}
            raise SandboxFailure(f"the tests neither asked nor reported: {done.stderr[-300:]!r}")
        self.requests = asked
        return None

    def answer(self) -> None:
        """Run the answer on all requests so far and note the last reply, or that there will be none."""
        if self.ended is not None:
            return self.replies.append("")
        done = self._program("answer", [self.load_line, *self.requests], self.limits.wall_seconds * self.calls)
        lines = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
        self.seconds.append(done.wall_seconds)
        expected = len(self.requests) + 2  # hello, loaded, replies
        verdict = done.classify()
        if len(lines) > expected or (len(lines) > 1 and lines[0] != "hello"):
            self.ended = (Verdict.TAMPERING, "sent a reply that nobody had asked for")
        elif len(lines) >= 2 and (refusal := self._refusal(lines[1])) is not None:
            self.ended = refusal
        elif len(lines) < expected:
            if verdict in (None, Verdict.RUNTIME_ERROR, Verdict.COMPILE_ERROR):
                verdict = Verdict.EARLY_EXIT
            self.ended = (verdict, f"the process ended with status {done.exit_code} before it had answered")
        self.replies.append(lines[-1] if self.ended is None else "")

    def _refusal(self, line: str) -> tuple[Verdict, str] | None:
        """Why the answer did not load; None if it did."""
        try:
            reply = json.loads(line)
            result, genuine = reply["load"], reply["number"] == self.load_number
        except (ValueError, KeyError, TypeError, RecursionError):
            return Verdict.TAMPERING, "forged the message that it had loaded"
        if not genuine:
            return Verdict.TAMPERING, "forged the message that it had loaded"
        if result == "ok":
            return None
        known = result in (Verdict.COMPILE_ERROR, Verdict.EARLY_EXIT, Verdict.MEMORY_LIMIT)
        return (Verdict(result) if known else Verdict.RUNTIME_ERROR), str(reply.get("message", ""))
