"""The two ways to run answers behind one interface: this machine's sandbox, or a remote service (remote.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from r1mega.errors import RewardError
from r1mega.sandbox.launcher import Launcher
from r1mega.sandbox.policy import COMPILER_LIMITS, Language, Limits, Policy
from r1mega.sandbox.probe import ensure_safe
from r1mega.sandbox.session import Graded, grade
from r1mega.sandbox.verdict import Completed, Verdict

if TYPE_CHECKING:  # the sandbox itself needs the standard library alone, so any Python of the machine can run it
    from r1mega.config.rewards import SandboxConfig


class Backend(Protocol):
    """Both methods raise SandboxFailure when the backend, not the answer, is at fault."""

    def run_cases(self, language: Language, source: str, inputs: Sequence[str], limits: Limits) -> Iterator[Completed]:
        """Run the program afresh on each standard input, one at a time as they are asked for.

        A program that does not compile yields one Completed with `stopped` COMPILE_ERROR and ends there.
        """

    def grade(self, source: str, spec: Mapping[str, Any], limits: Limits, *, clock_per_call: bool) -> Graded:
        """Python only: load the source, run the tests of `spec` against it in another sandbox (session.grade)."""


def open_backend(config: SandboxConfig) -> Backend:
    """The service that the config names, else this machine's sandbox. Raises RewardError where there is neither."""
    if config.url is not None:
        from r1mega.sandbox.remote import RemoteBackend

        return RemoteBackend(config.url)
    python = None if config.python is None else str(config.python)
    libraries = tuple(str(directory.resolve()) for directory in config.libraries)
    return LocalBackend(Launcher(Policy(python, libraries, require_cgroup=config.require_cgroup)))


def limits_of(config: SandboxConfig) -> Limits:
    """What one program may use where its task says nothing else."""
    return Limits(
        wall_seconds=config.wall_seconds,
        cpu_seconds=config.cpu_seconds,
        memory_bytes=config.memory_bytes,
        output_bytes=config.output_bytes,
        num_processes=config.num_processes,
    )


class LocalBackend:
    """This machine's sandbox. The start-up probe runs first, once a process: SandboxBreached if anything got
    through."""

    def __init__(self, launcher: Launcher | None = None, probe: bool = True) -> None:
        self.launcher = launcher or Launcher()
        if probe:
            ensure_safe(self.launcher)

    def run_cases(self, language: Language, source: str, inputs: Sequence[str], limits: Limits) -> Iterator[Completed]:
        text = source.encode("utf-8", "surrogatepass")
        if language == "python":
            for stdin in inputs:
                yield self.launcher.run_python(text, limits, stdin.encode("utf-8", "replace"))
            return
        compiled = self.compile(text)
        if compiled.stopped is not None:
            yield compiled
            return
        limits = replace(limits, stack_bytes=limits.memory_bytes)
        for stdin in inputs:
            yield self.launcher.run(
                ["/box/answer"],
                limits,
                stdin=stdin.encode("utf-8", "replace"),
                files={"/box/answer": compiled.stdout},
                executable_files=True,
            )

    def compile(self, source: bytes) -> Completed:
        """C++ -> an executable as `stdout`; `stopped` is COMPILE_ERROR if there is none. The compiler is sandboxed too.

        Raises RewardError where g++ is not installed.
        """
        if self.launcher.tools.compiler is None:
            raise RewardError(
                "sandbox: g++ is not installed at /usr/bin/g++; install it (`apt-get install -y g++`) or drop C++ tasks"
            )
        build = "g++ -std=c++17 -O2 -w -x c++ /box/answer.cpp -o /tmp/answer >&2 && cat /tmp/answer"
        built = self.launcher.run(
            [self.launcher.tools.shell, "-c", build],
            COMPILER_LIMITS,
            files={"/box/answer.cpp": source},
            with_compiler=True,
        )
        return built if built.classify() is None else replace(built, stopped=Verdict.COMPILE_ERROR)

    def grade(self, source: str, spec: Mapping[str, Any], limits: Limits, *, clock_per_call: bool) -> Graded:
        return grade(self.launcher, source, spec, limits, clock_per_call=clock_per_call)
